"""Router heads: hidden state to one logit per expert, in two parts like the router (see `moa_peft.routers.base`)."""

import torch
import torch.nn.functional as F
from torch import nn

from moa_peft.initialization import Init, MasterLinear, reset_linear


class LinearHead(nn.Module):
    """``logits = W z + b`` (METHODS 1.3, ``swi_x = 0``)."""

    def __init__(self, hidden_size: int, num_experts: int) -> None:
        super().__init__()
        self.linear = MasterLinear(hidden_size, num_experts)

    def reads(self) -> list[MasterLinear]:
        """The layers that read the hidden state."""
        return [self.linear]

    def logits(self, products: list[torch.Tensor]) -> torch.Tensor:
        """The logits, from what the layers of `reads` returned."""
        return products[0]

    def reset_parameters(self, init: Init) -> None:
        """Default weights, zero bias."""
        reset_linear(self.linear, init)


class SwiGLUHead(nn.Module):
    """``logits = W2 (silu(W1 z + b1) * (W3 z + b3)) + b2`` (METHODS 1.3, ``swi_x > 0``).

    Args:
        hidden_size: width D of the hidden state.
        num_experts: number E of logits.
        hidden_per_expert: the inner width is this times E.
    """

    def __init__(self, hidden_size: int, num_experts: int, hidden_per_expert: int) -> None:
        super().__init__()
        inner = hidden_per_expert * num_experts
        self.w1 = MasterLinear(hidden_size, inner)
        self.w2 = MasterLinear(inner, num_experts)
        self.w3 = MasterLinear(hidden_size, inner)

    def reads(self) -> list[MasterLinear]:
        """The layers that read the hidden state."""
        return [self.w1, self.w3]

    def logits(self, products: list[torch.Tensor]) -> torch.Tensor:
        """The logits, from what the layers of `reads` returned."""
        return self.w2(F.silu(products[0]) * products[1])

    def reset_parameters(self, init: Init) -> None:
        """Default weights, zero biases."""
        for module in (self.w1, self.w2, self.w3):
            reset_linear(module, init)
