"""What routers with a softmax over the experts share: options, the head, and selections by rank.

``p = softmax(head(z))`` in float32, ``[..., E]``. Selections return a mask; `keep` turns it into weights.
"""

from dataclasses import dataclass
from typing import Any

import torch

from moa_peft.errors import UserError
from moa_peft.fields import check_range
from moa_peft.initialization import Init, MasterLinear
from moa_peft.routers.base import Router, RouterOptions
from moa_peft.routers.heads import check_hidden_per_expert, make_head


@dataclass(kw_only=True)
class HeadOptions(RouterOptions):
    """Options of the head that makes the logits.

    Attributes:
        hidden_per_expert: inner width of a SwiGLU head per expert; 0 is a linear head.
        bias: whether the layers of the head have biases; they start at 0.
        init_std: start the head's weights from N(0, init_std); None is the default of linear layers, uniform in
            +-1/sqrt(width).
    """

    hidden_per_expert: int = 0
    bias: bool = False
    init_std: float | None = None

    def __post_init__(self) -> None:
        check_hidden_per_expert(self.hidden_per_expert)
        check_flag("router.bias", self.bias)
        if self.init_std is not None:
            check_range("router.init_std", self.init_std, 0.0, float("inf"))


class ProbabilityRouter(Router):
    """A router whose scores are probabilities over the experts, made from the logits of one head."""

    scores_are_probabilities = True

    def __init__(self, hidden_size: int, num_experts: int, options: HeadOptions) -> None:
        super().__init__(hidden_size, num_experts, options)
        self.head = make_head(
            hidden_size,
            num_experts,
            hidden_per_expert=options.hidden_per_expert,
            bias=options.bias,
            init_std=options.init_std,
        )

    def reads(self) -> list[MasterLinear]:
        return self.head.reads()

    def logits(self, products: list[torch.Tensor]) -> torch.Tensor:
        """``[..., E]`` float32 logits, from what the layers of the head's `reads` returned."""
        return self.head.logits(products).float()

    def reset_parameters(self, init: Init) -> None:
        self.head.reset_parameters(init)

    @classmethod
    def neutral_weight(cls, num_experts: int, options: Any) -> float:
        return 1.0 / num_experts


def softmax(logits: torch.Tensor) -> torch.Tensor:
    """``[..., E]`` probabilities in the dtype of `logits`, under autocast too."""
    return torch.softmax(logits, dim=-1, dtype=logits.dtype)


def keep(probabilities: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """``p * mask``; what is kept stays above 0, so that the selection can be read from the weights.

    Args:
        probabilities: ``[..., E]``.
        mask: ``[..., E]`` bool.

    Returns:
        ``[..., E]``: exactly 0 outside the mask, above 0 inside. No gradient reaches a
        probability outside the mask.
    """
    # Twice, so that it is no subnormal number after a division by a sum that came out above 1.
    return torch.where(mask, probabilities.clamp_min(2 * torch.finfo(probabilities.dtype).tiny), 0.0)


def normalise(weights: torch.Tensor) -> torch.Tensor:
    """Weights divided by their sum over the experts, which the caller keeps above 0."""
    return weights / weights.sum(dim=-1, keepdim=True)


def descending(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values sorted from large to small and where they were; of equal ones the first comes first."""
    return torch.sort(values.detach(), dim=-1, descending=True, stable=True)


def unsort(mask: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """A mask over sorted experts as a mask over the experts; `order` is what `descending` returned."""
    return torch.zeros_like(mask).scatter(-1, order, mask)


def first(count: int, like: torch.Tensor) -> torch.Tensor:
    """``[E]`` bool: the first `count` of E sorted experts."""
    return torch.arange(like.shape[-1], device=like.device) < count


def check_flag(name: str, value: Any) -> None:
    """Raise a UserError unless `value` is true or false."""
    if not isinstance(value, bool):
        raise UserError(f"{name} is {value!r}; it must be true or false.")


def check_at_most(name: str, count: int, num_experts: int) -> None:
    """Raise a UserError if a router is to keep more experts than its mixture has."""
    if count > num_experts:
        raise UserError(
            f"{name} is {count}, but a mixture of this model has {num_experts} experts; it must be at most "
            f"{num_experts}. Lower {name} or add experts."
        )
