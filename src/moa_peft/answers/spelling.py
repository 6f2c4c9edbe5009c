"""One spelling for numbers: signs, digits, fractions, powers and operators as the patterns of `numbers` read them."""

from __future__ import annotations

import re
import unicodedata

from moa_peft.answers.latex import plain_latex

_FULL_WIDTH_ZERO = 0xFF10
_CHARACTERS = str.maketrans(
    {"\u2212": "-", "\u2013": "-", "\ufe63": "-", "\uff0d": "-", "\u2044": "/", "\ufe69": "$", "\uff04": "$"}
    | {chr(_FULL_WIDTH_ZERO + digit): str(digit) for digit in range(10)}
)
_NARROW_SPACE = re.compile(r"(?<=[0-9])[\u00a0\u202f\u2009](?=[0-9]{3}(?![0-9]))")
_BLANK_GROUPS = re.compile(r"(?<![0-9.,/])[1-9][0-9]{0,2}(?: [0-9]{3}){1,6}(?![0-9/])")
# In a statement "3,5 hours" has a decimal comma, and "3-1/2 hours" is a mixed number.
_COMMA_BEFORE_UNIT = re.compile(r"(?<![0-9.,])([0-9]{1,4}),([0-9]{1,2})(?=\s?(?:[a-z\u20ac%]))")
_HYPHENATED = re.compile(r"(?<![0-9./-])([0-9]{1,4})-([1-9]/(?:[2-9]|1[0-9]))(?=\s[a-z]|\s?\Z)")
_SUPERSCRIPTS = str.maketrans("\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207b", "0123456789-")
_SUPERSCRIPT = re.compile("(?<=[0-9)])\u207b?[\u2070\u00b9\u00b2\u00b3\u2074-\u2079]{1,3}")
# "1.234.567" has two separators, so they are not decimal points; the comma of "0,75" cannot separate thousands.
_DOTTED_GROUPS = re.compile(r"(?<![0-9.,])[1-9][0-9]{0,2}(?:\.[0-9]{3}){2,6}(?![0-9]|\.[0-9])")
_DOTS_AND_COMMA = re.compile(r"(?<![0-9.,])[1-9][0-9]{0,2}(?:\.[0-9]{3}){1,6},[0-9]{1,2}(?![0-9,])")
_MARKED_GROUPS = re.compile(r"(?<![0-9])[1-9][0-9]{0,2}(?:(?:'[0-9]{3}){1,6}|(?:_[0-9]{3}){1,6})(?![0-9])")
_DECIMAL_COMMA = re.compile(r"(?<![0-9.,])0,(?=[0-9]{1,6}(?![0-9,]))")
_VULGAR_FRACTION = re.compile("[\u00bc-\u00be\u2150-\u215e]")
_ABBREVIATION = re.compile(r"\b(?:(?:Rs|approx|ca|about)\.\s*|No\.\s*(?=[0-9]))", re.IGNORECASE)
_REWRITTEN = (
    (re.compile(r"(?<=[0-9)])\s?\*\*\s?(?=[0-9(])"), "^"),
    (re.compile(r"(?<![\\A-Za-z])sqrt\s?\(([0-9.]{1,20})\)"), r"\\sqrt{\1}"),
    # "3 x 10^8" is one number.
    (
        re.compile(r"(?<=[0-9])\s{0,2}(?:[x*\u00d7]|\\times|\\cdot)\s{0,2}10\s?\^\s?(\{)?([+-]?[0-9]{1,3})(?(1)\})"),
        r"e\2",
    ),
    (re.compile(r"(?<=[0-9])\s+plus\s+(?=[$0-9])"), " + "),
    (re.compile(r"(?<=[0-9])\s+minus\s+(?=[$0-9])"), " - "),
    (re.compile(r"(?<=[0-9])\s+times\s+(?=[$0-9])"), " * "),
    (re.compile(r"(?<=[0-9])\s+divided\s+by\s+(?=[$0-9])"), " / "),
    (re.compile(r"\bnegative\s+(?=[$.0-9])", re.IGNORECASE), "-"),
    (re.compile(r"(?:(?<=\bis )|(?<==)|(?<== ))minus\s+(?=[$.0-9])", re.IGNORECASE), "-"),
)


def plain_numbers(text: str) -> str:
    """The text with numbers and operators in ASCII, LaTeX in plain text where possible, and "3e8" for "3 x 10^8"."""
    text = _NARROW_SPACE.sub("", text.translate(_CHARACTERS)).replace("\u00a0", " ").replace("\u202f", " ")
    text = _VULGAR_FRACTION.sub(
        lambda match: " " + unicodedata.normalize("NFKC", match[0]).replace("\u2044", "/"), text
    )
    text = _SUPERSCRIPT.sub(lambda match: "^" + match[0].translate(_SUPERSCRIPTS), text)
    text = _DOTS_AND_COMMA.sub(lambda match: match[0].replace(".", "").replace(",", "."), text)
    text = _MARKED_GROUPS.sub(lambda match: match[0].replace("'", "").replace("_", ""), text)
    text = _DOTTED_GROUPS.sub(lambda match: match[0].replace(".", ""), text)
    text = _ABBREVIATION.sub(" ", plain_latex(text))
    for pattern, plain in _REWRITTEN:
        text = pattern.sub(plain, text)
    return text


def join_number(part: str) -> str:
    """A statement with "1 234 567", "3,5 hours" and "3-1/2" as one number; in running text they may be several."""
    part = _HYPHENATED.sub(r"\1 \2", _COMMA_BEFORE_UNIT.sub(r"\1.\2", _DECIMAL_COMMA.sub("0.", part)))
    return _BLANK_GROUPS.sub(lambda match: match[0].replace(" ", ""), part)
