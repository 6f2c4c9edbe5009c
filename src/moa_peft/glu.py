"""Gated MLP, ``down(act(gate) * up)``, that keeps only ``gate`` and ``up`` for the backward pass.

Autograd keeps act(gate) too, and the input of the down projection as soon as an expert reads it: four tensors as wide
as the MLP. Here the product is made again in the backward pass, which costs two elementwise operations.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import GELUActivation, GELUTanh, SiLUActivation

from moa_peft.packed import drop_mask, dropped, rows, split_rows

Derivative = Callable[..., torch.Tensor]
"""Gradient of the output and input of an activation to the gradient of its input, written to ``grad_input``."""

_GELU_BACKWARD = torch.ops.aten.gelu_backward.grad_input


def derivative_of(activation: nn.Module | None) -> Derivative | None:
    """How to go back through an activation module; None for one that is not known."""
    if type(activation) in (nn.SiLU, SiLUActivation) and not getattr(activation, "inplace", False):
        return torch.ops.aten.silu_backward.grad_input
    function = activation.act if type(activation) in (GELUActivation, GELUTanh) else None  # type: ignore[union-attr]
    if function is F.gelu:
        return partial(_GELU_BACKWARD, approximate="none")
    if isinstance(function, partial) and function.func is F.gelu and function.keywords == {"approximate": "tanh"}:
        return partial(_GELU_BACKWARD, approximate="tanh")
    return None


def gated_down(
    gate: torch.Tensor,
    up: torch.Tensor,
    activation: nn.Module,
    down: nn.Linear,
    reads: Sequence[torch.Tensor],
    dropped_reads: Sequence[torch.Tensor] = (),
    dropout: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """``h W^T + b``, ``h A^T`` and ``dropout(h) A_d^T`` with ``h = act(gate) * up``.

    Args:
        gate: ``[.., F]``.
        up: ``[.., F]``.
        activation: one that `derivative_of` knows.
        down: the frozen down projection W, b.
        reads: the parts of A ``[R, F]``: what experts and routers beside it read with; may be empty.
        dropped_reads: the parts of A_d ``[R', F]``, what experts with dropout read with; may be empty.
        dropout: probability of dropping an element for these.

    Returns:
        ``[.., D]``, ``[.., R]`` and ``[.., R']``, or None where nothing reads.
    """
    parts = (*reads, *dropped_reads)
    return _GatedDown.apply(gate, up, down.weight, down.bias, activation, dropout, len(reads), *parts)  # type: ignore


class _GatedDown(torch.autograd.Function):
    """See `gated_down`."""

    @staticmethod
    def forward(ctx: Any, gate, up, weight, bias, activation, dropout, num_reads, *parts):  # type: ignore[no-untyped-def]
        # The module's forward without its call: profilers hook calls, and these tensors are in no graph of theirs.
        h = activation.forward(gate)
        h = h.mul_(up) if h is not gate else h * up
        reads, dropped_reads = parts[:num_reads], parts[num_reads:]
        mask = drop_mask(h, dropout) if dropped_reads else None
        ctx.save_for_backward(gate, up, weight, mask, *parts)
        ctx.activation, ctx.dropout, ctx.num_reads = activation, dropout, num_reads
        ctx.set_materialize_grads(False)
        return (
            F.linear(h, weight, bias),
            F.linear(h, rows(reads, h.dtype)) if reads else None,
            F.linear(dropped(h, mask, dropout), rows(dropped_reads, h.dtype)) if mask is not None else None,
        )

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_output, d_z, d_dropped):  # type: ignore[no-untyped-def]
        gate, up, weight, mask, *parts = ctx.saved_tensors
        reads, dropped_reads = parts[: ctx.num_reads], parts[ctx.num_reads :]
        width, shape = gate.shape[-1], gate.shape
        gate, up = gate.reshape(-1, width), up.reshape(-1, width)
        activated = ctx.activation.forward(gate)
        nothing_read = d_z is None and d_dropped is None
        h = torch.empty_like(activated) if nothing_read else activated * up
        d_h = torch.zeros_like(gate) if d_output is None else d_output.reshape(-1, d_output.shape[-1]) @ weight
        d_parts: list[torch.Tensor | None] = [None] * len(parts)
        if d_z is not None:
            d_flat = d_z.reshape(-1, d_z.shape[-1])
            d_parts[: ctx.num_reads] = split_rows(d_flat.t() @ h, reads)
            d_h.addmm_(d_flat, rows(reads, d_h.dtype))
        if d_dropped is not None:
            mask, d_flat = mask.reshape(-1, width), d_dropped.reshape(-1, d_dropped.shape[-1])
            d_parts[ctx.num_reads :] = split_rows(d_flat.t() @ dropped(h, mask, ctx.dropout), dropped_reads)
            d_h += dropped(d_flat @ rows(dropped_reads, d_h.dtype), mask, ctx.dropout)
        d_up = activated.mul_(d_h)
        derivative = derivative_of(ctx.activation)
        assert derivative is not None
        d_gate = derivative(d_h.mul_(up), gate, grad_input=h)
        return d_gate.view(shape), d_up.view(shape), None, None, None, None, None, *d_parts
