"""LoRA experts that share one A (HydraLoRA, arXiv 2404.19245): ``s * sum_i w_i B_i A dropout(x)``.

The scale s is alpha / rank. One module holds all copies, and takes one routing weight for each.
"""

import torch
from torch import nn

from moa_peft.experts.base import EXPERTS, Expert, Factors, SiteShape
from moa_peft.experts.lora import LoraOptions
from moa_peft.initialization import Init, MasterLinear, reset_linear


@EXPERTS.register("hydra")
class HydraExpert(Expert):
    """Low-rank updates of one linear layer that read through the same A, see the module's docstring."""

    Options = LoraOptions
    site_kind = "linear"
    holds_copies = True
    options: LoraOptions
    lora_A: MasterLinear

    def __init__(self, shape: SiteShape, options: LoraOptions, copies: int = 1) -> None:
        super().__init__(shape, options, copies)
        self.lora_A = MasterLinear(shape.in_features, options.rank, bias=False)
        self.lora_B = nn.ModuleList(MasterLinear(options.rank, shape.out_features, bias=False) for _ in range(copies))
        self.dropout = nn.Dropout(options.dropout) if options.dropout > 0 else nn.Identity()

    def forward(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The weighted update.

        Args:
            x: ``[..., in]`` input of the linear layer.
            weight: ``[..., n]`` routing weights of the n copies.

        Returns:
            ``[..., out]`` in the dtype of `x` (of autocast where it is on).
        """
        z = self.lora_A(self.dropout(x))
        weight = weight * self.options.scale
        parts = [write(z * weight[..., i : i + 1]) for i, write in enumerate(self.lora_B)]
        return torch.stack(parts).sum(0)

    def factors(self) -> Factors:
        writes: tuple[MasterLinear, ...] = tuple(self.lora_B)  # type: ignore[arg-type]
        return Factors(self.lora_A, writes, scale=self.options.scale, dropout=self.options.dropout)

    def reset_parameters(self, init: Init) -> None:
        reset_linear(self.lora_A, init)
        for write in self.lora_B:
            assert isinstance(write, MasterLinear)
            if init == "normal":
                reset_linear(write, init)
            else:
                nn.init.zeros_(write.weight)
