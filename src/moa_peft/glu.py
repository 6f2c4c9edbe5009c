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

from moa_peft.packed import backward_of_write, columns, rows, split_rows

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
    writes: Sequence[torch.Tensor],
    scale: torch.Tensor | None,
) -> torch.Tensor:
    """``h W^T + b + (h A^T * scale) B^T`` with ``h = act(gate) * up``.

    Args:
        gate: ``[.., F]``.
        up: ``[.., F]``.
        activation: one that `derivative_of` knows.
        down: the frozen down projection W, b.
        reads: the parts of A ``[R, F]``: what the LoRA experts beside it read with; may be empty.
        writes: the parts of B ``[D, R]``.
        scale: ``[.., R]`` their scaled routing weights; None without experts.
    """
    parts = (*reads, *writes)
    return _GatedDown.apply(gate, up, down.weight, down.bias, scale, activation, len(reads), *parts)  # type: ignore


class _GatedDown(torch.autograd.Function):
    """See `gated_down`."""

    @staticmethod
    def forward(ctx: Any, gate, up, weight, bias, scale, activation, num_reads, *parts):  # type: ignore[no-untyped-def]
        # The module's forward without its call: profilers hook calls, and these tensors are in no graph of theirs.
        h = activation.forward(gate)
        h = h.mul_(up) if h is not gate else h * up
        output = F.linear(h, weight, bias)
        inner = None
        if scale is not None:
            inner = F.linear(h, rows(parts[:num_reads], h.dtype))
            flat = (inner * scale).view(-1, inner.shape[-1])
            output.view(-1, output.shape[-1]).addmm_(flat, columns(parts[num_reads:], h.dtype).t())
        ctx.save_for_backward(gate, up, weight, scale, inner, *parts)
        ctx.activation, ctx.num_reads = activation, num_reads
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_output):  # type: ignore[no-untyped-def]
        gate, up, weight, scale, inner, *parts = ctx.saved_tensors
        reads, writes = parts[: ctx.num_reads], parts[ctx.num_reads :]
        width, shape = gate.shape[-1], d_output.shape[:-1]
        d_flat = d_output.reshape(-1, d_output.shape[-1])
        gate, up = gate.reshape(-1, width), up.reshape(-1, width)
        activated = ctx.activation.forward(gate)
        d_h = d_flat @ weight
        h = activated * up if scale is not None else torch.empty_like(activated)
        d_scale, d_reads, d_writes = None, [], []
        if scale is not None:
            inner, scale = inner.flatten(0, -2), scale.flatten(0, -2)
            d_weighted, d_writes = backward_of_write(d_flat, inner * scale, writes)
            d_scale = (d_weighted * inner).view(*shape, -1)
            d_inner = d_weighted.mul_(scale)
            d_reads = split_rows(d_inner.t() @ h, reads)
            d_h.addmm_(d_inner, rows(reads, d_h.dtype))
        d_up = activated.mul_(d_h)
        derivative = derivative_of(ctx.activation)
        assert derivative is not None
        d_gate = derivative(d_h.mul_(up), gate, grad_input=h)
        return (
            d_gate.view(*shape, width),
            d_up.view(*shape, width),
            None,
            None,
            d_scale,
            None,
            None,
            *d_reads,
            *d_writes,
        )
