"""Top-p router: as many experts as a share p of the probability takes ("dynamic" MixLoRA, arXiv 2404.15159).

``p = softmax(head(z))``, sorted from large to small with cumulative sums ``c``; the kept set is the smallest whose sum
exceeds the option ``p``, that is every expert whose predecessors sum to at most ``p``. ``w = p m``, not renormalised.
All are ``[..., E]``. The most probable expert is always kept.
"""

from dataclasses import dataclass

import torch

from moa_peft.fields import check_range
from moa_peft.routers.base import ROUTERS
from moa_peft.routers.probabilities import HeadOptions, ProbabilityRouter, descending, first, keep, softmax, unsort
from moa_peft.routing import Routing


@dataclass(kw_only=True)
class TopPRouterOptions(HeadOptions):
    """Options of the top-p router, besides those of its head.

    Attributes:
        p: the share of the probability that the kept experts exceed, in (0, 1]; 1 keeps every expert.
    """

    p: float = 0.8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("router.p", self.p, 0.0, 1.0)


def top_p_mask(probabilities: torch.Tensor, p: float) -> torch.Tensor:
    """``[..., E]`` bool: the smallest set of the largest probabilities whose sum exceeds `p`; all if none does."""
    ordered, order = descending(probabilities)
    if p == 1:
        # A sum of all probabilities may come out above 1 by rounding.
        return torch.ones_like(ordered, dtype=torch.bool)
    kept = first(1, ordered) | (ordered.cumsum(-1) <= p).roll(1, dims=-1)
    return unsort(kept, order)


@ROUTERS.register("top_p")
class TopPRouter(ProbabilityRouter):
    """The experts within a share of the probability, see the module's docstring."""

    Options = TopPRouterOptions
    options: TopPRouterOptions

    @classmethod
    def neutral_weight(cls, num_experts: int, options: TopPRouterOptions) -> float:
        kept = top_p_mask(torch.full((num_experts,), 1.0 / num_experts, device="cpu"), options.p)
        return kept.sum().item() / num_experts**2

    def route(self, products: list[torch.Tensor]) -> Routing:
        logits = self.logits(products)
        scores = softmax(logits)
        weights = keep(scores, top_p_mask(scores, self.options.p))
        return Routing(weights=weights, scores=scores, logits=logits)

    def may_skip(self, *, with_gradient: bool) -> bool:
        return self.options.p < 1
