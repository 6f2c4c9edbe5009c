"""Floating-point operations of a training step and of a forward pass.

Anchor: the frozen base model, forward and backward through its activations.

How: `torch.utils.flop_counter.FlopCounterMode` counts the matrix products (two operations per multiply-add) where
they are dispatched, so those inside custom autograd functions, in forward and in backward, and those of a
recomputation count like all others. Element-wise work is not counted, nor is it by the tools one would compare with.
PyTorch's counter does not know the CPU kernel of fused attention; its formula is added here, with the scores that
the backward kernel computes again. Nothing here depends on the machine's speed.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.base import BENCHMARKS, Benchmark, Options, Track, silent
from benchmarks.contenders import CONTENDERS, STANDARD, about, build
from benchmarks.models import base_model, make_batch
from benchmarks.rows import Row, rows_of
from benchmarks.timing import forget_gradients, forward_context
from benchmarks.training_step import step


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """``Q K^T`` and ``P V`` of shapes ``[B, H, T, K]``; as everywhere, a causal mask is not subtracted."""
    batch, heads, queries, width = query
    return 2 * batch * heads * queries * key[2] * (width + value[3])


def _attention_backward_flops(grad: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    """The scores again, and the gradients of probabilities, values, queries and keys."""
    batch, heads, queries, width = query
    return 2 * batch * heads * queries * key[2] * (3 * width + 2 * value[3])


_CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}


class _OneTotal:
    """Stands in for the counter's breakdown by module.

    The breakdown hooks every module, and its hooks fail where a module runs inside the backward pass of a custom
    autograd function, without gradients; the total needs none of it.
    """

    parents = frozenset({"Global"})

    def __enter__(self) -> None:
        return None

    def __exit__(self, *exception: object) -> None:
        return None


def count_flops(function: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products that `function` runs."""
    counter: Any = FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION)
    counter.mod_tracker = _OneTotal()
    with counter:
        function()
    return counter.get_total_flops()


@BENCHMARKS.register("operations")
class Operations(Benchmark):
    """See the module's docstring."""

    summary = "floating-point operations of a step and of a forward pass"
    methods = STANDARD
    allowed = tuple(CONTENDERS)

    def run(self, options: Options, track: Track = silent) -> list[Row]:
        base, batch, names = base_model(options), make_batch(options), self.contenders(options)
        steps, forwards = {}, {}
        for number in track(range(len(names)), len(names), "operations"):
            model = build(names[number], base, options, train=True)
            steps[names[number]] = [float(count_flops(lambda model=model: step(model, batch, options)))]
            forget_gradients(model)
            model.eval()
            with torch.no_grad(), forward_context(options):
                forward = count_flops(lambda model=model: model(input_ids=batch["input_ids"], use_cache=False))
            forwards[names[number]] = [float(forward)]
        common = about("operations", names, options)
        rows = rows_of(steps, metric="step_flops", unit="FLOP", **common)
        return rows + rows_of(forwards, metric="forward_flops", unit="FLOP", **common)
