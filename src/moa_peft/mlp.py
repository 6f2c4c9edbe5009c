"""The MLP of a block on the fused path: its class is swapped for a subclass that keeps less for the backward pass.

Only where the architecture says that the MLP is ``down(act(gate(x)) * up(x))`` and nothing else; everything else goes
to the model's own forward. Without a gradient it saves the memory of one activation as wide as the MLP.
"""

import functools
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from moa_peft.architectures import Architecture
from moa_peft.glu import derivative_of, gated_down
from moa_peft.packed import is_transformed
from moa_peft.products import is_plain
from moa_peft.swapped_class import restore_class, swap_class, swapped_class

if TYPE_CHECKING:
    from moa_peft.fused_path import FusedPath

MLP_SITE = "moa_mlp_site"
"""Key in the ``__dict__`` of an MLP; a plain entry is no child module, so state dicts do not see it."""


class MLPSite:
    """The parts of one gated MLP.

    Args:
        path: fused path of the block.
        architecture: what the block calls its parts.
    """

    def __init__(self, path: "FusedPath", architecture: Architecture) -> None:
        self.path = path
        roles = architecture.roles
        assert architecture.glu is not None
        self.names = (roles["gate"], roles["up"], architecture.glu, roles["down"])
        self.down_site = (roles["down"], roles["down"])

    def parts(self) -> tuple[nn.Module, nn.Module, nn.Module, nn.Module]:
        """The modules for gate, up, activation and down that the block has now."""
        gate, up, activation, down = map(self.path.layer.get_base_layer().get_submodule, self.names)
        return gate, up, activation, down

    def obstacle(self, adapter_names: Iterable[str]) -> str | None:
        """Why the MLP takes the model's own forward while these adapters act; None where it is fused."""
        _, _, activation, down = self.parts()
        if derivative_of(activation) is None:
            return f"no derivative is known for the activation {type(activation).__name__}"
        if type(down) is not nn.Linear or type(down.weight) is not nn.Parameter:
            return f"the down projection is a {type(down).__name__} with its own kind of weight"
        if any(parameter.requires_grad for parameter in down.parameters()):
            return "the down projection itself is trained"
        if not is_plain(activation):
            return "a hook listens to the activation"
        return self.path.mlp_obstacle(self.down_site, down, adapter_names)

    def forward(self, x: torch.Tensor) -> torch.Tensor | None:
        """The MLP's output for ``[.., D]``; None where the model's own forward has to make it."""
        call = self.path.layer.calls.current()
        if call is None or call.decoding or not call.routings or self.obstacle(call.routings) is not None:
            return None
        gate_layer, up_layer, activation, down = self.parts()
        assert isinstance(down, nn.Linear)
        gate, up = gate_layer(x), up_layer(x)
        if not torch.is_grad_enabled():
            h = activation(gate)
            return down(h * up if h is gate else h.mul_(up))
        if gate.dtype != down.weight.dtype or not (gate.requires_grad or up.requires_grad):
            return down(activation(gate) * up)
        experts = self.path.down_factors(call, self.down_site, gate.dtype)
        return gated_down(gate, up, activation, down, *experts)


@functools.cache
def fused_class(mlp_class: type[nn.Module]) -> type[nn.Module]:
    """The subclass of `mlp_class` that keeps less; one per class."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        site: MLPSite = self.__dict__[MLP_SITE]
        output = None
        if len(args) == 1 and not kwargs and not torch.compiler.is_compiling() and not is_transformed():
            output = site.forward(args[0])
        return mlp_class.forward(self, *args, **kwargs) if output is None else output

    return swapped_class(mlp_class, forward, fused_class)


def install_fused_mlp(mlp: nn.Module, site: MLPSite) -> None:
    """Give `mlp` the class that keeps less."""
    mlp.__dict__[MLP_SITE] = site
    swap_class(mlp, fused_class)


def uninstall_fused_mlp(mlp: nn.Module) -> None:
    """Take the class away again."""
    del mlp.__dict__[MLP_SITE]
    restore_class(mlp)
