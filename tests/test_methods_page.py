"""docs/methods.md is what the methods and the benchmark files say."""

import json
from pathlib import Path

from moa_peft.methods import METHODS
from studies.methods_page import BELOW, PAGE, page, read_costs, trained
from tests.test_counts import count_from_few_layers

RESULTS = PAGE.parent / "results" / "methods"


def test_the_page_is_up_to_date() -> None:
    written = PAGE.read_text(encoding="utf-8")
    assert written == page(count_from_few_layers), "run: python -m studies.methods_page"


def test_every_method_has_a_row_and_a_section() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for name, method in METHODS.items():
        row = next(line for line in text.splitlines() if line.startswith(f"| [`{name}`]"))
        cells = [cell.strip() for cell in row.strip("|").split(" | ")]
        assert len(cells) == 9 and cells[1] == f"`{method.formula}`" and cells[4].split(", ") == list(method.knobs)
        assert f"\n### {name}\n" in text and f"(../recipes/small/{name}.yaml)" in text
    assert "METHODS" not in text


def test_every_method_has_its_measured_cost_in_the_same_row() -> None:
    text = PAGE.read_text(encoding="utf-8")
    rows = {}
    for name in ("step", "saved_bytes"):
        content = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        assert f"`{content['command']}`, [{name}.json](results/methods/{name}.json)" in text
        rows |= {(row["method"], row["metric"]): row for row in content["rows"] if row["baseline"] == "base"}
    for name in METHODS:
        (line,) = [line for line in text.splitlines() if line.startswith(f"| [`{name}`]")]
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        step, saved = rows[name, "step_seconds"], rows[name, "saved_bytes"]
        spread = f"({step['ratio_q1']:.2f} to {step['ratio_q3']:.2f})"
        measured = [f"{step['ratio']:.2f} {spread}", f"{saved['ratio']:.2f}"]
        assert cells[7:] == ([BELOW, BELOW] if name == "lora" else measured)
    # The preset's rank is another than the contender's, whose row says so.
    assert METHODS["lora"].knobs["rank"] != rows["lora", "saved_bytes"]["settings"]["rank"] == 8
    assert "| `lora_64_all` | PEFT LoRA of rank 64 on all seven linear layers of a block | 64 |" in text
    assert text.count("\n| method | what it makes of the model |") == 1


def _file(folder: Path, name: str, rows: list[dict[str, object]]) -> Path:
    settings = {"batch": 4, "tokens": 256, "dtype": "float32", "device": "cpu", "rank": 8}
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
    nothing = read_costs([])
    assert nothing.of("molora") == ["-", "-"] and not nothing.sources
    steps = [
        {"method": "base", "metric": "step_seconds", "ratio": 1.0},
        {"method": "molora", "metric": "step_seconds", "ratio": 1.234, "ratio_q1": 1.2, "ratio_q3": 1.3},
        {"method": "molora", "metric": "step_seconds", "ratio": 9.0, "baseline": "lora"},
    ]
    saved = [{"method": "molora", "metric": "saved_bytes", "ratio": 0.951}]
    other = [{"method": "hydralora", "metric": "other", "ratio": 1.0}]
    files = [("step.json", steps), ("saved.json", saved), ("other.json", other)]
    costs = read_costs([_file(tmp_path, name, rows) for name, rows in files])
    assert costs.of("molora") == ["1.23 (1.20 to 1.30)", "0.95"] and costs.of("base") == ["1.00", "-"]
    assert costs.names == ["base", "molora"] and costs.rank("molora") == "8" and costs.rank("base") == "-"
    assert [source.split(":")[0] for source in costs.sources] == ["- step time", "- saved bytes"]
    assert "4 x 256 tokens, float32, a processor, 2 cores" in costs.sources[0]
    assert "(results/methods/step.json)" in costs.sources[0]


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
