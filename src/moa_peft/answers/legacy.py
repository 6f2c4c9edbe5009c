"""The extractors behind published numbers, for comparison with these only.

LLM-Adapters and the papers that evaluate with its scripts, MoA among them, read answers like this. The rules are
re-implemented from their description, faults included:

- A number is the last one of the text, so whatever a model writes after its answer replaces it, and "10-3" ends in -3.
- A letter is the first capital A to E anywhere, so "Because" is B, and "A: ..." and "The Answer is C" are A.
- An option is the first label in the text, so "not answer1 but answer2" is answer1, and "untrue" is true.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_SIGNED_DECIMAL = re.compile(r"-?[0-9]+\.?[0-9]*")


def legacy_number(text: str) -> float | None:
    """The last signed decimal once commas are dropped: "1/2" is 2, "-$5" is 5, and "10-3" is -3."""
    numbers = _SIGNED_DECIMAL.findall(text.replace(",", ""))
    return float(numbers[-1]) if numbers else None


def legacy_letter(text: str, *, choices: Sequence[str]) -> str | None:
    """The first capital letter among `choices`, be it a part of a word."""
    return next((character for character in text if character in choices), None)


def legacy_option(text: str, *, choices: Sequence[str]) -> str | None:
    """The first of the labels, in lower case only, be it a part of a word."""
    found = re.search("|".join(map(re.escape, choices)), text)
    return found[0] if found else None
