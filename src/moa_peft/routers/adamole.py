"""AdaMoLE router (arXiv 2405.00361): softmax weights above a learned threshold.

``p = softmax(head(z))``, ``tau = max_threshold * sigmoid(v . z + c)``, ``a = p - tau``, ``m = 1[a >= 0]``,
``w = a m / sum(a m)``. p, a, m, w are ``[..., E]``, tau is ``[..., 1]``. Since ``a`` itself is the weight, the
threshold learns.

The largest of E probabilities is at least 1/E, so a threshold below 1/E, the default bound, leaves every token an
expert. Where a threshold reaches the largest probability (by rounding, or under a higher bound), it is lowered to just
below it, so that the most probable expert is kept with weight 1 and the denominator is never 0.

Under a ``max_threshold`` above 1/E this, and no longer the paper's argument, is what leaves every token an expert.
Where the threshold excludes all experts but the largest, its weight is 1 whatever the threshold is, which so gets no
gradient from that token and cannot come down again there.
"""

from dataclasses import dataclass

import torch

from moa_peft.fields import check_range
from moa_peft.initialization import Init, MasterLinear, reset_linear
from moa_peft.routers.base import ROUTERS
from moa_peft.routers.probabilities import HeadOptions, ProbabilityRouter, normalise, softmax
from moa_peft.routing import Routing

MARGIN = 1e-6
"""How far below the largest probability a threshold stays, as a share of it: a few float32 roundings."""


@dataclass(kw_only=True)
class AdaMoLERouterOptions(HeadOptions):
    """Options of the AdaMoLE router, besides those of its head.

    Attributes:
        max_threshold: upper bound of the learned threshold, in (0, 1]; None is 1/E, the reciprocal of the number of
            experts.
    """

    bias: bool = True
    max_threshold: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_threshold is not None:
            check_range("router.max_threshold", self.max_threshold, 0.0, 1.0)


def below_largest(threshold: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
    """``[..., 1]`` thresholds, lowered where they would leave none of ``[..., E]`` probabilities above them."""
    largest = probabilities.detach().amax(dim=-1, keepdim=True)
    return torch.minimum(threshold, largest * (1 - MARGIN))


def threshold_weights(probabilities: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """``a m / sum(a m)`` with ``a = p - tau`` and ``m = 1[a >= 0]``.

    Args:
        probabilities: ``[..., E]``.
        threshold: ``[..., 1]``, below the largest probability.

    Returns:
        ``[..., E]`` weights that sum to 1, with gradients to both.
    """
    return normalise(torch.relu(probabilities - threshold))


@ROUTERS.register("adamole")
class AdaMoLERouter(ProbabilityRouter):
    """Experts above a learned threshold, see the module's docstring."""

    Options = AdaMoLERouterOptions
    options: AdaMoLERouterOptions

    def __init__(self, hidden_size: int, num_experts: int, options: AdaMoLERouterOptions) -> None:
        super().__init__(hidden_size, num_experts, options)
        self.threshold = MasterLinear(hidden_size, 1)
        self.max_threshold = 1.0 / num_experts if options.max_threshold is None else options.max_threshold

    def reads(self) -> list[MasterLinear]:
        return [*super().reads(), self.threshold]

    def route(self, products: list[torch.Tensor]) -> Routing:
        logits = self.logits(products)
        scores = softmax(logits)
        threshold = below_largest(self.max_threshold * torch.sigmoid(products[-1].float()), scores)
        weights = threshold_weights(scores, threshold)
        return Routing(weights=weights, scores=scores, threshold=threshold, logits=logits)

    def reset_parameters(self, init: Init) -> None:
        super().reset_parameters(init)
        reset_linear(self.threshold, init)

    def may_skip(self, *, with_gradient: bool) -> bool:
        return True
