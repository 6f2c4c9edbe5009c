"""From the runs of a study to its tables: one for each data set, and one for each measure and question set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moa_peft.errors import UserError
from moa_peft.study.records import (
    REST_SUFFIX,
    TRANSFER_SUFFIX,
    TWINS_SUFFIX,
    MissingRun,
    RunRecord,
    averaged_tasks,
    is_accuracy,
    missing_sentences,
    scored_measures,
    scored_tasks,
)
from moa_peft.study.statistics import (
    SIGNIFICANCE,
    PairedDifference,
    holm,
    macro_average,
    mean_and_spread,
    paired_difference,
    verdict,
)
from moa_peft.study.table_formats import PLUS_MINUS, Column, StudyTable, Value


@dataclass(frozen=True, kw_only=True)
class Question:
    """What a study asks.

    Attributes:
        baseline: the row that all others are compared with.
        primary: the measure that decides.
        lower_is_better: whether a lower value of it is better.
        margin: differences of it that do not matter; None where every difference does.
    """

    baseline: str
    primary: str
    lower_is_better: bool
    margin: float | None = None


def study_tables(
    records: Sequence[RunRecord], question: Question, *, missing: Sequence[MissingRun] = ()
) -> list[StudyTable]:
    """All tables of a study.

    The first table of a data set is that of `overview_tables`. Then every measure has a table for its average and one
    for each question set, parts apart included.

    Args:
        records: the finished runs.
        question: what is compared with what.
        missing: runs that were asked for and did not finish; they are shown and listed.

    Raises:
        UserError: the baseline is no row, a run is given twice, or runs cannot be compared (see `paired_difference`).
    """
    tables = []
    for of_data in _data_sets(records, question, missing):
        tables += [_overview(of_data, question), *_details(of_data, question)]
    return tables


def overview_tables(
    records: Sequence[RunRecord], question: Question, *, missing: Sequence[MissingRun] = ()
) -> list[StudyTable]:
    """One table for each data set: the primary measure averaged over its tasks, the accuracies beside it, the costs.

    Rows stand in the order of their first run, rows without any run last. For arguments and errors see `study_tables`.
    """
    return [_overview(of_data, question) for of_data in _data_sets(records, question, missing)]


@dataclass(frozen=True, kw_only=True)
class _DataSet:
    data: str
    records: Sequence[RunRecord]
    missing: Sequence[MissingRun]

    @property
    def rows(self) -> list[str]:
        return list(dict.fromkeys(run.row for run in (*self.records, *self.missing)))

    def runs(self, row: str) -> dict[int, RunRecord]:
        return {run.seed: run for run in sorted(self.records, key=lambda run: run.seed) if run.row == row}

    def paired_seeds(self, row: str, other: str) -> list[int]:
        return sorted(self.runs(row).keys() & self.runs(other).keys())


def _data_sets(records: Sequence[RunRecord], question: Question, missing: Sequence[MissingRun]) -> list[_DataSet]:
    rows = dict.fromkeys(run.row for run in (*records, *missing))
    if question.baseline not in rows:
        raise UserError(
            f"baseline is {question.baseline!r}, but no run has this row. Rows: {', '.join(rows)}. Give one of them."
        )
    places = [(run.row, run.data, run.seed) for run in (*records, *missing)]
    twice = next((place for place in places if places.count(place) > 1), None)
    if twice is not None:
        raise UserError(f"row {twice[0]!r} on {twice[1]!r} has seed {twice[2]} twice; give every run once.")
    return [
        _DataSet(
            data=data,
            records=[record for record in records if record.data == data],
            missing=[run for run in missing if run.data == data],
        )
        for data in dict.fromkeys(run.data for run in (*records, *missing))
    ]


def _details(of_data: _DataSet, question: Question) -> list[StudyTable]:
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


def _overview(of_data: _DataSet, question: Question) -> StudyTable:
    measure = question.primary
    tasks = averaged_tasks(of_data.records, measure=measure)
    compared, notes = _compare(of_data, question, measure=measure, tasks=tasks)
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
    beside_columns = [
        _mean_column(accuracy, prefix=f"{accuracy}_", lower_is_better=False, priority=2 if number == 0 else 5)
        for number, accuracy in enumerate(accuracies)
    ]
    columns = (
        _ROW,
        Column(title="method", keys=("method",), priority=9),
        _SEEDS,
        Column(title="parameters", keys=("trainable_parameters",), text="{:,}".format, kind="formula", priority=1),
        Column(title="learning rate", keys=("learning_rate",), text=_learning_rate, kind="number", priority=8),
        *_comparison_columns(measure, lower_is_better=question.lower_is_better),
        *beside_columns,
        Column(title="s/step", keys=("step_seconds",), text="{:.3g}".format, kind="formula", best="low", priority=6),
        Column(title="memory GiB", keys=("peak_memory_bytes",), text=_gib, kind="formula", best="low", priority=7),
    )
    notes += _about_averages(of_data, averages, primary=measure)
    notes += missing_sentences(of_data.missing, rows=of_data.rows)
    return StudyTable(title=of_data.data, columns=columns, rows=tuple(rows), notes=tuple(notes))


def _detail(of_data: _DataSet, question: Question, *, measure: str, tasks: tuple[str, ...]) -> StudyTable:
    rows, notes = _compare(of_data, question, measure=measure, tasks=tasks)
    scope = tasks[0] if len(tasks) == 1 else "average over tasks"
    return StudyTable(
        title=f"{of_data.data}: {measure}, {scope}",
        columns=(
            _ROW,
            _SEEDS,
            *_comparison_columns(measure, lower_is_better=_lower_is_better(measure, question)),
        ),
        rows=tuple(rows),
        notes=tuple(notes),
    )


def _compare(
    of_data: _DataSet, question: Question, *, measure: str, tasks: tuple[str, ...]
) -> tuple[list[dict[str, Value]], list[str]]:
    """For every row its mean and its difference to the baseline; and what a reader must know about them."""
    lower_is_better = _lower_is_better(measure, question)
    margin = question.margin if measure == question.primary else None
    differences = _differences(of_data, question.baseline, measure=measure, tasks=tasks)
    adjusted = dict(zip(differences, holm([each.p_value for each in differences.values()]), strict=True))
    rows: list[dict[str, Value]] = []
    for row in of_data.rows:
        runs = of_data.runs(row)
        mean, deviation = _mean_over_seeds(runs, measure=measure, tasks=tasks)
        numbers: dict[str, Value] = {
            "data": of_data.data,
            "measure": measure,
            "tasks": "; ".join(tasks),
            "row": row,
            "method": next((run.method for run in runs.values()), None),
            "seeds": len(runs),
            "seeds_asked": len(runs.keys() | {run.seed for run in of_data.missing if run.row == row}),
            "mean": mean,
            "deviation": deviation,
            **dict.fromkeys(_DIFFERENCE_KEYS),
        }
        if row == question.baseline:
            numbers["verdict"] = "baseline"
        elif row in differences:
            difference = differences[row]
            numbers |= {
                "difference": difference.difference,
                "low": difference.low,
                "high": difference.high,
                "p_value": difference.p_value,
                "p_holm": adjusted[row],
                "verdict": verdict(
                    difference, p_adjusted=adjusted[row], lower_is_better=lower_is_better, margin=margin
                ),
                "paired_seeds": difference.num_seeds,
                "paired_items": difference.num_items,
            }
        rows.append(numbers)
    notes = _about(question, measure=measure, tasks=tasks, margin=margin, num_tests=len(differences))
    return rows, notes + _reservations(of_data, question.baseline, differences)


def _differences(
    of_data: _DataSet, baseline: str, *, measure: str, tasks: tuple[str, ...]
) -> dict[str, PairedDifference]:
    """The difference of every row that shares a seed with the baseline, over the seeds that both have."""
    found = {}
    for row in of_data.rows:
        paired = of_data.paired_seeds(row, baseline)
        if row != baseline and paired and tasks:
            row_runs, baseline_runs = ([of_data.runs(name)[seed] for seed in paired] for name in (row, baseline))
            found[row] = paired_difference(row_runs, baseline_runs, measure=measure, tasks=tasks)
    return found


def _about(
    question: Question, *, measure: str, tasks: tuple[str, ...], margin: float | None, num_tests: int
) -> list[str]:
    """What the numbers of a table are."""
    if not tasks:
        return [f"No finished run on this data was scored by {measure} on a question set that an average covers."]
    better = "lower" if _lower_is_better(measure, question) else "higher"
    over = ", ".join(tasks) if len(tasks) == 1 else f"average over {', '.join(tasks)}, each task counting the same"
    notes = [f"{measure} ({better} is better): mean {PLUS_MINUS} standard deviation over seeds; {over}."]
    if num_tests:
        notes.append(
            f"Differences are row - {question.baseline}, paired by seed and question, with 95 % intervals; p values "
            f"are adjusted for this table's {num_tests} comparisons (Holm), the intervals are not."
        )
        resolved = f"the interval excludes 0 and p (Holm) is below {SIGNIFICANCE}. Not resolved: everything else."
        if margin is None:
            notes.append(f"Better, worse: {resolved}")
        else:
            inside = f"the interval is within {PLUS_MINUS} {_number(measure, margin)} (the margin)"
            notes.append(f"Equivalent: {inside}. Better, worse: it is not, {resolved}")
    return notes


def _about_averages(of_data: _DataSet, averages: Mapping[str, tuple[str, ...]], *, primary: str) -> list[str]:
    """Which question sets the measures beside the primary average, and which sets no average covers."""
    notes = []
    for measure, tasks in averages.items():
        if tasks and measure != primary:
            same = set(tasks) == set(averages.get(primary, ()))
            notes.append(f"{measure}: average over {f'the same sets as {primary}' if same else ', '.join(tasks)}.")
    covered = {task for tasks in averages.values() for task in tasks}
    scored = dict.fromkeys(task for measure in averages for task in scored_tasks(of_data.records, measure=measure))
    transfer = f"{TRANSFER_SUFFIX.removesuffix(')')}; no training rows of its kind)"
    # A set of twins only has no rest that could stand for it.
    all_twins = [
        task for task in covered if f"{task}{TWINS_SUFFIX}" in scored and f"{task}{REST_SUFFIX}" not in scored
    ]
    notes += [f"Every question of {task} has a twin in the training rows." for task in sorted(all_twins)]
    counted = covered | {f"{task}{TWINS_SUFFIX}" for task in all_twins}
    apart = [task.replace(TRANSFER_SUFFIX, transfer) for task in scored if task not in counted]
    return [*notes, *([f"Not in the average: {', '.join(apart)}."] if apart else [])]


def _reservations(of_data: _DataSet, baseline: str, differences: Mapping[str, PairedDifference]) -> list[str]:
    """What a table's differences do not cover."""
    if not of_data.runs(baseline):
        return [f"The baseline {baseline} has no finished run on this data, so nothing is compared."]
    notes = []
    for row in differences:
        paired = of_data.paired_seeds(row, baseline)
        if len(paired) < max(len(of_data.runs(row)), len(of_data.runs(baseline))):
            seeds = ", ".join(map(str, paired))
            notes.append(f"{row}: the difference is over the seeds that both rows have ({seeds}).")
    identical = [row for row, difference in differences.items() if difference.identical]
    if identical:
        notes.append(
            f"Equivalent, with the same value as {baseline} at every question and seed: {', '.join(identical)}."
        )
    one_seed = [row for row, difference in differences.items() if not difference.seeds_resampled]
    if one_seed:
        notes.append(
            f"One seed only: {', '.join(one_seed)}. These intervals cover the choice of questions and not the spread "
            "between seeds; they speak of the trained models, not of the methods."
        )
    return notes


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
        "learning_rate": rates[0] if len(rates) == 1 else ", ".join(map(_learning_rate, rates)) or None,
        "step_seconds": mean_and_spread(seconds).mean if seconds else None,
        "peak_memory_bytes": max(
            (run.peak_memory_bytes for run in runs if run.peak_memory_bytes is not None), default=None
        ),
    }


def _lower_is_better(measure: str, question: Question) -> bool:
    return question.lower_is_better if measure == question.primary else not is_accuracy(measure)


_DIFFERENCE_KEYS = ("difference", "low", "high", "p_value", "p_holm", "verdict", "paired_seeds", "paired_items")
_ROW = Column(title="row", keys=("row",), width=20)
_SEEDS = Column(
    title="seeds",
    keys=("seeds", "seeds_asked"),
    text=lambda seeds, asked: str(seeds) if seeds == asked else f"{seeds} of {asked}",
    kind="number",
    priority=3,
)


def _comparison_columns(measure: str, *, lower_is_better: bool) -> tuple[Column, ...]:
    return (
        _mean_column(measure, prefix="", lower_is_better=lower_is_better, priority=0),
        Column(
            title="difference [95%]",
            keys=("difference", "low", "high"),
            text=lambda difference, low, high: (
                f"{_number(measure, difference, sign='+')} "
                f"[{_number(measure, low, sign='+')}, {_number(measure, high, sign='+')}]"
            ),
            kind="formula",
        ),
        Column(title="p (Holm)", keys=("p_holm",), text="{:.2g}".format, kind="number", priority=4),
        Column(title="verdict", keys=("verdict",), width=8),
    )


def _mean_column(measure: str, *, prefix: str, lower_is_better: bool, priority: int) -> Column:
    return Column(
        title=f"{measure.replace('_', ' ')} %" if is_accuracy(measure) else measure,
        keys=(f"{prefix}mean", f"{prefix}deviation"),
        text=lambda mean, deviation: (
            _number(measure, mean) + ("" if deviation is None else f" {PLUS_MINUS} {_number(measure, deviation)}")
        ),
        kind="formula",
        best="low" if lower_is_better else "high",
        priority=priority,
    )


def _number(measure: str, value: float, *, sign: str = "") -> str:
    return f"{100 * value:{sign}.1f}" if is_accuracy(measure) else f"{value:{sign}.4f}"


def _learning_rate(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.3g}"


def _gib(value: int) -> str:
    return f"{value / 2**30:.2f}"
