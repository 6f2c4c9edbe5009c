"""Which part of a text is the model's own answer to the one question it was asked.

Around it stand what the model thinks before it answers, the end tokens of chat templates, the question repeated, and
further turns and questions of the model's own making.
"""

from __future__ import annotations

import re
from collections.abc import Callable

_FORMAT_LINE = re.compile(r"answer\s*(?:format|choices)\s*:[^\n]*", re.IGNORECASE)
# What a model thinks before it answers, the end tokens of chat templates, and text that is struck out.
_THOUGHT_END = re.compile(r"</(?:think|thinking|thought|reasoning)>", re.IGNORECASE)
_THOUGHT_BEGIN = re.compile(r"<(?:think|thinking|thought|reasoning)>", re.IGNORECASE)
_END_TOKEN = re.compile(r"</s>|<\|(?:endoftext|im_end|eot_id|end_of_text|end)\|>|<(?:eos|end_of_turn)>")
_STRUCK_OUT = re.compile(r"~~[^~\n]{1,80}~~")
_QUOTES = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"'})
# What begins the next turn: a section of the Alpaca layout, ...
_NEXT_TURN = re.compile(
    r"(?:^|\n)[ \t]*(?:"
    r"\#{2,3}[ \t]*(?:instructions?|input|response|user|human)[ \t]{0,4}[0-9]{0,4}[ \t]{0,4}[:\n]"
    r"|[*_]*(?:instruction|human|user)[ \t]{0,4}[0-9]{0,4}[ \t]{0,4}:)"
    r"|(?<=\S)\#{3}[ \t]*(?:instruction|input|response)[ \t]{0,4}:",
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


def end_of_thoughts(text: str) -> int | None:
    """Where the last block of thoughts ends, 0 without one; None while a block is open."""
    end = max((match.end() for match in _THOUGHT_END.finditer(text)), default=0)
    return None if _THOUGHT_BEGIN.search(text, end) else end


def opens_thoughts(prompt: str) -> bool:
    """Whether a prompt ends with the beginning of a block of thoughts, as some chat templates write it."""
    return prompt.rstrip().endswith("<think>")


def next_turn(text: str) -> int | None:
    """Where a text goes on with the next turn ("### Instruction:"); None for nowhere.

    A text may begin with such a heading. What is added behind a next turn does not move it.
    """
    return next((match.start() for match in _NEXT_TURN.finditer(text) if text[: match.start()].strip()), None)


def own_answer(text: str, *, holds_answer: Callable[[str], bool]) -> str:
    """What follows the thoughts, up to an end token or where a next turn or question begins, with typewriter quotes.

    Text that is struck out ("~~13~~ 12") is left out. While thoughts go on, there is no answer.

    Args:
        text: what a model wrote.
        holds_answer: whether a piece of text holds an answer. A question ends the text only behind one: before it, the
            text repeats its own question ("Sure!", "Question: ...", "Answer: 7").
    """
    thought = end_of_thoughts(text)
    if thought is None:
        return ""
    text = next((piece for piece in _END_TOKEN.split(text[thought:]) if piece.strip()), "")
    text = _STRUCK_OUT.sub("", text[: next_turn(text)].translate(_QUOTES))
    begin = 0
    for match in _QUESTION.finditer(text):
        # Piece by piece: reading all that stands before every question would cost the square of the text.
        piece = text[begin : match.start()]
        # A number is an answer also where a letter was asked for.
        if _DIGIT.search(piece) or holds_answer(piece):
            return text[: match.start()]
        begin = match.start()
    return text


def without_format_lines(text: str) -> str:
    """The text without repeated lines of the prompt: "Answer format: true/false", "Answer Choices: (A) ..."."""
    return _FORMAT_LINE.sub(" ", text)
