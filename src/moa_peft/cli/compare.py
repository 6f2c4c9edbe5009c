"""`moa compare`: methods x seeds x data on one budget, ending in a table."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from moa_peft.cli.command_line import command_line
from moa_peft.errors import UserError

if TYPE_CHECKING:
    from moa_peft.study.runner import Study, StudyOutcome

EXIT_INCOMPLETE = 1
"""Runs failed or are missing; the report says which."""


def compare(
    context: typer.Context,
    study: Annotated[Path, typer.Argument(help="YAML file; see the folder studies/.", metavar="STUDY.yaml")],
    output: Annotated[
        Path, typer.Option(help="Folder of the study. One that exists is continued, never overwritten.")
    ],
    data: Annotated[
        Path | None,
        typer.Option(help="Folder that the data paths are below; default: MOA_DATA, else the study's own folder."),
    ] = None,
    processes: Annotated[int, typer.Option(help="Runs at a time, each in a process of its own.")] = 1,
    threads: Annotated[int | None, typer.Option(help="CPU threads of a run; default: the cores shared out.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Start no run after this time; the rest is for later.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, list what is missing, run nothing.")
    ] = False,
) -> None:
    """Compare methods, with the same data, steps and tries of learning rates, over several seeds.

    Every run is trained like `moa train` and scored like `moa eval`. What is there is not run again: after Ctrl-C, a
    kill or a change to the study (further rows, seeds, data), the same command goes on. Several machines or terminals
    may work on one folder.

    **Examples**

        moa compare studies/smoke.yaml --output runs/smoke

        moa compare studies/mixtures.yaml --data data --output runs/mixtures --processes 2

        moa compare studies/mixtures.yaml --data data --output runs/mixtures --dry-run

    **Study file**: name, question; recipe: keys of a recipe that all runs share; data: per data set train, test,
    tasks, scorings (nll, generate, loglikelihood), transfer, generate_tasks, train_rows, test_rows, max_new_tokens,
    batch_size, rows, seeds, recipe; rows: per row method, moa, recipe, matched_to, learning_rate_of, seeds, note;
    seeds; search: data, learning_rate, max_steps, seed, recipe; baseline; primary (nll, accuracy_strict,
    accuracy_flexible, accuracy); comparisons: a list of question, rows, baseline, each with a table and corrected p
    values of its own; margin; parameter_tolerance.

    **Result**: table.md and .tex, details.md, table.csv, results.json; differences.png and accuracy.png, both as .svg
    too; records/ and search/ with one small file per run, which are all that is needed to go on or to print the
    tables again; runs/ with adapters, predictions and logs.

    **Exit codes**: 0 when every run is there, 1 when runs failed or are missing, 2 for a mistake in the study.
    """
    from moa_peft.evaluation.run import check_libraries
    from moa_peft.study.drawing import import_matplotlib
    from moa_peft.study.runner import Study
    from moa_peft.study.study_file import load_study

    for name, value in (("--processes", processes), ("--threads", 1 if threads is None else threads)):
        if value < 1:
            raise UserError(f"{name}: {value} is not allowed; give at least 1.")
    spec = load_study(study)
    root = data or Path(os.environ.get("MOA_DATA") or study.parent)
    if not root.is_dir():
        raise UserError(f"--data: there is no folder {str(root)!r}.")
    console = Console(stderr=True)
    work = Study(spec, roots=(root, study.parent), output=output)
    waiting, everything = work.jobs()
    console.print(
        f"{spec.name}: {len(everything)} runs; {len(waiting)} jobs can start now.", highlight=False, markup=False
    )
    if dry_run:
        for name in work.missing_names():
            typer.echo(name)
        return
    # For the report, which comes hours later.
    import_matplotlib()
    check_libraries((questions, kind) for data in work.data.values() for questions in data.sets
                    for kind in data.scorings(questions))  # fmt: skip
    outcome = work.run(
        processes=processes,
        threads=threads or max(1, (os.cpu_count() or 1) // processes),
        console=console,
        limit_s=None if minutes is None else minutes * 60,
    )
    _report(work, outcome, command=command_line(context), console=console)
    if outcome.missing or outcome.failed:
        raise typer.Exit(EXIT_INCOMPLETE)


def _report(work: Study, outcome: StudyOutcome, *, command: str, console: Console) -> None:
    """Write the report over what is there, and print its first tables."""
    from moa_peft.environment import library_versions
    from moa_peft.study.budgets import check_budgets
    from moa_peft.study.questions import Question
    from moa_peft.study.report import remove_report, write_report
    from moa_peft.study.table_formats import to_rich
    from moa_peft.study.tables import study_tables

    spec = work.spec
    for sentence in outcome.failed:
        console.print(f"Failed: {sentence}", style="red", highlight=False, markup=False, soft_wrap=True)
    if not outcome.records:
        remove_report(work.folder.path)
        console.print("No run is finished, so there is no table yet.", highlight=False)
        return
    matched = {row: settings.matched_to for row, settings in spec.rows.items() if settings.matched_to is not None}
    mismatches = check_budgets(outcome.records, matched=matched, tolerance=spec.parameter_tolerance)
    question = Question.of(spec)
    tables = study_tables(outcome.records, question, missing=outcome.missing)
    paths = write_report(
        tables,
        outcome.records,
        study_name=spec.name,
        question=question,
        missing=outcome.missing,
        folder=work.folder.path,
        provenance={
            "command": command,
            "versions": library_versions(),
            "runs_made_with": outcome.made_with,
            "study": spec.to_dict(),
        },
        budget_mismatches=mismatches,
        introduction=spec.question,
        remarks=[
            *(f"{name}: {row.note}" for name, row in spec.rows.items() if row.note),
            *(f"{name} has a recipe of its own: {dict(row.recipe)}." for name, row in spec.rows.items() if row.recipe),
            *work.rates_at_the_ends(),
        ],
    )
    for table in (table for of_data in tables for table in (of_data.overview, *of_data.comparisons)):
        Console().print(to_rich(table, width=Console().width), "")
    for mismatch in mismatches:
        console.print(mismatch.sentence, style="yellow", highlight=False, markup=False, soft_wrap=True)
    if outcome.missing:
        console.print(f"{len(outcome.missing)} runs are missing; the same command goes on.", highlight=False)
    console.print(f"Written: {', '.join(str(path) for path in paths)}", highlight=False, markup=False, soft_wrap=True)
