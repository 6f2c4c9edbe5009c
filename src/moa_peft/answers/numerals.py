"""Numbers in digits: where a text has them, and their values."""

import math
import re

from moa_peft.answers.words import SCALES

# A minus is a sign only where no operand stands directly before it: "-3" and "(-3)", but not "10-3" or "10 - 3".
# Apart from its number it is a sign only after "=", "(", ":" or "is".
_MINUS = r"(?:(?<![0-9A-Za-z)\]}])-(?=[$\u20ac\u00a3.0-9])|(?:(?<=[=(:])|(?<=[=(:][ ])|(?<=\bis[ ]))-[ ](?=[$.0-9]))"
# "1,234,567", "12,34,567" as in India, or digits alone.
_WHOLE = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]{1,2}(?:,[0-9]{2}){1,6},[0-9]{3}(?![0-9,])|[0-9]+)"
NUMBER = re.compile(
    rf"""
    (?P<sign>{_MINUS})? (?:[$\u20ac\u00a3](?P<inner_sign>-?))?
    (?:
        (?<![A-Za-z0-9/]) (?:(?P<mixed>[0-9]+)[ ]+)? (?P<top>{_WHOLE})/(?P<bottom>{_WHOLE})(?![0-9/])
      | (?<![A-Za-z]) (?P<decimal>{_WHOLE}(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)
            (?:[ ](?P<scale>hundred|thousand|million|billion|trillion)\b|(?P<letter>[kKMB])(?![\w/]))?
      | (?<![A-Za-z0-9]) (?P<point>\.[0-9]+)
    )
    """,
    re.VERBOSE,
)
"""A number with its sign, currency and scale, or a fraction; see `number_value`."""
_SCALES = SCALES | {"k": 1e3, "K": 1e3, "M": 1e6, "B": 1e9}


def number_value(match: re.Match[str]) -> float | None:
    """The value of a match of `NUMBER`; None for a fraction over zero and for what no float can hold."""
    if match["top"] is not None:
        bottom = _float(match["bottom"])
        if bottom == 0:
            return None
        value = float(match["mixed"] or 0) + _float(match["top"]) / bottom
    else:
        value = _float(match["decimal"] or match["point"])
    value *= _SCALES.get(match["scale"] or match["letter"], 1)
    if match["sign"] or match["inner_sign"]:
        value = -value
    return value if math.isfinite(value) else None


def _float(digits: str) -> float:
    return float(digits.replace(",", ""))
