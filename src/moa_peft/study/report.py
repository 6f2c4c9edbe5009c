"""The files of a study's report: tables, numbers and pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moa_peft.files import write_atomically
from moa_peft.study.accuracy_plot import plot_accuracy_over_parameters
from moa_peft.study.budgets import BudgetMismatch
from moa_peft.study.difference_plot import judged_rows, plot_differences
from moa_peft.study.drawing import import_matplotlib
from moa_peft.study.jobs import REPORT_FILES, RESULTS_FILE
from moa_peft.study.questions import Question
from moa_peft.study.records import MissingRun, RunRecord, averaged_tasks, is_accuracy, scored_measures
from moa_peft.study.statistics import task_mean
from moa_peft.study.table_formats import StudyTable, to_csv, to_latex, to_markdown
from moa_peft.study.tables import DataSetTables

_PICTURE_ENDINGS = (".png", ".svg")
_MORE = "Other measures and single question sets with intervals: [details.md](details.md). All numbers: results.json."


def write_report(
    tables: Sequence[DataSetTables],
    records: Sequence[RunRecord],
    *,
    study_name: str,
    question: Question,
    missing: Sequence[MissingRun],
    folder: Path,
    provenance: Mapping[str, Any],
    budget_mismatches: Sequence[BudgetMismatch] = (),
    introduction: str = "",
    remarks: Sequence[str] = (),
) -> list[Path]:
    """Write the report of a study; the same arguments give the same bytes.

    table.md and table.tex hold what a reader wants, details.md every other difference, table.csv and results.json all
    numbers. differences.png and .svg show the differences of the primary measure, unless there are none;
    accuracy.png and .svg for every data set the primary measure over parameters where it is an accuracy, else the
    first accuracy that has an average, if any. What an earlier report left and this one does not have is removed.

    Args:
        tables: of the records, from `study_tables`.
        records: the finished runs, in the order of the study's rows.
        study_name: heading of the report.
        question: what is compared with what.
        missing: runs that were asked for and did not finish.
        folder: where the files go; it is created.
        provenance: what the numbers depend on, as JSON values (command, versions, study), at the top of results.json;
            without times of day.
        budget_mismatches: what `check_budgets` found.
        introduction: a text above the tables of table.md.
        remarks: sentences below it.

    Returns:
        The files written.

    Raises:
        UserError: matplotlib is missing.
        OSError: a file cannot be written.
    """
    import_matplotlib()
    numbers = [table for of_data in tables for table in (of_data.overview, *of_data.comparisons, *of_data.details)]
    first = [table for of_data in tables for table in (of_data.overview, *of_data.comparisons, *of_data.by_set)]
    details = [table for of_data in tables for table in of_data.details]
    budgets = _about_budgets(budget_mismatches)
    listed = "\n".join(f"- {' '.join(remark.split())}" for remark in remarks)
    texts = {
        RESULTS_FILE: _results(
            records,
            numbers,
            overviews=[of_data.overview for of_data in tables],
            question=question,
            study_name=study_name,
            missing=missing,
            provenance=provenance,
            budget_mismatches=budget_mismatches,
        ),
        "table.md": _markdown(first, [f"# {study_name}", introduction.strip(), listed, budgets, _MORE]),
        "details.md": _markdown(details, [f"# {study_name}: differences by measure and question set"]),
        "table.csv": to_csv(numbers),
        "table.tex": "\n".join(to_latex(table) for table in first),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        write_atomically(folder / name, text)
    paths = [*(folder / name for name in texts), *_draw(tables, records, question=question, folder=folder)]
    remove_report(folder, but=paths)
    return paths


def remove_report(folder: Path, *, but: Sequence[Path] = ()) -> None:
    """Remove what an earlier report left in a folder; without its results.json nothing there is known to be one."""
    for name in REPORT_FILES if (folder / RESULTS_FILE).is_file() else ():
        if folder / name not in but:
            (folder / name).unlink(missing_ok=True)


def _draw(
    tables: Sequence[DataSetTables], records: Sequence[RunRecord], *, question: Question, folder: Path
) -> list[Path]:
    paths = []
    judged = [table for of_data in tables for table in (of_data.comparisons or (of_data.overview,))]
    measures = _accuracies(records, question)
    for ending in _PICTURE_ENDINGS:
        if any(judged_rows(table) for table in judged):
            paths.append(folder / f"differences{ending}")
            plot_differences(judged, paths[-1], question=question)
        if measures:
            paths.append(folder / f"accuracy{ending}")
            plot_accuracy_over_parameters(records, paths[-1], measures=measures)
    return paths


def _accuracies(records: Sequence[RunRecord], question: Question) -> dict[str, str]:
    """For every data set the accuracy to draw, if it has one."""
    found = {}
    for data in dict.fromkeys(record.data for record in records):
        of_data = [record for record in records if record.data == data]
        for measure in (question.primary, *scored_measures(of_data)):
            if is_accuracy(measure) and averaged_tasks(of_data, measure=measure):
                found.setdefault(data, measure)
    return found


def _markdown(tables: Sequence[StudyTable], above: Sequence[str]) -> str:
    blocks = [*above, *(to_markdown(table).rstrip("\n") for table in tables)]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _about_budgets(mismatches: Sequence[BudgetMismatch]) -> str:
    if not mismatches:
        return ""
    return "\n".join(["**Budgets that do not match:**", "", *(f"- {mismatch.sentence}" for mismatch in mismatches)])


def _results(
    records: Sequence[RunRecord],
    tables: Sequence[StudyTable],
    *,
    overviews: Sequence[StudyTable],
    question: Question,
    study_name: str,
    missing: Sequence[MissingRun],
    provenance: Mapping[str, Any],
    budget_mismatches: Sequence[BudgetMismatch],
) -> str:
    content = {
        "name": study_name,
        **provenance,
        "question": asdict(question),
        "seeds": sorted({run.seed for run in (*records, *missing)}),
        "rows": [dict(row) for table in overviews for row in table.rows],
        "runs": [_summary(record) for record in records],
        "missing": [vars(run) for run in missing],
        "budget_mismatches": [
            {**vars(mismatch), "values": dict(mismatch.values), "sentence": mismatch.sentence}
            for mismatch in budget_mismatches
        ],
        "tables": [
            {"title": table.title, "rows": [dict(row) for row in table.rows], "notes": list(table.notes)}
            for table in tables
        ],
    }
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _summary(record: RunRecord) -> dict[str, Any]:
    """A run with the means of its scores instead of the scores themselves."""
    means = [
        {
            "task": scores.task,
            "measure": scores.measure,
            "items": len(scores.items),
            "mean": task_mean(record, measure=scores.measure, task=scores.task),
        }
        for scores in record.scores
    ]
    return {**record.to_dict(), "scores": means}
