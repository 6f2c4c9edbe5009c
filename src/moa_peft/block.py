"""The block that routes: a subclass of the model's own block class, under the same name.

The tuner layer is a child called ``moa``; the block's class is swapped for a subclass whose ``forward`` starts and
ends the routing and calls the original in between. transformers checkpoints ``forward``, so the recomputation routes
again with the tensors of its own call, which a hook around the block would not.
"""

import functools
import types
from typing import Any

from torch import nn

from moa_peft.layer import MoALayer
from moa_peft.pooling import ARGUMENT

CHILD = "moa"
"""Name of the tuner layer in its block. It must not contain the prefix ``moa_``, by which PEFT finds containers."""


@functools.cache
def routed_class(block_class: type[nn.Module]) -> type[nn.Module]:
    """The subclass of `block_class` that routes; one per class, so that wrapping policies by class keep working."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        layer: MoALayer = self.moa  # type: ignore[assignment]
        hidden = args[0] if args else kwargs["hidden_states"]
        cache = kwargs.get("past_key_values")
        layer.start(hidden, kwargs.get("layer_past") if cache is None else cache, kwargs.pop(ARGUMENT, None))
        try:
            output = block_class.forward(self, *args, **kwargs)
            layer.check_prompt_ran()
        finally:
            layer.finish()
        return output

    def reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        # The class stands under its name in no module, so pickle and copy find it through the class it routes for.
        _, _, *state = block_class.__reduce_ex__(self, protocol)
        return (_new_routed, (block_class,), *state)

    names = {
        "forward": functools.wraps(block_class.forward)(forward),
        "__reduce_ex__": reduce,
        "__module__": block_class.__module__,
    }
    return type(block_class.__name__, (block_class,), names)


def _new_routed(block_class: type[nn.Module]) -> nn.Module:
    routed = routed_class(block_class)
    return routed.__new__(routed)


def install(block: nn.Module, layer: MoALayer) -> None:
    """Give `block` its tuner layer and the class that routes."""
    block.add_module(CHILD, layer)
    block.__class__ = routed_class(type(block))
    _rebind_device_hook(block)


def uninstall(block: nn.Module) -> None:
    """Take the tuner layer, its hooks and the class away again."""
    layer = getattr(block, CHILD)
    layer.remove_hooks()
    delattr(block, CHILD)
    block.__class__ = type(block).__mro__[1]
    _rebind_device_hook(block)


def _rebind_device_hook(block: nn.Module) -> None:
    # accelerate replaces ``forward`` on the instance and keeps the one it found: that must be the class's present one.
    if "_old_forward" in block.__dict__:
        block.__dict__["_old_forward"] = types.MethodType(type(block).forward, block)
