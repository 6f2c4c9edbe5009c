"""What a router returns: one weight per expert, and what it was made from.

Shape suffixes used in this package: ``B`` batch, ``T`` tokens, ``D`` model width, ``E`` experts of a mixture,
``R`` rank, ``O`` output width, ``H`` heads, ``K`` head width, ``P`` prompt tokens.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Routing:
    """The routing of one mixture for one forward pass; all tensors are float32.

    Attributes:
        weights: ``[..., E]``, what each expert's output is multiplied by; exactly 0 where it is not selected.
        scores: ``[..., E]``, the weights before anything was deselected.
        threshold: ``[..., 1]`` or None, the threshold that scores were compared with.
    """

    weights: torch.Tensor
    scores: torch.Tensor
    threshold: torch.Tensor | None = None

    @property
    def selected(self) -> torch.Tensor:
        """``[..., E]`` bool, which experts take part."""
        return self.weights != 0

    def weight_of(self, column: int, *, like: torch.Tensor) -> torch.Tensor:
        """The weight column of one expert, shaped and typed to multiply an activation.

        Args:
            column: index of the expert in the mixture.
            like: ``[B, T, D]`` activation, or ``[B*T, D]`` in families that flatten their tokens.

        Returns:
            ``[B, T, 1]`` or ``[B*T, 1]`` in the dtype of `like`.
        """
        weight = self.weights[..., column : column + 1].to(like.dtype)
        return weight if weight.dim() == like.dim() else weight.reshape(*like.shape[:-1], 1)
