"""Bytes that a forward pass leaves behind for its backward pass, and bytes it leaves behind elsewhere."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Storages:
    """Storages seen, without keeping them alive.

    The weak references keep the addresses from being used again, so an address stands for one storage.
    """

    def __init__(self) -> None:
        self._seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def add(self, tensor: torch.Tensor) -> None:
        """Remember the storage of a tensor."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())

    def alive(self) -> dict[int, int]:
        """Address to bytes of the storages that still exist."""
        return {address: size for address, (reference, size) in self._seen.items() if not reference.expired()}


class AllocationTracker(TorchDispatchMode):
    """Notices the storage of every tensor that any operation returns, those inside autograd functions included."""

    def __init__(self) -> None:
        super().__init__()
        self.storages = Storages()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.storages.add(leaf)
        return result


@dataclass(frozen=True)
class Footprint:
    """What exists between a forward and its backward pass.

    Attributes:
        saved: bytes that autograd holds for the backward pass.
        live: bytes of all tensors that exist, held by autograd or by anything else.
        unsaved: bytes of those among them that autograd does not hold.
    """

    saved: int
    live: int
    unsaved: int


def footprint(
    build: Callable[[], nn.Module], forward: Callable[[nn.Module], torch.Tensor], inputs: Iterable[torch.Tensor]
) -> Footprint:
    """Measure a model's first forward pass.

    Each storage counts once, whole, however many views of it are saved. Parameters, buffers and the inputs do not
    count. Building the model is watched too: what it or the forward pass keeps anywhere but in parameters and
    buffers (a cast copy of a weight, an activation on a module or in a closure) is found as live.

    Args:
        build: makes the model.
        forward: runs it and returns the loss, which is kept until everything is counted.
        inputs: tensors of the batch.
    """
    saved, tracker = Storages(), AllocationTracker()

    def remember(tensor: torch.Tensor) -> torch.Tensor:
        saved.add(tensor)
        return tensor

    with tracker:
        model = build()
        with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
            loss = forward(model)
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers(), *inputs, loss)}
    held = {address: size for address, size in saved.alive().items() if address not in own}
    live = {address: size for address, size in tracker.storages.alive().items() if address not in own} | held
    return Footprint(
        saved=sum(held.values()),
        live=sum(live.values()),
        unsaved=sum(size for address, size in live.items() if address not in held),
    )
