"""What a block keeps while its forward runs.

Calls are kept per thread, so threads may share one model object. Compiled code runs one call at a time.
"""

import threading
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from moa_peft.auxiliary import Attachment
from moa_peft.decoding import RunningStep
from moa_peft.packed import is_transformed
from moa_peft.pooling import Pooling
from moa_peft.routing import Routing
from moa_peft.sites import Site

T = TypeVar("T")
_COMPILED = 0
_STORE = "moa_generation"


class _Store(dict[int, dict[Hashable, Any]]):
    """What a generation keeps, by block; a copy of the cache begins with an empty one."""

    def __deepcopy__(self, memo: Any) -> "_Store":
        return _Store()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Store, ()


@dataclass
class Call:
    """One forward of one block.

    Attributes:
        owner: number of the block's layer.
        cache: key-value cache of the call, or None.
        pooling: what mixtures of sequence granularity pool over, or None.
        tokens: ``[B, T]`` bool, the tokens that are no padding, where auxiliary losses need to know; else None.
        decoding: one more token of a generation: what `once_per_generation` kept may be used.
        running: names of the adapters that act.
        routings: adapter name and mixture name to its routing.
        routed_from: the same to what the router read, for routers at a site.
        attachments: adapter name and mixture name to whether the losses of its routing count.
        inputs: what sites read whose two modules differ.
        shared: adapter name and input name to the tensor that was read, and each site's weighted inner activations.
        steps: adapter name to its prepared step, while decoding.
        prompt_ran: whether attention asked for the prompt experts.
    """

    owner: int
    cache: Any
    pooling: Pooling | None
    tokens: torch.Tensor | None
    decoding: bool
    running: tuple[str, ...] = ()
    routings: dict[str, dict[str, Routing]] = field(default_factory=lambda: defaultdict(dict))
    routed_from: dict[tuple[str, str], torch.Tensor] = field(default_factory=dict)
    attachments: dict[tuple[str, str], Attachment] = field(default_factory=dict)
    inputs: dict[Site, torch.Tensor] = field(default_factory=dict)
    shared: dict[tuple[str, str], tuple[torch.Tensor, dict[Site, torch.Tensor]]] = field(default_factory=dict)
    steps: dict[str, RunningStep] = field(default_factory=dict)
    prompt_ran: bool = False

    def __post_init__(self) -> None:
        if self.cache is not None and not self.decoding and not torch.compiler.is_compiling():
            getattr(self.cache, _STORE, {}).pop(self.owner, None)

    def once_per_generation(
        self,
        key: Hashable,
        witness: torch.Tensor,
        make: Callable[[], T],
        parameters: Callable[[], Sequence[torch.Tensor]],
    ) -> T:
        """What `make` returns, made once per generation: it lives on the key-value cache of the call.

        A forward over more than one token starts anew, so a cache that is emptied and filled again brings nothing
        along. Weights that change between two tokens of one generation other than in place or as a whole (``p.data``)
        are not noticed.

        Args:
            key: what it is.
            witness: one of the parameters as it is now: when it is another object, all of them are taken to be.
            make: makes it.
            parameters: what it is made from; a change in place is noticed.
        """
        keeps = hasattr(self.cache, "__dict__") and not torch.is_grad_enabled()
        if not keeps or torch.compiler.is_compiling() or is_transformed():
            return make()
        store = self.cache.__dict__.setdefault(_STORE, _Store()).setdefault(self.owner, {})
        found = store.get(key)
        if found is not None and found[0] is witness and found[2] == [source._version for source in found[1]]:
            return found[3]
        made, sources = make(), list(parameters())
        # Tensors made in inference mode count no changes.
        if not any(source.is_inference() for source in sources):
            store[key] = (witness, sources, [source._version for source in sources], made)
        return made


class Calls:
    """The running calls of one block, one per thread."""

    def __init__(self) -> None:
        self._by_thread: dict[int, Call] = {}

    def start(self, call: Call) -> None:
        """`call` is what runs in this thread now."""
        self._by_thread[_thread()] = call

    def finish(self) -> None:
        """Nothing runs in this thread any more."""
        self._by_thread.pop(_thread(), None)

    def current(self) -> Call | None:
        """The call that runs in this thread, or None."""
        call = self._by_thread.get(_thread())
        # A compiled block calls back into plain code where the graph breaks.
        return self._by_thread.get(_COMPILED) if call is None else call

    def __deepcopy__(self, memo: Any) -> "Calls":
        return Calls()

    def __reduce__(self) -> tuple[Any, ...]:
        return Calls, ()


def _thread() -> int:
    return _COMPILED if torch.compiler.is_compiling() else threading.get_ident()
