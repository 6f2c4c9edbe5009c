"""The files of a study's report: tables, numbers and pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moa_peft.files import write_atomically
from moa_peft.intervals import require_scipy
from moa_peft.study.budgets import BudgetMismatch
from moa_peft.study.plot import plot_accuracy_over_parameters, require_matplotlib
from moa_peft.study.records import MissingRun, RunRecord, averaged_tasks, is_accuracy, scored_measures
from moa_peft.study.statistics import task_mean
from moa_peft.study.table_formats import StudyTable, to_csv, to_latex, to_markdown
from moa_peft.study.tables import Question, overview_tables, study_tables


def write_report(
    records: Sequence[RunRecord],
    *,
    study_name: str,
    question: Question,
    missing: Sequence[MissingRun],
    folder: Path,
    provenance: Mapping[str, Any],
    budget_mismatches: Sequence[BudgetMismatch] = (),
    introduction: str = "",
    notes: Mapping[str, str] | None = None,
) -> list[Path]:
    """Write table.md, table.csv, table.tex, results.json, accuracy.png and accuracy.svg.

    The pictures show the primary measure where it is an accuracy, else the first accuracy that has an average; without
    any, they are left out. The same arguments give the same bytes.

    Args:
        records: the finished runs, in the order of the study's rows.
        study_name: heading of the report.
        question: what is compared with what.
        missing: runs that were asked for and did not finish.
        folder: where the files go; it is created.
        provenance: what the numbers depend on, as JSON values (command, versions, study), at the top of results.json;
            without times of day.
        budget_mismatches: what `check_budgets` found.
        introduction: a text above the tables of table.md.
        notes: row -> what the row is for, also there.

    Returns:
        The files written.

    Raises:
        UserError: scipy or matplotlib is missing, the baseline is no row, or runs cannot be compared.
        OSError: a file cannot be written.
    """
    require_scipy()
    require_matplotlib()
    tables = study_tables(records, question, missing=missing)
    texts = {
        "table.md": _markdown(
            tables,
            study_name=study_name,
            introduction=introduction,
            notes=notes or {},
            budget_mismatches=budget_mismatches,
        ),
        "table.csv": to_csv(tables),
        "table.tex": "\n".join(to_latex(table) for table in tables),
        "results.json": _results(
            records,
            tables,
            question=question,
            study_name=study_name,
            missing=missing,
            provenance=provenance,
            budget_mismatches=budget_mismatches,
        ),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        write_atomically(folder / name, text)
    paths = [folder / name for name in texts]
    accuracies = [measure for measure in (question.primary, *scored_measures(records)) if is_accuracy(measure)]
    scored = [measure for measure in accuracies if averaged_tasks(records, measure=measure)]
    for name in ("accuracy.png", "accuracy.svg") if scored else ():
        plot_accuracy_over_parameters(records, folder / name, measure=scored[0])
        paths.append(folder / name)
    return paths


def _markdown(
    tables: Sequence[StudyTable],
    *,
    study_name: str,
    introduction: str,
    notes: Mapping[str, str],
    budget_mismatches: Sequence[BudgetMismatch],
) -> str:
    blocks = [f"# {study_name}", introduction.strip(), "\n".join(f"- {row}: {note}" for row, note in notes.items())]
    if budget_mismatches:
        sentences = [f"- {mismatch.sentence}" for mismatch in budget_mismatches]
        blocks += ["**Budgets that do not match:**", "\n".join(sentences)]
    blocks += [to_markdown(table).rstrip("\n") for table in tables]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _results(
    records: Sequence[RunRecord],
    tables: Sequence[StudyTable],
    *,
    question: Question,
    study_name: str,
    missing: Sequence[MissingRun],
    provenance: Mapping[str, Any],
    budget_mismatches: Sequence[BudgetMismatch],
) -> str:
    overview = overview_tables(records, question, missing=missing)
    content = {
        "name": study_name,
        **provenance,
        "question": vars(question),
        "seeds": sorted({run.seed for run in (*records, *missing)}),
        "rows": [{"data": table.title, **row} for table in overview for row in table.rows],
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
