"""Numeric answers: reading the number a model gives, and comparing it with the right one.

Two extractors, because a score should say how much of it is format: `strict` takes the number of the first
"answer is ..." statement and nothing else, `flexible` falls back on the last number of the text.
"""

import math
import re
from typing import Literal

from moa_peft.errors import UserError

ExtractionMode = Literal["strict", "flexible"]

# A minus is a sign only where no operand stands directly before it: "-3" and "(-3)", but not "10-3" or "10 - 3".
_SIGN = r"(?:(?<![0-9A-Za-z)\]])-(?=[$.0-9]))?"
_WHOLE = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
_NUMBER = re.compile(
    rf"""
    (?P<sign>{_SIGN}) (?:\$(?P<inner_sign>-?))?
    (?:
        (?<![A-Za-z0-9/]) (?:(?P<mixed>[0-9]+)[ ])? (?P<top>{_WHOLE})/(?P<bottom>{_WHOLE})(?![0-9/])
      | (?<![A-Za-z]) (?P<decimal>{_WHOLE}(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)
      | (?<![A-Za-z0-9]) (?P<point>\.[0-9]+)
    )
    """,
    re.VERBOSE,
)
_STATEMENT = re.compile(r"\banswer\s+is\b", re.IGNORECASE)
_STATEMENT_LEAD = re.compile(r"[\s:*_`~]*")
_STATEMENT_END = re.compile(r"\n|[.!?](?=\s|$|[A-Za-z])")
_OPERATOR_AFTER = re.compile(r"\s*(?:[+*/x\u00d7\u00f7]|-\s)")
_LATEX_FRACTION = re.compile(r"\\[dt]?frac\s*\{\s*([0-9]+)\s*\}\s*\{\s*([0-9]+)\s*\}")
_ABBREVIATION = re.compile(r"\b(?:Rs|No|approx)\.\s*", re.IGNORECASE)
_PLAIN_MINUS = str.maketrans({"\u2212": "-", "\u2013": "-", "\u00a0": " ", "\u202f": " "})


def extract_number(text: str, *, mode: ExtractionMode) -> float | None:
    r"""Read the numeric answer out of a generated text.

    Understood are signs, thousands separators, decimals, fractions ("1/2", "1 1/2", "\frac{1}{2}"), a currency
    sign, a percent sign (50% is 50), units and Markdown around the number. In "the answer is 3 + 4 = 7" the number
    is the result, 7.

    Args:
        text: What the model wrote.
        mode: `strict` reads the first "answer is" statement only, up to the end of its sentence; if that holds no
            number, there is no answer. `flexible` then takes the last number of the whole text.

    Returns:
        The number, or None where there is none (or none that is finite).

    Raises:
        UserError: `mode` is neither of the two.
    """
    if mode not in ("strict", "flexible"):
        raise UserError(f"mode is {mode!r}; allowed are 'strict' and 'flexible'.")
    text = _LATEX_FRACTION.sub(r"\1/\2", text.translate(_PLAIN_MINUS))
    text = _ABBREVIATION.sub(" ", text)
    stated = _stated_number(text)
    if stated is not None or mode == "strict":
        return stated
    return _last_number(text)


def numbers_match(predicted: float | None, gold: float, *, tolerance: float = 1e-3) -> bool:
    """Whether an extracted number is the right one: |predicted - gold| <= tolerance; None never matches."""
    return predicted is not None and abs(predicted - gold) <= tolerance


def _stated_number(text: str) -> float | None:
    statement = _STATEMENT.search(text)
    if statement is None:
        return None
    lead = _STATEMENT_LEAD.match(text, statement.end())
    sentence = text[lead.end() if lead else statement.end() :]
    end = _STATEMENT_END.search(sentence)
    sentence = sentence[: end.start()] if end else sentence
    first = _NUMBER.search(sentence)
    if first is None:
        return None
    rest = sentence[first.end() :]
    if "=" in rest and _OPERATOR_AFTER.match(rest):
        result = _NUMBER.search(rest.rpartition("=")[2])
        if result is not None:
            return _value(result)
    return _value(first)


def _last_number(text: str) -> float | None:
    last = None
    for match in _NUMBER.finditer(text):
        last = match
    return None if last is None else _value(last)


def _value(match: re.Match[str]) -> float | None:
    if match["top"] is not None:
        bottom = _plain(match["bottom"])
        if bottom == 0:
            return None
        value = float(match["mixed"] or 0) + _plain(match["top"]) / bottom
    else:
        value = _plain(match["decimal"] or match["point"])
    if match["sign"] or match["inner_sign"]:
        value = -value
    return value if math.isfinite(value) else None


def _plain(digits: str) -> float:
    return float(digits.replace(",", ""))
