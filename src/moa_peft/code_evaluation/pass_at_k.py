"""pass@k: the chance that at least one of k samples of a problem passes its tests.

Source: Chen et al. 2021, "Evaluating Large Language Models Trained on Code", arXiv 2107.03374, equation 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from moa_peft.errors import UserError


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Unbiased estimate of pass@k from n samples of one problem, c of which pass.

        pass@k = 1 - C(n - c, k) / C(n, k)

    The quotient is exact integer arithmetic until the last division, so that nothing overflows or cancels.

    Args:
        num_samples: n, how many samples were drawn; at least k.
        num_correct: c, how many of them pass; from 0 to n.
        k: how many samples one may look at; at least 1.

    Returns:
        The estimate, from 0 to 1.

    Raises:
        UserError: a number is not whole or out of its range.
    """
    for name, value, least in (("num_samples", num_samples, 1), ("num_correct", num_correct, 0), ("k", k, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise UserError(f"{name}={value!r} must be a whole number of at least {least}.")
    if num_correct > num_samples:
        raise UserError(f"num_correct={num_correct} must not be larger than num_samples={num_samples}.")
    if k > num_samples:
        raise UserError(
            f"k={k} needs at least {k} samples of each problem, and there are {num_samples}. Draw more samples, or "
            f"ask for a smaller k."
        )
    all_choices = math.comb(num_samples, k)
    return (all_choices - math.comb(num_samples - num_correct, k)) / all_choices


def mean_pass_at_k(correct: Sequence[Sequence[bool]], k: int) -> float:
    """Mean of `pass_at_k` over problems, which may have different numbers of samples.

    Args:
        correct: for each problem, whether each of its samples passes.
        k: how many samples one may look at; at most the smallest number of samples.

    Returns:
        The mean, from 0 to 1.

    Raises:
        UserError: there is no problem, or one has fewer than k samples.
    """
    if not correct:
        raise UserError("correct is empty; give the samples of at least one problem.")
    return math.fsum(pass_at_k(len(samples), sum(map(bool, samples)), k) for samples in correct) / len(correct)
