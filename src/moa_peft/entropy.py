"""Entropies of routing probabilities (DynMoLE, arXiv 2504.00661).

``H_q(p) = (1 - sum_i p_i^q) / (q - 1)``                         (Tsallis)
``H_1(p) = - sum_i p_i log p_i``                                 (Shannon, the limit q -> 1)
``max H_q = (1 - E^(1-q)) / (q - 1)``, ``max H_1 = log E``       (at the uniform distribution)

They are computed as ``sum_i p_i g(-log p_i)`` with ``g(t) = -expm1(-(q - 1) t) / (q - 1)``, which is the same where p
sums to 1, keeps its digits as q comes near 1 and needs no constant added to p.
"""

import math

import torch

from moa_peft.errors import UserError


def tsallis_entropy(p: torch.Tensor, q: float = 1.0, *, normalised: bool = True) -> torch.Tensor:
    """The Tsallis entropy of distributions over the last dimension; of Shannon's kind for ``q = 1``.

    Args:
        p: ``[..., E]`` probabilities that sum to 1.
        q: entropic index, above 0.
        normalised: divide by the largest value E experts can have, and clamp to ``[0, 1]``. One expert alone has
            entropy 0.

    Returns:
        ``[...]`` entropies in the dtype of `p`. A probability of 0 contributes nothing and receives no gradient.

    Raises:
        UserError: if `q` is not a positive number.
    """
    if not (isinstance(q, (int, float)) and 0 < q < math.inf):
        raise UserError(f"The entropic index q is {q!r}; it must be a number above 0 (1 is Shannon's entropy).")
    # The slope of the entropy at p = 0 is infinite for q <= 1; below the smallest normal number p counts as 0.
    present = p >= torch.finfo(p.dtype).tiny
    surprise = -torch.where(present, p, 1.0).log()
    entropy = (torch.where(present, p, 0.0) * _generalised(surprise, q)).sum(-1)
    if not normalised:
        return entropy
    if p.shape[-1] == 1:
        return entropy * 0.0
    surprise_of_uniform = math.log(p.shape[-1])
    largest = surprise_of_uniform if q == 1 else math.expm1(surprise_of_uniform * (1 - q)) / (1 - q)
    return (entropy / largest).clamp(0.0, 1.0)


def _generalised(surprise: torch.Tensor, q: float) -> torch.Tensor:
    """``(1 - exp(-(q - 1) t)) / (q - 1)``, and its limit t at ``q = 1``."""
    if q == 1:
        return surprise
    return torch.expm1(surprise * (1 - q)) / (1 - q)
