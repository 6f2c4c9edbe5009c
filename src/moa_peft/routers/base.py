"""What every router is: a small module from a hidden state to a `Routing`."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

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

    Subclasses set `Options` (a dataclass of their options) and `scores_are_probabilities`.

    Args:
        hidden_size: width D of what it reads.
        num_experts: number E of experts in the mixture.
        options: an instance of `Options`.
    """

    Options: type[RouterOptions]
    scores_are_probabilities: bool
    """Whether the scores of a token sum to 1 over the experts, which entropies of them need."""

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

    @classmethod
    @abstractmethod
    def neutral_weight(cls, num_experts: int, options: Any) -> float:
        """The weight of every expert when the logits are zero, as they nearly are at initialisation."""

    @abstractmethod
    def reset_parameters(self, init: Init) -> None:
        """Set the initial weights."""

    @classmethod
    def shared_network(cls, hidden_size: int, options: Any) -> nn.Module | None:
        """A network that all routers of one adapter with this input width share; None where there is none.

        It is made once, is given to each router by `share`, and is stored once.
        """
        return None

    def share(self, network: nn.Module) -> None:
        """Use the shared network; the router does not own it."""
        raise NotImplementedError

    def all_parameters(self) -> list[nn.Parameter]:
        """Its parameters, and those of a network that it shares."""
        return list(self.parameters())

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
