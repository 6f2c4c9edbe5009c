"""From what a model wrote to a program: code blocks, repeated functions, continuations, lost indentation.

Nothing here runs or parses the text as Python: the rules look at lines only, so that no output can harm the caller.
"""

from __future__ import annotations

import re
import textwrap

from moa_peft.code_evaluation.problems import CodeProblem

_END_MARKS = ("<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>", "</s>", "[DONE]", "[/PYTHON]")
_START_MARK = re.compile(r"\A\s*\[(?:BEGIN|PYTHON)\]")
_THOUGHT_END = "</think>"
_FENCE = re.compile(r"(?P<before>[^`~]*)(?P<mark>`{3,}|~{3,})[ \t]*(?P<info>[\w+.-]*)[^`~]*")
_PYTHON = ("", "python", "py", "python3")
_INDEX_PART = r"(?:\"[^\"\n]*\"|'[^'\n]*'|[^\[\]=\"'])"


def _index(depth: int) -> str:
    """A pattern for brackets in brackets; every character has one way to match, so its time is that of its length."""
    return rf"\[(?:{_INDEX_PART}{'|' + _index(depth - 1) if depth > 1 else ''})*\]"


_CODE_LINE = re.compile(
    r"""
      (?:async\s+)?(?:def|class)\s+\w
    | import\s+[\w.]+ | from\s+[\w.]+\s+import\b
    | (?:if|elif|else|for|while|with|try|except|finally|match|case|async)\b.*:\s*(?:\#.*)?$
    | (?:return|yield|raise|assert|del|global|nonlocal)\b
    | (?:pass|break|continue)\s*(?:\#.*)?$
    | [A-Za-z_][\w.]*(?:INDEX|\s*,\s*\*?[A-Za-z_][\w.]*)*\s*(?::\s*\w[^=]*)?(?:[-+*/%&|^@]|//|\*\*|<<|>>)?=(?!=)
    | [A-Za-z_][\w.]*\(
    | [rRbBuU]?(?:\"\"\"|''') | [@\#)\]}]
    """.replace("INDEX", _index(5)),
    re.VERBOSE,
)
_USAGE_LINE = re.compile(r"print\s*\(|assert\b|if\s+__name__\b|\"\"\"|'{3}")
_INDENTED_START = re.compile(r"\A\s*\n?[ ]{1,3}(?=(?:def|async|import|from|class)\s|@)")
_TRIPLE_QUOTE = re.compile(r"\"\"\"|'''")


def solution_code(problem: CodeProblem, completion: str) -> str:
    """The module that a model's answer stands for; the problem's tests run in it.

    1. What follows an end mark ("[DONE]", "</s>", ...) and a chain of thought before "</think>" are dropped.
    2. Of fenced blocks, the first Python block that defines the function counts, closed or not; without one, code
       before the first fence, then the first Python block.
    3. A text that defines the function at the left margin is a whole answer: prose around it and usage after it
       (print, assert, `if __name__`, a further text in quotes) are dropped. For HumanEval, what stands before the
       function in the prompt (imports, helpers) goes in front.
    4. Otherwise a HumanEval answer continues the prompt: it ends at the first stop string or prose, and its lines are
       moved to the indentation of the function's body, where the first or all have lost theirs.

    Args:
        problem: the problem that was asked.
        completion: what the model wrote, without the prompt.

    Returns:
        Python source; a text without any code gives source that does not compile.
    """
    text = completion.replace("\r\n", "\n").replace("\r", "\n").lstrip("\ufeff")
    text = text.rpartition(_THOUGHT_END)[2]
    for mark in _END_MARKS:
        text = text.partition(mark)[0]
    text = _START_MARK.sub("", text)
    name = rf"{re.escape(problem.entry_point)}\b" if problem.entry_point else r"\w"
    definition = re.compile(rf"^(?:async )?def {name}", re.MULTILINE)
    code = _chosen_code(text, definition)
    if problem.dataset == "mbpp":
        return _without_prose(code, definition)
    if _is_whole(code, definition):
        start = definition.search(problem.prompt)
        return problem.prompt[: start.start() if start else 0] + _without_prose(code, definition)
    return problem.prompt.rstrip() + "\n" + _body(problem, code)


def _chosen_code(text: str, definition: re.Pattern[str]) -> str:
    before, blocks = _blocks(text)
    if not blocks:
        return _at_margin(text, definition)
    python = [_at_margin(code, definition) for info, code in blocks if info in _PYTHON]
    for code in python:
        if definition.search(code):
            return code
    before = _at_margin(before, definition)
    first_line = before.strip("\n").partition("\n")[0]
    if definition.search(before) or first_line.startswith((" ", "\t")) or _CODE_LINE.match(first_line):
        return before
    return python[0] if python else before


def _blocks(text: str) -> tuple[str, list[tuple[str, str]]]:
    """The text before the first fence, and (language, code) of each block; the last block may lack its end."""
    before: list[str] = []
    blocks: list[tuple[str, list[str]]] = []
    target, is_open = before, False
    for line in text.split("\n"):
        fence = _FENCE.fullmatch(line)
        if fence is None:
            target.append(line)
            continue
        if fence["before"].strip():
            target.append(fence["before"].rstrip())
        if is_open and not fence["info"]:
            target, is_open = [], False
        else:
            blocks.append((fence["info"].lower(), []))
            target, is_open = blocks[-1][1], True
    return "\n".join(before), [(info, "\n".join(lines)) for info, lines in blocks]


def _at_margin(code: str, definition: re.Pattern[str]) -> str:
    """Move an indented definition of the function (a list item, a leading space) to the left margin."""
    for moved in (_INDENTED_START.sub("", code), textwrap.dedent(code)):
        if definition.search(moved):
            return moved
    return code


def _is_whole(code: str, definition: re.Pattern[str]) -> bool:
    start = definition.search(code)
    if start is None:
        return False
    above = code[: start.start()].strip("\n")
    return not above.startswith((" ", "\t")) and re.search(r"^return\b", above, re.MULTILINE) is None


def _without_prose(code: str, definition: re.Pattern[str]) -> str:
    kept: list[str] = []
    keeping = defined = False
    quote: str | None = None
    for line in code.split("\n"):
        if quote is None and line.strip() and not line[0].isspace():
            keeping = _CODE_LINE.match(line) is not None
            if defined and (not keeping or _USAGE_LINE.match(line)):
                break
            defined = defined or definition.match(line) is not None
        if keeping:
            kept.append(line)
            quote = _open_quote(line, quote)
    return "\n".join(kept).rstrip() + "\n"


def _open_quote(line: str, quote: str | None) -> str | None:
    """The triple quote that is open after the line, if `quote` was open before it."""
    for mark in _TRIPLE_QUOTE.findall(line):
        if quote is None:
            quote = mark
        elif quote == mark:
            quote = None
    return quote


def _body(problem: CodeProblem, code: str) -> str:
    lines = [_spaces_for_tabs(line) for line in code.split("\n")]
    while lines and (not lines[0].strip() or (_indent(lines[0]) == 0 and not _CODE_LINE.match(lines[0]))):
        del lines[0]
    if not lines:
        return code
    margin = _body_indent(problem)
    first = _indent(lines[0])
    second = next((_indent(line) for line in lines[1:] if line.strip()), None)
    is_opener = lines[0].partition("#")[0].rstrip().endswith(":")
    lost_first = second is not None and (second > margin if is_opener else second >= margin)
    # At the left margin, "if" and "print(" belong to the body where all of its lines lost their indentation.
    all_lost = first == 0 and second is not None and not lost_first
    lines = _until_stop(lines, ("\nclass ", "\ndef ") if all_lost else problem.stop_strings)
    if first != margin:
        rest = [_indent(line) for line in lines[1:] if line.strip()]
        only_first = not all_lost and (first == 0 or not rest or min(rest) == margin)
        moved = 1 if only_first else len(lines)
        lines[:moved] = [" " * (_indent(line) + margin - first) + line.lstrip() for line in lines[:moved]]
    return "\n".join(lines).rstrip() + "\n"


def _until_stop(lines: list[str], stop_strings: tuple[str, ...]) -> list[str]:
    quote = _open_quote(lines[0], None)
    for number, line in enumerate(lines[1:], start=1):
        at_margin = quote is None and line.strip() and _indent(line) == 0
        if at_margin and (f"\n{line}\n".startswith(stop_strings) or not _CODE_LINE.match(line)):
            return lines[:number]
        quote = _open_quote(line, quote)
    return lines


def _body_indent(problem: CodeProblem) -> int:
    """How far the body of the prompt's function is indented: the first line after its signature tells."""
    signature = (
        rf"^(?:async )?def {re.escape(problem.entry_point or '')}\b[\s\S]*?:[ \t]*(?:#.*)?\n+(?P<indent>[ \t]+)"
    )
    found = re.search(signature, problem.prompt, re.MULTILINE)
    return len(found["indent"].expandtabs(4)) if found else 4


def _spaces_for_tabs(line: str) -> str:
    code = line.lstrip()
    return line[: len(line) - len(code)].expandtabs(4) + code


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())
