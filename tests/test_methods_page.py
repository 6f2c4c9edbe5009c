"""docs/methods.md is what the methods and the benchmark files say."""

import json
from pathlib import Path

from moa_peft.methods import METHODS
from studies.methods_page import PAGE, measured, page, trained
from tests.test_counts import count_from_few_layers


def test_the_page_is_up_to_date() -> None:
    written = PAGE.read_text(encoding="utf-8")
    assert written == page(count_from_few_layers), "run: python -m studies.methods_page"


def test_every_method_has_a_row_and_a_section() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for name, method in METHODS.items():
        row = next(line for line in text.splitlines() if line.startswith(f"| [`{name}`]"))
        cells = [cell.strip() for cell in row.strip("|").split(" | ")]
        assert len(cells) == 7 and cells[1] == f"`{method.formula}`" and cells[4].split(", ") == list(method.knobs)
        assert f"\n### {name}\n" in text and f"(../recipes/small/{name}.yaml)" in text
    assert "METHODS" not in text


def _file(folder: Path, name: str, rows: list[dict[str, object]]) -> Path:
    settings = {"batch": 4, "tokens": 256, "dtype": "float32", "device": "cpu"}
    common = {"model": "qwen3 6x1024", "settings": settings, "baseline": "base", "ratio_q1": None, "ratio_q3": None}
    content = {
        "command": "python -m benchmarks training_step",
        "machine": {"cpu": "a processor", "cores": 2},
        "rows": [common | row for row in rows],
    }
    path = folder / name
    path.write_text(json.dumps(content))
    return path


def test_measured_ratios_are_inserted(tmp_path: Path) -> None:
    assert measured([]) == "Not measured yet.\n"
    steps = [
        {"method": "base", "metric": "step_seconds", "ratio": 1.0},
        {"method": "molora", "metric": "step_seconds", "ratio": 1.234, "ratio_q1": 1.2, "ratio_q3": 1.3},
        {"method": "molora", "metric": "step_seconds", "ratio": 9.0, "baseline": "lora"},
    ]
    saved = [{"method": "molora", "metric": "saved_bytes", "ratio": 0.951}]
    text = measured([_file(tmp_path, "step.json", steps), _file(tmp_path, "saved.json", saved)])
    assert "| molora | 1.23 (1.20 to 1.30) |" in text and "| base | 1.00 |" in text and "9.0" not in text
    assert "| method | bytes saved for backward |" in text and "| molora | 0.95 |" in text
    assert "a processor, 2 cores" in text and "(results/methods/step.json)" in text
    assert measured([_file(tmp_path, "other.json", [{"method": "base", "metric": "other", "ratio": 1.0}])]) == (
        "Not measured yet.\n"
    )


def test_short_runs_are_shown_and_missing_ones_named() -> None:
    run = {
        "method": "molora",
        "first_loss": 1.0,
        "last_loss": 0.51,
        "validation_loss": 0.6,
        "logged_losses": ["moa/z"],
    }
    settings = {"max_steps": 30, "per_device_train_batch_size": 2, "dtype": "bfloat16", "data.validation_size": 16}
    text = trained({"runs": [run], "settings": settings, "window": 8, "command": "python -m studies.method_runs"})
    assert "| molora | 1.000 | 0.510 | 0.600 | moa/z |" in text and "| soft_moa | not run |" in text
    assert "30 steps of 2 rows" in text and "first and the last 8 steps" in text
