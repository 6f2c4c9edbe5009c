"""What a benchmark is: a class with a docstring, a list of contenders and a `run`, under a name in a registry."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.rows import Row
from moa_peft.errors import UserError
from moa_peft.fields import check_choice
from moa_peft.registry import Registry

Dtype = Literal["float32", "bfloat16"]
Device = Literal["cpu", "cuda"]
Family = Literal["llama", "qwen3", "gemma3"]
Sampling = Literal["sequential", "random", "group_by_length"]
Track = Callable[[Iterable[int], int, str], Iterable[int]]
"""Wraps the loop over rounds: the rounds, how many there are, and what to call them."""

AXES = ("experts", "rank", "tokens", "layers")


def silent(rounds: Iterable[int], total: int, description: str) -> Iterable[int]:
    """No progress display."""
    return rounds


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of the random model.

    The default is half a small model: six blocks are enough for ratios to settle, and a vocabulary of 1,000 keeps
    the output layer at 1.3 % of the operations, so that the blocks decide.
    """

    hidden: int = 1024
    intermediate: int = 3072
    layers: int = 6
    heads: int = 16
    kv_heads: int = 8
    head_dim: int = 64
    vocabulary: int = 1000


@dataclass(frozen=True, kw_only=True)
class Options:
    """Everything a benchmark can be told.

    Attributes:
        family: whose blocks the random model has.
        sizes: of the random model.
        batch: rows.
        tokens: tokens per row, without padding.
        dtype: of the base model; adapters are float32 masters.
        autocast: run the forward under bfloat16 autocast.
        device: where it runs.
        methods: contenders; empty are those of the benchmark.
        repeats: timed rounds; None is the benchmark's own number.
        warmup: rounds before them that are thrown away.
        rank: LoRA rank of the contenders that bring none of their own; the parallel adapter is twice as wide, as in
            the paper.
        active_fraction: share of the tokens for which a sparse mixture keeps an expert, on average.
        axes: what `scaling` varies.
        prompt_tokens: tokens in the cache when `decode` starts.
        decode_tokens: tokens that `decode` adds.
        decode_batches: batch sizes of `decode`.
        data: instruction data of `end_to_end`.
        base_model: what `end_to_end` trains: `packaged`, a folder or a hub id.
        steps: optimiser steps that `end_to_end` times, after `warmup` of them.
        sampling: order of the rows in `end_to_end`.
        threads: CPU threads; None leaves PyTorch's choice.
        seed: of weights, batches and adapters.
    """

    family: Family = "qwen3"
    sizes: Sizes = Sizes()
    batch: int = 4
    tokens: int = 256
    dtype: Dtype = "float32"
    autocast: bool = False
    device: Device = "cpu"
    methods: tuple[str, ...] = ()
    repeats: int | None = None
    warmup: int = 2
    rank: int = 8
    active_fraction: float = 0.5
    axes: tuple[str, ...] = AXES
    prompt_tokens: int = 64
    decode_tokens: int = 32
    decode_batches: tuple[int, ...] = (1, 8)
    data: Path | None = None
    base_model: str = "packaged"
    steps: int = 6
    sampling: Sampling = "sequential"
    threads: int | None = None
    seed: int = 0

    def check(self) -> None:
        """Refuse what cannot be run, before anything is built.

        Raises:
            UserError: naming the option, its value and what is allowed.
        """
        check_choice("family", self.family, ("llama", "qwen3", "gemma3"))
        check_choice("dtype", self.dtype, ("float32", "bfloat16"))
        check_choice("device", self.device, ("cpu", "cuda"))
        check_choice("sampling", self.sampling, ("sequential", "random", "group_by_length"))
        for axis in self.axes:
            check_choice("axis", axis, AXES)
        positive = {name: getattr(self, name) for name in ("batch", "tokens", "rank", "steps", "decode_tokens")}
        positive |= vars(self.sizes) | {"repeats": 1 if self.repeats is None else self.repeats}
        positive |= {"threads": 1 if self.threads is None else self.threads}
        positive |= {"prompt_tokens": self.prompt_tokens, "decode batch": min(self.decode_batches, default=0)}
        for name, value in positive.items():
            if value < 1:
                raise UserError(f"{name} is {value}; it must be at least 1.")
        if self.warmup < 0:
            raise UserError(f"warmup is {self.warmup}; it must be at least 0.")
        if not 0.0 < self.active_fraction <= 1.0:
            raise UserError(f"active_fraction is {self.active_fraction}; it must be above 0 and at most 1.")
        if self.sizes.heads % self.sizes.kv_heads:
            raise UserError(
                f"heads is {self.sizes.heads}, which {self.sizes.kv_heads} key-value heads do not divide evenly."
            )
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UserError("device is 'cuda', but PyTorch sees no CUDA device here. Use --device cpu.")

    @property
    def model_name(self) -> str:
        """Family and sizes in a few characters."""
        return f"{self.family} {self.sizes.layers}x{self.sizes.hidden}"

    def settings(self) -> dict[str, Any]:
        """What a row's numbers depend on besides model and contender."""
        return {
            "dtype": self.dtype,
            "autocast": self.autocast,
            "device": self.device,
            "batch": self.batch,
            "tokens": self.tokens,
            "active_fraction": self.active_fraction,
            **vars(self.sizes),
        }

    def changed(self, **changes: Any) -> "Options":
        """A copy with other values."""
        return replace(self, **changes)


class Benchmark(ABC):
    """One benchmark. The docstring of a subclass's module tells the reader what its numbers mean.

    Attributes:
        summary: one line for `--list`.
        methods: contenders that take part by default; the first is the anchor of the ratios.
        allowed: contenders that may take part.
        repeats: rounds by default; 0 where nothing is timed.
    """

    summary: str
    methods: tuple[str, ...]
    allowed: tuple[str, ...]
    repeats: int = 0

    @abstractmethod
    def run(self, options: Options, track: Track = silent) -> list[Row]:
        """Measure.

        Args:
            options: checked options.
            track: shows progress over the rounds.
        """

    def check(self, options: Options) -> None:
        """What this benchmark refuses beyond `Options.check`.

        Raises:
            UserError: a contender that does not exist, or does not take part in this benchmark.
        """
        for method in options.methods:
            if method not in self.allowed:
                raise UserError(f"Method {method!r} takes no part here. Choose from: {', '.join(self.allowed)}.")

    def contenders(self, options: Options) -> tuple[str, ...]:
        """Names of the contenders of a run; the anchor always takes part, as the first."""
        chosen = options.methods or self.methods
        return tuple(dict.fromkeys((self.methods[0], *chosen)))

    def rounds(self, options: Options) -> int:
        """Timed rounds of a run."""
        return self.repeats if options.repeats is None else options.repeats


BENCHMARKS: Registry[type[Benchmark]] = Registry("benchmark")
