"""Timing several contenders in one process, so that what disturbs the machine disturbs all of them."""

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

from benchmarks.base import Options, Track

T = TypeVar("T")
Task = Callable[[], float]
"""Prepares one repetition untimed, runs it, and returns the seconds that its timed part took."""


def interleave(
    tasks: Mapping[str, Callable[[], T]], *, repeats: int, warmup: int, track: Track, description: str
) -> dict[str, list[T]]:
    """Run every task once per round, in an order that changes from round to round.

    The order is rotated, so that nobody always runs first, and every second round is reversed, so that nobody always
    follows the same neighbour.

    Args:
        tasks: contender to what measures it once.
        repeats: rounds that count.
        warmup: rounds before them that do not.
        track: shows progress.
        description: what it calls the rounds.

    Returns:
        Contender to what it measured in each round that counts.
    """
    measured: dict[str, list[T]] = {name: [] for name in tasks}
    names = list(tasks)
    total = warmup + repeats
    with _collecting_between_rounds() as collect:
        for number in track(range(total), total, description):
            shift = number % len(names)
            order = names[shift:] + names[:shift]
            collect()
            for name in reversed(order) if number % 2 else order:
                result = tasks[name]()
                if number >= warmup:
                    measured[name].append(result)
    return measured


def stopwatch(function: Callable[[], object], device: str) -> float:
    """Seconds that `function` takes, on the device's own clock where it has one.

    On CUDA two events on the current stream enclose the work, and the device is idle before the first; this counts
    the gaps in which the device waits for the host, as a training loop without synchronisation would have them.
    """
    if device != "cuda":
        started_s = time.perf_counter()
        function()
        return time.perf_counter() - started_s
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    first.record()
    function()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1000.0


def peak_bytes(function: Callable[[], object]) -> int:
    """CUDA memory that `function` needs at its highest, beyond what is allocated when it starts."""
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def forward_context(options: Options) -> torch.autocast:
    """bfloat16 autocast if the options ask for it, else nothing."""
    return torch.autocast(options.device, dtype=torch.bfloat16, enabled=options.autocast)


def forget_gradients(model: nn.Module) -> None:
    """Free every gradient, so that the next backward pass writes and does not add."""
    for parameter in model.parameters():
        parameter.grad = None


@contextmanager
def _collecting_between_rounds() -> Iterator[Callable[[], object]]:
    """Switch the collector off, and give a call that collects what was made since."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield gc.collect
    finally:
        gc.enable()
        gc.unfreeze()
