"""The part of an adapter's model card that only the training run knows: data, settings, results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

START = "<!-- moa train: run -->"
END = "<!-- moa train: end -->"


def add_run_to_card(folder: Path, record: dict[str, Any]) -> None:
    """Write the run's section into README.md, replacing an earlier one; the rest of the card stays.

    Args:
        folder: the folder that `save_pretrained` wrote, with or without a README.md.
        record: the content of run.json.
    """
    file = folder / "README.md"
    card = file.read_text(encoding="utf-8") if file.is_file() else ""
    before, start, rest = card.partition(START)
    after = rest.partition(END)[2] if start else ""
    file.write_text(f"{before.rstrip()}\n\n{START}\n{_section(record)}\n{END}\n{after.lstrip()}", encoding="utf-8")


def _section(record: dict[str, Any]) -> str:
    recipe, results, data = record["recipe"], record["results"], record["data"]
    rows = [
        ("base model", recipe["model"]),
        ("method", recipe["method"]),
        ("trainable parameters", f"{record['parameters']['trainable']:,} of {record['parameters']['total']:,}"),
        ("training data", f"{_name(recipe['data']['path'])}, {data['train_rows']:,} rows"),
        ("validation data", f"{data['validation_rows']:,} rows split off the training data"),
        ("prompt template", recipe["data"]["template"]),
        ("steps", f"{results['steps']:,}"),
        ("seed", record["seeds"]["seed"]),
        ("training loss", _number(results["train_loss"])),
        ("validation loss", _number(results["validation_loss"])),
        ("versions", ", ".join(f"{name} {version}" for name, version in record["versions"].items())),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return f"## Training run\n\n| | |\n|---|---|\n{table}\n\n`recipe.yaml` beside this file repeats the run."


def _name(path: str) -> str:
    """A local path's last parts (a card is shared, the folders of its writer are not), a hub id as it is."""
    local = Path(path)
    return "/".join(local.parts[-2:]) if local.is_absolute() else path


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4f}"
