"""DynMoLE router (arXiv 2504.00661): few experts where the router is sure, all where it is not.

``p = softmax(head(z))``, sorted from large to small with cumulative sums ``c``; ``m = 1[c <= top_p]`` (the expert that
crosses the share is not added), and the first ``keep_top_k`` always; where the normalised Tsallis entropy of p exceeds
``entropy_threshold``, every expert. ``w = p m``, not renormalised. All are ``[..., E]``.
"""

from dataclasses import dataclass

import torch

from moa_peft.entropy import tsallis_entropy
from moa_peft.fields import check_positive_int, check_range
from moa_peft.routers.base import ROUTERS
from moa_peft.routers.probabilities import (
    HeadOptions,
    ProbabilityRouter,
    check_at_most,
    descending,
    first,
    keep,
    softmax,
    unsort,
)
from moa_peft.routing import Routing


@dataclass(kw_only=True)
class DynMoLERouterOptions(HeadOptions):
    """Options of the DynMoLE router, besides those of its head.

    Attributes:
        top_p: share of the probability within which experts are kept, in (0, 1].
        keep_top_k: how many experts a token keeps at least; at most as many as the mixture has.
        entropy_threshold: normalised entropy above which a token keeps every expert, in (0, 1].
        entropy_index: index q of the Tsallis entropy; 1 is Shannon's.
    """

    top_p: float = 0.75
    keep_top_k: int = 2
    entropy_threshold: float = 0.9
    entropy_index: float = 1.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("router.top_p", self.top_p, 0.0, 1.0)
        check_positive_int("router.keep_top_k", self.keep_top_k)
        check_range("router.entropy_threshold", self.entropy_threshold, 0.0, 1.0)
        check_range("router.entropy_index", self.entropy_index, 0.0, float("inf"))


def hybrid_mask(probabilities: torch.Tensor, options: DynMoLERouterOptions) -> torch.Tensor:
    """``[..., E]`` bool: the experts that the rule above keeps, of ``[..., E]`` probabilities."""
    ordered, order = descending(probabilities)
    inside = (ordered.cumsum(-1) <= options.top_p) | first(options.keep_top_k, ordered)
    unsure = tsallis_entropy(probabilities.detach(), options.entropy_index) > options.entropy_threshold
    return unsort(inside, order) | unsure.unsqueeze(-1)


@ROUTERS.register("dynmole")
class DynMoLERouter(ProbabilityRouter):
    """Experts by probability and entropy, see the module's docstring."""

    Options = DynMoLERouterOptions
    options: DynMoLERouterOptions

    def __init__(self, hidden_size: int, num_experts: int, options: DynMoLERouterOptions) -> None:
        check_at_most("router.keep_top_k", options.keep_top_k, num_experts)
        super().__init__(hidden_size, num_experts, options)

    @classmethod
    def neutral_weight(cls, num_experts: int, options: DynMoLERouterOptions) -> float:
        kept = hybrid_mask(torch.full((num_experts,), 1.0 / num_experts, device="cpu"), options)
        return kept.sum().item() / num_experts**2

    def route(self, products: list[torch.Tensor]) -> Routing:
        logits = self.logits(products)
        scores = softmax(logits)
        weights = keep(scores, hybrid_mask(scores, self.options))
        return Routing(weights=weights, scores=scores, logits=logits)

    def may_skip(self, *, with_gradient: bool) -> bool:
        return True
