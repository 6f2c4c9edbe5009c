"""Interval and p value where all items of a task show one difference, so that a bootstrap has no spread to go by."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moa_peft.intervals import upper_limit


def constant_interval(differences: Sequence[np.ndarray]) -> tuple[float, float]:
    """95 % interval of an average difference of accuracies.

    With c the difference that all items of a task show, a share u of further items may still show another one, between
    -1 and 1. Of the task's n items, m do not show c at every seed; u is the upper 95 % limit of the share m / n (for
    m = 0 about 3 / n, the rule of three). The task's difference then lies in

        [c - u (1 + c),  c + u (1 - c)]

    and the distances from c of T tasks join as a root of squares, divided by T.

    Args:
        differences: for each task row - baseline, [seeds, items], in [-1, 1]; every item has the same mean over seeds.

    Raises:
        UserError: scipy is not installed.
    """
    levels = np.array([task.mean() for task in differences])
    shares = np.array([_upper_share_of_others(task) for task in differences])
    below = np.linalg.norm(shares * (1 + levels)) / len(levels)
    above = np.linalg.norm(shares * (1 - levels)) / len(levels)
    return float(levels.mean() - below), float(levels.mean() + above)


def sign_test(differences: Sequence[np.ndarray], *, rounding: float) -> float:
    """Two-sided p of the sign test over items: 2^(1-n) where all n items that differ do so in the same direction.

    Where tasks differ in different directions, or none differs, p is 1.

    Args:
        differences: for each task row - baseline, [seeds, items]; every item has the same mean over seeds.
        rounding: means up to this size count as 0.
    """
    means = np.concatenate([task.mean(axis=0) for task in differences])
    means = means[np.abs(means) > rounding]
    one_direction = len(means) > 0 and abs(np.sign(means).sum()) == len(means)
    return 2.0 ** (1 - len(means)) if one_direction else 1.0


def _upper_share_of_others(differences: np.ndarray) -> float:
    others = (np.abs(differences - differences.mean()) > 1e-9).any(axis=0)  # [items]
    return upper_limit(int(others.sum()), differences.shape[1])
