"""Constant router: ``w = weight`` for every expert and token, ``[E]``, without parameters (naive composition)."""

from dataclasses import dataclass

import torch

from moa_peft.fields import check_range
from moa_peft.initialization import Init, MasterLinear
from moa_peft.routers.base import ROUTERS, Router, RouterOptions
from moa_peft.routing import Routing


@dataclass(kw_only=True)
class ConstantRouterOptions(RouterOptions):
    """Options of the constant router.

    Attributes:
        weight: the weight of every expert, above 0.
    """

    weight: float = 1.0

    def __post_init__(self) -> None:
        check_range("router.weight", self.weight, 0.0, float("inf"))


@ROUTERS.register("constant")
class ConstantRouter(Router):
    """The same weight everywhere. `route` sees no token, and returns one ``[E]`` vector for all of them."""

    Options = ConstantRouterOptions
    scores_are_probabilities = False
    options: ConstantRouterOptions
    device_of: torch.Tensor

    def __init__(self, hidden_size: int, num_experts: int, options: ConstantRouterOptions) -> None:
        super().__init__(hidden_size, num_experts, options)
        # Empty: it only goes where the module goes, and has no value that a change of dtype could round.
        self.register_buffer("device_of", torch.empty(0), persistent=False)

    @classmethod
    def neutral_weight(cls, num_experts: int, options: ConstantRouterOptions) -> float:
        return options.weight

    def forward(self, hidden: torch.Tensor) -> Routing:
        """The routing of ``[..., D]`` hidden states, expanded to ``[..., E]``."""
        return self.route([]).map(lambda values: values.expand(*hidden.shape[:-1], self.num_experts))

    def reads(self) -> list[MasterLinear]:
        return []

    def route(self, products: list[torch.Tensor]) -> Routing:
        weights = torch.full(
            (self.num_experts,), self.options.weight, dtype=torch.float32, device=self.device_of.device
        )
        return Routing(weights=weights, scores=weights)

    def reset_parameters(self, init: Init) -> None:
        """There are none."""
