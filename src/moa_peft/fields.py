"""Reading a part's options from a plain dictionary, with errors that name what is allowed."""

import math
from dataclasses import MISSING, fields
from difflib import get_close_matches
from typing import Any, TypeVar

from moa_peft.errors import UserError

C = TypeVar("C")


def build_options(options_class: type[C], values: dict[str, Any], *, where: str) -> C:
    """Build the options dataclass of a part from its dictionary.

    Args:
        options_class: a keyword-only dataclass whose ``__post_init__`` checks the values.
        values: the user's dictionary, without the ``type`` key.
        where: how to name the part in messages, for example ``experts[2] (lora)``.

    Raises:
        UserError: for an unknown key (the nearest known one is suggested) or a missing one.
    """
    known = {field.name: field for field in fields(options_class)}  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            near = get_close_matches(str(key), known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise UserError(f"{where}: unknown option {key!r}.{hint} Options: {', '.join(known)}.")
    required = [n for n, f in known.items() if f.default is MISSING and f.default_factory is MISSING]
    missing = [name for name in required if name not in values]
    if missing:
        raise UserError(f"{where}: option {missing[0]!r} is required. Options: {', '.join(known)}.")
    return options_class(**values)


def check_positive_int(name: str, value: Any) -> None:
    """Raise a UserError unless `value` is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{name} is {value!r}; it must be an integer of at least 1.")


def check_choice(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """Raise a UserError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise UserError(f"{name} is {value!r}; allowed: {', '.join(map(repr, allowed))}.")


def check_range(name: str, value: Any, low: float, high: float, *, closed: bool = False) -> None:
    """Raise a UserError unless `value` is a number in ``(low, high]``, or in ``[low, high)`` when `closed`."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    inside = number and math.isfinite(value) and (low <= value < high if closed else low < value <= high)
    if not inside:
        bounds = f"[{low}, {high})" if closed else f"({low}, {high}]"
        raise UserError(f"{name} is {value!r}; it must be a number in {bounds}.")
