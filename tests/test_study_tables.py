"""Tables, pictures and files of a study, from made-up runs."""

import csv
import io
import json
import re
import sys

import numpy as np
import pytest
from rich.console import Console

from moa_peft.errors import UserError
from moa_peft.study.budgets import check_budgets
from moa_peft.study.plot import plot_accuracy_over_parameters
from moa_peft.study.records import ItemScores, MissingRun, RunRecord
from moa_peft.study.report import write_report
from moa_peft.study.statistics import holm, macro_average, paired_difference
from moa_peft.study.table_formats import Column, StudyTable, to_csv, to_latex, to_markdown, to_rich
from moa_peft.study.tables import Question, overview_tables, study_tables

TASKS = {"AddSub": 30, "SVAMP": 50, "MultiArith": 20, "MultiArith (twins)": 8, "MultiArith (rest)": 12}
AVERAGED = ("AddSub", "SVAMP", "MultiArith (rest)")
# row -> method, trainable parameters, change of nll against the first row
ROWS = {
    "lora": ("lora", 1_000_000, 0.0),
    "soft_moa & prompt": ("soft_moa", 2_000_000, -0.2),
    "soft_moa": ("soft_moa", 2_000_000, -0.001),
    "mixlora": ("mixlora", 40_000_000, 0.15),
}
QUESTION = Question(baseline="lora", primary="nll", lower_is_better=True, margin=0.05)
MISSING = (
    MissingRun(row="mixlora", data="MetaMath", seed=3, reason="out of memory"),
    MissingRun(row="hydralora", data="MetaMath", seed=1),
)


def make_records(data="MetaMath", *, seeds=(1, 2, 3)):
    generator = np.random.default_rng(8)
    base = {task: generator.gamma(2.0, 0.4, size=size) for task, size in TASKS.items()}
    records = []
    for row, (method, parameters, change) in ROWS.items():
        for seed in seeds:
            if (row, data, seed) == ("mixlora", "MetaMath", 3):
                continue
            scores = []
            for task, values in base.items():
                items = tuple(f"{task}-{index}" for index in range(len(values)))
                nll = values + change + 0.01 * generator.normal() + 0.02 * generator.normal(size=len(values))
                right = generator.random(len(values)) < np.exp(-nll)
                scores.append(ItemScores(task=task, measure="nll", items=items, values=tuple(map(float, nll))))
                scores.append(
                    ItemScores(task=task, measure="accuracy_strict", items=items, values=tuple(map(float, right)))
                )
            records.append(
                RunRecord(
                    row=row,
                    data=data,
                    seed=seed,
                    method=method,
                    learning_rate=3e-4,
                    steps=100,
                    tokens=50_000,
                    rows_seen=400,
                    trainable_parameters=parameters,
                    peak_memory_bytes=2**31 + seed,
                    step_seconds=0.5 + seed / 10 + parameters / 1e8,
                    validation_loss=None,
                    scores=tuple(scores),
                )
            )
    return records


@pytest.fixture(scope="module")
def records():
    return make_records()


@pytest.fixture(scope="module")
def tables(records):
    return study_tables(records, QUESTION, missing=MISSING)


def test_there_is_one_table_for_the_data_and_one_for_each_measure_and_task(tables):
    assert [table.title for table in tables] == [
        "MetaMath",
        *(f"MetaMath: nll, {task}" for task in TASKS),
        "MetaMath: accuracy_strict, average over tasks",
        *(f"MetaMath: accuracy_strict, {task}" for task in TASKS),
    ]


def test_overviews_are_the_first_tables_of_the_data_sets(tables, records):
    both = [*records, *make_records("Alpaca")]
    overviews = overview_tables(both, QUESTION, missing=MISSING)
    assert [table.title for table in overviews] == ["MetaMath", "Alpaca"]
    assert overviews[0].rows == tables[0].rows and overviews[0].notes == tables[0].notes
    assert [row["seeds"] for row in overviews[1].rows] == [3, 3, 3, 3]


def test_numbers_of_the_first_table_are_those_of_the_statistics(tables, records):
    rows = {row["row"]: row for row in tables[0].rows}
    assert list(rows) == [*ROWS, "hydralora"]
    of = {name: [record for record in records if record.row == name] for name in ROWS}
    means = [macro_average(record, measure="nll", tasks=AVERAGED) for record in of["soft_moa"]]
    assert rows["soft_moa"]["mean"] == pytest.approx(np.mean(means))
    assert rows["soft_moa"]["deviation"] == pytest.approx(np.std(means, ddof=1))
    strict = [macro_average(record, measure="accuracy_strict", tasks=AVERAGED) for record in of["soft_moa"]]
    assert rows["soft_moa"]["accuracy_strict_mean"] == pytest.approx(np.mean(strict))
    differences = [
        paired_difference(of["soft_moa & prompt"], of["lora"], measure="nll", tasks=AVERAGED),
        paired_difference(of["soft_moa"], of["lora"], measure="nll", tasks=AVERAGED),
        paired_difference(of["mixlora"], of["lora"][:2], measure="nll", tasks=AVERAGED),
    ]
    adjusted = holm([difference.p_value for difference in differences])
    for name, difference, p_holm in zip(list(ROWS)[1:], differences, adjusted, strict=True):
        row = rows[name]
        assert (row["difference"], row["low"], row["high"]) == (difference.difference, difference.low, difference.high)
        assert (row["p_value"], row["p_holm"]) == (difference.p_value, p_holm)
    assert rows["lora"]["difference"] is None
    assert [row["verdict"] for row in rows.values()] == ["baseline", "better", "equivalent", "worse", None]
    assert rows["soft_moa"]["peak_memory_bytes"] == 2**31 + 3
    assert rows["soft_moa"]["step_seconds"] == pytest.approx(0.5 + 0.2 + 0.02)


def test_missing_runs_are_marked_and_listed(tables):
    rows = {row["row"]: row for row in tables[0].rows}
    assert (rows["mixlora"]["seeds"], rows["mixlora"]["seeds_asked"], rows["mixlora"]["paired_seeds"]) == (2, 3, 2)
    text = to_markdown(tables[0])
    assert re.search(r"^\| mixlora \| mixlora \| 2 of 3 \|", text, re.MULTILINE)
    assert re.search(r"^\| hydralora \| - \| 0 of 1 \| - \| - \| - \| - \|", text, re.MULTILINE)
    assert "- Missing: mixlora, seed 3 (out of memory)." in text
    assert "- Missing: hydralora, seed 1 (not finished)." in text
    assert "- Not in the average: MultiArith, MultiArith (twins)." in text
    assert "mixlora: the difference is over the seeds that both rows have (1, 2)" in text


def test_a_measure_other_than_the_primary_has_no_margin_and_its_own_direction(tables):
    table = next(table for table in tables if table.title == "MetaMath: accuracy_strict, average over tasks")
    assert "accuracy_strict (higher is better)" in table.notes[0]
    assert not any("margin" in note for note in table.notes)
    assert "(the margin)" in " ".join(tables[0].notes)
    means = [row["mean"] for row in table.rows if row["mean"] is not None]
    best = [row["mean"] for row in table.rows if table.is_best(row, table.columns[2])]
    assert best == [max(means)]


def test_one_seed_is_said_to_be_one_seed():
    (table, *_) = study_tables(make_records(seeds=(1,)), QUESTION)
    assert any(note.startswith("One seed only: soft_moa & prompt, soft_moa, mixlora.") for note in table.notes)
    assert re.search(r"\| soft_moa \| soft_moa \| 1 \| 2,000,000 \| 0.0003 \| [0-9.]+ \|", to_markdown(table))


def test_data_without_the_baseline_or_the_measure_says_so(records):
    others = [record for record in records if record.row != "lora"]
    gone = MissingRun(row="lora", data="MetaMath", seed=1)
    table = study_tables(others, QUESTION, missing=[gone])[0]
    assert any("The baseline lora has no finished run on this data" in note for note in table.notes)
    assert all(row["difference"] is None for row in table.rows)
    unscored = Question(baseline="lora", primary="accuracy", lower_is_better=False)
    table = study_tables(records, unscored)[0]
    assert table.notes[0] == "No finished run on this data was scored by accuracy."
    with pytest.raises(UserError, match="baseline is 'dora'.*Rows: lora, soft_moa"):
        study_tables(records, Question(baseline="dora", primary="nll", lower_is_better=True))


def test_a_run_given_twice_is_refused(records):
    with pytest.raises(UserError, match="row 'lora' on 'MetaMath' has seed 1 twice"):
        study_tables([*records, records[0]], QUESTION)


def test_csv_has_full_precision(tables):
    read = list(csv.DictReader(io.StringIO(to_csv(tables))))
    assert len(read) == sum(len(table.rows) for table in tables)
    for given, row in zip(read, (row for table in tables for row in table.rows), strict=True):
        for key, value in row.items():
            assert (float(given[key]) if isinstance(value, float) else given[key]) == (
                "" if value is None else value if isinstance(value, float) else str(value)
            )


def odd_table():
    columns = (
        Column(title="row_1 & more", keys=("row",)),
        Column(title="loss", keys=("loss",), text="{:.1f}".format, kind="formula", best="low"),
        Column(title="p %", keys=("p",), text="{:,}".format, kind="number", best="high", priority=1),
    )
    rows = (
        {"row": "[a] 50% | {b}_c^d~e\\f#g$h<i>", "loss": 2.0, "p": 1_000},
        {"row": "*two\nlines", "loss": 1.0, "p": None},
        {"row": "three", "loss": 1.0, "p": 999},
    )
    return StudyTable(title="A & B [x]", columns=columns, rows=rows, notes=("100 % \u00b1 1",))


def test_markdown():
    assert to_markdown(odd_table()) == (
        "## A & B [x]\n\n"
        "| row_1 & more | loss | p % |\n"
        "|---|---:|---:|\n"
        "| [a] 50% \\| {b}_c^d~e\\f#g$h<i> | 2.0 | 1,000 |\n"
        "| *two lines | 1.0 | - |\n"
        "| three | 1.0 | 999 |\n"
        "\n- 100 % \u00b1 1\n"
    )


def test_latex():
    text = to_latex(odd_table())
    assert (
        "{[}a] 50\\% \\textbar{} \\{b\\}\\_c\\textasciicircum{}d\\textasciitilde{}e\\textbackslash{}f\\#g\\$h"
        "\\textless{}i\\textgreater{} & $2.0$ & \\textbf{1,000} \\\\\n"
        "{*}two lines & $\\mathbf{1.0}$ & - \\\\\n"
        "three & $\\mathbf{1.0}$ & 999 \\\\\n"
        "\\bottomrule"
    ) in text
    assert "row\\_1 \\& more & loss & p \\% \\\\\n\\midrule" in text
    assert "100 \\% $\\pm$ 1" in text


def test_latex_of_a_study_is_balanced_and_plain(tables):
    for table in tables:
        text = to_latex(table)
        assert text.isascii()
        assert re.findall(r"\\usepackage\{(.*?)\}", text) == ["booktabs"]
        assert re.findall(r"\\begin\{(\w+)\}", text) == ["table", "tabular", "minipage"]
        assert re.findall(r"\\end\{(\w+)\}", text) == ["tabular", "minipage", "table"]
        plain = re.sub(r"\\[{}$]", "", text)
        assert plain.count("{") == plain.count("}")
        assert plain.count("$") % 2 == 0
        body = re.search(r"\\toprule\n(.*)\\bottomrule", text, re.DOTALL)
        assert body is not None
        lines = [line for line in body[1].splitlines() if line != "\\midrule"]
        assert len(lines) == 1 + len(table.rows)
        assert {len(re.findall(r"(?<!\\)&", line)) for line in lines} == {len(table.columns) - 1}


@pytest.mark.parametrize("width", [60, 100, 250])
def test_the_terminal_table_fits_and_names_what_it_leaves_out(tables, width):
    stream = io.StringIO()
    console = Console(width=width, file=stream, color_system=None)
    rendered = to_rich(tables[0], width=width)
    console.print(rendered)
    titles = [column.title for column in tables[0].columns]
    dropped = [
        title
        for title in titles
        if title.replace(" ", "\n") not in {str(c.header).replace(" ", "\n") for c in rendered.columns}
    ]
    caption = str(rendered.caption)
    if width == 250:
        assert dropped == [] and "do not fit" not in caption
    else:
        assert dropped and sorted(caption.partition("do not fit here: ")[2].rstrip(".").split(", ")) == sorted(dropped)
    if width == 100:
        assert "accuracy strict %" not in dropped
        text = stream.getvalue()
        assert "\u2026" not in text and max(map(len, text.splitlines())) <= 100
        assert "equivale" in text


def test_the_terminal_table_shows_brackets_of_names():
    stream = io.StringIO()
    console = Console(width=100, file=stream, color_system=None)
    console.print(to_rich(odd_table()))
    assert "[a] 50%" in stream.getvalue()


def report(folder, records, **changes):
    settings = {
        "study_name": "Mixtures on math",
        "question": QUESTION,
        "missing": MISSING,
        "folder": folder,
        "provenance": {"command": "moa compare study.yaml", "versions": {"moa-peft": "0"}},
        "introduction": "Does the prompt help?",
        "notes": {"soft_moa": "without the prompt"},
        "budget_mismatches": check_budgets(records, matched={"soft_moa": "lora"}, tolerance=0.05),
    }
    return write_report(records, **{**settings, **changes})


def test_the_report_is_complete_and_the_same_every_time(tmp_path, records):
    first = report(tmp_path / "new" / "first", records)
    assert [path.name for path in first] == [
        "table.md",
        "table.csv",
        "table.tex",
        "results.json",
        "accuracy.png",
        "accuracy.svg",
    ]
    assert sorted(path.name for path in (tmp_path / "new" / "first").iterdir()) == sorted(path.name for path in first)
    for one, two in zip(first, report(tmp_path / "second", records), strict=True):
        assert one.read_bytes() == two.read_bytes(), one.name
    results = json.loads(first[3].read_text())
    assert results["seeds"] == [1, 2, 3]
    assert results["command"] == "moa compare study.yaml"
    assert results["missing"][0] == {"row": "mixlora", "data": "MetaMath", "seed": 3, "reason": "out of memory"}
    assert len(results["runs"]) == len(records)
    scores = results["runs"][0]["scores"][0]
    assert scores.keys() == {"task", "measure", "items", "mean"}
    assert scores["mean"] == pytest.approx(np.mean(records[0].scores[0].values))
    assert results["tables"][0]["rows"][1]["verdict"] == "better"
    assert "MetaMath: trainable parameters differ: 2,000,000 (soft_moa); 1,000,000 (lora)" in first[0].read_text()
    assert "\n\nDoes the prompt help?\n\n- soft_moa: without the prompt\n\n" in first[0].read_text()
    assert results["question"]["margin"] == 0.05
    assert results["budget_mismatches"][0]["quantity"] == "trainable parameters"
    assert "AddSub-7" not in first[3].read_text()


def test_a_study_without_accuracy_has_no_picture(tmp_path, records):
    plain = [
        RunRecord.from_dict(
            {**r.to_dict(), "scores": [s for s in r.to_dict()["scores"] if s["measure"] == "nll"]}, source="-"
        )
        for r in records
    ]
    names = [path.name for path in report(tmp_path, plain, missing=())]
    assert names == ["table.md", "table.csv", "table.tex", "results.json"]


def test_a_missing_library_is_told_before_anything_is_written(tmp_path, records, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"pip install 'moa-peft\[plot\]'"):
        report(tmp_path / "folder", records)
    assert not (tmp_path / "folder").exists()


def drawn_labels(monkeypatch, records, path):
    """The boxes of the names in a drawn panel, and of its frame, in pixels."""
    from matplotlib.figure import Figure

    kept = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **_: (kept.append(figure), file.write_bytes(b"x")))
    plot_accuracy_over_parameters(records, path, measure="accuracy_strict")
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
        plot_accuracy_over_parameters(records, tmp_path / "a.pdf", measure="accuracy_strict")
    with pytest.raises(UserError, match="no run was scored by it"):
        plot_accuracy_over_parameters(records, tmp_path / "a.png", measure="accuracy")
