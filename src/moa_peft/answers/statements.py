r"""Where a text states its answer: "the answer is ...", "Answer: ...", "#### ..." and "\boxed{...}".

Every extractor reads the same statements, so that numbers, letters and options differ only in what they look for
inside one. A text that runs on with further questions of its own making is cut before them, but not before a question
that it repeats ahead of its answer.
"""

from __future__ import annotations

import re
from collections.abc import Callable

# White space is bounded in every pattern that has it twice in a row: a long run would cost its square.
_SUBJECT = r"(?:\bans(?:wer)?|\b(?:correct|right|best|final)\s+(?:option|choice|solution|ending|result))\b"
# "the answer to the question is", "the answer (in dollars) is": what stands between is short and one clause.
_BETWEEN = r"(?:\s{1,8}(?:to|for|in|of)\s[^.\n?!:=]{1,60}?|\s{0,8}\([^()\n]{1,30}\))?"
_VERB = (
    r"(?:,?\s{0,8}(?:therefore|then|thus),?)?\s{0,8}"
    r"(?:is|was|(?:should|would|must|will|has\s+to)\s{1,8}be|equals)\b"
)
_MARK = (
    r"(?:\s{0,8}\([^()\n]{1,30}\))?[*_`\"']{0,3}\s{0,8}(?:choice|letter)?[*_`]{0,3}"
    r"(?:\s{0,8}[:=]|\s{1,8}[-\u2013\u2014]\s)"
)
_HEADING = r"(?<![^\n])[#*_ ]{0,8}(?:final\s+)?answer[*_ ]*\n"
_STATEMENT = re.compile(
    rf"""
    (?P<boxed>\\(?:boxed|fbox)\s*\{{)
  | (?P<hashes>(?<!\#)\#{{4}}(?!\#))
  | <answer>(?=[^<]{{1,200}}</answer>)
  | {_HEADING}
  | {_SUBJECT}(?:{_BETWEEN}{_VERB}|{_MARK})
    """,
    re.VERBOSE | re.IGNORECASE,
)
# "if the answer is 5", "the wrong answer is 5": words before a statement that make it none.
_NO_STATEMENT = re.compile(
    r"\b(?:if|whether|no|not|wrong|incorrect|previous)\s+(?:(?:the|an|your|my)\s+)?(?:\w+\s+)?\Z", re.I
)
# "The answer is 5. Wait, no: the answer is 7": words before a statement that take back the ones before it.
_CORRECTION = re.compile(
    r"\b(?:wait|hold\s+on)\s{0,4}[,.!:]|\b(?:correction|oops)\b|[.!]\s{1,8}(?:actually\b|no\s{0,4}[,.!:])"
    r"|\b(?:scratch\s+that|on\s+second\s+thought|(?:was|made)\s+a\s+mistake)\b",
    re.IGNORECASE,
)
_CORRECTION_REACH = 60
# A dash at the beginning of the next line is a bullet, not a minus.
_LEAD = re.compile(r"""(?:\n\s*[-\u2022]\s+|[\s:*_`~"'>]|</?[a-z]{1,8}>|\$\$|\\\[|\\\()*""")
# "Answer:" above numbered steps: their numbers are not answers.
_LIST_BEGINS = re.compile(r"1[.)]\s+\S")
_MAX_PART = 400
# "3! = 6" is a factorial.
_SENTENCE_END = re.compile(r"\n|</answer>|(?:[.?]|!(?!\s{0,8}[=*\u00d7]))(?=\s|$|[A-Za-z<])")
_FORMAT_LINE = re.compile(r"answer\s*(?:format|choices)\s*:[^\n]*", re.IGNORECASE)
_QUOTES = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"'})
# What begins the next turn: a section of the Alpaca layout, ...
_NEXT_TURN = re.compile(
    r"(?:^|\n)[ \t]*(?:"
    r"\#{2,3}[ \t]*(?:instructions?|input|response|user|human)[ \t]{0,4}[0-9]{0,4}[ \t]{0,4}[:\n]"
    r"|[*_]*(?:instruction|human|user)[ \t]{0,4}[0-9]{0,4}[ \t]{0,4}:)",
    re.IGNORECASE,
)
# ... or a question, which may also be the one that the text is about to answer.
_QUESTION = re.compile(
    r"(?:^|\n)[ \t]*(?:"
    r"\#{2,}[ \t]*(?:question|problem)\b"
    r"|[*_]*(?:q|question|problem)[ \t]{0,4}[0-9]{0,4}[ \t]{0,4}:)",
    re.IGNORECASE,
)
_DIGIT = re.compile(r"[0-9]")


def next_turn(text: str) -> int | None:
    """Where a text goes on with the next turn ("### Instruction:"); None for nowhere.

    A text may begin with such a heading. What is added behind a next turn does not move it.
    """
    return next((match.start() for match in _NEXT_TURN.finditer(text) if text[: match.start()].strip()), None)


def own_answer(text: str, *, holds_answer: Callable[[str], bool]) -> str:
    """The text up to where a next turn or question begins, with typewriter quotes.

    Args:
        text: what a model wrote.
        holds_answer: whether a piece of text holds an answer. A question ends the text only behind one: before it, the
            text repeats its own question ("Sure!", "Question: ...", "Answer: 7").
    """
    text = text[: next_turn(text)].translate(_QUOTES)
    begin = 0
    for match in _QUESTION.finditer(text):
        # Piece by piece: reading all that stands before every question would cost the square of the text.
        piece = text[begin : match.start()]
        # A number is an answer also where a letter was asked for.
        if _DIGIT.search(piece) or holds_answer(piece):
            return text[: match.start()]
        begin = match.start()
    return text


def stated_parts(text: str) -> list[str]:
    r"""What the statements of a text say, in order, each up to the end of its sentence.

    A part that holds a "\boxed{...}" is left out, because the box follows as a statement of its own. A "####" line
    counts where it holds one sentence; a Markdown heading such as "#### 1. First step" does not. A statement behind
    words of correction takes back the ones before it.
    """
    parts: list[str] = []
    end = 0
    for match in _STATEMENT.finditer(text):
        since = max(end, match.start() - _CORRECTION_REACH)
        if match["boxed"]:
            part = _braces(text, match.end())
            end = match.end()
        else:
            if _NO_STATEMENT.search(text, max(0, match.start() - 40), match.start()):
                continue
            lead = _LEAD.match(text, match.end())
            start = lead.end() if lead else match.end()
            if _LIST_BEGINS.match(text, start) and "\n" in text[match.end() : start]:
                continue
            limit = min(len(text), start + _MAX_PART)
            sentence_end = _SENTENCE_END.search(text, start, limit)
            end = sentence_end.start() if sentence_end else limit
            part = text[start:end]
            if match["hashes"]:
                line = text[start : start + _MAX_PART].split("\n", 1)[0].strip()
                if line.rstrip(".!").strip() != part.strip() or ":" in part:
                    continue
            if "\\boxed" in part:
                continue
        if _CORRECTION.search(text, since, match.start()):
            parts.clear()
        parts.append(part)
    return parts


def without_format_lines(text: str) -> str:
    """The text without repeated lines of the prompt: "Answer format: true/false", "Answer Choices: (A) ..."."""
    return _FORMAT_LINE.sub(" ", text)


def _braces(text: str, start: int) -> str:
    depth = 1
    for position in range(start, min(len(text), start + _MAX_PART)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[start:position]
    # The text ends inside the braces, or they hold more than an answer.
    return ""
