"""Products with several small weights at once, of which autograd keeps the parameters and not their concatenation."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from moa_peft.initialization import MasterLinear


def is_transformed() -> bool:
    """Whether `torch.func` or forward-mode differentiation is at work, which our backward passes do not serve."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def has_backward() -> bool:
    """Whether our own backward passes are to be used: a gradient is wanted, and the usual one."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling() and not is_transformed()


def rows(parts: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """``[R_1, in], [R_2, in], ...`` one below the other."""
    return (parts[0] if len(parts) == 1 else torch.cat(list(parts))).to(dtype)


def columns(parts: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """``[out, R_1], [out, R_2], ...`` side by side; a vector ``[out]`` is one column."""
    matrices = [part if part.dim() == 2 else part[:, None] for part in parts]
    return (matrices[0] if len(matrices) == 1 else torch.cat(matrices, dim=1)).to(dtype)


def split_rows(gradient: torch.Tensor, parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The gradient of `rows` as gradients of its parts, in their dtypes."""
    pieces = gradient.split([part.shape[0] for part in parts])
    return [piece.to(part.dtype) for piece, part in zip(pieces, parts)]


def split_columns(gradient: torch.Tensor, parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The gradient of `columns` as gradients of its parts, in their dtypes."""
    pieces = gradient.split([1 if part.dim() == 1 else part.shape[1] for part in parts], dim=1)
    return [piece.reshape(part.shape).to(part.dtype) for piece, part in zip(pieces, parts)]


def backward_of_write(
    gradient: torch.Tensor, inner: torch.Tensor, parts: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Gradients of ``inner columns(parts)^T`` with respect to `inner` and the parts.

    Both products are written with the narrow matrix first and contiguous: on a CPU in float32 that is two to six
    times as fast as the obvious order, and the same elsewhere.

    Args:
        gradient: ``[N, out]``.
        inner: ``[N, R]``.
        parts: the parts of ``[out, R]``.
    """
    d_inner = F.linear(gradient, columns(parts, gradient.dtype).t().contiguous())
    return d_inner, split_columns((inner.t() @ gradient).t(), parts)


def read_matrix(linears: Sequence[MasterLinear], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weights ``[R, in]`` and biases ``[R]`` (None if there is none) of several layers, one below the other."""
    weight = rows([linear.weight for linear in linears], dtype)
    if all(linear.bias is None for linear in linears):
        return weight, None
    zeros = [linear.weight.new_zeros(linear.out_features) if linear.bias is None else None for linear in linears]
    biases = [linear.bias if zero is None else zero for linear, zero in zip(linears, zeros)]
    return weight, rows(biases, dtype)


def by_layer(product: torch.Tensor, linears: Sequence[MasterLinear]) -> dict[MasterLinear, torch.Tensor]:
    """What each of several layers returned, out of what all did side by side."""
    return dict(zip(linears, product.split([linear.out_features for linear in linears], dim=-1)))


def read(x: torch.Tensor, linears: Sequence[MasterLinear], index: torch.Tensor | None = None) -> torch.Tensor:
    """What several layers make of ``[.., in]``, side by side: ``[.., R]``, in the dtype of `x` (of autocast).

    The same as `torch.nn.functional.linear` with `read_matrix`.

    Args:
        x: ``[.., in]``.
        linears: the layers.
        index: ``[n]`` tokens to read, counted over all leading dimensions; the result is then ``[n, R]``.
    """
    tensors = [tensor for linear in linears for tensor in (linear.weight, linear.bias)]
    return _Read.apply(x, index, *tensors)  # type: ignore[return-value]


def drop_mask(x: torch.Tensor, dropout: float) -> torch.Tensor:
    """A bool of the shape of `x`, False with the probability `dropout`."""
    return torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - dropout)


def dropped(x: torch.Tensor, mask: torch.Tensor, dropout: float) -> torch.Tensor:
    """`x` where the mask is True, times ``1 / (1 - dropout)``; 0 elsewhere."""
    return (x * mask).mul_(1 / (1 - dropout))


def read_dropped(x: torch.Tensor, linears: Sequence[MasterLinear], dropout: float) -> torch.Tensor:
    """What several layers without bias make of ``dropout(x)``, side by side.

    The mask is kept for the backward pass, one byte for each element, and not what it leaves of `x`.

    Args:
        x: ``[.., in]``.
        linears: the layers.
        dropout: probability of dropping an element.

    Returns:
        ``[.., R]`` in the dtype of `x` (of autocast).
    """
    return _ReadDropped.apply(x, dropout, *[linear.weight for linear in linears])  # type: ignore[return-value]


class _ReadDropped(torch.autograd.Function):
    """See `read_dropped`."""

    @staticmethod
    def forward(ctx: Any, x, dropout, *weights):  # type: ignore[no-untyped-def]
        mask = drop_mask(x, dropout)
        ctx.save_for_backward(x, mask, *weights)
        ctx.dropout = dropout
        return F.linear(dropped(x, mask, dropout), rows(weights, x.dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_z):  # type: ignore[no-untyped-def]
        x, mask, *weights = ctx.saved_tensors
        flat = d_z.reshape(-1, d_z.shape[-1])
        d_x = None
        if ctx.needs_input_grad[0]:
            d_x = dropped((flat @ rows(weights, flat.dtype)).to(x.dtype).view(x.shape), mask, ctx.dropout)
        read_x = dropped(x, mask, ctx.dropout).reshape(-1, x.shape[-1]).to(flat.dtype)
        return d_x, None, *split_rows(flat.t() @ read_x, weights)


class _Read(torch.autograd.Function):
    """See `read`."""

    @staticmethod
    def forward(ctx: Any, x, index, *tensors):  # type: ignore[no-untyped-def]
        weights, biases = tensors[::2], tensors[1::2]
        ctx.save_for_backward(x, index, *weights)
        ctx.biases = [None if bias is None else bias.dtype for bias in biases]
        bias = None
        if any(bias is not None for bias in biases):
            filled = [w.new_zeros(w.shape[0]) if b is None else b for w, b in zip(weights, biases)]
            bias = rows(filled, x.dtype)
        return F.linear(_tokens(x, index), rows(weights, x.dtype), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_z):  # type: ignore[no-untyped-def]
        x, index, *weights = ctx.saved_tensors
        flat = d_z.reshape(-1, d_z.shape[-1])
        d_x = None
        if ctx.needs_input_grad[0]:
            d_x = (flat @ rows(weights, flat.dtype)).to(x.dtype)
            if index is not None:
                d_x = x.new_zeros(x.shape).view(-1, x.shape[-1]).index_add_(0, index, d_x)
            d_x = d_x.view(x.shape)
        read_x = _tokens(x, index).reshape(-1, x.shape[-1]).to(flat.dtype)
        d_weights = split_rows(flat.t() @ read_x, weights)
        sums = flat.sum(0).split([weight.shape[0] for weight in weights])
        d_biases = [None if dtype is None else piece.to(dtype) for piece, dtype in zip(sums, ctx.biases)]
        return d_x, None, *(gradient for pair in zip(d_weights, d_biases) for gradient in pair)


def _tokens(x: torch.Tensor, index: torch.Tensor | None) -> torch.Tensor:
    return x if index is None else x.reshape(-1, x.shape[-1]).index_select(0, index)


def add_in_place(
    output: torch.Tensor, inner: torch.Tensor, parts: Sequence[torch.Tensor], index: torch.Tensor | None = None
) -> torch.Tensor:
    """``output += inner columns(parts)^T`` for any number of leading dimensions.

    Without the copy that autograd makes for a view that is changed in place.

    Args:
        output: ``[.., out]``, contiguous, no view.
        inner: ``[.., R]`` in the dtype of `output`; ``[n, R]`` with `index`.
        parts: the parts of ``[out, R]``.
        index: ``[n]`` tokens to add to, counted over all leading dimensions.
    """
    return _AddInPlace.apply(output, inner, index, *parts)  # type: ignore[return-value]


class _AddInPlace(torch.autograd.Function):
    """See `add_in_place`."""

    @staticmethod
    def forward(ctx: Any, output, inner, index, *parts):  # type: ignore[no-untyped-def]
        ctx.mark_dirty(output)
        ctx.save_for_backward(inner, index, *parts)
        flat, write = inner.reshape(-1, inner.shape[-1]), columns(parts, output.dtype).t()
        if index is None:
            output.view(-1, output.shape[-1]).addmm_(flat, write)
        else:
            output.view(-1, output.shape[-1]).index_add_(0, index, flat @ write)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient):  # type: ignore[no-untyped-def]
        inner, index, *parts = ctx.saved_tensors
        flat = _tokens(gradient, index).reshape(-1, gradient.shape[-1])
        d_inner, d_parts = backward_of_write(flat, inner.reshape(-1, inner.shape[-1]), parts)
        return gradient, d_inner.view(inner.shape), None, *d_parts
