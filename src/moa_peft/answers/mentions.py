"""Mentions of choices in a text, and which of them count: not the denied ones, not lists of alternatives, not echoes.

A text that says "not answer1", "answer1, answer2 or answer3" or repeats the choices of its question has named labels
without choosing one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

_DENIED_BEFORE = re.compile(
    r"(?:\b(?:not|never|neither|nor|cannot|except|than|instead\s+of|over|compared\s+(?:to|with))|n't"
    r"|\b(?:eliminat|exclud|reject|discard)\w*|\brul(?:e|es|ed|ing)\s+out)\s+"
    r"(?:(?:be|the|an?|either|option|choice|answer|solution|ending|necessarily)\s+){0,3}[(\[\"'*_`]*\Z",
    re.IGNORECASE,
)
_DENIED_AFTER = re.compile(
    r"[)\]\"'*_`]*\s+(?:"
    r"(?:is|are|was|were)\s+(?:\w+ly\s+|also\s+|both\s+)?"
    r"(?:not|wrong|incorrect|false|impossible|implausible|unlikely|eliminated|ruled)\b"
    r"|(?:is|are|was|were|ca|could|would|wo|does|do)n't\b|cannot\b|(?:can|could|would|does|do)\s+not\b)",
    re.IGNORECASE,
)
# The label of the right choice stands before this: "(C) is correct".
JUDGED_RIGHT = re.compile(r"[)\]*_`\"']*\s{1,8}(?:is|must\s+be)\s+(?:the\s+)?(?:correct|right|best|answer)\b")
_CONDITION = re.compile(
    r"\b(?:if|whether|that|why|how)\s+(?:(?:the|option|choice|answer)\s+){0,2}[(\[\"'*_`]*\Z", re.IGNORECASE
)
# "I am not sure if that is true", "I can't say whether it is false": nothing is said about what follows.
_UNCERTAIN = re.compile(
    r"(?:(?:\b(?:not|cannot|unable)\b|n't\b)[^.!?;\n]{0,40}"
    r"\b(?:sure|certain|clear|know|say|tell|confirm|verify|determine)|\bunsure)"
    r"\s(?:if|whether|that)\b[^.!?,;\n]{0,60}\Z",
    re.IGNORECASE,
)
_QUESTION_BEGINS = re.compile(
    r"(?:\A|[.!?\n])\s*(?:is|are|was|were|do|does|did|can|could|will|would|should|has|have|which|what|who|how|why)\b"
    r"[^.!?\n]*\Z",
    re.IGNORECASE,
)
_QUESTION_ENDS = re.compile(r"[^.!?\n]*\?")
# What leads to a choice at the beginning of a text, and what follows one that is explained afterwards.
_LEAD = re.compile(
    r"[\s(\[{<\"'*_`$]*(?:(?:the\s)?(?:option|choice|letter|answer)\b)?[\s(\[{<\"'*_`$]*", re.IGNORECASE
)
_EXPLAINED = re.compile(
    r"[)\]}>\"'*_`$.!,]*(?:[ \t]*\n|,?[ \t]+(?:because|since)\b|[^\n]{0,60}\n\s{0,9}[*_]*(?:explanation|reason)\b)",
    re.IGNORECASE,
)
_CLOSING = r"[)\]\"'*_`]*\s*"
_OPENING = r"\s*(?:(?:the|either|option|choice|answer|solution)\s+)*[(\[\"'*_`]*"
_COMMA = re.compile(rf"{_CLOSING},{_OPENING}")
_OR = re.compile(rf"{_CLOSING},?\s*(?:/|&|\||\bor\b|\band\b|\band/or\b){_OPENING}", re.IGNORECASE)
# The mark after the label of a repeated choice: "Solution1: ...", "B. ..." at the beginning of a line.
_COLON = re.compile(r"[)\]*_]*\s*:")
_DOT = re.compile(r"[.)]")
_LINE_START = re.compile(r"(?:\A|\n)[ \t*_(\[-]*\Z")
_JUDGES = re.compile(r"\b(?:is|are|was|would|because|since|so|but)\b|\n\s*\n", re.IGNORECASE)
_LONGEST_CHOICE = 200
_LOOK_BACK = 80


@dataclass(frozen=True, kw_only=True)
class Mention:
    """One place of a text that names a choice; `start` and `end` enclose the label."""

    choice: str
    start: int
    end: int


def counted(mentions: Sequence[Mention], text: str, *, choices: Sequence[str]) -> list[Mention]:
    """The mentions that choose.

    Args:
        mentions: in the order of the text.
        text: where they stand.
        choices: all labels in their order, to tell a repeated list of choices.

    Returns:
        Those that are neither denied, nor in a list of alternatives, nor in a repetition of the choices.
    """
    kept = [mention for mention in mentions if not _DENIED_AFTER.match(text, mention.end)]
    open_mentions = [mention for mention in kept if not _is_denied_before(mention, text)]
    dropped = _alternatives(mentions, text) | _headings(kept, text) | _echoes(open_mentions, text, choices)
    return [mention for mention in open_mentions if mention not in dropped]


def offers_several(mentions: Sequence[Mention], text: str) -> bool:
    """Whether a statement names several choices and denies none: if none of them counts, it leaves the choice open."""
    if any(_DENIED_AFTER.match(text, m.end) or _is_denied_before(m, text) for m in mentions):
        return False
    return len({mention.choice for mention in mentions}) > 1


def leads(mention: Mention, text: str) -> bool:
    """Whether a text begins with a choice."""
    return _LEAD.fullmatch(text, 0, mention.start) is not None


def asserted(mentions: Sequence[Mention], text: str) -> list[Mention]:
    """The mentions outside of questions and of what the text is not sure about."""
    kept = []
    for mention in mentions:
        since = max(0, mention.start - 2 * _LOOK_BACK)
        is_asked = _QUESTION_BEGINS.search(text, since, mention.start) and _QUESTION_ENDS.match(text, mention.end)
        if not is_asked and not _UNCERTAIN.search(text, since, mention.start):
            kept.append(mention)
    return kept


def chosen(mentions: Sequence[Mention], text: str) -> str | None:
    """The choice of a text that states none: the one that it begins with and explains, or the last; None for none.

    Args:
        mentions: those that choose, in the order of the text.
        text: where they stand.
    """
    mentions = asserted(mentions, text)
    if not mentions:
        return None
    first = mentions[0]
    return first.choice if leads(first, text) and _EXPLAINED.match(text, first.end) else mentions[-1].choice


def judged_right(mentions: Sequence[Mention], text: str) -> str | None:
    """The choice of which a text says that it is right ("answer3 is correct"); None for none or several.

    Args:
        mentions: those that choose, in the order of the text.
        text: where they stand.
    """
    judged = {
        mention.choice
        for mention in mentions
        if JUDGED_RIGHT.match(text, mention.end)
        and not _CONDITION.search(text, max(0, mention.start - _LOOK_BACK), mention.start)
    }
    return judged.pop() if len(judged) == 1 else None


def _is_denied_before(mention: Mention, text: str) -> bool:
    return _DENIED_BEFORE.search(text, max(0, mention.start - _LOOK_BACK), mention.start) is not None


def _alternatives(mentions: Sequence[Mention], text: str) -> set[Mention]:
    """Mentions in lists such as "answer1, answer2 or answer3", "true/false"; two with only a comma are no list."""
    found: set[Mention] = set()
    chain: list[Mention] = []
    joined_by_or = False
    for mention in mentions:
        gap = text[chain[-1].end : mention.start] if chain and mention.start - chain[-1].end < _LOOK_BACK else None
        by_or = gap is not None and _OR.fullmatch(gap) is not None
        # "Of answer1 and answer2, answer2 is best."
        repeats = any(mention.choice == item.choice for item in chain)
        if gap is None or repeats or not (by_or or _COMMA.fullmatch(gap)):
            chain, joined_by_or = [], False
        chain.append(mention)
        joined_by_or |= by_or
        if len({item.choice for item in chain}) > 1 and (joined_by_or or len(chain) > 2):
            found.update(chain)
    return found


def _headings(mentions: list[Mention], text: str) -> set[Mention]:
    """Labels of two or more choices that are repeated with their texts."""
    headings = {
        mention
        for mention in mentions
        if _COLON.match(text, mention.end)
        or (
            _DOT.match(text, mention.end)
            and _LINE_START.search(text, max(0, mention.start - _LOOK_BACK), mention.start)
        )
    }
    return headings if len({mention.choice for mention in headings}) > 1 else set()


def _echoes(mentions: list[Mention], text: str, choices: Sequence[str]) -> set[Mention]:
    """Runs "(A) 12 (B) 15 (C) 18": three or more in order from the first choice on, with nothing said about them."""
    found: set[Mention] = set()
    run: list[Mention] = []
    for mention in mentions:
        gap = text[run[-1].end : mention.start] if run else ""
        if not (len(run) < len(choices) and mention.choice == choices[len(run)]) or (
            run and (len(gap) > _LONGEST_CHOICE or _JUDGES.search(gap))
        ):
            run = []
        if run or mention.choice == choices[0]:
            run.append(mention)
        if len(run) > 2:
            found.update(run)
    return found
