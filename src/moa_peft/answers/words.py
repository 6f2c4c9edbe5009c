"""Numbers in words: "twelve", "twenty-five", "two hundred and six", "three thousand".

Words are read only where a text states its answer: in running text "one" and "two" mostly count what was not asked.
"""

from __future__ import annotations

import re

# fmt: off
_SMALL = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)
# fmt: on
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_VALUES = {word: float(value) for value, word in enumerate(_SMALL)} | {
    word: 10.0 * value for value, word in enumerate(_TENS, start=2)
}
SCALES = {"hundred": 1e2, "thousand": 1e3, "million": 1e6, "billion": 1e9, "trillion": 1e12}

_WORD = rf"(?:{'|'.join((*_VALUES, *SCALES))})\b"
_AND = r"(?:(?<=hundred)|(?<=thousand)|(?<=million)) and "
_NUMBER = re.compile(
    rf"\b(?P<sign>(?:negative|minus) )?(?P<words>(?:a )?{_WORD}(?:(?:[ -]|{_AND}){_WORD})*)", re.IGNORECASE
)
# fmt: off
_DENOMINATORS = {
    "half": 2, "halve": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6, "seventh": 7, "eighth": 8,
    "ninth": 9, "tenth": 10,
}
# fmt: on
# "two thirds", "three-quarters", "one and a half"
_FRACTION = re.compile(
    rf"(?P<added> and an?)?[ -](?P<part>{'|'.join(_DENOMINATORS)})s?\b(?P<of> of\b)?", re.IGNORECASE
)
_HALF = re.compile(r"\s*an?\s+half\b(?!\s+(?:of|an?|the|as|dozen)\b|-)|\s*half\s*[.!]*\Z", re.IGNORECASE)
_ONLY = re.compile(r"\s*(?:(?:just|only|exactly|about|approximately)\s+)?\Z", re.IGNORECASE)
# "two-step" and "one of them" are no numbers.
_OTHER = re.compile(r"-[a-z]|(?<=\bone)\s+(?:of|or|who|which|that)\b", re.IGNORECASE)


def first_number_in_words(text: str) -> tuple[float, re.Match[str]] | None:
    """The first number that a text has in words, and where it stands.

    Returns:
        Its value and its place; None where there is none, or a share of something else ("two thirds of 12"), an
        ordinal ("twenty-fifth"), or a "one" that may be a pronoun.
    """
    half = _HALF.match(text)
    if half is not None:
        return 0.5, half
    match = _NUMBER.search(text)
    if match is None:
        return None
    value = _value(re.findall(_WORD, match["words"].lower()))
    fraction = _FRACTION.match(text, match.end())
    if fraction is not None:
        is_ordinal = match[0].lower().endswith(_TENS) and not fraction["added"]
        if fraction["of"] or is_ordinal:
            return None
        denominator = _DENOMINATORS[fraction["part"].lower()]
        value = value + 1 / denominator if fraction["added"] else value / denominator
    elif _OTHER.match(text, match.end()) or (match[0].lower() == "one" and not _ONLY.match(text, 0, match.start())):
        return None
    return (-value if match["sign"] else value), match


def _value(words: list[str]) -> float:
    """What words add up to: those before a "thousand" are multiplied by it, a "hundred" multiplies its own group."""
    total = group = 0.0
    for word in words:
        if word == "hundred":
            group = (group or 1) * 100
        elif word in SCALES:
            total += (group or 1) * SCALES[word]
            group = 0.0
        else:
            group += _VALUES[word]
    return total + group
