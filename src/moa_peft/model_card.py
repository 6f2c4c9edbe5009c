"""The part of an adapter's model card (README.md) that only this package can write: how to load it, and what it is."""

from collections import defaultdict
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from safetensors import SafetensorError, safe_open

BEGIN = "<!-- moa-peft: mixture -->"
END = "<!-- moa-peft: end -->"
TITLE = "# Mixture-of-adapters model"
TEMPLATE_TITLE = "# Model Card for Model ID"
FRAMEWORK = "### Framework versions"


def update_model_card(folder: str | Path, config: Any) -> None:
    """Write the section into ``README.md``, or replace the one that is there.

    Args:
        folder: folder of the adapter.
        config: its `MoAConfig`.
    """
    path = Path(folder) / "README.md"
    card = ModelCard.load(path) if path.exists() else ModelCard.from_template(ModelCardData(library_name="peft"))
    before, _, rest = _without_empty_template(card.text).partition(BEGIN)
    after = rest.partition(END)[2] if rest else ""
    card.text = f"{before.rstrip()}\n\n{BEGIN}\n{_section(Path(folder), config)}\n{END}\n{after.lstrip()}".lstrip()
    card.save(path)


def _without_empty_template(text: str) -> str:
    """The card without the hub's empty form, which would bury what is known under what is not."""
    if TEMPLATE_TITLE not in text:
        return text
    _, framework, versions = text.partition(FRAMEWORK)
    return f"{TITLE}\n\n{framework}{versions}"


def _section(folder: Path, config: Any) -> str:
    base = config.base_model_name_or_path or "BASE_MODEL"
    counts = _counts(folder / "adapter_model.safetensors")
    lines = [
        "## Mixture of adapters",
        "",
        "This adapter needs `pip install moa-peft`; the import registers the method with PEFT:",
        "",
        "```python",
        "import moa_peft  # before loading",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
        f'base = AutoModelForCausalLM.from_pretrained("{base}")',
        'model = PeftModel.from_pretrained(base, "THIS_ADAPTER")',
        "```",
        "",
        "Other programs (lm-eval, trl, transformers serve) load it through `moa exec -- PROGRAM ...`.",
        "",
        "| expert | options |",
        "|---|---|",
        *(f"| {entry['type']} | {_options(entry)} |" for entry in config.experts),
        f"| router: {config.router['type']} | {_options(config.router)} |",
        "",
        f"Scope {config.scope}, granularity {config.granularity}, router input {config.router_input}.",
    ]
    if counts:
        lines += ["", "| part | parameters |", "|---|---|"]
        lines += [f"| {name} | {number:,} |" for name, number in counts.items()]
        lines += [f"| **total** | **{sum(counts.values()):,}** |"]
    return "\n".join(lines)


def _options(entry: dict[str, Any]) -> str:
    hidden = {"type", "optional"}
    shown = {key: value for key, value in entry.items() if key not in hidden and value is not None}
    if shown.get("routed") is True:
        del shown["routed"]
    return ", ".join(f"{key} {value}" for key, value in shown.items())


def _counts(path: Path) -> dict[str, int]:
    """Parameters per expert and of the router, from the names and shapes in the adapter's file."""
    if not path.exists():
        return {}
    counts: dict[str, int] = defaultdict(int)
    try:
        with safe_open(str(path), "pt") as file:
            for key in file.keys():  # noqa: SIM118
                number = 1
                for size in file.get_slice(key).get_shape():
                    number *= size
                _, _, rest = key.partition(".moa.")
                container, _, inner = rest.partition(".")
                name = {"moa_router": "router", "moa_shared": "router", "moa_experts": inner.partition(".")[0]}.get(
                    container, "other"
                )
                counts[name] += number
    except SafetensorError:
        # The card describes; whether the weights can be read is for whoever loads them to say.
        return {}
    return dict(counts)
