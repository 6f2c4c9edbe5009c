"""Cut the user's text until a row fits, leaving the template's frame and the answer whole."""

import re
from collections.abc import Callable

from moa_peft.data.examples import Example
from moa_peft.data.templates import EncodedExample

_OMISSION = " ... "
_MAX_MEAN_WORD_CHARS = 20  # above it the script has no spaces between words, or the text is no prose


def shorten_prompt(
    example: Example, *, max_length: int, encode_one: Callable[[Example], EncodedExample]
) -> EncodedExample | None:
    """Take words out of the middle of the user's text, as few as needed, and mark the gap with an ellipsis.

    The beginning (the task) and the end (the question, the answer's format) of a prompt matter most, so both stay.
    The cut text is rendered and encoded again: the result is exactly the row that the shorter text would give. Of an
    instruction row the input is cut first, then the instruction; of a conversation the longest user message first.

    Args:
        example: a row that is too long.
        max_length: the most tokens allowed.
        encode_one: renders and encodes an example.

    Returns:
        The encoded row, or None where it is too long even with one word left of every user text.
    """
    texts = example.user_texts()
    names = list(texts) if example.source is not None else sorted(texts, key=lambda name: -len(texts[name]))
    for name in names:
        smallest = example
        for units in _units(texts[name]):
            fitting: EncodedExample | None = None
            low, high = 1, len(units) - 1
            while low <= high:
                kept = (low + high) // 2
                shortened = example.with_user_text(name, _keep_ends(units, kept))
                encoded = encode_one(shortened)
                if len(encoded.input_ids) <= max_length:
                    fitting, low = encoded, kept + 1
                else:
                    smallest, high = shortened, kept - 1
            if fitting is not None:
                return fitting
        example = smallest
    return None


def _units(text: str) -> list[list[str]]:
    """Ways to divide a text, the preferred one first: words with the space before them, characters."""
    words = re.findall(r"\s*\S+", text)
    characters = list(text)
    if len(text) > _MAX_MEAN_WORD_CHARS * len(words):
        return [characters]
    return [words, characters]


def _keep_ends(units: list[str], kept: int) -> str:
    tail_size = kept // 2
    head = "".join(units[: kept - tail_size]).rstrip()
    tail = "".join(units[len(units) - tail_size :]).lstrip()
    return (head + _OMISSION + tail).rstrip()
