"""Options that take one of a few words."""

from __future__ import annotations

from typing import Any, get_args

from moa_peft.errors import UserError


def check_choice(name: str, value: str | None, kind: Any) -> None:
    """Refuse a value that is none of a `Literal`'s; None, where an option was not given, passes.

    Raises:
        UserError: naming the option and its values.
    """
    allowed = get_args(kind)
    if value is not None and value not in allowed:
        raise UserError(f"{name}: {value!r} is not allowed; give one of {', '.join(allowed)}.")


def split_words(text: str | None) -> list[str]:
    """The words of a comma-separated option."""
    return [word.strip() for word in (text or "").split(",") if word.strip()]
