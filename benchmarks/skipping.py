"""What leaving out tokens without a weight saves in sparse mixtures, over the share of (token, expert) pairs kept.

Anchors: the same mixture with every token taking part (``dense``), and the frozen base model.

How: Sparse MoA of six experts of rank 64 and of 24 of rank 8, and eight LoRA experts of rank 64 on each linear layer
of which a token keeps two or four. Each is measured dense, always leaving out tokens, and as the library decides by
itself (``auto``), interleaved: a prompt's forward pass, and a training step without a gradient through the threshold
(with the straight-through estimate, training needs every token).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks.base import BENCHMARKS, Benchmark, Options, Track, silent
from benchmarks.contenders import build, settings_of
from benchmarks.models import base_model, make_batch
from benchmarks.prefill import fill_cache
from benchmarks.rows import BASE, Row, rows_of
from benchmarks.timing import Task, forget_gradients, interleave, stopwatch
from benchmarks.training_step import step
from moa_peft import fused_path

LARGE_RANK = 64
FRACTIONS = (1.0, 0.75, 0.5, 0.25, 0.1)
TOP_K = {"top_2_of_8": (0.25,), "top_4_of_8": (0.5,)}
MODES: dict[str, dict[str, float] | None] = {"dense": {}, "always": {"cpu": 1.0, "cuda": 1.0}, "auto": None}


@contextmanager
def skip_share(shares: dict[str, float] | None) -> Iterator[None]:
    """Up to which share of tokens with a weight the others are left out; None is what the library decides."""
    before = dict(fused_path.SKIP_SHARE)
    if shares is not None:
        fused_path.SKIP_SHARE.clear()
        fused_path.SKIP_SHARE.update(shares)
    try:
        yield
    finally:
        fused_path.SKIP_SHARE.clear()
        fused_path.SKIP_SHARE.update(before)


@BENCHMARKS.register("skipping")
class Skipping(Benchmark):
    """See the module's docstring."""

    summary = "seconds of sparse mixtures over the share of experts it keeps, with and without leaving tokens out"
    methods = (BASE, "sparse_cut", "sparse_cut_24", *TOP_K)
    allowed = methods
    repeats = 7

    def run(self, options: Options, track: Track = silent) -> list[Row]:
        base = base_model(options)
        rows = []
        for metric, train in (("prefill_seconds", False), ("step_seconds", True)):
            tasks: dict[str, Task] = {
                BASE: self._task(build(BASE, base, options, train=train), options, None, train=train)
            }
            against = {BASE: [BASE]}
            settings = {BASE: settings_of(BASE, options)}
            for method in self.contenders(options)[1:]:
                large = options if method.endswith("_24") else options.changed(rank=max(LARGE_RANK, options.rank))
                for fraction in TOP_K.get(method, FRACTIONS):
                    at = large.changed(active_fraction=fraction)
                    model = build(method, base, at, train=train)
                    dense = f"{method}[kept={fraction}, dense]"
                    for mode, shares in MODES.items():
                        label = f"{method}[kept={fraction}, {mode}]"
                        tasks[label] = self._task(model, at, shares, train=train)
                        against[label] = [dense, BASE]
                        settings[label] = settings_of(method, at)
            seconds = interleave(
                tasks,
                repeats=self.rounds(options),
                warmup=options.warmup,
                track=track,
                description=f"skipping, {metric}",
            )
            rows += rows_of(
                seconds,
                benchmark="skipping",
                model=options.model_name,
                metric=metric,
                unit="s",
                settings=settings,
                against=against,
            )
        return rows

    def _task(self, model: Any, options: Options, shares: dict[str, float] | None, *, train: bool) -> Task:
        batch = make_batch(options)

        def work() -> None:
            if train:
                step(model, batch, options)
            else:
                fill_cache(model, batch["input_ids"], options)

        def task() -> float:
            forget_gradients(model)
            with skip_share(shares):
                return stopwatch(work, options.device)

        return task
