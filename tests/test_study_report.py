"""Files and pictures of a study, from made-up runs."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest

from moa_peft.errors import UserError
from moa_peft.study.accuracy_plot import plot_accuracy_over_parameters
from moa_peft.study.budgets import check_budgets
from moa_peft.study.difference_plot import plot_differences
from moa_peft.study.jobs import REPORT_FILES
from moa_peft.study.questions import Comparison, Question
from moa_peft.study.records import RunRecord
from moa_peft.study.report import write_report
from moa_peft.study.tables import study_tables
from tests.study_records import MISSING, QUESTION, ROWS, make_records


@pytest.fixture(scope="module")
def records():
    return make_records()


def report(folder, records, **changes):
    settings = {
        "study_name": "Mixtures on math",
        "question": QUESTION,
        "missing": MISSING,
        "folder": folder,
        "provenance": {"command": "moa compare study.yaml", "versions": {"moa-peft": "0"}},
        "introduction": "Does the prompt help?",
        "remarks": ["soft_moa: without\nthe prompt"],
        "budget_mismatches": check_budgets(records, matched={"soft_moa": "lora"}, tolerance=0.05),
    }
    settings |= changes
    tables = study_tables(records, settings["question"], missing=settings["missing"])
    paths = write_report(tables, records, **settings)
    assert {path.name for path in paths} <= set(REPORT_FILES)
    return paths


def test_the_report_is_complete_and_the_same_every_time(tmp_path, records):
    first = report(tmp_path / "new" / "first", records)
    assert sorted(path.name for path in first) == sorted(REPORT_FILES)
    assert sorted(path.name for path in (tmp_path / "new" / "first").iterdir()) == sorted(path.name for path in first)
    for one, two in zip(first, report(tmp_path / "second", records), strict=True):
        assert one.read_bytes() == two.read_bytes(), one.name
    files = {path.name: path for path in first}
    results = json.loads(files["results.json"].read_text())
    assert results["seeds"] == [1, 2, 3]
    assert results["command"] == "moa compare study.yaml"
    assert results["missing"][0] == {"row": "mixlora", "data": "MetaMath", "seed": 3, "reason": "out of memory"}
    assert len(results["runs"]) == len(records)
    scores = results["runs"][0]["scores"][0]
    assert scores.keys() == {"task", "measure", "items", "mean"}
    assert scores["mean"] == pytest.approx(np.mean(records[0].scores[0].values))
    assert results["tables"][0]["rows"][1]["verdict"] == "better"
    page = files["table.md"].read_text()
    assert "MetaMath: trainable parameters differ: 2,000,000 (soft_moa); 1,000,000 (lora)" in page
    assert "\n\nDoes the prompt help?\n\n- soft_moa: without the prompt\n\n" in page
    assert "## MetaMath: nll by question set" in page and "## MetaMath: nll, AddSub" not in page
    assert "## MetaMath: nll, AddSub" in files["details.md"].read_text()
    assert results["question"]["margin"] == 0.05
    assert results["budget_mismatches"][0]["quantity"] == "trainable parameters"
    assert "AddSub-7" not in files["results.json"].read_text()


def test_what_an_earlier_report_left_is_removed(tmp_path, records):
    report(tmp_path, records)
    (tmp_path / "records").mkdir()
    written = report(tmp_path, [run for run in records if run.row == "lora"], missing=())
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in written} | {"records"}
    assert not (tmp_path / "differences.png").exists()


def test_every_data_set_is_drawn_with_an_accuracy_of_its_own(tmp_path, records, monkeypatch):
    from matplotlib.figure import Figure

    kept = {}
    monkeypatch.setattr(Figure, "savefig", lambda f, file, **_: (kept.setdefault(file.name, f), file.write_bytes(b"")))
    others = [
        replace(run, scores=tuple(replace(s, measure=s.measure.removesuffix("_strict")) for s in run.scores))
        for run in make_records("Alpaca")
    ]
    paths = report(tmp_path, [*records, *others])
    assert tmp_path / "accuracy.png" in paths
    (figure,) = [figure for name, figure in kept.items() if name.startswith(".accuracy") and name.endswith(".png")]
    drawn = {panel.get_title(): panel.get_ylabel() for panel in figure.axes}
    assert drawn == {"MetaMath": "accuracy strict (%)", "Alpaca": "accuracy (%)"}


def test_a_study_without_accuracy_has_no_picture_of_it(tmp_path, records):
    plain = [
        RunRecord.from_dict(
            {**r.to_dict(), "scores": [s for s in r.to_dict()["scores"] if s["measure"] == "nll"]}, source="-"
        )
        for r in records
    ]
    names = {path.name for path in report(tmp_path, plain, missing=())}
    assert names == {name for name in REPORT_FILES if not name.startswith("accuracy")}


def test_a_missing_library_is_told_before_anything_is_written(tmp_path, records, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"pip install 'moa-peft\[plot\]'"):
        report(tmp_path / "folder", records)
    assert not (tmp_path / "folder").exists()


def test_a_picture_needs_an_average(tmp_path, records):
    only_transfer = [
        replace(run, scores=tuple(replace(s, task=f"{s.task} (transfer)") for s in run.scores)) for run in records
    ]
    with pytest.raises(UserError, match="on a question set that the average covers"):
        plot_accuracy_over_parameters(only_transfer, tmp_path / "a.png", measures={"MetaMath": "accuracy_strict"})
    names = {path.name for path in report(tmp_path / "report", only_transfer, missing=())}
    assert names == {"table.md", "details.md", "table.csv", "table.tex", "results.json"}


def drawn_labels(monkeypatch, records, path):
    """The boxes of the names in a drawn panel, and of its frame, in pixels."""
    from matplotlib.figure import Figure

    kept = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **_: (kept.append(figure), file.write_bytes(b"x")))
    plot_accuracy_over_parameters(records, path, measures={"MetaMath": "accuracy_strict"})
    (figure,) = kept
    (panel,) = figure.axes
    renderer = figure.canvas.get_renderer()
    return {text.get_text(): text.get_window_extent(renderer) for text in panel.texts}, panel


def test_names_in_the_picture_do_not_overlap(tmp_path, records, monkeypatch):
    crowd = [RunRecord.from_dict({**r.to_dict(), "row": f"{r.row}, again"}, source="-") for r in records]
    boxes, panel = drawn_labels(monkeypatch, [*records, *crowd], tmp_path / "a.png")
    assert len(boxes) == 2 * len(ROWS)
    frame = panel.get_window_extent()
    names = list(boxes)
    for index, name in enumerate(names):
        box = boxes[name]
        assert frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
        assert not any(box.overlaps(boxes[other]) for other in names[index + 1 :])


def test_differences_are_drawn_with_interval_and_margin(tmp_path, records, monkeypatch):
    from matplotlib.figure import Figure

    kept = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **_: (kept.append(figure), file.write_bytes(b"x")))
    asked = (
        Comparison(title="All", baseline="lora", rows=("soft_moa & prompt", "soft_moa", "mixlora")),
        Comparison(title="One", baseline="lora", rows=("soft_moa",)),
    )
    (tables,) = study_tables(records, replace(QUESTION, comparisons=asked))
    plot_differences(tables.comparisons, tmp_path / "a.svg", question=QUESTION)
    (figure,) = kept
    panel, same = figure.axes
    assert [panel.get_title(loc="left"), same.get_title(loc="left")] == ["MetaMath: All", "MetaMath: One"]
    compared = [row for row in tables.comparisons[0].rows if row["row"] != "lora"]
    assert [label.get_text() for label in panel.get_yticklabels()] == [row["row"] for row in compared]
    for row, bar in zip(compared, panel.containers, strict=True):
        (ends,) = bar.lines[2][0].get_segments()
        assert bar.lines[0].get_xdata()[0] == row["difference"]
        assert list(ends[:, 0]) == pytest.approx([row["low"], row["high"]])
    (band,) = panel.patches
    assert band.get_x() == -0.05 and band.get_width() == pytest.approx(0.1)
    assert {text.get_text() for text in figure.legends[0].get_texts()} == {row["verdict"] for row in compared}
    assert panel.get_xlabel() == "nll: row - lora (left is better; grey: the margin)"
    assert panel.get_xlim() == same.get_xlim()


def test_differences_of_an_accuracy_are_drawn_in_percent_without_a_margin(tmp_path, records, monkeypatch):
    from matplotlib.figure import Figure

    kept = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **_: (kept.append(figure), file.write_bytes(b"x")))
    question = Question(baseline="lora", primary="accuracy_strict")
    (tables,) = study_tables(records, question)
    plot_differences([tables.overview], tmp_path / "a.svg", question=question)
    (panel,) = kept[0].axes
    assert panel.get_xlabel() == "accuracy strict %: row - lora (right is better)" and not panel.patches
    assert panel.containers[0].lines[0].get_xdata()[0] == 100 * tables.overview.rows[1]["difference"]


def test_differences_of_nothing_are_not_drawn(tmp_path, records):
    alone = study_tables([run for run in records if run.row == "lora"], QUESTION)[0].overview
    with pytest.raises(UserError, match="no two rows can be compared"):
        plot_differences([alone], tmp_path / "a.png", question=QUESTION)


def test_rows_of_equal_parameters_are_drawn_side_by_side(tmp_path, records, monkeypatch):
    _, panel = drawn_labels(monkeypatch, records, tmp_path / "a.png")
    drawn = sorted(line.get_xdata()[0] for line in panel.lines if line.get_marker() in "os^D")
    assert drawn[0] == 1_000_000 and drawn[-1] == 40_000_000
    assert drawn[1] < 2_000_000 < drawn[2] and drawn[1] * drawn[2] == pytest.approx(2_000_000**2)
    assert "side by side" in panel.get_xlabel()


def test_a_row_without_parameters_is_a_line(tmp_path, records, monkeypatch):
    content = [{**record.to_dict(), "trainable_parameters": 0} for record in records if record.row == "soft_moa"]
    base = [RunRecord.from_dict({**fields, "row": "base"}, source="-") for fields in content]
    boxes, panel = drawn_labels(monkeypatch, [*records, *base], tmp_path / "a.png")
    assert len(boxes) == 5
    assert [line for line in panel.lines if line.get_linestyle() == "--"]


def test_a_picture_of_an_unknown_kind_or_measure_is_refused(tmp_path, records):
    with pytest.raises(UserError, match=r"written as \.png or \.svg"):
        plot_accuracy_over_parameters(records, tmp_path / "a.pdf", measures={"MetaMath": "accuracy_strict"})
    with pytest.raises(UserError, match="no run was scored by them"):
        plot_accuracy_over_parameters(records, tmp_path / "a.png", measures={"MetaMath": "accuracy"})
