r"""Where a text states its answer: "the answer is ...", "Answer: ...", "#### ..." and "\boxed{...}".

Every extractor reads the same statements, so that numbers, letters and options differ only in what they look for
inside one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

ExtractionMode = Literal["settled", "strict", "flexible"]
"""How much of a text counts as its answer; see `extract_number`."""

# White space is bounded in every pattern that has it twice in a row: a long run would cost its square.
_SUBJECT = r"(?:\bans(?:wer)?|\b(?:correct|right|best|final)\s+(?:option|choice|solution|ending|result))\b"
# "the answer to the question is", "the answer (in dollars) is": what stands between is short and one clause.
_BETWEEN = (
    r"(?:\s{1,8}(?:to|for|in|of|rounded)\s(?:[^\"\n]{0,20}\"[^\"\n]{1,120}\"|[^.\n?!:=]{1,60}?)"
    r"|\s{0,8}\([^()\n]{1,30}\))?"
)
_VERB = (
    r"(?:,?\s{0,8}(?:therefore|then|thus),?)?\s{0,8}"
    r"(?:is|was|(?:should|would|must|will|has\s+to)\s{1,8}be|equals)\b"
)
_MARK = (
    r"(?:\s{0,8}\([^()\n]{1,30}\))?[*_`]{0,3}\s{0,8}(?:choice|letter)?[*_`]{0,3}"
    r"(?:\s{0,8}[:=]|\s{1,8}[-\u2013\u2014]\s)"
)
_HEADING = r"(?<![^\n])[#*_ ]{0,8}(?P<final>final\s+)?answer[*_ ]*\n"
# A mark such as "Answer:" may also begin the reasoning.
_STATEMENT = re.compile(
    rf"""
    (?P<boxed>\\(?:boxed|fbox)\s*\{{)
  | (?P<hashes>(?<!\#)\#{{4}}(?!\#))
  | <answer>(?=[^<]{{1,200}}</answer>)
  | ["'](?:final_?|correct_?)?(?:answer|option|choice)["']\s{{0,4}}:
  | (?P<heading>{_HEADING})
  | {_SUBJECT}{_BETWEEN}{_VERB}
  | (?:\bfinal\s{{1,4}}|\bcorrect\s{{1,4}})ans(?:wer)?\b{_MARK}
  | (?P<mark>{_SUBJECT}{_MARK}|\bAns\.(?=\s{{0,4}}[(\[$0-9]))
    """,
    re.VERBOSE | re.IGNORECASE,
)
# "if the answer is 5", "the wrong answer is 5": words before a statement that make it none.
_NO_STATEMENT = re.compile(
    r"(?:\b(?:if|whether|no|not|wrong|incorrect|previous|(?:might|may|could|would|not)\s+think)|n't\s+think)\s+"
    r"(?:that\s+)?(?:(?:the|an|your|my)\s+)?(?:\w+\s+)?\Z",
    re.IGNORECASE,
)
# "The answer is 5. Wait, no: the answer is 7": words before a statement that take back the ones before it.
_CORRECTION = re.compile(
    r"\b(?:wait|hold\s+on)\s{0,4}[,.!:]|\b(?:correction|oops)\b|[.!]\s{1,8}(?:actually\b|no\s{0,4}[,.!:])"
    r"|\b(?:scratch\s+that|on\s+second\s+thought|(?:was|made)\s+a\s+mistake)\b",
    re.IGNORECASE,
)
_CORRECTION_REACH = 60
# A line that begins like this takes back what stands above it, however long it goes on.
_CORRECTING_LINE = re.compile(
    r"\n[\s*_>]{0,8}(?:(?:but\s|oh,?\s)?(?:wait|hold\son)\b|hmm|oops|correction\b|actually\b|sorry\b|no[,!:]|no\.(?!\s?[0-9])"
    r"|scratch\sthat|on\ssecond\sthought|i\smade\sa\smistake|the\sanswer\sis\swrong"
    r"|let\sme\s(?:re-?(?:check|calc|consider|do\b|compute|examine|evaluate|think)|double|check|try)"
    r"|that(?:'s|\sis)\s(?:not\sright|wrong|incorrect))",
    re.IGNORECASE,
)
# "The answer is wrong, let me try again", but not "any other answer is wrong".
_IS_WRONG = re.compile(r"(?:wrong|incorrect|not\s+right)\b", re.IGNORECASE)
_ANOTHER = re.compile(r"\b(?:other|another|any|every|each|his|her|their|\w+'s)\s+\Z", re.IGNORECASE)
LONGEST_CORRECTION = 28
"""Characters of a line within which it is known whether it takes back an answer."""
# A dash at the beginning of the next line is a bullet, not a minus.
_LEAD = re.compile(r"""(?:\n\s*[-\u2022]\s+|[\s:*_`~"'>]|</?[a-z]{1,8}>|\$\$|\\\[|\\\()*""")
# "Answer:" above numbered steps: their numbers are not answers.
_LIST_BEGINS = re.compile(r"1[.)]\s+\S")
_MAX_PART = 400
_MAX_REST = 2000
_SENTENCE_END = re.compile(
    # "3! = 6" is a factorial.
    r"\n|</answer>|(?:[.?]|!(?!\s{0,8}[=*\u00d7]))(?=\s|$|[A-Za-z<])"
    # "12 | Tom has 3", "12 ### Question", "12 -- Tom has 3", "12 [End of answer]"
    r"|\s(?:\||\#\#|--|\[(?=[A-Z][A-Za-z])|[-\u2013\u2014]\s(?=[A-Z][a-z]))"
    # The next key of a JSON object.
    r"|,(?=\s{0,4}[\"']\w{1,30}[\"']\s{0,4}:)"
)
# Text that runs on behind a number without a full stop: "12 kg Tom has 3", "12The answer is 13".
_RUNS_ON = re.compile(
    r"[$\u20ac\u00a3(*_-]{0,4}[0-9][0-9,.]{0,20}(?:/[0-9]{1,9})?(?!\s(?:hundred|thousand|million|billion|trillion)\b)"
    r"(?:\s[a-z/]{1,12}){0,4}(?=\s{0,4}(?:"
    r"(?:The|There|This|So|If|He|She|It|They|We|Question|Explanation|Note|Step)\b|(?i:the\sanswer\sis)\b"
    r"|[A-Z][a-z]{1,15}\s(?:has|have|had|is|are|was|were|will|can|buys?|bought|gave|gives|wants?|needs?|gets?)\b))"
)
# Paragraphs that look back on the answer above them.
_LOOKS_BACK = re.compile(
    r"\n\s*\n[\s*_#]{0,9}(?:explanation|reason|because|note|proof|check|verification)", re.IGNORECASE
)


@dataclass(frozen=True, kw_only=True)
class Statement:
    """One statement of an answer.

    Attributes:
        text: what it says, up to the end of its sentence.
        is_mark: whether it is a mere "Answer:", behind which the reasoning may begin.
        rest: what follows a mark's sentence, up to a paragraph that explains it; empty for others.
    """

    text: str
    is_mark: bool
    rest: str


def statements(text: str) -> list[Statement]:
    r"""What a text states, in order.

    One that holds a "\boxed{...}" is left out, because the box follows as a statement of its own. A "####" line
    counts where it holds one sentence; a Markdown heading such as "#### 1. First step" does not. A statement behind
    words of correction takes back the ones before it.
    """
    found: list[Statement] = []
    end = 0
    for match in _STATEMENT.finditer(text):
        since = max(end, match.start() - _CORRECTION_REACH)
        if match["boxed"]:
            part, stop = _braces(text, match.end()), match.end()
        else:
            if _NO_STATEMENT.search(text, max(0, match.start() - 40), match.start()):
                continue
            lead = _LEAD.match(text, match.end())
            start = lead.end() if lead else match.end()
            if _LIST_BEGINS.match(text, start) and "\n" in text[match.end() : start]:
                continue
            stop = _end_of_part(text, start)
            part = text[start:stop]
            if match["hashes"]:
                line = text[start : start + _MAX_PART].split("\n", 1)[0].strip()
                ends_in_stop = text[stop : stop + 1] in ".?!"
                if ":" in part or (ends_in_stop and line.rstrip(".!").strip() != part.strip()):
                    continue
        is_wrong = _IS_WRONG.match(part)
        if is_wrong and _ANOTHER.search(text, max(0, match.start() - 20), match.start()):
            continue
        corrected = _CORRECTION.search(text, since, match.start()) or _CORRECTING_LINE.search(text, end, match.start())
        if is_wrong or corrected:
            found.clear()
        # A box inside follows as a statement of its own.
        if is_wrong or ("\\boxed" in part and not match["boxed"]):
            continue
        end = stop
        is_mark = match["mark"] is not None or (match["heading"] is not None and match["final"] is None)
        rest = _LOOKS_BACK.split(text[end : end + _MAX_REST])[0] if is_mark else ""
        found.append(Statement(text=part, is_mark=is_mark, rest=rest))
    return found


def _end_of_part(text: str, start: int) -> int:
    """Where the sentence ends that a statement begins at `start`."""
    limit = min(len(text), start + _MAX_PART)
    sentence_end = _SENTENCE_END.search(text, start, limit)
    end = sentence_end.start() if sentence_end else limit
    runs_on = _RUNS_ON.match(text, start, end)
    return runs_on.end() if runs_on else end


def taken_back(text: str, newline: int) -> bool:
    """Whether the line that begins behind `newline` takes back what stands above it.

    It is known once the line has `LONGEST_CORRECTION` characters.
    """
    return _CORRECTING_LINE.match(text, newline) is not None


def _braces(text: str, start: int) -> str:
    depth = 1
    for position in range(start, min(len(text), start + _MAX_PART)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[start:position]
    # The text ends inside the braces, or they hold more than an answer.
    return ""
