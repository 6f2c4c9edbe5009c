"""Seconds of one training step: forward pass, loss and backward pass, without the optimiser.

Anchor: the frozen base model. Its embeddings' output requires gradients, as that of every other contender, so the
backward pass runs through all of every block and what is left is the price of the adapters alone.

How: every contender runs once per round, in changing order; the ratio is the median over rounds of the ratio within
the round, its spread the quartiles. On CUDA also the peak of the memory allocated during the step.
"""

import torch
from torch import nn

from benchmarks.base import BENCHMARKS, Benchmark, Options, Track, silent
from benchmarks.contenders import CONTENDERS, TIMED, about, build_all
from benchmarks.models import base_model, make_batch
from benchmarks.rows import Row, rows_of
from benchmarks.timing import Task, forget_gradients, forward_context, interleave, peak_bytes, stopwatch


def step(model: nn.Module, batch: dict[str, torch.Tensor], options: Options) -> None:
    """Forward and backward pass."""
    with forward_context(options):
        loss = model(**batch, use_cache=False).loss
    loss.backward()


def timed_step(model: nn.Module, batch: dict[str, torch.Tensor], options: Options) -> Task:
    """The task that times a step of a model."""

    def task() -> float:
        forget_gradients(model)
        return stopwatch(lambda: step(model, batch, options), options.device)

    return task


@BENCHMARKS.register("training_step")
class TrainingStep(Benchmark):
    """See the module's docstring."""

    summary = "seconds of forward and backward pass"
    methods = TIMED
    allowed = tuple(CONTENDERS)
    repeats = 9

    def run(self, options: Options, track: Track = silent) -> list[Row]:
        base, batch = base_model(options), make_batch(options)
        models = build_all(self.contenders(options), base, options, train=True)
        tasks = {name: timed_step(model, batch, options) for name, model in models.items()}
        seconds = interleave(
            tasks, repeats=self.rounds(options), warmup=options.warmup, track=track, description="training_step"
        )
        common = about("training_step", models, options)
        rows = rows_of(seconds, metric="step_seconds", unit="s", **common)
        if options.device == "cuda":
            peaks = {}
            for name, model in models.items():
                forget_gradients(model)
                peaks[name] = [float(peak_bytes(lambda model=model: step(model, batch, options)))]
                forget_gradients(model)
            rows += rows_of(peaks, metric="step_peak_bytes", unit="B", **common)
        return rows
