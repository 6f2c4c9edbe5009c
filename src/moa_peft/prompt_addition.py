"""Adding what the prompt experts attend to, without keeping their probabilities or the sum for the backward pass.

Both are made again there: the probabilities from the queries, which attention keeps anyway, and the sum (which the
experts of the output projection read) from what attention returned, which it keeps too.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from moa_peft.experts import PromptExpert
from moa_peft.packed import rows, split_rows


@dataclass(frozen=True)
class PromptState:
    """A prompt expert in one forward.

    Attributes:
        expert: the expert.
        key_HPK: its prompt keys.
        value_HPK: its prompt values.
        weight_BT1: its routing weight.
    """

    expert: Callable[..., torch.Tensor]
    key_HPK: torch.Tensor
    value_HPK: torch.Tensor
    weight_BT1: torch.Tensor


def with_prompts(
    attended_BTHK: torch.Tensor, query_BHTK: torch.Tensor, states: Sequence[PromptState], scaling: float
) -> torch.Tensor:
    """What attention returned plus the output of every prompt expert, in the dtype of the former.

    Args:
        attended_BTHK: ``[B, T, H, K]``.
        query_BHTK: queries as attention used them.
        states: the experts.
        scaling: factor on the scores.
    """
    total = attended_BTHK
    for state in states:
        part = state.expert(query_BHTK, state.key_HPK, state.value_HPK, state.weight_BT1, scaling=scaling)
        total = total + part.reshape(total.shape).to(total.dtype)
    return total


def recomputed_with_prompts(
    attended_BTHK: torch.Tensor,
    query_BHTK: torch.Tensor,
    states: Sequence[PromptState],
    scaling: float,
    reads: Sequence[torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The same as `with_prompts`, and what is read from it: ``sum A^T``.

    Args:
        attended_BTHK: ``[B, T, H, K]``.
        query_BHTK: queries as attention used them.
        states: the experts.
        scaling: factor on the scores.
        reads: the parts of A ``[R, H * K]``; may be empty.

    Returns:
        The sum, and ``[B, T, R]``, or None where nothing reads.
    """
    states_of = [tensor for state in states for tensor in (state.key_HPK, state.value_HPK, state.weight_BT1)]
    experts = [state.expert for state in states]
    parameters = [p for expert in experts if isinstance(expert, PromptExpert) for p in expert.parameters()]
    tensors = (*states_of, *reads, *parameters)
    return _PromptAddition.apply(experts, len(reads), scaling, attended_BTHK, query_BHTK, *tensors)  # type: ignore


class _PromptAddition(torch.autograd.Function):
    """See `recomputed_with_prompts`."""

    @staticmethod
    def forward(ctx: Any, experts, num_reads, scaling, attended, query, *tensors):  # type: ignore[no-untyped-def]
        ctx.experts, ctx.num_reads, ctx.scaling = experts, num_reads, scaling
        device = query.device.type
        available = torch.amp.is_autocast_available(device)
        ctx.autocast = torch.get_autocast_dtype(device) if available and torch.is_autocast_enabled(device) else None
        ctx.save_for_backward(attended, query, *tensors)
        total = with_prompts(attended, query, _states(experts, tensors), scaling)
        reads = tensors[3 * len(experts) :][:num_reads]
        return total, F.linear(total.flatten(-2), rows(reads, total.dtype)) if reads else None

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_total, d_z):  # type: ignore[no-untyped-def]
        attended, query, *tensors = ctx.saved_tensors
        states, rest = tensors[: 3 * len(ctx.experts)], tensors[3 * len(ctx.experts) :]
        reads, parameters = rest[: ctx.num_reads], rest[ctx.num_reads :]
        inputs = [tensor.detach().requires_grad_() for tensor in (query, *states)]
        # With the parameters of the forward, which need not be the module's any more (`torch.func.functional_call`).
        remaining = iter(parameters)
        experts = [partial(_call, e, {name: next(remaining) for name, _ in e.named_parameters()}) for e in ctx.experts]
        cast = nullcontext() if ctx.autocast is None else torch.autocast(query.device.type, dtype=ctx.autocast)
        with torch.enable_grad(), cast:
            total = with_prompts(attended.detach(), inputs[0], _states(experts, inputs[1:]), ctx.scaling)
        d_reads: list[torch.Tensor | None] = [None] * len(reads)
        if reads and d_z is not None:
            flat = d_z.reshape(-1, d_z.shape[-1])
            d_reads = [*split_rows(flat.t() @ total.detach().flatten(-2).flatten(0, -2).to(flat.dtype), reads)]
            d_total = d_total + (flat @ rows(reads, flat.dtype)).view(d_total.shape)
        wanted = [parameter for parameter in parameters if parameter.requires_grad]
        found = torch.autograd.grad(total, [*inputs, *wanted], d_total, allow_unused=True)
        by_parameter = dict(zip(map(id, wanted), found[len(inputs) :]))
        d_parameters = [by_parameter.get(id(parameter)) for parameter in parameters]
        d_query, *d_states = found[: len(inputs)]
        return None, None, None, d_total, d_query, *d_states, *d_reads, *d_parameters


def _call(expert: PromptExpert, parameters: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.func.functional_call(expert, parameters, args, kwargs)


def _states(experts: Sequence[Callable[..., torch.Tensor]], tensors: Sequence[torch.Tensor]) -> list[PromptState]:
    return [PromptState(expert, *tensors[3 * index : 3 * index + 3]) for index, expert in enumerate(experts)]
