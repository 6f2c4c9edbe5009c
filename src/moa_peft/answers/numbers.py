"""Numeric answers: reading the number a model gives, and comparing it with the right one.

Two extractors, because a score should say how much of it is format: `strict` takes the number of the first statement
of an answer and nothing else, `flexible` falls back on the last number of the text.
"""

import math
import re
import unicodedata
from typing import Literal

from moa_peft.answers.latex import HARD_LATEX, latex_value, plain_latex
from moa_peft.answers.statements import own_answer, stated_parts
from moa_peft.errors import UserError

ExtractionMode = Literal["strict", "flexible"]

# A minus is a sign only where no operand stands directly before it: "-3" and "(-3)", but not "10-3" or "10 - 3".
# Apart from its number it is a sign only after "=", "(", ":" or "is".
_MINUS = r"(?:(?<![0-9A-Za-z)\]}])-(?=[$\u20ac\u00a3.0-9])|(?:(?<=[=(:])|(?<=[=(:][ ])|(?<=\bis[ ]))-[ ](?=[$.0-9]))"
_WHOLE = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
_NUMBER = re.compile(
    rf"""
    (?P<sign>{_MINUS})? (?:[$\u20ac\u00a3](?P<inner_sign>-?))?
    (?:
        (?<![A-Za-z0-9/]) (?:(?P<mixed>[0-9]+)[ ]+)? (?P<top>{_WHOLE})/(?P<bottom>{_WHOLE})(?![0-9/])
      | (?<![A-Za-z]) (?P<decimal>{_WHOLE}(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)
            (?:[ ](?P<scale>thousand|million|billion|trillion)\b)?
      | (?<![A-Za-z0-9]) (?P<point>\.[0-9]+)
    )
    """,
    re.VERBOSE,
)
_SCALES = {"thousand": 1e3, "million": 1e6, "billion": 1e9, "trillion": 1e12}
# What makes the first number of a statement a part of a calculation: "5 apples + 3 apples = 8 apples".
_OPERATOR_AFTER = re.compile(
    r"\s*(?:\^|\\(?:times|cdot|div)|[/x]\s*[0-9($\\]|(?:[+*\u00d7\u00f7]\s*|-\s+)(?:[0-9($\\]|[a-z]\b))"
    r"|[ %]*[A-Za-z ]{0,25}\s[+*\u00d7\u00f7]\s"
    # "5-3" may be a range or a score, "5-3=2" is a difference.
    r"|-\$?[0-9][0-9.,]*\s?="
)
_OPERATOR_BEFORE = re.compile(r"(?:\b[a-z]\s*[-+*/^\u00d7\u00f7]|[)\]]\s*[+*/^\u00d7\u00f7])\s*\Z")
_UNIT_AFTER = re.compile(r"\s+[A-Za-z][A-Za-z ]*\Z")
_SUM = re.compile(r"\b(?:sum|difference|product|quotient)\b", re.IGNORECASE)
_RESULT = re.compile(r"=|\bequals\b|\bis\s+equal\s+to\b|\bwhich\s+(?:is|gives|makes)\b", re.IGNORECASE)
# Words before the first number of a statement that say that there is none.
_NO_NUMBER = re.compile(
    r"\b(?:unknown|unclear|undetermined|undefined|impossible|unable|insufficient|cannot|depends|sorry)\b"
    r"|\b(?:can|could|is|do)(?:n't|\s+not)\b|\bnot\s+(?:known|given|possible|clear|enough|sure)\b|\bno\s+answer\b",
    re.IGNORECASE,
)
_LEADING_MINUS = re.compile(r"\A-\s+(?=[$.0-9])")
_NEGATED = re.compile(r"\bnot\s+(?:equal\s+to\s+)?\Z", re.IGNORECASE)
_MATH = re.compile(r"\\boxed\s*\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}|\$([^$\n]{1,200})\$")

_ABBREVIATION = re.compile(r"\b(?:Rs|No|approx|ca|about)\.\s*", re.IGNORECASE)
_OPERATOR_WORDS = (
    (re.compile(r"(?<=[0-9])\s+plus\s+(?=[$0-9])"), " + "),
    (re.compile(r"(?<=[0-9])\s+minus\s+(?=[$0-9])"), " - "),
    (re.compile(r"(?<=[0-9])\s+times\s+(?=[$0-9])"), " * "),
    (re.compile(r"(?<=[0-9])\s+divided\s+by\s+(?=[$0-9])"), " / "),
    (re.compile(r"\bnegative\s+(?=[$.0-9])", re.IGNORECASE), "-"),
    (re.compile(r"(?:(?<=\bis )|(?<==)|(?<== ))minus\s+(?=[$.0-9])", re.IGNORECASE), "-"),
)
_CHARACTERS = str.maketrans(
    {"\u2212": "-", "\u2013": "-", "\ufe63": "-", "\uff0d": "-", "\u2044": "/", "\ufe69": "$", "\uff04": "$"}
)
_NARROW_SPACE = re.compile(r"(?<=[0-9])[\u00a0\u202f\u2009](?=[0-9]{3}(?![0-9]))")
_SUPERSCRIPT = re.compile("(?<=[0-9)])[\u00b2\u00b3]")
_VULGAR_FRACTION = re.compile("[\u00bc-\u00be\u2150-\u215e]")


def extract_number(text: str, *, mode: ExtractionMode) -> float | None:
    r"""Read the numeric answer out of a generated text.

    Understood are signs, thousands separators, decimals, fractions ("1/2", "1 1/2", "\frac{1}{2}"), a currency
    sign, a percent sign (50% is 50), units, Markdown and LaTeX around the number. In "the answer is 3 + 4 = 7" and
    "the answer is 3 + 4" the number is the result, 7. Questions that the text adds after its answer are not read.

    Args:
        text: What the model wrote.
        mode: `strict` reads the first statement that holds a number ("the answer is 12", "Answer: 12", "#### 12",
            "\boxed{12}"), up to the end of its sentence; without one, there is no answer. `flexible` then takes the
            last number of the text.

    Returns:
        The number, or None where there is none (or none that is finite).

    Raises:
        UserError: `mode` is neither of the two; or the answer is an expression in LaTeX and math-verify, which
            evaluates it, is not installed.
    """
    if mode not in ("strict", "flexible"):
        raise UserError(f"mode is {mode!r}; allowed are 'strict' and 'flexible'.")
    text = _plain(own_answer(text))
    for part in stated_parts(text):
        stated = _stated_number(part)
        if stated is not None:
            return stated
    return None if mode == "strict" else _last_number(text)


def numbers_match(predicted: float | None, gold: float, *, tolerance: float = 1e-3) -> bool:
    """Whether an extracted number is the right one: |predicted - gold| <= tolerance; None never matches."""
    return predicted is not None and abs(predicted - gold) <= tolerance


def _plain(text: str) -> str:
    """The text in the spelling that the patterns read."""
    text = _NARROW_SPACE.sub("", text.translate(_CHARACTERS)).replace("\u00a0", " ").replace("\u202f", " ")
    text = _VULGAR_FRACTION.sub(
        lambda match: " " + unicodedata.normalize("NFKC", match[0]).replace("\u2044", "/"), text
    )
    text = _SUPERSCRIPT.sub(lambda match: "^2" if match[0] == "\u00b2" else "^3", text)
    text = _ABBREVIATION.sub(" ", plain_latex(text))
    for words, sign in _OPERATOR_WORDS:
        text = words.sub(sign, text)
    return text


def _stated_number(part: str) -> float | None:
    part = _LEADING_MINUS.sub("-", part)
    first = next((m for m in _NUMBER.finditer(part) if not _NEGATED.search(part, 0, m.start())), None)
    hard = HARD_LATEX.search(part)
    if hard and (first is None or "=" not in part[hard.start() :]):
        return latex_value(_expression(part))
    if first is None or _NO_NUMBER.search(part, 0, first.start()):
        return None
    rest = part[first.end() :]
    operator = _OPERATOR_AFTER.match(rest) or _OPERATOR_BEFORE.search(part, 0, first.start())
    if not operator and not _SUM.search(part, 0, first.start()):
        return _value(first)
    results = list(_RESULT.finditer(rest))
    result = _NUMBER.search(rest, results[-1].end()) if results else None
    if result is not None:
        return _value(result)
    return latex_value(_UNIT_AFTER.sub("", _expression(part))) if operator else None


def _last_number(text: str) -> float | None:
    last = None
    for match in _NUMBER.finditer(text):
        last = match
    if last is None:
        return None
    for piece in _MATH.finditer(text):
        if piece.start() <= last.start() < piece.end():
            content = (piece[1] or piece[2]).rpartition("=")[2]
            value = latex_value(content) if HARD_LATEX.search(content) else None
            if value is not None:
                return value
    return _value(last)


def _expression(part: str) -> str:
    r"""The expression of a statement: what stands between "$" signs where there are any, after the last "="."""
    math_piece = _MATH.search(part)
    expression = (math_piece[1] or math_piece[2]) if math_piece else part
    return expression.rpartition("=")[2].strip(" *_`")


def _value(match: re.Match[str]) -> float | None:
    if match["top"] is not None:
        bottom = _float(match["bottom"])
        if bottom == 0:
            return None
        value = float(match["mixed"] or 0) + _float(match["top"]) / bottom
    else:
        value = _float(match["decimal"] or match["point"])
    value *= _SCALES.get(match["scale"], 1)
    if match["sign"] or match["inner_sign"]:
        value = -value
    return value if math.isfinite(value) else None


def _float(digits: str) -> float:
    return float(digits.replace(",", ""))
