"""Initial weights of routers and experts.

``identity`` (the default): the mixture adds exactly zero before the first step.
``reference``: what the released MoA code intends (parallel adapter xavier with gain 1e-4, so only nearly zero;
arXiv 2506.05928).
``normal``: N(0, 0.02) for every weight, what the released transformers port really starts from, because loading a
checkpoint re-initialises weights that it lacks. For reproducing that code; it perturbs the base model.
"""

import math
from typing import Literal

import torch
from torch import nn

from moa_peft.functional import linear

Init = Literal["identity", "reference", "normal"]
INITS: tuple[Init, ...] = ("identity", "reference", "normal")
NORMAL_STD = 0.02


class MasterLinear(nn.Linear):
    """A linear layer whose float32 weights are cast to the dtype of its input at use."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return linear(input, self.weight, self.bias)


def reset_linear(module: nn.Linear, init: Init) -> None:
    """The default of `torch.nn.Linear` for the weight (uniform in +-1/sqrt(fan_in)) or N(0, 0.02); zero bias."""
    if init == "normal":
        nn.init.normal_(module.weight, std=NORMAL_STD)
    else:
        # a = sqrt(5) makes the kaiming bound sqrt(6 / ((1 + a^2) fan_in)) equal 1 / sqrt(fan_in).
        nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5))
    if module.bias is not None:
        nn.init.zeros_(module.bias)
