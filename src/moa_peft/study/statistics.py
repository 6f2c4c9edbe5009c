"""Means over tasks and seeds, and differences of two rows of a study with an interval that holds for few seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from moa_peft.errors import UserError
from moa_peft.intervals import require_scipy
from moa_peft.study.constant_differences import constant_interval, sign_test
from moa_peft.study.records import ItemScores, RunRecord, is_accuracy

Verdict = Literal["better", "worse", "equivalent", "not resolved", "one seed"]

SIGNIFICANCE = 0.05

_LEVEL_PERCENTILES = (2.5, 97.5)
_ROUNDING = 1e-12  # relative to the largest value: differences below it are rounding alone
_DRAWS_AT_A_TIME = 2_000_000  # item indices held at once: 16 MB


@dataclass(frozen=True, kw_only=True)
class MeanSpread:
    """A mean over seeds and the sample standard deviation between them, None for one seed."""

    mean: float
    deviation: float | None


@dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """Row minus baseline, in units of the measure.

    Attributes:
        difference: the mean over seeds of the average over tasks.
        low: lower end of the 95 % interval.
        high: upper end.
        p_value: two-sided, for no difference; never 0.
        num_items: items paired, over all tasks.
        num_seeds: seeds paired.
        seeds_resampled: whether the interval covers the spread between seeds. With one seed it does not: it then
            speaks of these two trained models only, not of the methods.
        identical: whether a continuous measure (any but an accuracy) has the same value for both at every item and
            seed. The two are then the same model there.
    """

    difference: float
    low: float
    high: float
    p_value: float
    num_items: int
    num_seeds: int
    seeds_resampled: bool
    identical: bool


def task_mean(run: RunRecord, *, measure: str, task: str) -> float:
    """Mean of a measure over the items of one task.

    Raises:
        UserError: the run was not scored there.
    """
    return float(np.mean(_require_scores(run, measure=measure, task=task).values))


def macro_average(run: RunRecord, *, measure: str, tasks: Sequence[str]) -> float:
    """Unweighted mean over `tasks` of the mean over their items: every task counts the same, whatever its size.

    Raises:
        UserError: there is no task, or the run was not scored on one of them.
    """
    _check_tasks(tasks)
    return float(np.mean([task_mean(run, measure=measure, task=task) for task in tasks]))


def mean_and_spread(values_per_seed: Sequence[float]) -> MeanSpread:
    """Mean of one number per seed, and their sample standard deviation (divisor: seeds - 1).

    Raises:
        UserError: there is no value.
    """
    if not values_per_seed:
        raise UserError("mean_and_spread: there are no values; give one for every seed.")
    deviation = float(np.std(values_per_seed, ddof=1)) if len(values_per_seed) > 1 else None
    return MeanSpread(mean=float(np.mean(values_per_seed)), deviation=deviation)


def paired_difference(
    row_runs: Sequence[RunRecord],
    baseline_runs: Sequence[RunRecord],
    *,
    measure: str,
    tasks: Sequence[str],
    resamples: int = 10_000,
    seed: int = 0,
) -> PairedDifference:
    """Difference of two rows on the same items and seeds, by a bootstrap over items with a Student seed part.

    With d[s, i] the difference at seed s and item i of a task, M[s] the average over tasks of the means over items, S
    seeds, and sd(M) their sample standard deviation, a draw of the bootstrap distribution is

        mean(M)  +  t_{S-1} sd(M) / sqrt(S)  +  mean over tasks of  k (mean of resampled d[., i] - mean of d[., i])

    where d[., i] is the mean over seeds (all seeds share the resampled items), t_{S-1} a draw of Student's
    distribution, and

        k^2 = max(0, 1 - MS_residual / MS_items)

    from the two-way analysis of variance of the task's d. The interval is the 2.5th to 97.5th percentile.

    Why not resample seeds as well: with three seeds that makes their spread too small by sqrt(2/3), and no draw leaves
    the range of three values. In simulated studies without a true difference (60 items, the seeds' spread dominating),
    its 95 % interval covered 0 in 64, 80 and 84 % of the studies with 2, 3 and 5 seeds; this one in 97, 96 and 95 %.
    Over other mixtures of noise, heavy tails and right-or-wrong items it covered 94 to 99 %. The seed part already
    holds the noise of single runs on single items, and k keeps it from counting twice (where this noise is all there
    is, three seeds: over 99 % without k, 97 % with it). tests/test_study_statistics.py repeats this on a small scale.
    The price is width: the outer quantile of t is 12.7 with two seeds, 4.3 with three, 2.8 with five.

    With one seed only items are resampled (k = 1), see `PairedDifference.seeds_resampled`. Where all M are equal, k is
    1 as well: the seed part is 0 and holds no noise that could count twice.

    Where in addition all items of a task have the same d[., i], nothing is left to resample. The interval is then that
    of `constant_interval` for an accuracy and a single point for other measures, and p that of `sign_test`, not below
    the smallest one that draws could give.

    Args:
        row_runs: the runs of the row, one for each seed.
        baseline_runs: those of the baseline, with the same seeds.
        measure: the measure to compare.
        tasks: the tasks to average over, each with the same weight.
        resamples: number of draws.
        seed: of the draws; the same call gives the same numbers.

    Returns:
        The difference row - baseline, its interval, and p = 2 (1 + draws on the rarer side of 0) / (1 + draws), at
        most 1.

    Raises:
        UserError: seeds or items of the two differ, a seed occurs twice, a task was not scored, or scipy is missing.
    """
    _check_tasks(tasks)
    if resamples < 1:
        raise UserError(f"resamples is {resamples!r}; it must be at least 1 (10,000 for a table).")
    pairs = [_paired_values(row_runs, baseline_runs, measure=measure, task=task) for task in tasks]
    differences = [row - baseline for row, baseline in pairs]
    rounding = _ROUNDING * max(float(np.abs(pair).max()) for pair in pairs)
    per_seed = np.mean([task.mean(axis=1) for task in differences], axis=0)  # [seeds]
    num_seeds = len(per_seed)
    difference = float(per_seed.mean())
    seeds_vary = num_seeds > 1 and np.ptp(per_seed) > rounding
    if seeds_vary or any(np.ptp(task.mean(axis=0)) > rounding for task in differences):
        generator = np.random.default_rng(seed)
        draws = np.full(resamples, difference)
        for task in differences:
            share = _item_share(task) if seeds_vary else 1.0
            draws += share * _resampled_offsets(task.mean(axis=0), resamples, generator) / len(tasks)
        if seeds_vary:
            draws += _student_draws(num_seeds - 1, resamples, generator) * per_seed.std(ddof=1) / num_seeds**0.5
        low, high = (float(end) for end in np.percentile(draws, _LEVEL_PERCENTILES))
        rarer = int(min((draws <= 0).sum(), (draws >= 0).sum()))
        p_value = min(1.0, 2 * (rarer + 1) / (resamples + 1))
    else:
        low, high = constant_interval(differences) if is_accuracy(measure) else (difference, difference)
        p_value = min(1.0, max(sign_test(differences, rounding=rounding), 2 / (resamples + 1)))
    return PairedDifference(
        difference=difference,
        low=low,
        high=high,
        p_value=p_value,
        num_items=sum(task.shape[1] for task in differences),
        num_seeds=num_seeds,
        seeds_resampled=num_seeds > 1,
        identical=not is_accuracy(measure) and not any(task.any() for task in differences),
    )


def verdict(
    difference: PairedDifference, *, p_adjusted: float, lower_is_better: bool, margin: float | None
) -> Verdict:
    """What the interval and the p value say about the row.

    Args:
        difference: row - baseline.
        p_adjusted: its p value, adjusted for the comparisons made beside it (see `holm`).
        lower_is_better: whether a negative difference is an improvement.
        margin: differences smaller than this do not matter; None if every difference does.

    Returns:
        "equivalent" where the two are identical; "one seed" where one is all there is, because its interval does not
        cover the spread between seeds and is narrower than that of two. Else "equivalent" where the interval lies
        inside (-margin, margin), whether it holds 0 or not; "better" or "worse" where the interval excludes 0 and
        p_adjusted is below 0.05; else "not resolved". An interval without width says nothing by itself: where the sign
        test over its items does not reach 0.05 either (five items or fewer), it is not resolved.

    Raises:
        UserError: the margin is not positive.
    """
    if margin is not None and not margin > 0:
        raise UserError(f"margin is {margin!r}; it must be above 0, in units of the measure, or left out.")
    if difference.identical:
        return "equivalent"
    if not difference.seeds_resampled:
        return "one seed"
    if difference.low == difference.high and difference.p_value >= SIGNIFICANCE:
        return "not resolved"
    if margin is not None and -margin < difference.low and difference.high < margin:
        return "equivalent"
    if (difference.low > 0 or difference.high < 0) and p_adjusted < SIGNIFICANCE:
        return "better" if (difference.high < 0) == lower_is_better else "worse"
    return "not resolved"


def holm(p_values: Sequence[float], *, num_tests: int | None = None) -> list[float]:
    """Holm's adjusted p values, in the order given (Scandinavian Journal of Statistics 6, 1979).

    With the values in rising order, the k-th becomes the largest of min(1, (m - j + 1) p_j) for j <= k.

    Args:
        p_values: those that are known.
        num_tests: m, with tests that were asked for and have no p value yet; None for the number of values.
    """
    tests = len(p_values) if num_tests is None else num_tests
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (tests - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def _check_tasks(tasks: Sequence[str]) -> None:
    if not tasks:
        raise UserError("tasks: there is none to average over; give at least one.")


def _paired_values(
    row_runs: Sequence[RunRecord], baseline_runs: Sequence[RunRecord], *, measure: str, task: str
) -> np.ndarray:
    """Row and baseline, [2, seeds, items], seeds in rising order and items in the order of the row's first run."""
    row, baseline = (_by_seed(runs) for runs in (row_runs, baseline_runs))
    if row.keys() != baseline.keys() or not row:
        raise UserError(
            f"paired_difference: the row has the seeds {sorted(row)}, the baseline {sorted(baseline)}; runs pair by "
            "seed, so they must be the same and at least one. Give the common ones."
        )
    items: tuple[str, ...] | None = None
    values = []
    for seed in sorted(row):
        of_row, of_baseline = (_values_by_item(runs[seed], measure=measure, task=task) for runs in (row, baseline))
        items = items or tuple(of_row)
        for run, scored in ((row[seed], of_row), (baseline[seed], of_baseline)):
            if scored.keys() != set(items):
                odd = sorted(scored.keys() ^ set(items))
                raise UserError(
                    f"paired_difference: row {run.row!r}, seed {seed} was scored on other items of {task!r} than the "
                    f"first run ({len(odd)} differ, for example {odd[0]!r}). Score all runs on the same questions."
                )
        values.append([[scored[item] for item in items] for scored in (of_row, of_baseline)])
    return np.asarray(values).swapaxes(0, 1)


def _by_seed(runs: Sequence[RunRecord]) -> dict[int, RunRecord]:
    by_seed = {run.seed: run for run in runs}
    if len(by_seed) != len(runs):
        raise UserError(f"paired_difference: row {runs[0].row!r} has a seed twice; give one run for every seed.")
    return by_seed


def _values_by_item(run: RunRecord, *, measure: str, task: str) -> dict[str, float]:
    scores = _require_scores(run, measure=measure, task=task)
    return dict(zip(scores.items, scores.values, strict=True))


def _require_scores(run: RunRecord, *, measure: str, task: str) -> ItemScores:
    scores = run.find_scores(task=task, measure=measure)
    if scores is None:
        raise UserError(
            f"row {run.row!r}, seed {run.seed}: there is no {measure!r} for the task {task!r}. All rows of a study "
            "are scored on the same tasks; score this run again."
        )
    return scores


def _item_share(differences: np.ndarray) -> float:
    """k: how much of the spread between items is the items' own, and not the noise of single runs on them."""
    num_seeds, num_items = differences.shape
    if num_items == 1:
        return 1.0
    of_items = differences.mean(axis=0)
    residuals = differences - differences.mean(axis=1, keepdims=True) - of_items + differences.mean()
    between = num_seeds * of_items.var(ddof=1)
    within = (residuals**2).sum() / ((num_seeds - 1) * (num_items - 1))
    return float(max(0.0, 1 - within / between) ** 0.5) if between > 0 else 0.0


def _resampled_offsets(values: np.ndarray, resamples: int, generator: np.random.Generator) -> np.ndarray:
    """Means of `resamples` samples with replacement from `values`, minus the mean of `values`."""
    centred = values - values.mean()
    size = max(1, _DRAWS_AT_A_TIME // len(values))
    offsets = np.empty(resamples)
    for start in range(0, resamples, size):
        count = min(size, resamples - start)
        offsets[start : start + count] = centred[generator.integers(len(values), size=(count, len(values)))].mean(
            axis=1
        )
    return offsets


def _student_draws(degrees: int, count: int, generator: np.random.Generator) -> np.ndarray:
    """`count` evenly spaced quantiles of Student's distribution in random order.

    With few degrees its tails are so heavy that the ends of an interval from independent draws would move by several
    percent from seed to seed.
    """
    require_scipy()
    from scipy import stats

    return generator.permutation(stats.t.ppf((np.arange(count) + 0.5) / count, degrees))
