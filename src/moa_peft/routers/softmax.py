"""Softmax router: every expert takes part, with weights that sum to 1.

``w = softmax(head(z))``, ``[..., E]``: MoLoRA (arXiv 2309.05444), HydraLoRA (arXiv 2404.19245). With ``scaled`` it is
``w = E * softmax(head(z))``, the ablation of MoA (arXiv 2506.05928), whose weights are 1 on average.
"""

from dataclasses import dataclass

import torch

from moa_peft.routers.base import ROUTERS
from moa_peft.routers.probabilities import HeadOptions, ProbabilityRouter, check_flag, softmax
from moa_peft.routing import Routing


@dataclass(kw_only=True)
class SoftmaxRouterOptions(HeadOptions):
    """Options of the softmax router, besides those of its head.

    Attributes:
        scaled: multiply the weights by the number of experts.
    """

    scaled: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_flag("router.scaled", self.scaled)


@ROUTERS.register("softmax")
class SoftmaxRouter(ProbabilityRouter):
    """All experts, see the module's docstring."""

    Options = SoftmaxRouterOptions
    options: SoftmaxRouterOptions

    @classmethod
    def neutral_weight(cls, num_experts: int, options: SoftmaxRouterOptions) -> float:
        return 1.0 if options.scaled else 1.0 / num_experts

    def route(self, products: list[torch.Tensor]) -> Routing:
        logits = self.logits(products)
        scores = softmax(logits)
        weights = scores * self.num_experts if self.options.scaled else scores
        return Routing(weights=weights, scores=scores, logits=logits)
