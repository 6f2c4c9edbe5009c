"""Watching the routing of a model without changing its forward."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from moa_peft.layer import MoALayer
from moa_peft.routing import Routing
from moa_peft.sites import BLOCK


class RoutingRecord:
    """The routings of the forward passes inside `record_routing`, detached.

    Attributes:
        routings: router to one `Routing` per forward pass, in order. A router is called like its block, or, where the
            block has several, like the block and the linear layer or MLP: ``model.layers.0.q``.
        experts: router to the names of its experts, in the order of the weights.
    """

    def __init__(self) -> None:
        self.routings: dict[str, list[Routing]] = {}
        self.experts: dict[str, list[str]] = {}

    def weights(self, *, forward: int = -1) -> torch.Tensor:
        """The weights of one forward pass, stacked over routers: ``[routers, ..., E]``.

        Args:
            forward: which pass, in order; the last by default.

        Raises:
            ValueError: if nothing was recorded, or routers have different numbers of experts.
        """
        if not self.routings:
            raise ValueError("Nothing was recorded: run the model inside `with record_routing(model) as record:`.")
        sizes = {len(names) for names in self.experts.values()}
        if len(sizes) > 1:
            raise ValueError(f"Routers have different numbers of experts ({sorted(sizes)}); read `routings` instead.")
        return torch.stack([routings[forward].weights for routings in self.routings.values()])

    def _add(self, block_name: str, layer: MoALayer, adapter_name: str, mixture: str, routing: Routing) -> None:
        # Gradient checkpointing runs the forward a second time inside the backward pass; that is no new forward.
        if torch._C._current_graph_task_id() != -1:
            return
        name = block_name if mixture == BLOCK else f"{block_name}.{mixture}"
        self.routings.setdefault(name, []).append(routing.map(torch.Tensor.detach))
        self.experts[name] = layer.mixtures[adapter_name].mixtures[mixture].expert_names


@contextmanager
def record_routing(model: nn.Module) -> Iterator[RoutingRecord]:
    """Record every routing while the context is open; the forward itself is unchanged.

    Every routing is kept, ``E`` float32 numbers per token and router.

    Args:
        model: a model with a mixture of adapters, wrapped or not.

    Raises:
        ValueError: if the model has none.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MoALayer)}
    if not layers:
        raise ValueError("The model has no mixture of adapters to record.")
    record = RoutingRecord()
    try:
        for name, layer in layers.items():
            layer.recorder = partial(record._add, name.removesuffix(".moa"), layer)
        yield record
    finally:
        for layer in layers.values():
            layer.recorder = None
