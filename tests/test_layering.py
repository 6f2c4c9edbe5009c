"""The direction of imports: each level may import itself and those below it (docs/design.md)."""

import ast
from pathlib import Path

import moa_peft

ROOT = Path(moa_peft.__file__).parent

LEVELS = [
    {
        "errors",
        "fields",
        "functional",
        "initialization",
        "entropy",
        "losses",
        "registry",
        "routing",
        "routers",
        "experts",
        "version",
    },
    {"architectures", "config", "methods", "peft_type", "model_card"},
    {
        "plan",
        "sites",
        "layer",
        "listeners",
        "obstacles",
        "auxiliary",
        "shared_networks",
        "token_mask",
        "training_callback",
        "adapter_names",
        "adapter_tensors",
        "loading",
        "quantized_base",
        "block",
        "call",
        "decoding",
        "fused_path",
        "glu",
        "mixture",
        "mlp",
        "packed",
        "products",
        "prompt_addition",
        "status",
        "swapped_class",
        "tuner",
        "registration",
        "prompt_attention",
        "pooling",
        "recording",
        "counting",
        "starting_weights",
        "meta_model",
        "saved_modules",
    },
    {
        "training",
        "data",
        "quickstart",
        "answers",
        "code_evaluation",
        "harness",
        "harness_results",
        "intervals",
        "study",
        "tasks",
        "environment",
        "evaluation",
        "generation",
        "files",
        "base_models",
        "adapter_files",
        "adapter_loading",
    },
    {"cli", "__main__", "child_processes"},
]
ALLOWED_IN_L0 = {"torch", "moa_peft"}


def level(module: str) -> int:
    for number, names in enumerate(LEVELS):
        if module in names:
            return number
    raise AssertionError(f"{module} is on no level: add it to LEVELS")


def imports(path: Path) -> set[str]:
    """Dotted names that a file imports from this package, and the top names of other packages."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            names = {f"{node.module}.{a.name}" for a in node.names} if node.module == "moa_peft" else {node.module}
            found |= names
    return found


def test_no_file_imports_a_level_above_its_own():
    files = [path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py"]
    assert len(files) > 30
    for path in files:
        own = path.relative_to(ROOT).parts[0].removesuffix(".py")
        for name in imports(path):
            parts = name.split(".")
            if parts[0] == "moa_peft" and len(parts) > 1 and parts[1] in MODULES:
                assert level(parts[1]) <= level(own), f"{path.relative_to(ROOT)} imports {name}"
            if level(own) == 0 and parts[0] not in ALLOWED_IN_L0:
                assert parts[0] in STANDARD, f"{path.relative_to(ROOT)} imports {name}; level 0 is torch only"


MODULES = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
STANDARD = {"abc", "collections", "dataclasses", "difflib", "math", "typing", "__future__"}


def test_files_stay_small():
    for path in ROOT.rglob("*.py"):
        lines = len(path.read_text().splitlines())
        assert lines <= 400, f"{path.relative_to(ROOT)} has {lines} lines"
        if path.parent.name in ("routers", "experts"):
            assert lines <= 200, f"{path.relative_to(ROOT)} has {lines} lines"
