"""The label of a chosen option: true/false, answer1 to answer5, solution1/2, ending1 to ending4, option1/2.

`strict` reads the first statement of an answer ("the correct answer is answer3", "the answer is 3", "answer3 is
correct"), `flexible` falls back on the last label of the text, in any letter case and spelling ("Answer 3"). Where the
labels are true and false, "yes" and "no" say the same.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache, partial

from moa_peft.answers.latex import plain_latex
from moa_peft.answers.mentions import Mention, chosen, counted, judged_right, leads, offers_several
from moa_peft.answers.own_text import own_answer, without_format_lines
from moa_peft.answers.statements import ExtractionMode, statements

_LABEL = re.compile(r"(\D*?)[\s_-]*([0-9]+)")
_MARKS = r"[\s*_`\"'$.,!()\[\]{}#]{0,20}"
# "3", "option (3)", "3: water", "3, because ..."; but not "3 apples", nor "3, 4".
_ONLY_NUMBER = re.compile(
    rf"{_MARKS}(?:I\s(?:choose|pick|select)\s)?(?:(?:the\s)?(?:option|choice|answer|solution|ending|number|no\.):?\s?)?"
    rf"{_MARKS}([0-9]{{1,3}})"
    rf"(?:{_MARKS}(?:\b(?:because|since|as)\b.*)?|[*_`]{{0,3}}[:)]\s.*)",
    re.IGNORECASE,
)
_IS_NOT = re.compile(
    r"\s*(?:the\s(?:statement|claim|answer)|this|that|it)\s(?:is|was)(?:\snot|n't)\s(true|false)\s*[.!]?\s*\Z",
    re.IGNORECASE,
)
_YES_OR_NO = re.compile(
    r"[\s*_`\"']{0,20}(?:(?:sure|certainly|okay)[!,.]\s+)?(yes|no)\b(?=[*_`\"'}]*\s*(?:[.,;:!\n]|\Z)|\s+because\b)"
    # "Yes, I can help you with that!"
    r"(?!,?\s+(?:I\s(?:can|will|would)|I'd|I'll|please)\b)",
    re.IGNORECASE,
)


def extract_option(text: str, *, choices: Sequence[str], mode: ExtractionMode) -> str | None:
    """Read the chosen label out of a generated text.

    Args:
        text: what the model wrote.
        choices: the labels, in order.
        mode: `strict` reads a statement, `flexible` falls back on the label that the text begins with and explains, or
            on the last one. `settled`: see `extract_number`.

    Returns:
        The label as it stands in `choices`, or None: there is none, or the text denies it, lists several, or only
        repeats the choices.
    """
    read = partial(_read, choices=choices)
    text = own_answer(text, holds_answer=lambda piece: read(piece, mode="flexible") is not None)
    return read(text, mode=mode)


def _read(text: str, *, choices: Sequence[str], mode: ExtractionMode) -> str | None:
    text = plain_latex(text)
    reasoned, leaves_open = None, False
    for statement in statements(text):
        part = statement.text
        named = _mentions(part, choices)
        mentions = counted(named, part, choices=choices)
        stated = _short(part, choices)
        if stated is None and mentions:
            stated = mentions[0].choice
            if statement.is_mark and not leads(mentions[0], part):
                reasoned, stated = reasoned or stated, None
        if stated is not None:
            return stated
        leaves_open = not mentions and not statement.is_mark and offers_several(named, part)
    if mode == "settled":
        return None
    text = without_format_lines(text)
    named = _mentions(text, choices)
    mentions = counted(named, text, choices=choices)
    judged = judged_right(mentions, text)
    if judged is not None:
        return judged
    if reasoned is not None or leaves_open or mode == "strict":
        return reasoned
    if not mentions:
        return _yes_or_no(text, choices) if named else _short(text, choices)
    return _yes_or_no(text.strip().split("\n")[0], choices) or chosen(mentions, text)


def _short(part: str, choices: Sequence[str]) -> str | None:
    """The label of a text that is only a number, where labels have numbers, or begins with "yes" or "no"."""
    number = _ONLY_NUMBER.fullmatch(part)
    if number is None:
        return _yes_or_no(part, choices)
    labels = [choice for choice in choices if (label := _LABEL.fullmatch(choice)) and label[2] == number[1]]
    return labels[0] if len(labels) == 1 else None


def _yes_or_no(text: str, choices: Sequence[str]) -> str | None:
    """The label of a text that begins with "yes" or "no", or says that something is not true, or not false."""
    if set(choices) != {"true", "false"}:
        return None
    word = _YES_OR_NO.match(text)
    if word is not None:
        return {"yes": "true", "no": "false"}[word[1].lower()]
    opposite = _IS_NOT.match(text)
    return None if opposite is None else {"true": "false", "false": "true"}[opposite[1].lower()]


def _mentions(text: str, choices: Sequence[str]) -> list[Mention]:
    found = []
    for match in _pattern(tuple(choices)).finditer(text):
        assert match.lastindex is not None
        found.append(Mention(choice=choices[match.lastindex - 1], start=match.start(), end=match.end()))
    return found


@lru_cache(maxsize=32)
def _pattern(choices: tuple[str, ...]) -> re.Pattern[str]:
    """One group per choice. A text may run on directly: "answer3The", "answer3answer3ans"."""
    patterns = []
    for choice in choices:
        label = _spellings(choice)
        patterns.append(rf"\b({label})(?:(?:{label})+[a-z]*\Z|(?:{label})*(?-i:(?![a-z0-9])))")
    return re.compile("|".join(patterns), re.IGNORECASE)


def _spellings(choice: str) -> str:
    numbered = _LABEL.fullmatch(choice)
    if numbered is None:
        return re.escape(choice)
    return rf"{re.escape(numbered[1])}(?:[\s_#-]|\s(?:number|no\.)\s)?[\[(]?{numbered[2]}"
