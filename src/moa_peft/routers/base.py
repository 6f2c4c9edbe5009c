"""What every router is: a small module from a hidden state to a `Routing`."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import nn

from moa_peft.initialization import Init, MasterLinear
from moa_peft.registry import Registry
from moa_peft.routing import Routing


@dataclass(kw_only=True)
class RouterOptions:
    """Options that a router reads from ``router: {...}``; subclasses add theirs."""


class Router(nn.Module, ABC):
    """Maps ``[..., D]`` hidden states to a `Routing` over `num_experts` experts.

    It is written in two parts, so that its first products can be made together with those of the experts that read
    the same hidden state: `reads` names the linear layers applied to it, `route` goes on from what they return.

    Subclasses set `Options` (a dataclass of their options) and `neutral_weight`.

    Args:
        hidden_size: width D of the hidden state it reads.
        num_experts: number E of experts in the mixture.
        options: an instance of `Options`.
    """

    Options: type[RouterOptions]
    neutral_weight: float
    """The weight of every expert when the logits are zero, as they nearly are at initialisation."""

    def __init__(self, hidden_size: int, num_experts: int, options: RouterOptions) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.num_experts = num_experts
        self.options = options

    def forward(self, hidden: torch.Tensor) -> Routing:
        """Route ``[..., D]`` hidden states; products in their dtype, everything that selects or weights in float32."""
        return self.route([linear(hidden) for linear in self.reads()])

    @abstractmethod
    def reads(self) -> list[MasterLinear]:
        """The linear layers that read the hidden state."""

    @abstractmethod
    def route(self, products: list[torch.Tensor]) -> Routing:
        """The routing, from what each layer of `reads` returned."""

    @abstractmethod
    def reset_parameters(self, init: Init) -> None:
        """Set the initial weights."""

    def may_skip(self, *, with_gradient: bool) -> bool:
        """Whether it gives weights that are exactly 0, whose experts may be left out.

        Args:
            with_gradient: whether gradients must be the same too: no gradient may reach a weight of 0.
        """
        return False

    def frozen_parameters(self) -> list[nn.Parameter]:
        """Parameters that are saved but that no gradient reaches, and that stay frozen therefore."""
        return []


ROUTERS: Registry[type[Router]] = Registry("router type")
