"""Router heads: hidden state to one logit per expert, in two parts like the router (see `moa_peft.routers.base`)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from moa_peft.errors import UserError
from moa_peft.initialization import Init, MasterLinear, reset_linear


class LinearHead(nn.Module):
    """``logits = W z + b`` (MoA, arXiv 2506.05928; ``swi_x = 0``).

    Args:
        hidden_size: width D of the hidden state.
        num_experts: number E of logits.
        bias: whether there is b.
        init_std: start the weights from N(0, init_std) instead of the default of linear layers.
    """

    def __init__(
        self, hidden_size: int, num_experts: int, *, bias: bool = True, init_std: float | None = None
    ) -> None:
        super().__init__()
        self.linear = MasterLinear(hidden_size, num_experts, bias=bias)
        self.init_std = init_std

    def reads(self) -> list[MasterLinear]:
        """The layers that read the hidden state."""
        return [self.linear]

    def logits(self, products: list[torch.Tensor]) -> torch.Tensor:
        """The logits, from what the layers of `reads` returned."""
        return products[0]

    def reset_parameters(self, init: Init) -> None:
        """Default weights, zero bias."""
        reset_head_linear(self.linear, init, self.init_std)


class SwiGLUHead(nn.Module):
    """``logits = W2 (silu(W1 z + b1) * (W3 z + b3)) + b2`` (the same, ``swi_x > 0``).

    Args:
        hidden_size: width D of the hidden state.
        num_experts: number E of logits.
        hidden_per_expert: the inner width is this times E.
        bias: whether there are b1, b2 and b3.
        init_std: start the weights from N(0, init_std) instead of the default of linear layers.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        hidden_per_expert: int,
        *,
        bias: bool = True,
        init_std: float | None = None,
    ) -> None:
        super().__init__()
        inner = hidden_per_expert * num_experts
        self.w1 = MasterLinear(hidden_size, inner, bias=bias)
        self.w2 = MasterLinear(inner, num_experts, bias=bias)
        self.w3 = MasterLinear(hidden_size, inner, bias=bias)
        self.init_std = init_std

    def reads(self) -> list[MasterLinear]:
        """The layers that read the hidden state."""
        return [self.w1, self.w3]

    def logits(self, products: list[torch.Tensor]) -> torch.Tensor:
        """The logits, from what the layers of `reads` returned."""
        return self.w2(F.silu(products[0]) * products[1])

    def reset_parameters(self, init: Init) -> None:
        """Default weights, zero biases."""
        for module in (self.w1, self.w2, self.w3):
            reset_head_linear(module, init, self.init_std)


def make_head(
    hidden_size: int, num_experts: int, *, hidden_per_expert: int, bias: bool = True, init_std: float | None = None
) -> LinearHead | SwiGLUHead:
    """The SwiGLU head, or the linear one where `hidden_per_expert` is 0; see the classes for the arguments."""
    if hidden_per_expert == 0:
        return LinearHead(hidden_size, num_experts, bias=bias, init_std=init_std)
    return SwiGLUHead(hidden_size, num_experts, hidden_per_expert, bias=bias, init_std=init_std)


def reset_head_linear(linear: nn.Linear, init: Init, init_std: float | None) -> None:
    """The weights that `init` gives, or N(0, init_std) where a router asks for that; zero bias."""
    reset_linear(linear, init)
    if init_std is not None:
        nn.init.normal_(linear.weight, std=init_std)


def check_hidden_per_expert(value: Any) -> None:
    """Raise a UserError unless ``router.hidden_per_expert`` is an integer of at least 0."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise UserError(f"router.hidden_per_expert is {value!r}; it must be an integer >= 0.")
    if value < 0:
        raise UserError(f"router.hidden_per_expert is {value}; it must be 0 (linear router) or more.")
