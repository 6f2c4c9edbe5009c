"""The sentences below a study's tables: what the numbers are, and what they do not cover."""

from __future__ import annotations

from collections.abc import Mapping

from moa_peft.study.columns import number
from moa_peft.study.grouping import DataSetRuns
from moa_peft.study.questions import prefers_low
from moa_peft.study.records import REST_SUFFIX, TRANSFER_SUFFIX, TWINS_SUFFIX, scored_tasks
from moa_peft.study.statistics import SIGNIFICANCE, PairedDifference
from moa_peft.study.table_formats import PLUS_MINUS


def about_measure(measure: str) -> str:
    """Which measure is shown."""
    better = "lower" if prefers_low(measure) else "higher"
    return f"{measure} ({better} is better): mean {PLUS_MINUS} standard deviation over seeds."


def about_means(measure: str, *, tasks: tuple[str, ...]) -> list[str]:
    """Which measure is shown, over which question sets."""
    if not tasks:
        return [f"No finished run on this data was scored by {measure} on a question set that an average covers."]
    over = ", ".join(tasks) if len(tasks) == 1 else f"average over {', '.join(tasks)}, each task counting the same"
    return [f"{about_measure(measure).removesuffix('.')}; {over}."]


def about_differences(baseline: str) -> str:
    """How differences are made, where no verdict goes with them."""
    return f"Differences are row - {baseline}, paired by seed and question, with 95 % intervals."


def about_verdicts(baseline: str, *, measure: str, margin: float | None, num_tests: int) -> list[str]:
    """How differences are made and judged."""
    sentence = about_differences(baseline).removesuffix(".")
    comparisons = "one comparison" if num_tests == 1 else f"{num_tests} comparisons"
    notes = [f"{sentence}; p values are adjusted for this table's {comparisons} (Holm), the intervals are not."]
    resolved = f"the interval excludes 0 and p (Holm) is below {SIGNIFICANCE}. Not resolved: everything else."
    if margin is None:
        return [*notes, f"Better, worse: {resolved}"]
    inside = f"the interval is within {PLUS_MINUS} {number(measure, margin)} (the margin)"
    return [*notes, f"Equivalent: {inside}. Better, worse: it is not, {resolved}"]


def about_averages(of_data: DataSetRuns, averages: Mapping[str, tuple[str, ...]], *, primary: str) -> list[str]:
    """Which question sets the measures beside the primary average, and which sets no average covers."""
    notes = []
    for measure, tasks in averages.items():
        if tasks and measure != primary:
            same = set(tasks) == set(averages.get(primary, ()))
            notes.append(f"{measure}: average over {f'the same sets as {primary}' if same else ', '.join(tasks)}.")
    covered = {task for tasks in averages.values() for task in tasks}
    scored = {measure: scored_tasks(of_data.records, measure=measure) for measure in averages}
    transfer = f"{TRANSFER_SUFFIX.removesuffix(')')}; no training rows of its kind)"
    # A set of twins only has no rest that could stand for it.
    all_twins = {
        task: measure
        for measure, tasks in averages.items()
        for task in tasks
        if f"{task}{TWINS_SUFFIX}" in scored[measure] and f"{task}{REST_SUFFIX}" not in scored[measure]
    }
    notes += [
        f"Every question of {task} that {measure} covers has a twin in the training rows, so twins count there."
        for task, measure in sorted(all_twins.items())
    ]
    counted = covered | {f"{task}{TWINS_SUFFIX}" for task in all_twins}
    everything = dict.fromkeys(task for tasks in scored.values() for task in tasks)
    apart = [task.replace(TRANSFER_SUFFIX, transfer) for task in everything if task not in counted]
    return [*notes, *([f"Not in the average: {', '.join(apart)}."] if apart else [])]


def reservations(of_data: DataSetRuns, baseline: str, differences: Mapping[str, PairedDifference]) -> list[str]:
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
            f"One seed only, so no verdict: {', '.join(one_seed)}. These intervals cover the choice of questions, not "
            "the spread between seeds; they speak of the trained models, not of the methods."
        )
    return notes
