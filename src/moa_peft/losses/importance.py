"""The importance loss of sparsely gated mixtures (Shazeer et al., arXiv 1701.06538).

``L = CV(I)^2 = variance_i(I) / mean_i(I)^2`` over the experts i, where ``I_i`` is the sum of the scores of i over the
real tokens. The variance is that of the population. L is 0 when all experts weigh the same; the scores' scale does not
matter, so it fits sigmoid scores too.
"""

import torch

from moa_peft.losses.base import LOSSES, Loss, LossOptions, sum_over_tokens
from moa_peft.routing import Routing

EPSILON = 1e-10


@LOSSES.register("importance")
class ImportanceLoss(Loss):
    """Squared coefficient of variation of the summed scores per expert."""

    Options = LossOptions
    name = "importance"
    options: LossOptions

    def sums(self, routing: Routing, real: torch.Tensor | None) -> torch.Tensor:
        return sum_over_tokens(routing.scores, real)

    def value(self, sums: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        # The quotient is the same for sums and means; means keep the epsilon small whatever the number of tokens.
        means = sums / count
        return means.var(correction=0) / (means.mean().square() + EPSILON)
