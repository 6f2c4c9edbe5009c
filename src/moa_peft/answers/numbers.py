"""Numeric answers: reading the number a model gives, and comparing it with the right one.

Two extractors, because a score should say how much of it is format: `strict` takes the number of the first statement
of an answer ("Answer:" with reasoning behind it yields to later ones) and nothing else, `flexible` falls back on a
first line that is a number and is explained below, and on the last number of the text.
"""

import re
from typing import get_args

from moa_peft.answers.latex import HARD_LATEX, latex_value
from moa_peft.answers.numerals import NUMBER, number_value
from moa_peft.answers.own_text import own_answer
from moa_peft.answers.spelling import join_number, plain_numbers
from moa_peft.answers.statements import ExtractionMode, statements
from moa_peft.answers.words import first_number_in_words
from moa_peft.errors import UserError

# What makes the first number of a statement a part of a calculation: "5 apples + 3 apples = 8 apples".
_OPERATOR_AFTER = re.compile(
    r"\s*(?:\^|\\(?:times|cdot|div)|[/x]\s*[0-9($\\]|(?:[+*\u00d7\u00f7]\s*|-\s+)(?:[0-9($\\]|[a-z]\b))"
    r"|[ %]*[A-Za-z ]{0,25}\s[+*\u00d7\u00f7]\s"
    # "5-3" may be a range or a score, "5-3=2" is a difference.
    r"|-\$?[0-9][0-9.,]*\s?="
)
_OPERATOR_BEFORE = re.compile(r"(?:\b[a-z]\s*[-+*/^\u00d7\u00f7]|[)\]]\s*[+*/^\u00d7\u00f7])\s*\Z")
# A statement that ends in a number gives it as its result behind "=", and in a clause behind "is" or "have".
_ENDS = re.compile(r"[ %]*(?:[A-Za-z/][A-Za-z/ ]{0,60})?[ .!*_`$)\]}]*\Z")
_GIVES = re.compile(
    r"(?:=|\b(?:is|are|was|were|be|equals?|has|have|had|gives?|makes?|costs?|gets?|needs?))"
    r"(?:\s(?:about|only|exactly))?\s*\Z"
)
# "She has 12 apples left"
_OUTCOME = re.compile(r"[^0-9]*[0-9][0-9,.]*[^0-9]*\b(?:left|remaining|in\s(?:total|all)|altogether)[ .!*_]*")
# Behind these words another thought begins: "6 pieces, or 6 * 2.5 = 15 ounces", "5 because 2 + 3 = 5".
_BREAK = re.compile(
    r"[;:]|,(?!\s?\$?[0-9])|\band\b(?!\s\$?[0-9])"
    r"|\b(?:or|but|because|since|as|so|when|while|if|which|where|who|that|than|after|before|given)\b"
    r"|\b(?:he|she|it|they|there)\b"
)
# "5 arms and 3 legs, or 8 limbs in total"
_RESTATES = re.compile(r"\b(?:or|so|making)\s*\Z")
_IN_TOTAL = re.compile(r"\b(?:in\s(?:total|all)|altogether)[ .!]*\Z")
_CURRENCY = re.compile("[$\u20ac\u00a3]")
_CLAUSE = re.compile(r"[A-Za-z]+\s+[A-Za-z]+")
_UNIT_AFTER = re.compile(r"\s+[A-Za-z][A-Za-z ]*\Z")
_SUM = re.compile(r"\b(?:sum|difference|product|quotient)\b", re.IGNORECASE)
_RESULT = re.compile(r"=|:\s|\bequals\b|\bis\s+equal\s+to\b|\bwhich\s+(?:is|gives|makes)\b", re.IGNORECASE)
# "10% of 450, which is 45", "5 more than 40, so 45", "1/4 of 48, or 12"
_CONCLUSION = re.compile(
    r",?\s+(?:so|thus|therefore|hence|(?P<alternative>or)|giving|making|which\s+(?:is|gives|makes|equals|means))\b"
)
# "In 2020, he was 45 years old": the number of the circumstance is not the answer.
_CIRCUMSTANCE = re.compile(
    r"(?:In|On|At|By|After|Before|For|With|Over|During|Within|From|If|Since|Because|When|As)\s[^,\n]{1,80}?,\s+(?=[A-Za-z])"
)
_DERIVES = re.compile(r"\b(?:twice|double|triple|half|dozen|found|obtained|calculated)\b|%", re.IGNORECASE)
# "(50 - 5) * 2"
_CALCULATION = re.compile(
    r"\([0-9][0-9 .,+*/\u00d7\u00f7-]*\)\s?[+*/\u00d7\u00f7-]\s?[0-9(][0-9 ().,+*/\u00d7\u00f7-]*"
)
_ASSIGNS = re.compile(r"[,;]\s*(?:so\s+|and\s+)?[a-z]\s?=\s?\Z")
# "13, no wait, 12"
_MEANT = re.compile(r",?\s+(?:no,?\s+wait|wait,?\s+no|I\s+mean|scratch\s+that)\b[,:]?", re.IGNORECASE)
# Numbers that name a place or a precision: "in question 3", "rounded to 2 decimal places".
_NO_AMOUNT = re.compile(
    r"\b(?:in|on|at|see|from)\s+(?:the\s+)?(?:question|step|part|problem|figure|table|section|example)\s+[0-9]+"
    r"|\brounded\s+(?:off\s+)?to\s+(?:the\s+nearest\s+[a-z]+|[0-9]+\s+(?:decimals?|significant)(?:\s+[a-z]+)?)[:,]?",
    re.IGNORECASE,
)
# Words before the first number of a statement that say that there is none.
_NO_NUMBER = re.compile(
    r"\A(?:n/?a|null)\b"
    r"|\b(?:unavailable|unknown|unclear|undetermined|undefined|impossible|unable|insufficient|cannot|depends|sorry)\b"
    r"|\b(?:can|could|is|do)(?:n't|\s+not)\b|\bnot\s+(?:known|given|possible|clear|enough|sure)\b|\bno\s+answer\b",
    re.IGNORECASE,
)
# A number and its unit, and nothing else.
_UNIT = r"[A-Za-z%/\u00b0][A-Za-z%/.\u00b2\u00b3]*"
_ALONE = re.compile(
    rf"[ (*_`$\u20ac\u00a3~-]{{0,6}}\.?[0-9][0-9,.]{{0,30}}(?:/[0-9]+)?"
    rf"(?:[ ]?{_UNIT}(?:[ ]{_UNIT}){{0,2}})?[ .!)*_`$\]}}]{{0,6}}"
)
_EXPLAINED = re.compile(
    rf"\s{{0,9}}({_ALONE.pattern})\n"
    r"(?:[ \t]{0,9}\n\s{0,9}(?=[*_#]{0,6}[A-Z][a-z])|[*_\s]{0,9}(?i:explanation|reason|solution|because)\b)"
)
_LEADING_MINUS = re.compile(r"\A-\s+(?=[$.0-9])")
_NEGATED = re.compile(r"\b(?:not|neither|nor|never)\s+(?:equal\s+to\s+)?\Z", re.IGNORECASE)
_MATH = re.compile(r"\\boxed\s*\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}|\$([^$\n]{1,200})\$")


def extract_number(text: str, *, mode: ExtractionMode) -> float | None:
    r"""Read the numeric answer out of a generated text.

    Understood are signs, thousands separators, decimals, fractions ("1/2", "1 1/2", "\frac{1}{2}"), a currency
    sign, a percent sign (50% is 50), "1.5M", "3 x 10^8", units, Markdown and LaTeX around the number, and in a
    statement also words ("twelve"). In "the answer is 3 + 4 = 7" and "the answer is 3 + 4" the number is the result,
    7; in "the answer is that 3 friends have 12" it is 12. Questions that the text adds after its answer are not read.

    Args:
        text: What the model wrote.
        mode: `strict` reads the first statement that holds a number ("the answer is 12", "Answer: 12", "#### 12",
            "\boxed{12}") and is not taken back, up to the end of its sentence; without one, there is no answer.
            `flexible` then takes the first line, if it is a number and an explanation follows, or the last number of
            the text. `settled` is `strict` without what follows a mere "Answer:" and may be the beginning of the
            reasoning: nothing that the text says later outranks it.

    Returns:
        The number, or None where there is none (or none that is finite).

    Raises:
        UserError: `mode` is none of the three; or the answer is an expression in LaTeX and math-verify, which
            evaluates it, is not installed.
    """
    if mode not in get_args(ExtractionMode):
        raise UserError(f"mode is {mode!r}; allowed are {', '.join(get_args(ExtractionMode))}.")
    text = own_answer(text, holds_answer=lambda piece: _read(piece, mode="flexible") is not None)
    return _read(text, mode=mode)


def only_number(text: str) -> float | None:
    """The number that a text is about: the one it states, or the only one it holds; None for several, or none."""
    stated = extract_number(text, mode="settled")
    if stated is not None:
        return stated
    plain = join_number(plain_numbers(text.strip()))
    return None if len(NUMBER.findall(plain)) > 1 else _stated_number(plain)


def numbers_match(predicted: float | None, gold: float, *, tolerance: float = 1e-3) -> bool:
    """Whether an extracted number is the right one: |predicted - gold| <= tolerance; None never matches."""
    return predicted is not None and abs(predicted - gold) <= tolerance


def _read(text: str, *, mode: ExtractionMode) -> float | None:
    text = plain_numbers(text)
    reasoned = None
    for statement in statements(text):
        stated = _stated_number(statement.text)
        if stated is None:
            continue
        if not statement.is_mark or _ALONE.fullmatch(statement.text):
            return stated
        # "Answer: Janet sells 9 eggs a day. She makes 9 * 2 = $18."
        if reasoned is None and (_OUTCOME.fullmatch(statement.text) or not NUMBER.search(statement.rest)):
            reasoned = stated
    if mode == "settled":
        return None
    if reasoned is not None or mode == "strict":
        return reasoned
    first = _EXPLAINED.match(text)
    stated = _stated_number(first[1]) if first else None
    return _last_number(text) if stated is None else stated


def _stated_number(part: str) -> float | None:
    part = _NO_AMOUNT.sub(" ", join_number(_LEADING_MINUS.sub("-", part))).strip()
    meant = _MEANT.split(part)[-1]
    part = meant if NUMBER.search(meant) else part
    circumstance = _CIRCUMSTANCE.match(part)
    if circumstance and NUMBER.search(part, circumstance.end()):
        part = part[circumstance.end() :]
    if _CALCULATION.fullmatch(part.rstrip(" .")):
        return latex_value(part)
    numbers = [m for m in NUMBER.finditer(part) if not _NEGATED.search(part, 0, m.start())]
    first = numbers[0] if numbers else None
    hard = HARD_LATEX.search(part)
    if hard and (first is None or "=" not in part[hard.start() :]):
        return latex_value(_expression(part))
    in_words = first_number_in_words(part)
    if in_words is not None:
        value, place = in_words
        # "twelve, because 3 * 4 = 12"
        if first is None or (place.start() == 0 and _BREAK.search(part[place.end() : first.end()])):
            return None if _NO_NUMBER.search(part, 0, place.start()) else value
    if first is None or _NO_NUMBER.search(part, 0, first.start()):
        return None
    if _ends_in_result(part, first, numbers[-1]) or _is_conclusion(part, numbers):
        return number_value(numbers[-1])
    rest = part[first.end() :]
    operator = _OPERATOR_AFTER.match(rest) or _OPERATOR_BEFORE.search(part, 0, first.start())
    if not operator and not _SUM.search(part, 0, first.start()):
        return number_value(first)
    results = list(_RESULT.finditer(rest))
    result = NUMBER.search(rest, results[-1].end()) if results else None
    if result is not None:
        return number_value(result)
    return latex_value(_UNIT_AFTER.sub("", _expression(part))) if operator else None


def _ends_in_result(part: str, first: re.Match[str], last: re.Match[str]) -> bool:
    """Whether a statement gives its last number as its result: "6 groups of 6 = 36", "3 friends have 12"."""
    between = part[first.end() : last.start()]
    if last is first or not _ENDS.match(part, last.end()):
        return False
    if _RESTATES.search(between) and _IN_TOTAL.search(part, last.end()):
        return True
    if _BREAK.search(between):
        return False
    if _GIVES.search(between):
        return True
    # "John pays for 5 books $20"
    amount = _CURRENCY.search(last[0]) and not _CURRENCY.search(first[0])
    return bool(amount and _CLAUSE.search(part, 0, first.start()))


def _is_conclusion(part: str, numbers: list[re.Match[str]]) -> bool:
    """Whether a statement says what its last number comes from: "9 eggs at $2, which is $18", "3x = 36, x = 12"."""
    *before, last = numbers
    if not before or not _ENDS.match(part, last.end()):
        return False
    if _ASSIGNS.search(part, 0, last.start()):
        return True
    places = [match for match in _CONCLUSION.finditer(part) if match.end() <= last.start()]
    if not places or before[-1].start() > places[-1].start():
        return False
    # "12 apples, so he has 3 more": what follows an answer is another thought, what follows a calculation its result.
    is_derived = _DERIVES.search(part, 0, places[-1].start()) and not places[-1]["alternative"]
    return len(before) > 1 or bool(is_derived)


def _last_number(text: str) -> float | None:
    last = None
    for match in NUMBER.finditer(text):
        last = match
    if last is None:
        return None
    for piece in _MATH.finditer(text):
        if piece.start() <= last.start() < piece.end():
            content = (piece[1] or piece[2]).rpartition("=")[2]
            value = latex_value(content) if HARD_LATEX.search(content) else None
            if value is not None:
                return value
    return number_value(last)


def _expression(part: str) -> str:
    r"""The expression of a statement: what stands between "$" signs where there are any, after the last "="."""
    math_piece = _MATH.search(part)
    expression = (math_piece[1] or math_piece[2]) if math_piece else part
    return expression.rpartition("=")[2].strip(" *_`")
