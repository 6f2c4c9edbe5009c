"""The block that routes: a subclass of the model's own block class, under the same name.

The tuner layer is a child called ``moa``; the block's class is swapped for a subclass whose ``forward`` starts and
ends the routing and calls the original in between. transformers checkpoints ``forward``, so the recomputation routes
again with the tensors of its own call, which a hook around the block would not.
"""

import functools
from typing import Any

from torch import nn

from moa_peft.layer import MoALayer
from moa_peft.pooling import ARGUMENT
from moa_peft.swapped_class import restore_class, swap_class, swapped_class
from moa_peft.token_mask import ARGUMENT as TOKENS

CHILD = "moa"
"""Name of the tuner layer in its block. It must not contain the prefix ``moa_``, by which PEFT finds containers."""


@functools.cache
def routed_class(block_class: type[nn.Module]) -> type[nn.Module]:
    """The subclass of `block_class` that routes; one per class, so that wrapping policies by class keep working."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        layer: MoALayer = self.moa  # type: ignore[assignment]
        hidden = args[0] if args else kwargs["hidden_states"]
        cache = kwargs.get("past_key_values")
        cache = kwargs.get("layer_past") if cache is None else cache
        layer.start(hidden, cache, pooling=kwargs.pop(ARGUMENT, None), tokens=kwargs.pop(TOKENS, None))
        try:
            output = block_class.forward(self, *args, **kwargs)
            layer.check_prompt_ran()
        finally:
            layer.finish()
        return output

    return swapped_class(block_class, forward, routed_class)


def install(block: nn.Module, layer: MoALayer) -> None:
    """Give `block` its tuner layer and the class that routes."""
    block.add_module(CHILD, layer)
    swap_class(block, routed_class)


def uninstall(block: nn.Module) -> None:
    """Take the tuner layer, its hooks and the class away again."""
    layer: MoALayer = getattr(block, CHILD)
    layer.remove_hooks()
    delattr(block, CHILD)
    restore_class(block)
