"""Rows of the three accepted forms turned into examples.

- instruction: `instruction`, optional `input`, `output`, optional `answer` (LLM-Adapters, Alpaca);
- prompt: `prompt` and `completion`, both text or both lists of messages (as in TRL);
- messages: `messages`, a list of {role, content}.

A field that is null counts as absent, because Parquet and `datasets` fill missing columns with nulls. Any row may
carry `answer`, the reference for scoring; other columns are ignored.
"""

import re
from typing import Any, get_args

from moa_peft.data.examples import Example, Message, Role, Source, join_instruction
from moa_peft.errors import UserError

ACCEPTED_FORMS = (
    "Accepted forms: (1) instruction, input (optional), output; (2) prompt, completion (both text, or both lists of "
    "messages); (3) messages, a list of {role, content}. Each may also have answer, the reference for scoring."
)
PROMPT_FIELD = {"instruction": "instruction", "prompt": "prompt", "messages": "messages"}
ANSWER_FIELD = {"instruction": "output", "prompt": "completion", "messages": "messages"}

# LLM-Adapters' chain-of-thought outputs start with a line break and "A:". A plain "A:" with no line break before it
# is left alone: it may be a multiple-choice answer.
_LEADING_ANSWER_MARK = re.compile(r"\A\s*\n\s*A:\s*")
_LEADING_LINE_BREAKS = re.compile(r"\A(?:[ \t]*\r?\n)+")


def parse_row(
    row: Any, *, where: str, split: str | None = None, require_answer: bool = True, form: str | None = None
) -> tuple[Example, str]:
    """Turn one row into an example.

    Args:
        row: the decoded row.
        where: file and row for messages.
        split: what `Example.split` shall say.
        require_answer: whether a row without an answer is an error.
        form: the form of the rows before this one; None for the first.

    Returns:
        The example, and the form it was in.

    Raises:
        UserError: the row is not an object, is of none of the forms or of another than `form`, or a value has the
            wrong type.
    """
    if not isinstance(row, dict):
        raise UserError(f"{where}: a row must be an object with named fields, not {_describe(row)}. {ACCEPTED_FORMS}")
    fields = {key: value for key, value in row.items() if value is not None}
    found_form = _detect_form(row, fields, where, require_answer)
    if form is not None and found_form != form:
        raise UserError(
            f"{where} is of the {found_form} form, but the rows before it are of the {form} form. Use one form in a "
            f"data set. {ACCEPTED_FORMS}"
        )
    reference = _reference(fields.get("answer"), where)
    source: Source | None = None
    num_context = 0
    if found_form == "instruction":
        source = Source(
            instruction=_text(fields["instruction"], "instruction", where),
            input=_text(fields.get("input", ""), "input", where),
        )
        messages = [Message("user", join_instruction(source))]
        if "output" in fields:
            messages.append(Message("assistant", strip_answer_mark(_text(fields["output"], "output", where))))
        if not messages[0].content.strip():
            raise UserError(f"{where}: instruction and input are empty; give the row a question or remove it.")
    elif found_form == "prompt":
        messages, num_context = _prompt_completion(fields["prompt"], fields.get("completion"), where)
    else:
        messages = _messages(fields["messages"], "messages", where)
    _check_conversation(messages, where, require_answer)
    example = Example(
        messages=tuple(messages),
        source=source,
        reference=reference,
        num_context=num_context,
        split=split,
        where=where,
    )
    return example, found_form


def strip_answer_mark(output: str) -> str:
    """Remove the line break and "A:", or the bare line breaks, that an output begins with."""
    without_mark = _LEADING_ANSWER_MARK.sub("", output)
    return without_mark if without_mark != output else _LEADING_LINE_BREAKS.sub("", output)


def _detect_form(row: dict[str, Any], fields: dict[str, Any], where: str, require_answer: bool) -> str:
    complete = [form for form in PROMPT_FIELD if {PROMPT_FIELD[form], ANSWER_FIELD[form]} <= fields.keys()]
    candidates = complete
    if not complete and not require_answer:
        candidates = [form for form in PROMPT_FIELD if PROMPT_FIELD[form] in fields]
    if len(candidates) == 1:
        return candidates[0]
    found = ", ".join(f"{key} (null)" if row[key] is None else str(key) for key in row) or "none"
    if candidates:
        raise UserError(
            f"{where} fits {len(candidates)} forms at once ({', '.join(candidates)}); remove the fields of all but "
            f"one. Fields found: {found}. {ACCEPTED_FORMS}"
        )
    incomplete = [form for form in PROMPT_FIELD if PROMPT_FIELD[form] in fields]
    hint = f" {PROMPT_FIELD[incomplete[0]]} is there, {ANSWER_FIELD[incomplete[0]]} is missing." if incomplete else ""
    raise UserError(f"{where} has the wrong fields. Fields found: {found}.{hint} {ACCEPTED_FORMS}")


def _prompt_completion(prompt: Any, completion: Any, where: str) -> tuple[list[Message], int]:
    if completion is not None and isinstance(prompt, str) != isinstance(completion, str):
        raise UserError(
            f"{where}: prompt is {_describe(prompt)} and completion is {_describe(completion)}; make both text or "
            f"both lists of messages."
        )
    if isinstance(prompt, str):
        if not prompt.strip():
            raise UserError(f"{where}: prompt is empty; give the row a question or remove it.")
        answer = [] if completion is None else [Message("assistant", _text(completion, "completion", where))]
        return [Message("user", _text(prompt, "prompt", where)), *answer], 1
    context = _messages(prompt, "prompt", where)
    return context + ([] if completion is None else _messages(completion, "completion", where)), len(context)


def _messages(value: Any, name: str, where: str) -> list[Message]:
    if not isinstance(value, list | tuple) or not value:
        raise UserError(f"{where}: {name} must be a list of {{role, content}} with at least one entry.")
    messages = []
    for position, entry in enumerate(value, start=1):
        place = f"{where}, message {position} of {name}"
        if not isinstance(entry, dict):
            raise UserError(f"{place} must be {{role, content}}, not {_describe(entry)}.")
        unknown = sorted(key for key, item in entry.items() if key not in ("role", "content") and item)
        if unknown:
            raise UserError(f"{place} has {', '.join(unknown)}; only role and content are supported. Remove the rest.")
        role: Any = entry.get("role")
        if role not in get_args(Role):
            raise UserError(f"{place} has role {role!r}; allowed: {', '.join(get_args(Role))}.")
        messages.append(Message(role, _text(entry.get("content"), "content", place)))
    return messages


def _check_conversation(messages: list[Message], where: str, require_answer: bool) -> None:
    first_user = next((i for i, message in enumerate(messages) if message.role == "user"), None)
    first_assistant = next((i for i, message in enumerate(messages) if message.role == "assistant"), len(messages))
    if first_user is None or first_user > first_assistant:
        raise UserError(f"{where}: a conversation needs a user message before the first assistant message.")
    last = messages[-1].role
    if last == "system" or (require_answer and last != "assistant"):
        wanted = "the assistant" if require_answer else "the user or the assistant"
        raise UserError(f"{where}: the last message must be by {wanted}, but it is by the {last}.")


def _reference(value: Any, where: str) -> str | None:
    if value is None:
        return None
    if isinstance(value, str):
        return _text(value, "answer", where)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return str(value)
    raise UserError(f"{where}: answer must be text, a number or a truth value, not {_describe(value)}.")


def check_characters(text: str, name: str) -> None:
    """Refuse lone surrogates, which are half of a character: no tokenizer takes them, and no file can hold them.

    JSON can write them (`"\\ud800"`), and Python reads bytes of the command line that are no UTF-8 as such.

    Args:
        text: any text.
        name: how the message names it.

    Raises:
        UserError: with the place of the first one.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise UserError(
            f"{name} has {half} at position {error.start + 1}, half of a surrogate pair and no character. Write the "
            "text as UTF-8, or remove it there."
        ) from error


def _text(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where}: {name} must be text, not {_describe(value)}.")
    check_characters(value, f"{where}: {name}")
    return value


def _describe(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", type(None): "null", bool: "a truth value"}
    return names.get(type(value), f"a value of type {type(value).__name__}")
