"""Networks that all routers of an adapter share, one per width of what they read.

They belong to the decoder stack, as a child called ``moa`` beside its blocks: each is stored once, and wrappers that
keep a block's weights together (FSDP) keep these with the model's own.
"""

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from moa_peft.config import MoAConfig
from moa_peft.errors import UserError
from moa_peft.layer import MoALayer
from moa_peft.mixture import mixtures_of
from moa_peft.plan import Plan
from moa_peft.routers import ROUTERS
from moa_peft.sites import UNROUTED

CHILD = "moa"


class SharedNetworks(nn.Module, BaseTunerLayer):
    """The shared networks of every adapter.

    Args:
        stack: the decoder stack; it is not registered as a child.
    """

    adapter_layer_names = ("moa_shared",)
    other_param_names = ()

    def __init__(self, stack: nn.Module) -> None:
        super().__init__()
        self.moa_shared = nn.ModuleDict()  # adapter name -> input width -> network
        vars(self)["stack"] = stack

    def get_base_layer(self) -> nn.Module:
        """The decoder stack."""
        return vars(self)["stack"]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Nothing to merge; the tuner layers refuse it."""

    def unmerge(self) -> None:
        """Nothing is ever merged."""


def share_networks(model: nn.Module, block_name: str, layer: MoALayer, adapter_name: str, config: MoAConfig) -> None:
    """Give the routers of one adapter in one block their shared networks, which are made where there are none yet.

    Args:
        model: the model.
        block_name: full name of the block.
        layer: its tuner layer, with the adapter.
        adapter_name: the adapter.
        config: its configuration.
    """
    stack = model.get_submodule(stack_name(block_name))
    for router in layer.routers(adapter_name).values():
        network = type(router).shared_network(router.hidden_size, router.options)
        if network is None:
            continue
        held: Any = getattr(stack, CHILD, None)
        if held is None:
            held = SharedNetworks(stack)
            stack.add_module(CHILD, held)
        if adapter_name not in held.moa_shared:
            held.moa_shared[adapter_name] = nn.ModuleDict()
        networks, width = held.moa_shared[adapter_name], str(router.hidden_size)
        assert isinstance(networks, nn.ModuleDict)
        if width not in networks:
            network.reset_parameters(config.init)  # type: ignore[operator]
            networks[width] = network.to(next(router.parameters()).device)
            held.set_adapter(layer.active_adapters)
        router.share(networks[width])


def check_devices(model: nn.Module, plan: Plan, config: MoAConfig) -> None:
    """Refuse a model whose blocks are on several devices, where the routers share a network.

    Raises:
        UserError: naming the devices.
    """
    assert config.router is not None
    if ROUTERS[config.router["type"]].shared_network(1, config.router_options()) is None:
        return
    first = (next(model.get_submodule(block).parameters(), None) for block in plan.blocks)
    devices = sorted({str(parameter.device) for parameter in first if parameter is not None})
    if len(devices) > 1:
        raise UserError(
            f"The router {config.router['type']!r} shares one network between all blocks, and these are on several "
            f"devices ({', '.join(devices)}). Load the model on one device, or use another router."
        )


def shared_shapes(config: MoAConfig, plan: Plan, hidden_size: int) -> dict[str, torch.Size]:
    """Names and shapes of the tensors of the networks that `share_networks` makes; names as in the model, without the
    adapter's.

    Args:
        config: configuration of the mixture.
        plan: experts of every block.
        hidden_size: width of the residual stream.
    """
    assert config.router is not None
    router_class, options = ROUTERS[config.router["type"]], config.router_options()
    shapes = {}
    with torch.device("meta"):
        for block, slots in plan.blocks.items():
            widths = {m.input_size(config, hidden_size) for m in mixtures_of(slots).values() if m.name != UNROUTED}
            for width in widths:
                network = router_class.shared_network(width, options)
                for name, tensor in [] if network is None else network.state_dict().items():
                    prefix = f"{stack_name(block)}.{CHILD}.moa_shared.{width}".lstrip(".")
                    shapes[f"{prefix}.{name}"] = tensor.shape
    return shapes


def remove_shared_networks(model: nn.Module) -> None:
    """Take the shared networks of all adapters away."""
    for module in list(model.modules()):
        if isinstance(getattr(module, CHILD, None), SharedNetworks):
            delattr(module, CHILD)


def stack_name(block_name: str) -> str:
    """Full name of the module that holds the list of blocks."""
    return block_name.rpartition(".")[0].rpartition(".")[0]
