"""The routers of MoA (arXiv 2506.05928): independent sigmoid weights, all experts or those above a threshold.

Soft:    ``w = sigmoid(head(z))``, every expert takes part.
Sparse:  ``tau = max_threshold * sigmoid(v . z + c)`` (or the constant ``max_threshold``) and
         ``w~_i = w_i * 1[w_i >= tau]``; weights that survive are neither shifted nor renormalised, and a token may
         keep no expert at all.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from moa_peft.fields import check_choice, check_range
from moa_peft.initialization import Init, MasterLinear, reset_linear
from moa_peft.routers.base import ROUTERS, Router, RouterOptions
from moa_peft.routers.heads import check_hidden_per_expert, make_head
from moa_peft.routing import Routing

Threshold = Literal["none", "constant", "learned"]
ThresholdGradient = Literal["none", "straight_through", "shifted"]


@dataclass(kw_only=True)
class SigmoidRouterOptions(RouterOptions):
    """Options of the sigmoid router.

    Attributes:
        hidden_per_expert: inner width of the SwiGLU head per expert; 0 is a linear head.
        threshold: ``none`` is Soft MoA; ``learned`` and ``constant`` are Sparse MoA.
        max_threshold: the constant threshold, or the upper bound of the learned one; in (0, 1].
        threshold_gradient: how gradients pass the selection, see `select`.
        threshold_temperature: width T of the straight-through estimate.
    """

    hidden_per_expert: int = 4
    threshold: Threshold = "none"
    max_threshold: float = 0.5
    threshold_gradient: ThresholdGradient = "straight_through"
    threshold_temperature: float = 0.1

    def __post_init__(self) -> None:
        check_hidden_per_expert(self.hidden_per_expert)
        check_choice("router.threshold", self.threshold, ("none", "constant", "learned"))
        check_choice("router.threshold_gradient", self.threshold_gradient, ("none", "straight_through", "shifted"))
        check_range("router.max_threshold", self.max_threshold, 0.0, 1.0)
        check_range("router.threshold_temperature", self.threshold_temperature, 0.0, float("inf"))


def select(
    scores: torch.Tensor, threshold: torch.Tensor, *, gradient: ThresholdGradient, temperature: float
) -> torch.Tensor:
    """Keep the scores that reach the threshold, and zero the others.

    Args:
        scores: ``[..., E]`` float32.
        threshold: ``[..., 1]`` float32, broadcast over the experts.
        gradient: ``none``: ``w * 1[w >= tau]``, no gradient to tau (the released code). ``straight_through``: the same
            value, with the gradient of ``w * sigmoid((w - tau) / T)`` taken through the indicator, to w and to tau.
            ``shifted``: ``relu(w - tau)``, differentiable as it is.
        temperature: T of ``straight_through``.

    Returns:
        ``[..., E]`` weights.
    """
    if gradient == "shifted":
        return torch.relu(scores - threshold)
    keep = (scores >= threshold).to(scores.dtype)
    if gradient == "straight_through":
        soft = torch.sigmoid((scores - threshold) / temperature)
        # The bracket is exactly zero in the forward pass, so the kept weights are not rounded.
        keep = keep + (soft - soft.detach())
    return scores * keep


@ROUTERS.register("sigmoid")
class SigmoidRouter(Router):
    """Soft and Sparse MoA, see the module's docstring."""

    Options = SigmoidRouterOptions
    scores_are_probabilities = False
    options: SigmoidRouterOptions

    def __init__(self, hidden_size: int, num_experts: int, options: SigmoidRouterOptions) -> None:
        super().__init__(hidden_size, num_experts, options)
        self.head = make_head(hidden_size, num_experts, hidden_per_expert=options.hidden_per_expert)
        self.threshold = MasterLinear(hidden_size, 1) if options.threshold == "learned" else None

    @classmethod
    def neutral_weight(cls, num_experts: int, options: SigmoidRouterOptions) -> float:
        return 0.5

    def reads(self) -> list[MasterLinear]:
        return self.head.reads() + ([] if self.threshold is None else [self.threshold])

    def route(self, products: list[torch.Tensor]) -> Routing:
        logits = self.head.logits(products).float()
        scores = torch.sigmoid(logits)
        if self.options.threshold == "none":
            return Routing(weights=scores, scores=scores, logits=logits)
        if self.threshold is None:
            threshold = torch.full_like(scores[..., :1], self.options.max_threshold)
        else:
            threshold = self.options.max_threshold * torch.sigmoid(products[-1].float())
        weights = select(
            scores,
            threshold,
            gradient=self.options.threshold_gradient,
            temperature=self.options.threshold_temperature,
        )
        return Routing(weights=weights, scores=scores, threshold=threshold, logits=logits)

    def reset_parameters(self, init: Init) -> None:
        self.head.reset_parameters(init)
        if self.threshold is not None:
            reset_linear(self.threshold, init)

    def may_skip(self, *, with_gradient: bool) -> bool:
        # The straight-through estimate asks what an expert below the threshold would have contributed.
        estimates = self.options.threshold_gradient == "straight_through"
        return self.options.threshold != "none" and not (with_gradient and estimates)

    def frozen_parameters(self) -> list[nn.Parameter]:
        if self.threshold is None or self.options.threshold_gradient != "none":
            return []
        return list(self.threshold.parameters())
