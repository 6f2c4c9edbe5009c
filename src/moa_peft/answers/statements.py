r"""Where a text states its answer: "the answer is ...", "Answer: ...", "#### ..." and "\boxed{...}".

Every extractor reads the same statements, so that numbers, letters and options differ only in what they look for
inside one. A text that runs on with further questions of its own making is cut before them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

# White space is bounded in every pattern that has it twice in a row: a long run would cost its square.
_SUBJECT = r"(?:\bans(?:wer)?|\b(?:correct|right|best|final)\s+(?:option|choice|solution|ending|result))\b"
# "the answer to the question is", "the answer (in dollars) is": what stands between is short and one clause.
_BETWEEN = r"(?:\s{1,8}(?:to|for|in|of)\s[^.\n?!:=]{1,60}?|\s{0,8}\([^()\n]{1,30}\))?"
_VERB = (
    r"(?:,?\s{0,8}(?:therefore|then|thus),?)?\s{0,8}"
    r"(?:is|was|(?:should|would|must|will|has\s+to)\s{1,8}be|equals)\b"
)
_MARK = (
    r"(?:\s{0,8}\([^()\n]{1,30}\))?[*_`]{0,3}\s{0,8}(?:choice|letter)?[*_`]{0,3}"
    r"(?:\s{0,8}[:=]|\s{1,8}[-\u2013\u2014]\s)"
)
_HEADING = r"(?<![^\n])[#*_ ]{0,8}(?:final\s+)?answer[*_ ]*\n"
_STATEMENT = re.compile(
    rf"""
    (?P<boxed>\\(?:boxed|fbox)\s*\{{)
  | (?P<hashes>(?<!\#)\#{{4}}(?!\#))
  | {_HEADING}
  | {_SUBJECT}(?:{_BETWEEN}{_VERB}|{_MARK})
    """,
    re.VERBOSE | re.IGNORECASE,
)
# "if the answer is 5", "the wrong answer is 5": words before a statement that make it none.
_NO_STATEMENT = re.compile(
    r"\b(?:if|whether|no|not|wrong|incorrect|previous)\s+(?:(?:the|an|your|my)\s+)?(?:\w+\s+)?\Z", re.I
)
# A dash at the beginning of the next line is a bullet, not a minus.
_LEAD = re.compile(r"""(?:\n\s*[-\u2022]\s+|[\s:*_`~"'>]|\$\$|\\\[|\\\()*""")
# "Answer:" above numbered steps: their numbers are not answers.
_LIST_BEGINS = re.compile(r"1[.)]\s+\S")
_MAX_PART = 400
_SENTENCE_END = re.compile(r"\n|[.!?](?=\s|$|[A-Za-z<])")
_FORMAT_LINE = re.compile(r"answer\s*(?:format|choices)\s*:[^\n]*", re.IGNORECASE)
_QUOTES = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"'})
_NEXT_QUESTION = re.compile(
    r"(?:^|\n)[ \t]*(?:"
    r"\#{2,}[ \t]*(?:instructions?|input|question|problem|user|human)\b"
    r"|[*_]*(?:Q|Question|Problem|Instruction|Human|User)[ \t]{0,4}[0-9]{0,4}[ \t]{0,4}:)",
    re.IGNORECASE,
)


def own_answer(text: str) -> str:
    """The text up to where a next question begins ("Q: ...", "### Instruction:"), with typewriter quotes."""
    text = text.translate(_QUOTES)
    for match in _NEXT_QUESTION.finditer(text):
        if text[: match.start()].strip():
            return text[: match.start()]
    return text


def stated_parts(text: str) -> Iterator[str]:
    r"""What the statements of a text say, in order, each up to the end of its sentence.

    A part that holds a "\boxed{...}" is left out, because the box follows as a statement of its own. A "####" line
    counts where it holds one sentence; a Markdown heading such as "#### 1. First step" does not.
    """
    for match in _STATEMENT.finditer(text):
        if match["boxed"]:
            yield _braces(text, match.end())
            continue
        if _NO_STATEMENT.search(text, max(0, match.start() - 40), match.start()):
            continue
        lead = _LEAD.match(text, match.end())
        start = lead.end() if lead else match.end()
        if _LIST_BEGINS.match(text, start) and "\n" in text[match.end() : start]:
            continue
        limit = min(len(text), start + _MAX_PART)
        end = _SENTENCE_END.search(text, start, limit)
        part = text[start : end.start() if end else limit]
        if match["hashes"]:
            line = text[start : start + _MAX_PART].split("\n", 1)[0].strip()
            if line.rstrip(".!").strip() != part.strip() or ":" in part:
                continue
        if "\\boxed" not in part:
            yield part


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
