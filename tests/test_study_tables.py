"""Tables of a study, from made-up runs."""

import csv
import io
import re
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from moa_peft.errors import UserError
from moa_peft.study.questions import Comparison, Question
from moa_peft.study.records import MissingRun
from moa_peft.study.statistics import holm, macro_average, paired_difference
from moa_peft.study.table_formats import Column, StudyTable, to_csv, to_latex, to_markdown, to_rich
from moa_peft.study.tables import study_tables
from tests.study_records import AVERAGED, MISSING, QUESTION, ROWS, TASKS, make_records, with_scores


@pytest.fixture(scope="module")
def records():
    return make_records()


@pytest.fixture(scope="module")
def of_data(records):
    (found,) = study_tables(records, QUESTION, missing=MISSING)
    return found


@pytest.fixture(scope="module")
def tables(of_data):
    """All tables that judge."""
    return [of_data.overview, *of_data.comparisons, *of_data.details]


def test_there_is_one_table_for_the_data_and_one_for_each_measure_and_task(tables):
    assert [table.title for table in tables] == [
        "MetaMath",
        *(f"MetaMath: nll, {task}" for task in TASKS),
        "MetaMath: accuracy_strict, average over tasks",
        *(f"MetaMath: accuracy_strict, {task}" for task in TASKS),
    ]


def test_every_data_set_has_its_tables(of_data, records):
    first, second = study_tables([*records, *make_records("Alpaca")], QUESTION, missing=MISSING)
    assert [first.overview.title, second.overview.title] == ["MetaMath", "Alpaca"]
    assert first.overview.rows == of_data.overview.rows and first.overview.notes == of_data.overview.notes
    assert [row["seeds"] for row in second.overview.rows] == [3, 3, 3, 3]


def test_means_on_every_question_set_stand_in_one_table(of_data):
    assert [table.title for table in of_data.by_set] == [
        "MetaMath: nll by question set",
        "MetaMath: accuracy strict % by question set",
    ]
    (table, _) = of_data.by_set
    assert [column.title for column in table.columns] == ["row", "seeds", *TASKS]
    assert table.notes == ("nll (lower is better): mean \u00b1 standard deviation over seeds.",)
    assert [table.cell(row, table.columns[1]) for row in table.rows] == ["3", "3", "3", "2 of 3", "0 of 1"]
    details = {detail.title: detail for detail in of_data.details}
    for column, task in zip(table.columns[2:], TASKS, strict=True):
        detail = details[f"MetaMath: nll, {task}"]
        assert [table.cell(row, column) for row in table.rows] == [
            detail.cell(row, detail.columns[2]) for row in detail.rows
        ]
        assert [table.is_best(row, column) for row in table.rows].count(True) == 1


def test_questions_are_families_of_their_own(records):
    asked = (
        Comparison(title="Is a prompt worth it?", baseline="soft_moa", rows=("soft_moa & prompt",)),
        Comparison(title="Against LoRA", baseline="lora", rows=("soft_moa", "mixlora", "hydralora")),
        Comparison(title="Nobody here", baseline="lora", rows=("adamole",)),
    )
    question = replace(QUESTION, comparisons=asked)
    (tables,) = study_tables(records, question, missing=MISSING)
    assert [table.title for table in tables.comparisons] == [
        "MetaMath: Is a prompt worth it?",
        "MetaMath: Against LoRA",
    ]
    prompt, against = tables.comparisons
    assert [row["row"] for row in prompt.rows] == ["soft_moa", "soft_moa & prompt"]
    assert prompt.rows[0]["verdict"] == "baseline"
    # One comparison needs no correction; a row whose runs are missing is part of its family already.
    assert prompt.rows[1]["p_holm"] == prompt.rows[1]["p_value"]
    tested = {row["row"]: row for row in against.rows if row["p_value"] is not None}
    assert list(tested) == ["soft_moa", "mixlora"]
    assert [row["p_holm"] for row in tested.values()] == pytest.approx(
        holm([row["p_value"] for row in tested.values()], num_tests=3)
    )
    assert any("this table's 3 comparisons" in note for note in against.notes)
    assert any("this table's one comparison " in note for note in prompt.notes)
    assert against.notes[0].startswith("Differences are row - lora")
    # The overview judges nothing twice.
    titles = [column.title for column in tables.overview.columns]
    assert "verdict" not in titles and "p (Holm)" not in titles and "difference [95%]" in titles
    assert [row["verdict"] for row in tables.overview.rows] == ["baseline", None, None, None, None]
    assert not any("Holm" in note for note in tables.overview.notes)


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
    # hydralora has no run yet.
    adjusted = holm([difference.p_value for difference in differences], num_tests=4)
    for name, difference, p_holm in zip(list(ROWS)[1:], differences, adjusted, strict=True):
        row = rows[name]
        assert (row["difference"], row["low"], row["high"]) == (difference.difference, difference.low, difference.high)
        assert (row["p_value"], row["p_holm"]) == (difference.p_value, p_holm)
    assert rows["lora"]["difference"] is None
    # mixlora's interval of two seeds excludes 0, but not its adjusted p.
    assert rows["mixlora"]["low"] > 0 and rows["mixlora"]["p_value"] < 0.05 < rows["mixlora"]["p_holm"]
    assert [row["verdict"] for row in rows.values()] == ["baseline", "better", "equivalent", "not resolved", None]
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
    assert "- accuracy_strict: average over the same sets as nll." in text
    assert "mixlora: the difference is over the seeds that both rows have (1, 2)" in text


def test_a_measure_other_than_the_primary_has_no_margin_and_its_own_direction(tables):
    table = next(table for table in tables if table.title == "MetaMath: accuracy_strict, average over tasks")
    assert "accuracy_strict (higher is better)" in table.notes[0]
    assert not any("margin" in note for note in table.notes)
    assert "Better, worse: the interval excludes 0 and p (Holm) is below 0.05. Not resolved: everything else." in (
        table.notes
    )
    assert "Equivalent: the interval is within \u00b1 0.0500 (the margin). Better, worse: it is not, the interval" in (
        " ".join(tables[0].notes)
    )
    means = [row["mean"] for row in table.rows if row["mean"] is not None]
    best = [row["mean"] for row in table.rows if table.is_best(row, table.columns[2])]
    assert best == [max(means)]


def test_one_seed_is_said_to_be_one_seed():
    table = study_tables(make_records(seeds=(1,)), QUESTION)[0].overview
    assert any(
        note.startswith("One seed only, so no verdict: soft_moa & prompt, soft_moa, mixlora.") for note in table.notes
    )
    assert [row["verdict"] for row in table.rows] == ["baseline", "one seed", "one seed", "one seed"]
    assert re.search(r"\| soft_moa \| soft_moa \| 1 \| 2,000,000 \| 0.0003 \| [0-9.]+ \|", to_markdown(table))


def test_rows_of_one_seed_are_part_of_the_family_and_not_tested(records):
    one = [run for run in records if run.row in ("lora", "mixlora") or run.seed == 1]
    rows = {row["row"]: row for row in study_tables(one, QUESTION)[0].overview.rows}
    assert [rows[name]["p_holm"] for name in ("soft_moa & prompt", "soft_moa")] == [None, None]
    assert rows["soft_moa"]["p_value"] is not None
    # Three comparisons were asked for, two of which cannot be made yet.
    assert rows["mixlora"]["p_holm"] == pytest.approx(min(1, 3 * rows["mixlora"]["p_value"]))


def test_rows_that_can_never_be_paired_are_no_part_of_the_family(records):
    apart = [replace(run, seed=run.seed + 10) for run in records if run.row == "soft_moa"]
    others = [run for run in records if run.row != "soft_moa"]
    rows = {row["row"]: row for row in study_tables([*others, *apart], QUESTION)[0].overview.rows}
    assert rows["soft_moa"]["p_value"] is None
    tested = [rows[name] for name in ("soft_moa & prompt", "mixlora")]
    assert [row["p_holm"] for row in tested] == pytest.approx(holm([row["p_value"] for row in tested]))


def test_data_without_the_baseline_or_the_measure_says_so(records):
    others = [record for record in records if record.row != "lora"]
    gone = MissingRun(row="lora", data="MetaMath", seed=1)
    table = study_tables(others, QUESTION, missing=[gone])[0].overview
    assert any("The baseline lora has no finished run on this data" in note for note in table.notes)
    assert all(row["difference"] is None for row in table.rows)
    unscored = Question(baseline="lora", primary="accuracy")
    table = study_tables(records, unscored)[0].overview
    assert table.notes[0] == (
        "No finished run on this data was scored by accuracy on a question set that an average covers."
    )
    with pytest.raises(UserError, match="baseline is 'dora'.*Rows: lora, soft_moa"):
        study_tables(records, Question(baseline="dora", primary="nll"))


def test_the_notes_name_transfer_sets_and_what_each_measure_averages(records):
    more = with_scores(records, task="piqa (transfer)", measure="accuracy", like="AddSub")
    more = with_scores(more, task="arc_easy", measure="accuracy_flexible", like="SVAMP")
    (tables,) = study_tables(more, QUESTION)
    table = tables.overview
    notes = "\n".join(table.notes)
    assert "average over AddSub, SVAMP, MultiArith (rest), each task counting the same." in notes
    assert "accuracy_strict: average over the same sets as nll.\n" in notes
    assert "accuracy_flexible: average over arc_easy.\n" in notes
    assert (
        "Not in the average: MultiArith, MultiArith (twins), piqa (transfer; no training rows of its kind)." in notes
    )
    titles = [column.title for column in table.columns]
    assert "accuracy strict %" in titles and "accuracy flexible %" in titles and "accuracy %" not in titles
    assert "MetaMath: accuracy, piqa (transfer)" in [detail.title for detail in tables.details]


def test_a_row_equal_to_the_baseline_is_named(records):
    twin = [replace(run, row="same") for run in records if run.row == "lora"]
    table = study_tables([*records, *twin], QUESTION)[0].overview
    assert "Equivalent, with the same value as lora at every question and seed: same." in table.notes
    assert table.rows[-1]["verdict"] == "equivalent"


def test_long_reasons_are_shortened():
    reason = "RuntimeError:  the allocation\nfailed " + "because of a long list of tensors, " * 20
    missing = MissingRun(row="mixlora", data="MetaMath", seed=3, reason=reason)
    table = study_tables(make_records(), QUESTION, missing=[missing])[0].overview
    (note,) = [note for note in table.notes if note.startswith("Missing")]
    shown = note.partition("(")[2].removesuffix(").")
    assert shown.startswith("RuntimeError: the allocation failed because of") and shown.endswith("...")
    assert 110 < len(shown) <= 120


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


def test_a_narrow_terminal_keeps_long_names_parameters_and_the_first_accuracy(records):
    names = {"soft_moa": "soft_moa_shifted_r16", "mixlora": "mixlora_8_experts_k2"}
    renamed = [replace(run, row=names.get(run.row, run.row)) for run in records]
    renamed = with_scores(renamed, task="AddSub", measure="accuracy_flexible", like="AddSub")
    stream = io.StringIO()
    console = Console(width=100, file=stream, color_system=None)
    rendered = to_rich(study_tables(renamed, QUESTION)[0].overview)
    console.print(rendered)
    lines = stream.getvalue().splitlines()
    assert [str(column.header).split() for column in rendered.columns] == [
        ["row"],
        ["parameters"],
        ["nll"],
        ["difference", "[95%]"],
        ["verdict"],
        ["accuracy", "strict", "%"],
    ]
    assert max(map(len, lines)) <= 100
    for name in names.values():
        assert len(name) == 20 and any(line.startswith(f"{name} ") for line in lines)


def test_the_terminal_table_shows_brackets_of_names():
    stream = io.StringIO()
    console = Console(width=100, file=stream, color_system=None)
    console.print(to_rich(odd_table()))
    assert "[a] 50%" in stream.getvalue()
