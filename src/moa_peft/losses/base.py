"""What every auxiliary loss is: a pure function of a `Routing` and of which of its tokens are real.

It is written in two parts, ``sums over tokens -> value``, so that several processes can add their sums up first
(`moa_peft.losses.values`).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from moa_peft.fields import check_choice, check_range
from moa_peft.registry import Registry
from moa_peft.routing import Routing

Reduction = Literal["sum", "mean"]
Needs = Literal["logits", "sparsity", "threshold", "selection", "probabilities"]


@dataclass(kw_only=True)
class LossOptions:
    """Options that every loss reads from its entry in ``losses: [...]``; subclasses add theirs.

    Attributes:
        coefficient: what the loss is multiplied by; more than 0.
        reduction: ``sum`` or ``mean`` over the routers of the model.
    """

    coefficient: float
    reduction: Reduction = "sum"

    def __post_init__(self) -> None:
        check_range("coefficient", self.coefficient, 0.0, float("inf"))
        check_choice("reduction", self.reduction, ("sum", "mean"))


class Loss(ABC):
    """One auxiliary loss of one router.

    Subclasses set `Options` and `name`, the name they are registered under.

    Args:
        options: an instance of `Options`.
    """

    Options: ClassVar[type[LossOptions]]
    name: ClassVar[str]

    def __init__(self, options: Any) -> None:
        self.options = options

    @abstractmethod
    def sums(self, routing: Routing, real: torch.Tensor | None) -> torch.Tensor:
        """``[n]`` sums over the real tokens, from which `value` is made.

        Args:
            routing: tensors of padding hold harmless values and must not count.
            real: ``[..., 1]`` bool, the tokens that are no padding; None: all.
        """

    @abstractmethod
    def value(self, sums: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        """The loss, a scalar.

        Args:
            sums: ``[n]`` as `sums` returns them, of one process or added up over all.
            count: number of real tokens behind them, at least 1.
        """

    def needs(self) -> tuple[Needs, ...]:
        """What the router must return for this loss to mean anything."""
        return ()

    def check_num_experts(self, num_experts: int) -> None:
        """Raise a UserError where the loss cannot be had with this number of experts."""
        return


class TokenMean(Loss):
    """A loss that is a mean over tokens."""

    @abstractmethod
    def per_token(self, routing: Routing) -> torch.Tensor:
        """``[...]``, the loss of each token."""

    def sums(self, routing: Routing, real: torch.Tensor | None) -> torch.Tensor:
        return sum_over_tokens(self.per_token(routing)[..., None], real)

    def value(self, sums: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        return sums[0] / count


def sum_over_tokens(values: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
    """``[..., n]`` values of tokens to their ``[n]`` sums over the real ones."""
    if real is not None:
        values = torch.where(real, values, 0.0)
    return values.reshape(-1, values.shape[-1]).sum(0)


LOSSES: Registry[type[Loss]] = Registry("loss type")
"""The losses by the name that ``losses: [{type: ...}]`` uses."""
