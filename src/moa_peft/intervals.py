"""95 % intervals of a share, of a mean, and of the difference of two shares measured on the same questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moa_peft.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A 95 % interval, as shares."""

    low: float
    high: float


def wilson_interval(successes: int, trials: int) -> Interval:
    """95 % Wilson score interval of a share.

    Raises:
        UserError: scipy is not installed.
    """
    interval = _import_stats().binomtest(successes, trials).proportion_ci(confidence_level=0.95, method="wilson")
    return Interval(low=float(interval.low), high=float(interval.high))


def upper_limit(successes: int, trials: int) -> float:
    """One-sided upper 95 % limit of a share (Clopper and Pearson, Biometrika 26, 1934).

    Without a success it is 1 - 0.05^(1 / trials), about 3 / trials: the rule of three.

    Raises:
        UserError: scipy is not installed.
    """
    test = _import_stats().binomtest(successes, trials, alternative="less")
    return float(test.proportion_ci(confidence_level=0.95, method="exact").high)


_RESAMPLES = 10_000


def mean_interval(values: Sequence[float]) -> Interval:
    """95 % percentile bootstrap interval of a mean; values that are all equal give that value.

    Questions are drawn with replacement, 10,000 times, with a fixed seed.

    Raises:
        UserError: scipy is not installed.
    """
    stats = _import_stats()
    if min(values) == max(values):
        return Interval(low=values[0], high=values[0])
    found = stats.bootstrap(
        (list(values),), _mean, n_resamples=_RESAMPLES, batch=500, vectorized=True, method="percentile", rng=0
    )
    return Interval(low=float(found.confidence_interval.low), high=float(found.confidence_interval.high))


def share_interval(correct: Sequence[bool]) -> Interval:
    """95 % interval of a share: `mean_interval`, and Wilson's where every question is right or every one is wrong.

    Drawing from equal values cannot show any spread: 0 of 20 would be 0 for certain.
    """
    if all(correct) or not any(correct):
        return wilson_interval(sum(correct), len(correct))
    return mean_interval([float(value) for value in correct])


def _mean(sample: Any, axis: int) -> Any:
    return sample.mean(axis=axis)


def paired_difference(before: Sequence[bool], after: Sequence[bool]) -> tuple[float, Interval]:
    """Difference of two shares measured on the same questions, with its 95 % interval.

    Newcombe's hybrid score interval for paired data (Statistics in Medicine 17, 1998, method 10): with the Wilson
    intervals (l1, u1), (l2, u2) of the shares p1 (after) and p2 (before) and the phi coefficient of the pairs,

        low  = d - sqrt((p1 - l1)^2 - 2 phi (p1 - l1)(u2 - p2) + (u2 - p2)^2)
        high = d + sqrt((p2 - l2)^2 - 2 phi (p2 - l2)(u1 - p1) + (u1 - p1)^2),  d = p1 - p2

    It stays within [-1, 1] and holds its level where few questions are right before or all are right after.

    Args:
        before: whether each question was right before.
        after: whether the same question is right after.

    Returns:
        The difference of the shares and its interval, as shares.
    """
    trials = len(before)
    assert trials == len(after) > 0
    p1, p2 = sum(after) / trials, sum(before) / trials
    first, second = wilson_interval(sum(after), trials), wilson_interval(sum(before), trials)
    phi = _phi(before, after)
    down1, up1, down2, up2 = p1 - first.low, first.high - p1, p2 - second.low, second.high - p2
    low = max(down1**2 - 2 * phi * down1 * up2 + up2**2, 0.0) ** 0.5
    high = max(down2**2 - 2 * phi * down2 * up1 + up1**2, 0.0) ** 0.5
    return p1 - p2, Interval(low=p1 - p2 - low, high=p1 - p2 + high)


def _phi(before: Sequence[bool], after: Sequence[bool]) -> float:
    """Phi coefficient of the pairs, with the method's continuity correction where it is positive."""
    pairs = list(zip(before, after, strict=True))
    both, neither = pairs.count((True, True)), pairs.count((False, False))
    lost, won = pairs.count((True, False)), pairs.count((False, True))
    product = (both + lost) * (won + neither) * (both + won) * (lost + neither)
    if product == 0:
        return 0.0
    numerator = both * neither - lost * won
    if numerator > 0:
        numerator = max(numerator - len(pairs) / 2, 0)
    return numerator / product**0.5


def require_scipy() -> None:
    """Raise a `UserError` unless scipy is installed: for checks before long work."""
    _import_stats()


def _import_stats() -> Any:
    try:
        from scipy import stats
    except ImportError as error:
        raise UserError("evaluation: intervals need scipy. Run: pip install 'moa-peft[eval]'") from error
    return stats
