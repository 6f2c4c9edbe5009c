"""Whole MLPs as experts over frozen weights that they share (MixLoRA, arXiv 2404.15159).

Expert e is the block's gated MLP with a LoRA of its own on each of its three layers. With the frozen products
``g = W_g x`` and ``u = W_u x``, made once for all experts, ``s = alpha / rank`` and ``h = act(g) * u``::

    h_e = act(g + s B_g A_g x) * (u + s B_u A_u x)
    y   = W_d (h + sum_e w_e (h_e - h)) + s sum_e w_e B_d A_d h_e

which for weights that sum to 1 is the mixture ``sum_e w_e F_e(x)`` of the paper, and needs the frozen down projection
once. Adding the difference to h instead of replacing it makes the mixture exactly the base model where B is zero.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from moa_peft.experts.base import EXPERTS, Expert, ExpertOptions, SiteShape
from moa_peft.experts.lora import LoraOptions
from moa_peft.fields import check_positive_int
from moa_peft.initialization import Init, MasterLinear, reset_linear

Activation = Callable[[torch.Tensor], torch.Tensor]


@dataclass(kw_only=True)
class MlpLoraOptions(ExpertOptions):
    """Options of ``{type: mlp_lora, ...}``.

    Attributes:
        rank: inner width R of each LoRA.
        alpha: numerator of the scale; None is the rank (scale 1).
        dropout: probability of dropping an input element of a LoRA, in [0, 1).
        rslora: scale by ``alpha / sqrt(rank)`` instead (arXiv 2312.03732).
    """

    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    rslora: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive_int("rank", self.rank)
        self.scale = LoraOptions(
            target="down", rank=self.rank, alpha=self.alpha, dropout=self.dropout, rslora=self.rslora
        ).scale


class LowRank(nn.Module):
    """A and B of one LoRA."""

    def __init__(self, in_features: int, out_features: int, rank: int) -> None:
        super().__init__()
        self.lora_A = MasterLinear(in_features, rank, bias=False)
        self.lora_B = MasterLinear(rank, out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``B A x``."""
        return self.lora_B(self.lora_A(x))

    def reset_parameters(self, init: Init) -> None:
        """The start of a LoRA expert."""
        reset_linear(self.lora_A, init)
        if init == "normal":
            reset_linear(self.lora_B, init)
        else:
            nn.init.zeros_(self.lora_B.weight)


@EXPERTS.register("mlp_lora")
class MlpLoraExpert(Expert):
    """Copies of one gated MLP that share its frozen weights, see the module's docstring.

    The site's shape is that of the gate projection.
    """

    Options = MlpLoraOptions
    site_kind = "gated_mlp"
    holds_copies = True
    options: MlpLoraOptions

    def __init__(self, shape: SiteShape, options: MlpLoraOptions, copies: int = 1) -> None:
        super().__init__(shape, options, copies)
        width, inner, rank = shape.in_features, shape.out_features, options.rank
        self.gate = nn.ModuleList(LowRank(width, inner, rank) for _ in range(copies))
        self.up = nn.ModuleList(LowRank(width, inner, rank) for _ in range(copies))
        self.down = nn.ModuleList(LowRank(inner, width, rank) for _ in range(copies))

    def forward(
        self,
        x: torch.Tensor,
        gate: torch.Tensor,
        up: torch.Tensor,
        weight: torch.Tensor,
        *,
        activation: Activation,
        gathered: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the experts add to h, and to the output of the down projection.

        Args:
            x: ``[N, D]`` input of the MLP.
            gate: ``[N, F]`` the frozen ``W_g x``.
            up: ``[N, F]`` the frozen ``W_u x``.
            weight: ``[N, n]`` routing weights.
            activation: act.
            gathered: every expert computes only the tokens for which it has a weight; else all, masked.

        Returns:
            ``[N, F]`` and ``[N, D]``.
        """
        read = F.dropout(x, self.options.dropout, training=self.training)
        if not gathered:
            masked = [
                self._one(number, read, gate, up, weight_N1, activation)
                for number, weight_N1 in enumerate(weight.split(1, dim=-1))
            ]
            hidden, output = zip(*masked)
            return torch.stack(hidden).sum(0), torch.stack(output).sum(0)
        indices = [column.nonzero().squeeze(-1) for column in weight.unbind(-1)]
        parts = [
            self._one(number, read[index], gate[index], up[index], weight[index, number, None], activation)
            for number, index in enumerate(indices)
        ]
        index = torch.cat(indices)
        hidden, output = (torch.cat(pieces) for pieces in zip(*parts))
        # In the dtypes of what is added: under autocast they are not those of x.
        return (
            hidden.new_zeros(gate.shape).index_add(0, index, hidden),
            output.new_zeros(x.shape).index_add(0, index, output),
        )

    def _one(
        self,
        number: int,
        read: torch.Tensor,
        gate: torch.Tensor,
        up: torch.Tensor,
        weight: torch.Tensor,
        activation: Activation,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        scale = self.options.scale
        h = activation(gate + self.gate[number](read) * scale) * (up + self.up[number](read) * scale)
        low_rank = self.down[number]
        assert isinstance(low_rank, LowRank)
        inner = low_rank.lora_A(F.dropout(h, self.options.dropout, training=self.training))
        return (h - activation(gate) * up) * weight, low_rank.lora_B(inner * (weight * scale))

    def reset_parameters(self, init: Init) -> None:
        for low_rank in (*self.gate, *self.up, *self.down):
            assert isinstance(low_rank, LowRank)
            low_rank.reset_parameters(init)
