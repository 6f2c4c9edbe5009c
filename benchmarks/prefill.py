"""Seconds to read a prompt: one forward pass without gradients that fills a key-value cache.

Anchor: the frozen base model. As in generation, only the last position goes through the output layer.

How: as training_step, interleaved rounds and the median of the ratios within a round. On CUDA also peak memory.
"""

from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from benchmarks.base import BENCHMARKS, Benchmark, Options, Track, silent
from benchmarks.contenders import CONTENDERS, TIMED, about, build_all
from benchmarks.models import base_model, make_batch
from benchmarks.rows import Row, rows_of
from benchmarks.timing import forward_context, interleave, peak_bytes, stopwatch


def fill_cache(model: nn.Module, input_ids: torch.Tensor, options: Options) -> Any:
    """The key-value cache after the prompt.

    Args:
        model: a causal language model, with adapters or without.
        input_ids: ``[batch, tokens]``.
        options: autocast or not.
    """
    config: Any = model.config
    cache = DynamicCache(config=config)
    with torch.no_grad(), forward_context(options):
        model(input_ids=input_ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


@BENCHMARKS.register("prefill")
class Prefill(Benchmark):
    """See the module's docstring."""

    summary = "seconds of a prompt's forward pass into an empty key-value cache"
    methods = TIMED
    allowed = tuple(CONTENDERS)
    repeats = 15

    def run(self, options: Options, track: Track = silent) -> list[Row]:
        base, input_ids = base_model(options), make_batch(options)["input_ids"]
        models = build_all(self.contenders(options), base, options, train=False)
        tasks = {
            name: lambda model=model: stopwatch(lambda: fill_cache(model, input_ids, options), options.device)
            for name, model in models.items()
        }
        seconds = interleave(
            tasks, repeats=self.rounds(options), warmup=options.warmup, track=track, description="prefill"
        )
        common = about("prefill", models, options)
        rows = rows_of(seconds, metric="prefill_seconds", unit="s", **common)
        if options.device == "cuda":
            peaks = {
                name: [float(peak_bytes(lambda model=model: fill_cache(model, input_ids, options)))]
                for name, model in models.items()
            }
            rows += rows_of(peaks, metric="prefill_peak_bytes", unit="B", **common)
        return rows
