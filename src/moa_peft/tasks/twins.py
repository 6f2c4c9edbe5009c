"""Test questions that training data hold with other numbers.

Arithmetic sets are made from few templates. A model may have met the words of a test question in training and only
needs the same steps with new numbers, so such rows are reported apart from the rest.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from moa_peft.data import Example

_DIGITS = re.compile(r"[0-9]+(?:[.,][0-9]+)*")
_WORDS = (
    "one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen|fourteen|fifteen|sixteen|seventeen"
    "|eighteen|nineteen|twenty"
)
_NUMBER_WORD = re.compile(rf"\b(?:{_WORDS})\b")
_NUMBER_MARK = "#"


def train_twins(test: Sequence[Example], train: Sequence[Example]) -> list[bool]:
    """Which test questions have a training question that differs in its numbers only.

    Numbers are digits and the words one to twenty; letter case, white space and punctuation do not count. A training
    question that is the same with its numbers is a twin too.

    Args:
        test: the questions to look up.
        train: the questions that the model was trained on.

    Returns:
        True for every test question with a twin, in the order of `test`.
    """
    known = {_without_numbers(example) for example in train}
    return [_without_numbers(example) in known for example in test]


def _without_numbers(example: Example) -> str:
    text = _DIGITS.sub(_NUMBER_MARK, example.question.casefold().replace(_NUMBER_MARK, " "))
    text = _NUMBER_WORD.sub(_NUMBER_MARK, text)
    return "".join(char for char in text if char.isalpha() or char == _NUMBER_MARK)
