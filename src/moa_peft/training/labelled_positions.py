"""The loss of the labelled positions only: unlabelled hidden states never reach the output layer.

With a vocabulary of 262,144 the output layer of a small model costs more than all its blocks, and most positions of
an instruction data set (the prompt, the padding) carry no label. A forward pre-hook on the output layer replaces the
hidden states [B, T, D] by the N labelled rows [1, N, D], so whatever the model does after that layer (soft-capping,
logit scaling) runs as the model wrote it, on every device, with no code per model family.

Shapes: B batch, T tokens, D model, V vocabulary, N labelled positions of the batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import functional

IGNORED = -100


@dataclass
class LabelledPositions:
    """Which positions predict a label, and whether the output layer was already restricted to them.

    Attributes:
        mask_BT: position t is True when the token at t + 1 has a label.
        targets_N: the labels that those positions predict, in row-major order; empty where only logits are wanted.
        selected: the output layer has received the selected rows in this forward.
    """

    mask_BT: torch.Tensor
    targets_N: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    selected: bool = False

    @classmethod
    def from_labels(cls, labels_BT: torch.Tensor) -> LabelledPositions:
        """Shift labels by one, as causal language models do: position t predicts label t + 1."""
        targets_BT = functional.pad(labels_BT[:, 1:], (0, 1), value=IGNORED)
        mask_BT = targets_BT != IGNORED
        return cls(mask_BT=mask_BT, targets_N=targets_BT[mask_BT])

    def rows(self, states_BTD: torch.Tensor) -> torch.Tensor:
        """Pick the labelled rows.

        Args:
            states_BTD: [B, T, D], or [B, P + T, D] where prompt learning put P virtual tokens in front.

        Returns:
            [1, N, D] in the input's dtype; N may be 0.
        """
        virtual = states_BTD.shape[1] - self.mask_BT.shape[1]
        mask_BT = functional.pad(self.mask_BT, (virtual, 0), value=False)
        return states_BTD[mask_BT.to(states_BTD.device)].unsqueeze(0)

    def loss_sum(self, logits: torch.Tensor, *, label_smoothing: float = 0.0) -> torch.Tensor:
        """Sum of the cross entropies in float32; 0 (with a graph) when nothing is labelled.

        Args:
            logits: [1, N, V] when the output layer was restricted, else [B, T, V].
            label_smoothing: weight of the uniform distribution in the target.
        """
        rows_NV = (logits if self.selected else self.rows(logits)).squeeze(0)
        return functional.cross_entropy(
            rows_NV.float(),
            self.targets_N.to(rows_NV.device),
            reduction="sum",
            label_smoothing=label_smoothing,
        )


@contextmanager
def only_labelled_positions(output_layer: nn.Module | None, labels_BT: torch.Tensor) -> Iterator[LabelledPositions]:
    """While active, `output_layer` computes the labelled positions only.

    Args:
        output_layer: `model.get_output_embeddings()`. With None, or a model that does not call the module, the
            positions are selected from the full logits instead: slower, the same loss.
        labels_BT: labels as in a data set, unshifted, -100 where there is none.

    Yields:
        The positions, to compute the loss from the logits of the forward that ran inside.
    """
    positions = LabelledPositions.from_labels(labels_BT)
    with restricted_output_layer(output_layer, positions):
        yield positions


@contextmanager
def restricted_output_layer(output_layer: nn.Module | None, positions: LabelledPositions) -> Iterator[None]:
    """While active, `output_layer` computes the given positions only and notes that in `positions.selected`."""
    if output_layer is None:
        yield
        return

    def keep_labelled_rows(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        positions.selected = True
        return (positions.rows(args[0]), *args[1:])

    handle = output_layer.register_forward_pre_hook(keep_labelled_rows)
    try:
        yield
    finally:
        handle.remove()
