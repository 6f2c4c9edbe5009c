"""Core-space experts (CoMoL, arXiv 2603.00573): ``s * B (sum_i w_i M_i) A dropout(x)``, ``s = alpha / rank``.

A and B are shared, each expert is one ``R x R`` core M_i: n experts cost hardly more than one LoRA of the same rank.
The method's router reads ``A dropout(x)``, which is ``router_input: core`` in the configuration.
"""

import math

import torch
from torch import nn

from moa_peft.experts.base import EXPERTS, Expert, Factors, SiteShape
from moa_peft.experts.lora import LoraOptions
from moa_peft.initialization import NORMAL_STD, Init, MasterLinear, reset_linear


@EXPERTS.register("core")
class CoreExpert(Expert):
    """Mixed cores between one A and one B, see the module's docstring."""

    Options = LoraOptions
    site_kind = "linear"
    holds_copies = True
    options: LoraOptions
    lora_A: MasterLinear
    lora_B: MasterLinear

    def __init__(self, shape: SiteShape, options: LoraOptions, copies: int = 1) -> None:
        super().__init__(shape, options, copies)
        self.lora_A = MasterLinear(shape.in_features, options.rank, bias=False)
        self.lora_B = MasterLinear(options.rank, shape.out_features, bias=False)
        self.cores = nn.Parameter(torch.empty(copies, options.rank, options.rank))
        self.dropout = nn.Dropout(options.dropout) if options.dropout > 0 else nn.Identity()

    def forward(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The weighted update.

        Args:
            x: ``[..., in]`` input of the linear layer.
            weight: ``[..., n]`` routing weights of the n cores.

        Returns:
            ``[..., out]`` in the dtype of `x` (of autocast where it is on).
        """
        z = self.lora_A(self.dropout(x))
        mixed = torch.einsum("...e,erk,...k->...r", weight * self.options.scale, self.cores.to(z.dtype), z)
        return self.lora_B(mixed)

    def factors(self) -> Factors:
        return Factors(
            self.lora_A, (self.lora_B,), scale=self.options.scale, has_cores=True, dropout=self.options.dropout
        )

    def reset_parameters(self, init: Init) -> None:
        reset_linear(self.lora_A, init)
        # B is zero, so it learns first, and learns nothing where the cores are zero too.
        if init == "normal":
            reset_linear(self.lora_B, init)
            nn.init.normal_(self.cores, std=NORMAL_STD)
        else:
            nn.init.zeros_(self.lora_B.weight)
            bound = 1 / math.sqrt(self.options.rank)
            nn.init.uniform_(self.cores, -bound, bound)
