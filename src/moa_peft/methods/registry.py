"""What a named method is, how one is registered, and how its knobs are checked."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from difflib import get_close_matches
from functools import cached_property
from typing import Any, get_type_hints

from peft import PeftConfig

from moa_peft.errors import UserError

Targets = tuple[str, ...] | list[str]
"""Roles or modules."""

Numbers = int | tuple[int, ...] | list[int]
"""One number, or one for each group of consecutive blocks."""

Layers = list[int] | str | None
"""Blocks: indices, or a string such as ``0-11,20``; None is all."""

EXPERT_KNOBS = frozenset(
    ["rank", "alpha", "dropout", "rslora", "targets", "layers", "num_experts", "adapter_size", "prompt"]
    + ["prompt_length"]
)
"""Knobs of the experts. Of the others, those of losses end in ``_coefficient`` or are `LOSS_KNOBS`; the rest are the
router's."""

LOSS_KNOBS = frozenset(["sparsity_k"])

_SET_BY_KNOBS = {"experts", "target_modules", "r", "lora_alpha", "lora_dropout", "use_rslora", "peft_type"}


@dataclass(frozen=True)
class Method:
    """One row of ``moa methods``.

    Attributes:
        name: what recipes call it.
        build: function of its knobs that returns a configuration.
        formula: what it adds.
        source: paper.
        scope: what owns one router.
    """

    name: str
    build: Callable[..., PeftConfig]
    formula: str
    source: str
    scope: str

    @property
    def knobs(self) -> dict[str, Any]:
        """Names and defaults of its own knobs."""
        parameters = inspect.signature(self.build).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}

    @property
    def config_fields(self) -> set[str]:
        """Fields of its configuration class that can be given beside the knobs."""
        return {f.name for f in fields(self._hints["return"])} - _SET_BY_KNOBS

    def check_knob(self, name: str, value: Any) -> Any:
        """The value of one of its knobs; one name makes a list of names.

        Raises:
            UserError: where its type is wrong.
        """
        hint = self._hints[name]
        if hint == Targets and isinstance(value, str):
            value = [value]
        for kind, words, fits in _KINDS:
            if hint == kind and not fits(value):
                raise UserError(f"{name} is {value!r}; it must be {words}.")
        return value

    @cached_property
    def _hints(self) -> dict[str, Any]:
        return get_type_hints(self.build)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


_KINDS: list[tuple[Any, str, Callable[[Any], bool]]] = [
    (bool, "true or false", lambda value: isinstance(value, bool)),
    (int, "a whole number", _is_int),
    (float, "a number", lambda value: _is_int(value) or isinstance(value, float)),
    (
        Targets,
        "a list of names",
        lambda value: isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value),
    ),
    (
        Numbers,
        "a whole number, or a list of them (one for each group of consecutive blocks)",
        lambda value: _is_int(value) or (isinstance(value, (list, tuple)) and all(map(_is_int, value))),
    ),
]
"""Types of knobs that are checked here; the parts check the others."""


METHODS: dict[str, Method] = {}


def method(formula: str, source: str, scope: str) -> Callable[[Callable[..., PeftConfig]], Callable[..., PeftConfig]]:
    """Decorator that enters a function under its name; its docstring is a summary line and what there is to know."""

    def enter(build: Callable[..., PeftConfig]) -> Callable[..., PeftConfig]:
        METHODS[build.__name__] = Method(build.__name__, build, formula, source, scope)
        return build

    return enter


def method_config(name: str, **knobs: Any) -> Any:
    """The configuration of the method `name`.

    Args:
        name: a key of `METHODS`.
        **knobs: the method's knobs, and any field of the configuration class it returns (`task_type`, ...). `router`
            and `losses` take the place of the method's own.

    Raises:
        UserError: for an unknown method or knob, a knob of the wrong type, or two settings of the same thing.
    """
    if name not in METHODS:
        near = get_close_matches(name, METHODS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise UserError(f"Unknown method {name!r}.{hint} Known: {', '.join(METHODS)}.")
    chosen = METHODS[name]
    own = {key: value for key, value in knobs.items() if key in chosen.knobs}
    rest = {key: value for key, value in knobs.items() if key not in chosen.knobs}
    for key in rest:
        if key not in chosen.config_fields:
            raise UserError(f"Method {name!r} has no knob {key!r}.{_hint(key, chosen)} Knobs: {_listed(chosen)}.")
    _check_replaced(chosen, own, rest)
    return chosen.build(**{key: chosen.check_knob(key, value) for key, value in own.items()}, **rest)


def _hint(key: str, chosen: Method) -> str:
    if key in ("experts", "target_modules"):
        return " Experts are written out in a configuration without a named method (in a recipe: method: custom)."
    near = get_close_matches(key, [*chosen.knobs, *chosen.config_fields], n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def _listed(chosen: Method) -> str:
    return ", ".join(chosen.knobs) or "none"


def _check_replaced(chosen: Method, own: dict[str, Any], rest: dict[str, Any]) -> None:
    """Refuse knobs of a router or of losses that another one, or others, take the place of."""
    coefficients = [key for key in own if key.endswith("_coefficient") or key in LOSS_KNOBS]
    of_router = [key for key in own if key not in EXPERT_KNOBS and key not in coefficients]
    for field, set_too in (("router", of_router), ("losses", coefficients)):
        if rest.get(field) is not None and set_too:
            raise UserError(
                f"Method {chosen.name!r}: {field} is {rest[field]!r} and {set_too[0]} is {own[set_too[0]]!r}; {field} "
                f"takes the place of the method's own. Give one of the two."
            )
