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

from moa_peft.packed import rows, split_rows

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
    gate: torch.Tensor, up: torch.Tensor, activation: nn.Module, down: nn.Linear, reads: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``h W^T + b`` and ``h A^T`` with ``h = act(gate) * up``.

    Args:
        gate: ``[.., F]``.
        up: ``[.., F]``.
        activation: one that `derivative_of` knows.
        down: the frozen down projection W, b.
        reads: the parts of A ``[R, F]``: what experts and routers beside it read with; may be empty.

    Returns:
        ``[.., D]``, and ``[.., R]``, or None where nothing reads.
    """
    return _GatedDown.apply(gate, up, down.weight, down.bias, activation, *reads)  # type: ignore


class _GatedDown(torch.autograd.Function):
    """See `gated_down`."""

    @staticmethod
    def forward(ctx: Any, gate, up, weight, bias, activation, *reads):  # type: ignore[no-untyped-def]
        # The module's forward without its call: profilers hook calls, and these tensors are in no graph of theirs.
        h = activation.forward(gate)
        h = h.mul_(up) if h is not gate else h * up
        ctx.save_for_backward(gate, up, weight, *reads)
        ctx.activation = activation
        ctx.set_materialize_grads(False)
        return F.linear(h, weight, bias), F.linear(h, rows(reads, h.dtype)) if reads else None

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_output, d_z):  # type: ignore[no-untyped-def]
        gate, up, weight, *reads = ctx.saved_tensors
        width, shape = gate.shape[-1], gate.shape
        gate, up = gate.reshape(-1, width), up.reshape(-1, width)
        activated = ctx.activation.forward(gate)
        h = torch.empty_like(activated) if d_z is None else activated * up
        d_h = torch.zeros_like(gate) if d_output is None else d_output.reshape(-1, d_output.shape[-1]) @ weight
        d_reads: list[torch.Tensor | None] = [None] * len(reads)
        if d_z is not None:
            d_flat = d_z.reshape(-1, d_z.shape[-1])
            d_reads = [*split_rows(d_flat.t() @ h, reads)]
            d_h.addmm_(d_flat, rows(reads, d_h.dtype))
        d_up = activated.mul_(d_h)
        derivative = derivative_of(ctx.activation)
        assert derivative is not None
        d_gate = derivative(d_h.mul_(up), gate, grad_input=h)
        return d_gate.view(shape), d_up.view(shape), None, None, None, *d_reads
