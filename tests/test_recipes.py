"""Every shipped recipe is read, names itself, builds its adapter, and has the published number of parameters."""

from __future__ import annotations

from pathlib import Path

import pytest

from moa_peft.counting import count_parameters
from moa_peft.methods import METHODS
from moa_peft.training import load_recipe
from moa_peft.training.adapters import adapter_config
from studies.reference_models import BY_HUB_ID

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
SMALL = [path for path in RECIPES if path.parent.name == "small"]
ORIGINALS = [path for path in RECIPES if path.parent.name == "originals"]
PAPER = [path for path in RECIPES if path not in SMALL + ORIGINALS]

# The rows of the table of exact counts that a shipped recipe stands for.
COUNTS = {
    "math/soft_moa_llama31_8b": 24_520_288,
    "math/sparse_moa_llama31_8b": 22_289_120,
    "math/soft_moa_llama31_8b_hf": 22_158_016,
    "math/soft_moa_qwen3_8b_hf": 24_337_944,
    "math/sparse_moa_qwen3_8b_hf": 24_485_436,
    "math/soft_moa_qwen3_14b_hf": 34_292_080,
    "math/sparse_moa_qwen3_14b_hf": 34_496_920,
    "commonsense/soft_moa_llama31_8b": 18_089_696,
    "commonsense/sparse_moa_llama31_8b": 16_777_952,
}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT / "recipes").with_suffix(""))


def test_there_is_a_recipe_for_every_task_model_and_path() -> None:
    expected = {
        f"{task}/{method}_{model}{path}"
        for task in ("math", "commonsense", "code")
        for method in ("soft_moa", "sparse_moa")
        for model in ("llama31_8b", "qwen3_8b", "qwen3_14b")
        for path in ("", "_hf")
    }
    assert {name_of(path) for path in PAPER} == expected
    assert {path.stem for path in SMALL} == set(METHODS)
    assert {path.stem for path in ORIGINALS} == {"hydralora", "adamole", "mola", "mixlora", "dynmole", "ld_mole"}


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_recipe(path: Path, tmp_path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[0].split()[:4] == ["#", "moa", "train", str(path.relative_to(ROOT))]
    assert all(len(line) <= 119 for line in lines)
    recipe = load_recipe(path)
    assert recipe.options.output_dir == f"runs/{name_of(path)}"
    adapter_config(recipe)
    has_validation = recipe.data.validation_size > 0
    recipe.trainer["use_cpu"] = True
    arguments = recipe.training_arguments(checkpoints=tmp_path, has_validation=has_validation)
    batch = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    if path in PAPER:
        header = "\n".join(line for line in lines if line.startswith("#"))
        assert all(part in header for part in ("Paper row:", "Code path:", "Data:", "Deviations:"))
        is_hf = path.stem.endswith("_hf")
        assert batch == (16 if is_hf else 32)
        assert recipe.moa["router_input"] == ("normed" if is_hf else "residual")
        assert recipe.data.loss_on == ("all" if is_hf else "answer")
        assert arguments.learning_rate == (1e-4 if is_hf else 7.5e-4)
    elif path in ORIGINALS:
        header = "\n".join(line for line in lines if line.startswith("#"))
        assert all(part in header for part in ("Source: ", "Data: ", "Deviations:", METHODS[path.stem].source))
        assert recipe.options.method == path.stem and recipe.options.model in BY_HUB_ID
    else:
        assert recipe.options.method == path.stem
        assert batch == 8 and has_validation and arguments.load_best_model_at_end


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts(name: str) -> None:
    recipe = load_recipe(ROOT / "recipes" / f"{name}.yaml")
    assert count_parameters(BY_HUB_ID[recipe.options.model], adapter_config(recipe)).total == COUNTS[name]


@pytest.mark.parametrize(
    ("name", "total"),
    [
        # 4 experts of rank 4 on gate, up and down (19,200 in, 26,112 out): one A, 4 B, a router of 4 rows.
        ("hydralora", 32 * (4 * 19_200 + 16 * 26_112 + 4 * 19_200)),
        # 8 experts of rank 4 on four 4096 x 4096 layers, a router of 8 rows without bias, a threshold with one.
        ("adamole", 32 * 4 * (8 * 4 * 2 * 4096 + 8 * 4096 + 4096 + 1)),
        ("mola", 105_635_840),
        ("dynmole", 212_484_096),
    ],
)
def test_parameter_counts_of_the_original_settings(name: str, total: int) -> None:
    recipe = load_recipe(ROOT / "recipes" / "originals" / f"{name}.yaml")
    assert count_parameters(BY_HUB_ID[recipe.options.model], adapter_config(recipe)).total == total
