"""Validation rows split off the training rows."""

import random
from collections.abc import Sequence

from moa_peft.data.examples import Example
from moa_peft.errors import UserError


def split_validation(
    examples: Sequence[Example], *, size: int | float, seed: int
) -> tuple[list[Example], list[Example]]:
    """Set some training rows aside for validation. Rows that ask the same question stay on one side.

    Questions are the same if they agree but for case, white space and punctuation. Whole groups of such rows are
    drawn in a random order until the size is reached; a group that would exceed it is passed over, so validation
    has `size` rows or a few fewer.

    Args:
        examples: training rows.
        size: number of validation rows (an int), or their share between 0 and 1 (a float). 0 means none.
        seed: the same rows, size and seed give the same split.

    Returns:
        Training and validation rows, each in their original order.

    Raises:
        UserError: the size or seed is of the wrong kind, the rows are test rows, or a side would be empty.
    """
    wanted = _number_of_rows(size, len(examples))
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise UserError(f"The seed of the validation split must be a whole number, not {seed!r}.")
    if wanted == 0:
        return list(examples), []
    test_row = next((example for example in examples if example.split == "test"), None)
    if test_row is not None:
        raise UserError(
            f"{test_row.where} is test data by its name, and test data must not be used to choose anything. Give the "
            f"training data; if this is no test set, rename the file or set the validation size to 0."
        )
    groups: dict[str, list[int]] = {}
    for index, example in enumerate(examples):
        groups.setdefault(_question_key(example), []).append(index)
    order = list(groups.values())
    random.Random(seed).shuffle(order)
    chosen: set[int] = set()
    for group in order:
        if len(chosen) + len(group) <= wanted:
            chosen.update(group)
    if not chosen:
        raise UserError(
            f"A validation set of {wanted} rows cannot be split off: every question occurs more often than that. Give "
            f"more varied data, a larger size, or size 0 for no validation."
        )
    train = [example for index, example in enumerate(examples) if index not in chosen]
    validation = [example for index, example in enumerate(examples) if index in chosen]
    return train, validation


def _number_of_rows(size: int | float, num_examples: int) -> int:
    if isinstance(size, bool) or not isinstance(size, int | float):
        raise UserError(f"The validation size must be a number of rows or a share below 1, not {size!r}.")
    if isinstance(size, float) and not 0 <= size < 1:
        raise UserError(
            f"The validation size {size!r} is a share and must be at least 0 and below 1; give an int for rows."
        )
    if size < 0:
        raise UserError(f"The validation size {size!r} must not be negative; 0 means no validation.")
    if size == 0:
        return 0
    wanted = size if isinstance(size, int) else max(1, round(size * num_examples))
    if wanted >= num_examples:
        raise UserError(
            f"A validation size of {size!r} takes all {num_examples} rows and leaves none to train "
            f"on; give fewer than {num_examples}."
        )
    return wanted


def _question_key(example: Example) -> str:
    """The question with only its letters and digits, in one case."""
    question = example.question
    return "".join(char for char in question.casefold() if char.isalnum()) or question.strip()
