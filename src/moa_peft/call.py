"""What a block keeps while its forward runs, and nothing afterwards.

Calls are kept per thread, so threads may share one model object. Compiled code runs one call at a time.
"""

import threading
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from moa_peft.decoding import RunningStep
from moa_peft.plan import Site
from moa_peft.pooling import Pooling
from moa_peft.routing import Routing

T = TypeVar("T")
_COMPILED = 0
_STORE = "moa_generation"


@dataclass
class Call:
    """One forward of one block.

    Attributes:
        cache: key-value cache of the call, or None.
        pooling: what mixtures of sequence granularity pool over, or None.
        decoding: one more token of a generation: what `once_per_generation` kept may be used.
        routings: adapter name to its routing.
        inputs: what sites read whose two modules differ.
        shared: adapter name and input name to the tensor that was read, and each site's weighted inner activations.
        steps: adapter name to its prepared step, while decoding.
        prompt_ran: whether attention asked for the prompt experts.
    """

    cache: Any = None
    pooling: Pooling | None = None
    decoding: bool = False
    routings: dict[str, Routing] = field(default_factory=dict)
    inputs: dict[Site, torch.Tensor] = field(default_factory=dict)
    shared: dict[tuple[str, str], tuple[torch.Tensor, dict[Site, torch.Tensor]]] = field(default_factory=dict)
    steps: dict[str, RunningStep] = field(default_factory=dict)
    prompt_ran: bool = False

    def once_per_generation(
        self, key: Hashable, make: Callable[[], T], parameters: Callable[[], Sequence[torch.Tensor]]
    ) -> T:
        """What `make` returns, made once per generation: it lives on the key-value cache of the call.

        Args:
            key: what it is.
            make: makes it.
            parameters: what it is made from; a change in place is noticed.
        """
        if self.cache is None or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return make()
        store = self.cache.__dict__.setdefault(_STORE, {})
        found = store.get(key) if self.decoding else None
        # The versions guard against a cache that outlives a change of the weights; inference tensors have none.
        if found is None or found[1] != [parameter._version for parameter in found[0]]:
            sources = [parameter for parameter in parameters() if not parameter.is_inference()]
            found = store[key] = (sources, [parameter._version for parameter in sources], make())
        return found[2]


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

    def __len__(self) -> int:
        return len(self._by_thread)

    def __deepcopy__(self, memo: Any) -> "Calls":
        return Calls()

    def __reduce__(self) -> tuple[Any, ...]:
        return Calls, ()


def _thread() -> int:
    return _COMPILED if torch.compiler.is_compiling() else threading.get_ident()
