"""Tokenized rows of different lengths to one padded batch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from moa_peft.data.tokenization import IGNORED_LABEL
from moa_peft.errors import UserError

PaddingSide = Literal["right", "left"]


@dataclass(frozen=True)
class CompletionCollator:
    """Pads `input_ids` with the padding id, `labels` with -100 and `attention_mask` with 0; ignores other columns.

    Args:
        pad_token_id: the tokenizer's padding id.
        pad_to_multiple_of: round the length of the batch up to a multiple of this.
        padding_side: "right" or "left".

    Raises:
        UserError: there is no padding id, or a setting has a value that is not allowed.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None
    padding_side: PaddingSide = "right"

    def __post_init__(self) -> None:
        if isinstance(self.pad_token_id, bool) or not isinstance(self.pad_token_id, int) or self.pad_token_id < 0:
            raise UserError(
                f"pad_token_id={self.pad_token_id!r} is no token id; if the tokenizer has no padding token, set "
                f"tokenizer.pad_token = tokenizer.eos_token."
            )
        if self.pad_to_multiple_of is not None and self.pad_to_multiple_of < 1:
            raise UserError(f"pad_to_multiple_of={self.pad_to_multiple_of!r} must be at least 1, or not set.")
        if self.padding_side not in get_args(PaddingSide):
            raise UserError(f"padding_side={self.padding_side!r} is unknown; allowed: right, left.")

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Batch rows.

        Args:
            features: rows with `input_ids` and `labels` of equal length.

        Returns:
            `input_ids`, `attention_mask` and `labels`, each int64 [batch, tokens].
        """
        length = max(len(row["input_ids"]) for row in features)
        if self.pad_to_multiple_of is not None:
            length = -(-length // self.pad_to_multiple_of) * self.pad_to_multiple_of
        shape = (len(features), length)
        batch = {
            "input_ids": torch.full(shape, self.pad_token_id, dtype=torch.long),
            "attention_mask": torch.zeros(shape, dtype=torch.long),
            "labels": torch.full(shape, IGNORED_LABEL, dtype=torch.long),
        }
        for index, row in enumerate(features):
            size = len(row["input_ids"])
            place = slice(0, size) if self.padding_side == "right" else slice(length - size, length)
            batch["input_ids"][index, place] = torch.as_tensor(row["input_ids"], dtype=torch.long)
            batch["attention_mask"][index, place] = 1
            batch["labels"][index, place] = torch.as_tensor(row["labels"], dtype=torch.long)
        return batch
