"""Top-k router: the k most probable experts of every token (MixLoRA, arXiv 2404.15159; MoLA, arXiv 2402.08562).

``u = head(z)``, in training with noise ``u + eps * softplus(G_n z)``, ``eps ~ N(0, 1)`` (arXiv 1701.06538);
``p = softmax(u)`` over all experts, ``m`` the k largest of p, ``w = p m / sum(p m)``, or ``w = p m`` unrenormalised.
All are ``[..., E]``. Of equal probabilities the expert that comes first is kept, so exactly k experts are.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from moa_peft.errors import UserError
from moa_peft.fields import check_positive_int
from moa_peft.initialization import Init, MasterLinear
from moa_peft.routers.base import ROUTERS
from moa_peft.routers.heads import reset_head_linear
from moa_peft.routers.probabilities import (
    HeadOptions,
    ProbabilityRouter,
    check_at_most,
    check_flag,
    descending,
    first,
    keep,
    normalise,
    softmax,
    unsort,
)
from moa_peft.routing import Routing


@dataclass(kw_only=True)
class TopKRouterOptions(HeadOptions):
    """Options of the top-k router, besides those of its head.

    Attributes:
        k: how many experts a token keeps; at most as many as the mixture has.
        noise: add learned noise to the logits in training.
        renormalise: divide the kept weights by their sum.
    """

    bias: bool = True
    k: int = 2
    noise: bool = False
    renormalise: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive_int("router.k", self.k)
        check_flag("router.noise", self.noise)
        check_flag("router.renormalise", self.renormalise)
        if self.k == 1 and self.renormalise:
            raise UserError(
                "router.k is 1 and router.renormalise is true, so the one kept weight is always 1 and the router "
                "learns nothing from the model's loss. Set renormalise to false (Switch) or k to 2 or more."
            )


def top_k_mask(probabilities: torch.Tensor, k: int) -> torch.Tensor:
    """``[..., E]`` bool: the k largest of ``[..., E]`` probabilities, exactly k also where some are equal."""
    ordered, order = descending(probabilities)
    return unsort(first(k, ordered).expand(ordered.shape), order)


@ROUTERS.register("top_k")
class TopKRouter(ProbabilityRouter):
    """The k most probable experts, see the module's docstring."""

    Options = TopKRouterOptions
    options: TopKRouterOptions

    def __init__(self, hidden_size: int, num_experts: int, options: TopKRouterOptions) -> None:
        check_at_most("router.k", options.k, num_experts)
        super().__init__(hidden_size, num_experts, options)
        self.noise = MasterLinear(hidden_size, num_experts, bias=False) if options.noise else None

    @classmethod
    def neutral_weight(cls, num_experts: int, options: TopKRouterOptions) -> float:
        return 1.0 / num_experts if options.renormalise else options.k / num_experts**2

    def reads(self) -> list[MasterLinear]:
        return super().reads() + ([] if self.noise is None else [self.noise])

    def route(self, products: list[torch.Tensor]) -> Routing:
        logits = self.logits(products)
        if self.noise is not None and self.training:
            logits = logits + torch.randn_like(logits) * F.softplus(products[-1].float())
        scores = softmax(logits)
        weights = keep(scores, top_k_mask(scores, self.options.k))
        if self.options.renormalise:
            weights = normalise(weights)
        return Routing(weights=weights, scores=scores, logits=logits)

    def reset_parameters(self, init: Init) -> None:
        super().reset_parameters(init)
        if self.noise is not None:
            reset_head_linear(self.noise, init, self.options.init_std)

    def may_skip(self, *, with_gradient: bool) -> bool:
        return self.options.k < self.num_experts
