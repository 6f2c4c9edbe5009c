r"""LaTeX in answers: rewritten as plain text where that says the same, evaluated by math-verify where it does not.

math-verify is slow to import and to run, and its own time limits are signals, which only the main thread may set. So
it is asked only about short expressions of known commands, whose value cannot be large: no nested powers, no
factorials.
"""

from __future__ import annotations

import logging
import math
import re
from functools import lru_cache
from typing import Any

from moa_peft.errors import UserError

_MAX_LENGTH = 100
_COMMANDS = r"\\(?:[dt]?frac|sqrt|cdot|times|div|pi|left|right)(?![A-Za-z])"
_ALLOWED = re.compile(rf"(?:{_COMMANDS}|[0-9.+\-*/^(){{}}\[\] ])+")
_POWER = re.compile(r"\^\s*(?:\{\s*-?[0-9]{1,2}(?:/[0-9])?\s*\}|[0-9](?![0-9]))")
# sympy multiplies out, so the size of a value grows with the product of the exponents.
_MAX_POWERS = 2

_SIMPLE_FRACTION = re.compile(
    r"(?:(?P<whole>[0-9]{1,9})\s{0,2})?\\[dtc]?frac\s*(?:\{\s*(?P<top>-?[0-9.,]+)\s*\}\s*\{\s*(?P<bottom>[0-9.,]+)\s*\}|(?P<digits>[0-9]{2}))"
)
_TEXT = re.compile(r"\\(?:text|mathrm|mathbf|textbf|mathit|mbox|operatorname)\s*\{([^{}]*)\}")
_SPACES = re.compile(r"\\[,;:!]|\\q?quad(?![A-Za-z])|\\ |~")
_THOUSANDS = re.compile(r"(?<=[0-9])(?:\{,\}|\\[,!]|,\\!)(?=[0-9]{3})")
_DEGREES = re.compile(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![A-Za-z]))")
_DELIMITERS = re.compile(r"\\[()\[\]]|\$\$")
HARD_LATEX = re.compile(r"\\(?:[dt]?frac|sqrt|pi)(?![A-Za-z])|[0-9)}]\s*\^")


def plain_latex(text: str) -> str:
    r"""Rewrite LaTeX that plain text can say: "\frac{3}{4}", "2\frac12", "1{,}000", "\text{ kg}", "50\%", "5^\circ".

    Args:
        text: any text; one without LaTeX comes back as it is.

    Returns:
        The text with these commands and the delimiters of formulas rewritten, and "\boxed" and all others in place.
    """
    if "\\" not in text and "$$" not in text:
        return text
    text = _THOUSANDS.sub("", text)
    text = _TEXT.sub(r" \1", text)
    text = _DEGREES.sub("", text)
    text = _SIMPLE_FRACTION.sub(_plain_fraction, text)
    text = _SPACES.sub(" ", text)
    text = _DELIMITERS.sub(" ", text)
    return re.sub(r"\\([$%#&_])", r"\1", text)


def latex_value(expression: str) -> float | None:
    r"""The value of a short arithmetic expression: "\sqrt{16}", "2^3", "3 \times 10^8", "12 - 34".

    Args:
        expression: without delimiters such as "$".

    Returns:
        The value, or None where there is none that is real and finite, or the expression holds anything but numbers,
        operators, fractions, roots and small powers.

    Raises:
        UserError: math-verify is not installed.
    """
    expression = expression.replace("\u00d7", r"\times ").replace("\u00f7", r"\div ")
    expression = re.sub(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))|[$%]", "", expression).strip(" .,")
    if not 0 < len(expression) <= _MAX_LENGTH or not _ALLOWED.fullmatch(expression) or expression[-1] in "+-*/^":
        return None
    if not expression.count("^") == len(_POWER.findall(expression)) <= _MAX_POWERS:
        return None
    return _evaluate(expression)


def require_math_verify() -> None:
    """Raise a `UserError` unless math-verify is installed: for checks before long work."""
    _import_math_verify()


@lru_cache(maxsize=256)
def _evaluate(expression: str) -> float | None:
    math_verify = _import_math_verify()
    parsed = math_verify.parse(
        f"${expression}$",
        extraction_config=[math_verify.LatexExtractionConfig()],
        fallback_mode="no_fallback",
        extraction_mode="first_match",
        parsing_timeout=None,
    )
    if not parsed:
        return None
    # sympy says in its own ways that a value is complex, infinite or no number.
    try:
        value = float(parsed[0])
    except (TypeError, ValueError, OverflowError):
        return None
    return value if math.isfinite(value) else None


def _plain_fraction(match: re.Match[str]) -> str:
    top, bottom = (match["top"], match["bottom"]) if match["digits"] is None else match["digits"]
    return f"{match['whole'] or ''} {top}/{bottom}" if match["whole"] else f"{top}/{bottom}"


def _import_math_verify() -> Any:
    try:
        import math_verify
    except ImportError as error:
        raise UserError("evaluation: answers in LaTeX need math-verify. Run: pip install 'moa-peft[eval]'") from error
    # It warns once that parsing has no time limit, which the checks above make unnecessary.
    logging.getLogger("math_verify.parser").setLevel(logging.ERROR)
    return math_verify
