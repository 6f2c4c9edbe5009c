"""From the runs of a study to its tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from moa_peft.study.columns import (
    LEARNING_RATE,
    MEMORY,
    METHOD,
    P_VALUE,
    PARAMETERS,
    ROW,
    SEEDS,
    STEP_TIME,
    VERDICT,
    difference_column,
    heading,
    learning_rate,
    mean_column,
)
from moa_peft.study.grouping import DataSetRuns, group_by_data
from moa_peft.study.questions import Comparison, Question, prefers_low
from moa_peft.study.records import (
    MissingRun,
    RunRecord,
    averaged_tasks,
    is_accuracy,
    missing_sentences,
    scored_measures,
    scored_tasks,
)
from moa_peft.study.statistics import (
    PairedDifference,
    holm,
    macro_average,
    mean_and_spread,
    paired_difference,
    verdict,
)
from moa_peft.study.table_formats import Column, StudyTable, Value
from moa_peft.study.table_notes import (
    about_averages,
    about_differences,
    about_means,
    about_measure,
    about_verdicts,
    reservations,
)

_DIFFERENCE_KEYS = ("difference", "low", "high", "p_value", "p_holm", "verdict", "paired_seeds", "paired_items")


@dataclass(frozen=True, kw_only=True)
class DataSetTables:
    """The tables of one data set.

    Attributes:
        overview: all rows: the primary measure averaged over its question sets, the accuracies beside it, the costs.
        comparisons: one for each question of the study that this data answers, with its verdicts.
        by_set: one for each measure: its means on every question set, parts apart included.
        details: the differences of every measure on its average and on every question set.
    """

    overview: StudyTable
    comparisons: tuple[StudyTable, ...]
    by_set: tuple[StudyTable, ...]
    details: tuple[StudyTable, ...]


def study_tables(
    records: Sequence[RunRecord], question: Question, *, missing: Sequence[MissingRun] = ()
) -> list[DataSetTables]:
    """All tables of a study, data set by data set.

    Rows stand in the order of their first run, rows without any run last. Where a study asks single questions, each
    is a family of tests of its own, and the overview gives no verdicts; else the overview is the one family.

    Args:
        records: the finished runs.
        question: what is compared with what.
        missing: runs that were asked for and did not finish; they are shown and listed.

    Raises:
        UserError: the baseline is no row, a run is given twice, or runs cannot be compared (see `paired_difference`).
    """
    return [
        DataSetTables(
            overview=_overview(of_data, question),
            comparisons=tuple(_comparisons(of_data, question)),
            by_set=tuple(_by_set(of_data, measure) for measure in scored_measures(of_data.records)),
            details=tuple(_details(of_data, question)),
        )
        for of_data in group_by_data(records, missing, baseline=question.baseline)
    ]


def _overview(of_data: DataSetRuns, question: Question) -> StudyTable:
    measure = question.primary
    tasks = averaged_tasks(of_data.records, measure=measure)
    compared, notes = _compare(of_data, question, measure=measure, tasks=tasks)
    notes = [*about_means(measure, tasks=tasks), *notes]
    averages = {
        name: averaged_tasks(of_data.records, measure=name)
        for name in scored_measures(of_data.records)
        if name == measure or is_accuracy(name)
    }
    accuracies = [name for name, averaged in averages.items() if averaged and name != measure]
    rows = []
    for row, numbers in zip(of_data.rows, compared, strict=True):
        runs = of_data.runs(row)
        beside: dict[str, Value] = {}
        for accuracy in accuracies:
            mean, deviation = _mean_over_seeds(runs, measure=accuracy, tasks=averages[accuracy])
            beside |= {f"{accuracy}_mean": mean, f"{accuracy}_deviation": deviation}
        rows.append({**numbers, **beside, **_costs(list(runs.values()))})
    columns = (
        ROW,
        METHOD,
        SEEDS,
        PARAMETERS,
        LEARNING_RATE,
        *_comparison_columns(question, measure),
        *(
            mean_column(accuracy, prefix=f"{accuracy}_", low=False, priority=2 if number == 0 else 5)
            for number, accuracy in enumerate(accuracies)
        ),
        STEP_TIME,
        MEMORY,
    )
    notes += about_averages(of_data, averages, primary=measure)
    notes += missing_sentences(of_data.missing, rows=of_data.rows)
    return StudyTable(title=of_data.data, columns=columns, rows=tuple(rows), notes=tuple(notes))


def _comparisons(of_data: DataSetRuns, question: Question) -> list[StudyTable]:
    """A table for every question of the study that has its baseline and one of its rows on this data."""
    tables = []
    for asked in question.comparisons:
        rows = [row for row in asked.rows if row in of_data.rows]
        if rows and asked.baseline in of_data.rows:
            tables.append(_comparison(of_data.only([asked.baseline, *rows]), question, asked))
    return tables


def _comparison(of_data: DataSetRuns, question: Question, asked: Comparison) -> StudyTable:
    own = replace(question, baseline=asked.baseline, comparisons=())
    measure = question.primary
    tasks = averaged_tasks(of_data.records, measure=measure)
    # What is averaged and which runs are missing is said below the overview.
    rows, notes = _compare(of_data, own, measure=measure, tasks=tasks)
    return StudyTable(
        title=f"{of_data.data}: {asked.title}",
        columns=(ROW, SEEDS, *_comparison_columns(own, measure)),
        rows=tuple(rows),
        notes=tuple(notes),
    )


def _by_set(of_data: DataSetRuns, measure: str) -> StudyTable:
    """Means of a measure on every question set."""
    tasks = scored_tasks(of_data.records, measure=measure)
    rows = []
    for row in of_data.rows:
        numbers = _counts(of_data, row)
        for task in tasks:
            mean, deviation = _mean_over_seeds(of_data.runs(row), measure=measure, tasks=(task,))
            numbers |= {f"{task}_mean": mean, f"{task}_deviation": deviation}
        rows.append(numbers)
    low = prefers_low(measure)
    columns = [mean_column(measure, title=task, prefix=f"{task}_", low=low) for task in tasks]
    return StudyTable(
        title=f"{of_data.data}: {heading(measure)} by question set",
        columns=(ROW, SEEDS, *columns),
        rows=tuple(rows),
        notes=(about_measure(measure),),
    )


def _counts(of_data: DataSetRuns, row: str) -> dict[str, Value]:
    """A row with the number of its seeds, finished and asked for."""
    return {"row": row, "seeds": len(of_data.runs(row)), "seeds_asked": len(of_data.asked_seeds(row))}


def _details(of_data: DataSetRuns, question: Question) -> list[StudyTable]:
    overview = (question.primary, averaged_tasks(of_data.records, measure=question.primary))
    tables = []
    for measure in scored_measures(of_data.records):
        average = averaged_tasks(of_data.records, measure=measure)
        scopes = [average] if len(average) > 1 else []
        scopes += [(task,) for task in scored_tasks(of_data.records, measure=measure)]
        for tasks in scopes:
            if (measure, tasks) != overview:
                tables.append(_detail(of_data, question, measure=measure, tasks=tasks))
    return tables


def _detail(of_data: DataSetRuns, question: Question, *, measure: str, tasks: tuple[str, ...]) -> StudyTable:
    rows, notes = _compare(of_data, question, measure=measure, tasks=tasks)
    scope = tasks[0] if len(tasks) == 1 else "average over tasks"
    return StudyTable(
        title=f"{of_data.data}: {measure}, {scope}",
        columns=(ROW, SEEDS, *_comparison_columns(question, measure)),
        rows=tuple(rows),
        notes=(*about_means(measure, tasks=tasks), *notes),
    )


def _compare(
    of_data: DataSetRuns, question: Question, *, measure: str, tasks: tuple[str, ...]
) -> tuple[list[dict[str, Value]], list[str]]:
    """For every row its mean and its difference to the baseline, and what a reader must know about the differences.

    A verdict goes with them unless the study asks single questions, whose tables judge.
    """
    has_verdicts = not question.comparisons
    margin = question.margin_of(measure)
    baseline = question.baseline
    # The family is what was asked: a verdict does not get easier because runs are missing, or stand on one seed.
    others = [row for row in of_data.rows if row != baseline]
    num_tests = sum(bool(of_data.asked_seeds(row) & of_data.asked_seeds(baseline)) for row in others)
    differences = _differences(of_data, baseline, measure=measure, tasks=tasks)
    tested = {row: found.p_value for row, found in differences.items() if found.seeds_resampled}
    adjusted = dict(zip(tested, holm(list(tested.values()), num_tests=num_tests), strict=True))
    rows: list[dict[str, Value]] = []
    for row in of_data.rows:
        runs = of_data.runs(row)
        mean, deviation = _mean_over_seeds(runs, measure=measure, tasks=tasks)
        numbers: dict[str, Value] = {
            "data": of_data.data,
            "measure": measure,
            "tasks": "; ".join(tasks),
            **_counts(of_data, row),
            "baseline": baseline,
            "method": next((run.method for run in runs.values()), None),
            "mean": mean,
            "deviation": deviation,
            **dict.fromkeys(_DIFFERENCE_KEYS),
        }
        if row == baseline:
            numbers["verdict"] = "baseline"
        elif row in differences:
            found = differences[row]
            numbers |= {
                "difference": found.difference,
                "low": found.low,
                "high": found.high,
                "p_value": found.p_value,
                "paired_seeds": found.num_seeds,
                "paired_items": found.num_items,
            }
            if has_verdicts:
                low = prefers_low(measure)
                judged = verdict(found, p_adjusted=adjusted.get(row, 1.0), lower_is_better=low, margin=margin)
                numbers |= {"p_holm": adjusted.get(row), "verdict": judged}
        rows.append(numbers)
    notes = []
    if differences and has_verdicts:
        notes += about_verdicts(baseline, measure=measure, margin=margin, num_tests=num_tests)
    elif differences:
        notes.append(about_differences(baseline))
    return rows, notes + reservations(of_data, baseline, differences)


def _differences(
    of_data: DataSetRuns, baseline: str, *, measure: str, tasks: tuple[str, ...]
) -> dict[str, PairedDifference]:
    """The difference of every row that shares a seed with the baseline, over the seeds that both have."""
    found = {}
    for row in of_data.rows:
        paired = of_data.paired_seeds(row, baseline)
        if row != baseline and paired and tasks:
            row_runs, baseline_runs = ([of_data.runs(name)[seed] for seed in paired] for name in (row, baseline))
            found[row] = paired_difference(row_runs, baseline_runs, measure=measure, tasks=tasks)
    return found


def _mean_over_seeds(
    runs: dict[int, RunRecord], *, measure: str, tasks: Sequence[str]
) -> tuple[float | None, float | None]:
    if not runs or not tasks:
        return None, None
    spread = mean_and_spread([macro_average(run, measure=measure, tasks=tasks) for run in runs.values()])
    return spread.mean, spread.deviation


def _costs(runs: Sequence[RunRecord]) -> dict[str, Value]:
    """Costs of a row: largest parameters and memory, mean step time; learning rates as text where seeds differ."""
    rates = sorted({run.learning_rate for run in runs})
    seconds = [run.step_seconds for run in runs if run.step_seconds is not None]
    return {
        "trainable_parameters": max((run.trainable_parameters for run in runs), default=None),
        "learning_rate": rates[0] if len(rates) == 1 else ", ".join(map(learning_rate, rates)) or None,
        "step_seconds": mean_and_spread(seconds).mean if seconds else None,
        "peak_memory_bytes": max(
            (run.peak_memory_bytes for run in runs if run.peak_memory_bytes is not None), default=None
        ),
    }


def _comparison_columns(question: Question, measure: str) -> tuple[Column, ...]:
    mean = mean_column(measure, low=prefers_low(measure))
    return (mean, difference_column(measure), *(() if question.comparisons else (P_VALUE, VERDICT)))
