"""Bytes that wait for the backward pass, and bytes that survive the forward pass anywhere else.

Anchor: the frozen base model with the same batch and the same loss, whose embeddings' output requires gradients.

How: `torch.autograd.graph.saved_tensors_hooks` sees what autograd saves. Each storage counts once and whole;
parameters, buffers and the batch do not count. A dispatch mode watches every tensor that building the adapters and
the first forward pass make and asks afterwards which of them still exist, so `unsaved_live_bytes` is whatever is
kept outside autograd: nothing can look small by holding its activations elsewhere. Over a bfloat16 base every
contender has the embeddings' output there, which autograd holds as the leaf that gradients reach but does not save.
Fixed costs, such as copies of the adapters' weights, weigh more the fewer the tokens. Nothing here depends on the
machine's speed.
"""

from typing import Any

import torch
from torch import nn

from benchmarks.base import BENCHMARKS, Benchmark, Options, Track, silent
from benchmarks.contenders import CONTENDERS, STANDARD, about, build
from benchmarks.memory import Footprint, footprint
from benchmarks.models import base_model, make_batch
from benchmarks.rows import BASE, Row, rows_of
from benchmarks.timing import forward_context


def contender_footprint(name: str, base: nn.Module, options: Options) -> Footprint:
    """The footprint of one contender's forward pass.

    Args:
        name: a key of `CONTENDERS`.
        base: from `base_model`.
        options: batch, tokens and autocast.
    """
    batch = make_batch(options)

    def forward(model: nn.Module) -> torch.Tensor:
        with forward_context(options):
            return model(**batch, use_cache=False).loss

    return footprint(lambda: build(name, base, options, train=True), forward, batch.values())


@BENCHMARKS.register("saved_bytes")
class SavedBytes(Benchmark):
    """See the module's docstring."""

    summary = "bytes saved for the backward pass, and bytes kept anywhere else"
    methods = STANDARD
    allowed = tuple(CONTENDERS)

    def run(self, options: Options, track: Track = silent) -> list[Row]:
        base, names = base_model(options), self.contenders(options)
        found = {}
        for number in track(range(len(names)), len(names), "saved_bytes"):
            found[names[number]] = contender_footprint(names[number], base, options)
        common: dict[str, Any] = {"unit": "B"} | about("saved_bytes", names, options)
        saved = {name: [float(one.saved)] for name, one in found.items()}
        live = {name: [float(one.live)] for name, one in found.items()}
        rows = rows_of(saved, metric="saved_bytes", **common) + rows_of(live, metric="live_bytes", **common)
        # Ideally nothing is left outside autograd, so there is nothing to divide by: shares of the base's saved bytes.
        return rows + [
            Row(
                method=name,
                metric="unsaved_live_bytes",
                value=float(one.unsaved),
                baseline=BASE,
                ratio=one.unsaved / found[BASE].saved,
                **(common | {"settings": common["settings"][name]}),
            )
            for name, one in found.items()
        ]
