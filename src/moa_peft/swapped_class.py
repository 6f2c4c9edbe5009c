"""Giving a module of the model a subclass of its own class, under the same name, with another forward.

The class stays an instance of what it was, so wrapping policies, checkpointing and string checks keep working, and
nothing has to be bound to the instance.
"""

import functools
import types
from collections.abc import Callable
from typing import Any

from torch import nn


def swapped_class(original: type[nn.Module], forward: Callable[..., Any], make: "ClassMaker") -> type[nn.Module]:
    """A subclass of `original` with this forward.

    Args:
        original: the module's own class.
        forward: the method that replaces its forward.
        make: the function (cached, one class per original) that calls this one; pickle and copy find the class by it.
    """

    def reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        # The class stands under its name in no module, so pickle and copy find it through the class it replaces.
        _, _, *state = original.__reduce_ex__(self, protocol)
        return (_new, (make, original), *state)

    names = {
        "forward": functools.wraps(original.forward)(forward),
        "__reduce_ex__": reduce,
        "__module__": original.__module__,
    }
    return type(original.__name__, (original,), names)


ClassMaker = Callable[[type[nn.Module]], type[nn.Module]]


def _new(make: ClassMaker, original: type[nn.Module]) -> nn.Module:
    swapped = make(original)
    return swapped.__new__(swapped)


def swap_class(module: nn.Module, make: ClassMaker) -> None:
    """Give `module` the class that `make` makes of its own."""
    _change_class(module, make(type(module)))


def restore_class(module: nn.Module) -> None:
    """Give a module its own class back."""
    _change_class(module, type(module).__mro__[1])


def runs_own_forward(module: nn.Module) -> bool:
    """Whether calling `module` reaches the forward of its class, at once or through a hook of accelerate."""
    method = module.__dict__.get("_old_forward", module.__dict__.get("forward"))
    return method is None or getattr(method, "__func__", None) is type(module).forward


def _change_class(module: nn.Module, new: type[nn.Module]) -> None:
    old = type(module)
    module.__class__ = new
    # accelerate keeps the forward that it found on the instance, and leaves it there when its hook is removed.
    for name in ("_old_forward", "forward"):
        method = module.__dict__.get(name)
        if getattr(method, "__func__", None) is old.forward:
            module.__dict__[name] = types.MethodType(new.forward, module)
