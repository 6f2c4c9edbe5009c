"""The letter of a multiple-choice answer, such as AQuA's (A) to (E).

A capital letter alone proves nothing: "A" is also a word and the mark before an answer ("A: ..."), "B" a train or a
point. `strict` reads the first statement of an answer ("the answer is C", "C is correct"), `flexible` falls back on
the last letter that stands as an option: "(C)", "C.", "option C".
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial

from moa_peft.answers.latex import plain_latex
from moa_peft.answers.mentions import JUDGED_RIGHT, Mention, chosen, counted, judged_right, leads, offers_several
from moa_peft.answers.own_text import own_answer, without_format_lines
from moa_peft.answers.statements import ExtractionMode, statements

# "A because ..." is a letter, "A number ..." the article.
_AFTER_LETTER = r"because|since|as|which|and|or|is|with|for|but|due|given|not"


def extract_letter(text: str, *, choices: Sequence[str], mode: ExtractionMode) -> str | None:
    """Read the chosen letter out of a generated text.

    Args:
        text: what the model wrote.
        choices: the letters, in order.
        mode: `strict` reads a statement, `flexible` falls back on the letter that the text begins with and explains,
            or on the last one that stands as an option. `settled`: see `extract_number`.

    Returns:
        The letter, or None: there is none, or the text denies it, lists several, or only repeats the choices.
    """
    read = partial(_read, choices=tuple(choices))
    text = own_answer(text, holds_answer=lambda piece: read(piece, mode="flexible") is not None)
    return read(text, mode=mode)


def _read(text: str, *, choices: tuple[str, ...], mode: ExtractionMode) -> str | None:
    text = plain_latex(text)
    reasoned, leaves_open = None, False
    for statement in statements(text):
        part = statement.text
        named = list(_mentions(part, choices, stated=True))
        mentions = counted(named, part, choices=choices)
        if mentions:
            if not statement.is_mark or leads(mentions[0], part):
                return mentions[0].choice
            reasoned = reasoned or mentions[0].choice
        leaves_open = not mentions and not statement.is_mark and offers_several(named, part)
    if mode == "settled":
        return None
    text = without_format_lines(text)
    mentions = counted(list(_mentions(text, choices, stated=False)), text, choices=choices)
    judged = judged_right(mentions, text)
    if judged is not None:
        return judged
    if reasoned is not None or leaves_open or mode == "strict":
        return reasoned
    return chosen(mentions, text)


def _mentions(text: str, choices: tuple[str, ...], *, stated: bool) -> Iterator[Mention]:
    pattern = _pattern(choices, stated)
    for match in pattern.finditer(text):
        name = match.lastgroup
        assert name is not None
        yield Mention(choice=match[name].upper(), start=match.start(name), end=match.end(name))


@lru_cache(maxsize=32)
def _pattern(choices: tuple[str, ...], stated: bool) -> re.Pattern[str]:
    """The places where a letter is an option; in a statement also where it stands first or after "or"."""
    letters = "".join(map(re.escape, choices))
    upper, any_case = f"[{letters}]", f"[{letters}{letters.lower()}]"
    # The letter is not the article, and no word, possessive, initial or formula goes on after it; "**" is Markdown.
    article = rf"(?<=A)\s+(?!(?:{_AFTER_LETTER})\b)[a-z]"
    whole = rf"(?![\w']|\.\w|\s*(?:\*(?!\*)|</?(?![a-z/])|[+/^>\u00d7]))(?!{article})"
    end = rf"(?![:]|\s*=){whole}"
    # Bounded, because a long run of blanks that is tried from every line would cost its square.
    opened, marks = r"[(\[\"'*_`{$<]*", r"[ \t*_`\"'$]{0,20}"
    places = [
        # A function's argument such as P(A) is none.
        rf"(?<![A-Za-z0-9)])(?<!\bP )[(\[]\s*(?P<enclosed>{any_case})\s*[)\]]",
        rf"\b(?i:option|choice|letter|answer)\s+{opened}(?P<named>{upper}){whole}",
        rf"\b(?i:option|choice)\s+(?P<small_named>{any_case})(?=[.,:)]|\s+is\b|$)",
        # A text of one letter.
        rf"\A[\s(\[<*_`\"'$]{{0,9}}(?P<whole>{any_case})[\s)\]>*_`\"'$.!]{{0,9}}\Z",
        rf"^[>#]{{0,6}}{marks}(?:A:[ \t]{{0,9}})?[*_`\"'$]{{0,4}}(?P<line>{upper})[.!)]{{0,3}}{marks}$",
        rf"^[ \t*_]*(?P<item>{upper})\)(?=[\sA-Z$]|$)",
        rf"^[ \t*_]*(?P<reasoned>{upper})[*_]*,?[ \t]+(?:because|since)\b",
        # Not a temperature ("30 C.", "30 \u00b0C.") and not the last of a list ("Eliminate A, B and D.").
        rf"(?<![\w.'\u00b0/+*=-])(?<![0-9\u00b0][ ])(?<!{upper},[ ])(?<!{upper}[ ]and[ ])(?<!,[ ]and[ ])"
        rf"(?P<dotted>{upper})(?=\.(?:[\s*_`\"')]|$))",
        rf"(?:\b(?i:choose|chose|picks?|picked|selects?|selected|is|be|so|therefore|thus|hence)[,:]?\s+"
        rf"|'s\s+|(?:=>|->|\u2192|\u2234)\s*){opened}(?P<cued>{upper}){end}",
        rf"(?<![\w'])(?P<judged>{upper})(?={JUDGED_RIGHT.pattern})",
        rf"(?<![\w'])(?P<kept>{upper})(?=[ ](?:fits|remains|works|is[ ]left)(?:[.,;!]|\s*$))",
    ]
    if stated:
        places = [
            rf"\A{marks}[(\[{{<]*(?P<only>{any_case})[\s*_`\"')\]}}>$.,]*\Z",
            rf"\A{marks}[(\[{{<]*(?P<first>{upper}){whole}",
            rf"\A\s*(?P<small>{any_case})[).]\s",
            rf"(?:\b(?:either|or|and)|[,/&])\s*{opened}(?P<other>{upper}){end}",
            rf"\A{marks}[(\[{{<]*(?P<alternative>{upper})(?=/{upper}\b)",
            *places,
        ]
    return re.compile("|".join(places), re.MULTILINE)
