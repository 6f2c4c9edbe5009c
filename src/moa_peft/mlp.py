"""The MLP of a block: its class is swapped for a subclass that keeps less for the backward pass on the fused path, and
on either path serves the experts that act inside it.

Only where the architecture says that the MLP is ``down(act(gate(x)) * up(x))`` and nothing else; everything else goes
to the model's own forward. Without a gradient it saves the memory of one activation as wide as the MLP.
"""

import functools
from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from moa_peft.architectures import Architecture
from moa_peft.experts import MlpLoraExpert
from moa_peft.glu import derivative_of, gated_down
from moa_peft.listeners import is_plain, listens_alone
from moa_peft.packed import has_backward, is_transformed
from moa_peft.sites import UNROUTED
from moa_peft.swapped_class import restore_class, swap_class, swapped_class

if TYPE_CHECKING:
    from moa_peft.call import Call
    from moa_peft.fused_path import FusedPath
    from moa_peft.layer import MoALayer

MLP_SITE = "moa_mlp_site"
"""Key in the ``__dict__`` of an MLP; a plain entry is no child module, so state dicts do not see it."""


SWITCHED_OFF = "switched off"

GATHER_TOKENS = 64
"""On other devices than the CPU, experts inside the MLP compute all tokens, masked, in forwards over fewer."""


class GatedExpert(NamedTuple):
    """An expert inside the MLP in one forward.

    Attributes:
        expert: the expert.
        weights: ``[.., n]`` its routing weights; None is 1.
        skips: whether it may leave out tokens without a weight.
    """

    expert: MlpLoraExpert
    weights: torch.Tensor | None
    skips: bool


def gated_experts(layer: "MoALayer", call: "Call") -> list[GatedExpert]:
    """The experts that act inside the MLP in one forward of a block."""
    found = []
    for name in call.running:
        for mixture, columns, slot in layer.mixtures[name].gated:
            expert = layer.moa_experts[name].get_submodule(slot.name)
            assert isinstance(expert, MlpLoraExpert)
            if mixture.name == UNROUTED:
                found.append(GatedExpert(expert, None, skips=False))
                continue
            router = layer.routers(name)[mixture.name]
            weights = layer.routing_of(call, name, mixture.name).weights[..., columns[0] : columns[-1] + 1]
            found.append(GatedExpert(expert, weights, router.may_skip(with_gradient=torch.is_grad_enabled())))
    return found


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
        if any(self.path.layer.mixtures[name].gated for name in adapter_names):
            return "experts act inside it; what they compute is made again in the backward pass"
        if derivative_of(activation) is None:
            return f"no derivative is known for the activation {type(activation).__name__}"
        if type(down) is not nn.Linear or type(down.weight) is not nn.Parameter:
            return f"the down projection is a {type(down).__name__} with its own kind of weight"
        if any(parameter.requires_grad for parameter in down.parameters()):
            return "the down projection itself is trained"
        if not is_plain(activation):
            return "a hook listens to the activation"
        if not self.path.enabled:
            return SWITCHED_OFF
        if not listens_alone(self.path.layer, down):
            return "another hook listens to the down projection"
        names = list(adapter_names)
        products = [self.path.layer.mixtures[name].products.get(self.down_site) for name in names]
        if sum(product is not None and product.drops for product in products) > 1:
            return "several adapters drop elements of the input of the down projection (dropout, in training)"
        return next(filter(None, map(self._experts_obstacle, names)), None)

    def _experts_obstacle(self, adapter_name: str) -> str | None:
        mixtures = self.path.layer.mixtures[adapter_name]
        if not mixtures.at(self.down_site):
            return None
        product = mixtures.products.get(self.down_site)
        if product is None or not product.is_linear or product.read_biased:
            return "an expert of the down projection is no plain product of two matrices"
        shared = mixtures.shared.read_by(self.down_site)
        routers = self.path.layer.routers(adapter_name)
        if not all(is_plain(part) for name in shared.routers for part in (routers[name], *routers[name].reads())):
            return "a hook listens to the router of the down projection, or keeps its weights elsewhere"
        return shared.obstacle()

    def forward(self, x: torch.Tensor) -> torch.Tensor | None:
        """The MLP's output for ``[.., D]``; None where the model's own forward has to make it."""
        call = self.path.layer.calls.current()
        if call is None or not call.running:
            return None
        inside = gated_experts(self.path.layer, call)
        if inside:
            return self._with_experts(x, inside)
        if torch.compiler.is_compiling() or is_transformed():
            return None
        if call.decoding or self.obstacle(call.running) is not None:
            return None
        gate_layer, up_layer, activation, down = self.parts()
        assert isinstance(down, nn.Linear)
        gate, up = gate_layer(x), up_layer(x)
        if not torch.is_grad_enabled():
            h = activation(gate)
            return down(h * up if h is gate else h.mul_(up))
        if gate.dtype != down.weight.dtype or not (gate.requires_grad or up.requires_grad):
            return down(activation(gate) * up)
        return self.path.add_down(call, self.down_site, partial(gated_down, gate, up, activation, down))

    def _with_experts(self, x: torch.Tensor, inside: Sequence[GatedExpert]) -> torch.Tensor:
        """The MLP's output where experts act inside it."""
        gate_layer, up_layer, activation, down = self.parts()
        gate, up = gate_layer(x), up_layer(x)
        hidden, output = activation(gate) * up, None
        flat = [values.reshape(-1, values.shape[-1]) for values in (x, gate, up)]
        for expert, weights, skips in inside:
            tokens = flat[0].shape[0]
            ones = gate.new_ones(tokens, expert.copies) if weights is None else None
            weight = weights.reshape(tokens, -1).to(gate.dtype) if weights is not None else ones
            # Which tokens an expert has is known to the host only after it waited for the device.
            worth_it = skips and (x.device.type == "cpu" or tokens >= GATHER_TOKENS)
            gathered = worth_it and self.path.enabled and not torch.compiler.is_compiling() and not is_transformed()
            run = partial(expert, activation=activation, gathered=gathered)
            if has_backward() and self.path.enabled:
                # Every expert has activations as wide as the MLP: they are made again in the backward pass.
                d_hidden, d_output = checkpoint(run, *flat, weight, use_reentrant=False)  # type: ignore[misc]
            else:
                d_hidden, d_output = run(*flat, weight)
            hidden = hidden + d_hidden.to(hidden.dtype).view(hidden.shape)
            output = d_output if output is None else output + d_output
        result = down(hidden)
        return result + output.to(result.dtype).view(result.shape)  # type: ignore[union-attr]


@functools.cache
def fused_class(mlp_class: type[nn.Module]) -> type[nn.Module]:
    """The subclass of `mlp_class` that keeps less; one per class."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        site: MLPSite = self.__dict__[MLP_SITE]
        output = None
        if len(args) + len(kwargs) == 1:
            output = site.forward(args[0] if args else next(iter(kwargs.values())))
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
