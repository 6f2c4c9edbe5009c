"""Parallel adapter beside the MLP (He et al., arXiv 2110.04366): ``w * (U silu(D x + b_D) + b_U)``.

No inner scale and no norm, as in MoA (arXiv 2506.05928).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from moa_peft.experts.base import EXPERTS, Expert, ExpertOptions, Factors, SiteShape
from moa_peft.fields import check_positive_int
from moa_peft.initialization import Init, MasterLinear, reset_linear

REFERENCE_GAIN = 1e-4


@dataclass(kw_only=True)
class ParallelOptions(ExpertOptions):
    """Options of ``{type: parallel, ...}``.

    Attributes:
        size: inner width of the bottleneck.
    """

    size: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive_int("size", self.size)


@EXPERTS.register("parallel")
class ParallelExpert(Expert):
    """A bottleneck that reads what the MLP reads and adds to what it returns."""

    Options = ParallelOptions
    site_kind = "mlp"
    options: ParallelOptions

    def __init__(self, shape: SiteShape, options: ParallelOptions) -> None:
        super().__init__(shape, options)
        self.down = MasterLinear(shape.in_features, options.size)
        self.up = MasterLinear(options.size, shape.out_features)

    def forward(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The weighted output.

        Args:
            x: ``[..., D]`` input of the MLP.
            weight: ``[..., 1]`` routing weight.

        Returns:
            ``[..., D]`` in the dtype of `x` (of autocast where it is on).
        """
        return self.up(F.silu(self.down(x))) * weight

    def factors(self) -> Factors:
        return Factors(self.down, (self.up,), activation=F.silu)

    def reset_parameters(self, init: Init) -> None:
        for module in (self.down, self.up):
            reset_linear(module, init)
        if init == "reference":
            nn.init.xavier_uniform_(self.down.weight, gain=REFERENCE_GAIN)
            nn.init.xavier_uniform_(self.up.weight, gain=REFERENCE_GAIN)
        elif init == "identity":
            nn.init.zeros_(self.up.weight)
