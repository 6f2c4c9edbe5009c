"""What a router returns: one weight per expert, and what it was made from.

Shape suffixes used in this package: ``B`` batch, ``T`` tokens, ``D`` model width, ``E`` experts of a mixture,
``R`` rank, ``O`` output width, ``H`` heads, ``K`` head width, ``P`` prompt tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch


@dataclass(frozen=True)
class Routing:
    """The routing of one mixture for one forward pass; all tensors are float32.

    Attributes:
        weights: ``[..., E]``, what each expert's output is multiplied by; exactly 0 where it is not selected.
        scores: ``[..., E]``, the weights before anything was deselected.
        threshold: ``[..., 1]`` or None, the threshold that scores were compared with.
        logits: ``[..., E]`` or None, what the scores were made from.
        sparsity: ``[..., 1]`` or None, the predicted lambda of a sparsegen projection.
    """

    weights: torch.Tensor
    scores: torch.Tensor
    threshold: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    sparsity: torch.Tensor | None = None

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Routing":
        """The routing with every one of its tensors changed."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: change(value) for name, value in values.items() if value is not None})

    @property
    def selected(self) -> torch.Tensor:
        """``[..., E]`` bool, which experts take part."""
        return self.weights != 0

    def weight_of(self, columns: Sequence[int], *, like: torch.Tensor) -> torch.Tensor:
        """The weight columns of one expert, shaped and typed to multiply an activation.

        Args:
            columns: its columns, one after the other.
            like: ``[B, T, D]`` activation, or ``[B*T, D]`` in families that flatten their tokens.

        Returns:
            ``[B, T, n]`` or ``[B*T, n]`` in the dtype of `like`.
        """
        weight = self.weights[..., columns[0] : columns[-1] + 1].to(like.dtype)
        return weight if weight.dim() == like.dim() else weight.reshape(*like.shape[:-1], len(columns))
