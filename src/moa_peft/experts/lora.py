"""LoRA expert (Hu et al., arXiv 2106.09685): ``w * s * B A dropout(x)`` with ``s = alpha / rank``.

The weight multiplies in rank space, before B: ``[.., R]`` instead of ``[.., O]`` numbers, and the same value.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

from moa_peft.errors import UserError
from moa_peft.experts.base import EXPERTS, Expert, ExpertOptions, Factors, SiteShape
from moa_peft.fields import check_positive_int, check_range
from moa_peft.initialization import Init, MasterLinear, reset_linear


@dataclass(kw_only=True)
class LoraOptions(ExpertOptions):
    """Options of ``{type: lora, ...}``.

    Attributes:
        target: a role (``q k v o gate up down``), a module's name in the block, or a regular expression over the
            names of linear layers in the block; a list makes one expert of each.
        rank: inner width R.
        alpha: numerator of the scale; None is the rank (scale 1).
        dropout: probability of dropping an input element, in [0, 1).
        rslora: scale by ``alpha / sqrt(rank)`` instead (arXiv 2312.03732).
    """

    target: str | list[str]
    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    rslora: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        targets = [self.target] if isinstance(self.target, str) else self.target
        if not isinstance(targets, (list, tuple)) or not targets or not all(isinstance(t, str) and t for t in targets):
            raise UserError(
                f"target is {self.target!r}; it must be a role, a module name, a pattern, or a list of them."
            )
        check_positive_int("rank", self.rank)
        if self.alpha is not None:
            check_range("alpha", self.alpha, 0.0, float("inf"))
        check_range("dropout", self.dropout, 0.0, 1.0, closed=True)
        if not isinstance(self.rslora, bool):
            raise UserError(f"rslora is {self.rslora!r}; it must be true or false.")

    @property
    def scale(self) -> float:
        """``alpha / rank``, or ``alpha / sqrt(rank)`` with rsLoRA."""
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


@EXPERTS.register("lora")
class LoraExpert(Expert):
    """A low-rank update of one linear layer, see the module's docstring."""

    Options = LoraOptions
    site_kind = "linear"
    options: LoraOptions
    lora_A: MasterLinear
    lora_B: MasterLinear

    def __init__(self, shape: SiteShape, options: LoraOptions) -> None:
        super().__init__(shape, options)
        self.lora_A = MasterLinear(shape.in_features, options.rank, bias=False)
        self.lora_B = MasterLinear(options.rank, shape.out_features, bias=False)
        self.dropout = nn.Dropout(options.dropout) if options.dropout > 0 else nn.Identity()
        self.scale = options.scale

    def forward(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The weighted update.

        Args:
            x: ``[..., in]`` input of the linear layer.
            weight: ``[..., 1]`` routing weight.

        Returns:
            ``[..., out]`` in the dtype of `x` (of autocast where it is on).
        """
        return self.lora_B(self.lora_A(self.dropout(x)) * (weight * self.scale))

    def factors(self) -> Factors:
        return Factors(self.lora_A, (self.lora_B,), scale=self.scale, dropout=self.options.dropout)

    def reset_parameters(self, init: Init) -> None:
        reset_linear(self.lora_A, init)
        if init == "normal":
            reset_linear(self.lora_B, init)
        else:
            nn.init.zeros_(self.lora_B.weight)
