"""Adding what the prompt experts attend to, without keeping their probabilities or the sum for the backward pass.

The gradients are written out. What they need is made again: the probabilities from the queries, which attention keeps
anyway. The sum, which the experts of the output projection read, is not needed: what it adds to the gradient of their
weights comes from what attention returned, which attention keeps too, and from the probabilities.

Shapes: N = B * T tokens, H heads, P prompt tokens, K the width of a head.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from moa_peft.experts import PromptExpert
from moa_peft.packed import rows, split_rows

FEW_TOKENS = 128
"""Up to so many tokens what an expert adds is made apart, in one product: in place it is one for every head."""


@dataclass(frozen=True)
class PromptState:
    """A prompt expert in one forward.

    Attributes:
        expert: the expert.
        key_HPK: its prompt keys, one per key-value head.
        value_HPK: its prompt values, one per key-value head.
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

    An expert of another class than `PromptExpert` may compute something else; all of them then run themselves.

    Args:
        attended_BTHK: ``[B, T, H, K]``.
        query_BHTK: queries as attention used them.
        states: the experts.
        scaling: factor on the scores.
        reads: the parts of A ``[R, H * K]``; may be empty.

    Returns:
        The sum, and ``[B, T, R]``, or None where nothing reads.
    """
    tensors: list[torch.Tensor] = []
    for state in states:
        expert = state.expert
        if not isinstance(expert, PromptExpert) or type(expert) is not PromptExpert:
            total = with_prompts(attended_BTHK, query_BHTK, states, scaling)
            return total, _read(total, reads)
        tensors += (state.key_HPK, state.value_HPK, state.weight_BT1, expert.gate)
    return _PromptAddition.apply(len(reads), scaling, attended_BTHK, query_BHTK, *reads, *tensors)  # type: ignore


def _read(total_BTHK: torch.Tensor, reads: Sequence[torch.Tensor]) -> torch.Tensor | None:
    return F.linear(total_BTHK.flatten(-2), rows(reads, total_BTHK.dtype)) if reads else None


def fold(
    key_HPK: torch.Tensor, value_HPK: torch.Tensor, gate: torch.Tensor, scaling: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompt keys times `scaling` and prompt values times the gate, each ``[H, P, K]``: one per query head.

    Args:
        key_HPK: one per key-value head.
        value_HPK: one per key-value head.
        gate: ``[1, H, 1, 1]``.
        scaling: factor on the scores.
        dtype: of the result; see `product_dtype`.
    """
    gate_NG11 = gate.float().view(key_HPK.shape[0], -1, 1, 1)
    key_NGPK = (key_HPK * scaling).to(dtype)[:, None].expand(-1, gate_NG11.shape[1], -1, -1)
    return key_NGPK.flatten(0, 1), (gate_NG11 * value_HPK[:, None]).to(dtype).flatten(0, 1)


def product_dtype(query: torch.Tensor) -> torch.dtype:
    """The dtype of products with the queries: theirs, or that of autocast."""
    device = query.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return query.dtype


def summed_with_prompts(
    attended_BTHK: torch.Tensor,
    query_BHTK: torch.Tensor,
    prompts: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
) -> torch.Tensor:
    """The same as `with_prompts`, in few operations and without gradients.

    Args:
        attended_BTHK: ``[B, T, H, K]``.
        query_BHTK: queries as attention used them.
        prompts: of every expert the two that `fold` returns, and its routing weight ``[B, T, 1]``; at least one.
    """
    apart = query_BHTK.shape[0] * query_BHTK.shape[2] <= FEW_TOKENS or attended_BTHK.dtype != prompts[0][1].dtype
    total_BTHK = attended_BTHK if apart else attended_BTHK.clone(memory_format=torch.contiguous_format)
    for key_HPK, value_HPK, weight_BT1 in prompts:
        query_NHK = _by_token(query_BHTK.transpose(1, 2), key_HPK.dtype)
        weights_HPN = _probabilities(query_NHK, key_HPK).mul_(_of_tokens(weight_BT1, query_BHTK))
        weights_HNP = weights_HPN.to(value_HPK.dtype).transpose(1, 2)
        if apart:
            part_NHK = torch.bmm(weights_HNP, value_HPK).transpose(0, 1)
            total_BTHK = total_BTHK + part_NHK.reshape(total_BTHK.shape).to(total_BTHK.dtype)
        else:
            total_BTHK.view(query_NHK.shape).transpose(0, 1).baddbmm_(weights_HNP, value_HPK)
    return total_BTHK


class _PromptAddition(torch.autograd.Function):
    """See `recomputed_with_prompts`. Of each expert it takes the prompt keys and values, the weight and the gate.

    For one head of one expert, with k and v as `fold` gives them, w the routing weights and g the gradient of the
    sum (that of what is read from it included)::

        p = softmax(q k^T)    u = w p    sum = attended + u v

        d_v = u^T g    d_u = g v^T    d_w = sum over the prompt of p d_u, over the heads
        d_scores = u (d_u - d_w of the head)    d_q = d_scores k    d_k = d_scores^T q
    """

    @staticmethod
    def forward(ctx: Any, num_reads, scaling, attended, query, *tensors):  # type: ignore[no-untyped-def]
        ctx.num_reads, ctx.scaling, ctx.dtype = num_reads, scaling, product_dtype(query)
        ctx.save_for_backward(attended, query, *tensors)
        prompts = [
            (*fold(key, value, gate, scaling, ctx.dtype), weight)
            for key, value, weight, gate in _quadruples(tensors[num_reads:])
        ]
        total = summed_with_prompts(attended, query, prompts)
        return total, _read(total, tensors[:num_reads])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_total, d_z):  # type: ignore[no-untyped-def]
        attended, query, *tensors = ctx.saved_tensors
        reads, experts = tensors[: ctx.num_reads], _quadruples(tensors[ctx.num_reads :])
        available = torch.amp.is_autocast_available(query.device.type)
        with torch.autocast(query.device.type, enabled=False) if available else nullcontext():
            d_read = None
            if reads:
                flat = d_total.reshape(-1, attended.shape[-2] * attended.shape[-1])
                d_z = d_z.reshape(flat.shape[0], -1).to(flat.dtype)
                d_read = d_z.t() @ attended.reshape(flat.shape).to(flat.dtype)
                # In one operation: a product and then a sum take several times as long.
                d_total = torch.addmm(flat, d_z, rows(reads, flat.dtype)).view(attended.shape)
            query_NHK = _by_token(query.transpose(1, 2), ctx.dtype)
            d_total_NHK = _by_token(d_total, ctx.dtype)
            d_query_NHK = torch.empty_like(query_NHK) if ctx.needs_input_grad[3] else None
            d_experts: list[torch.Tensor] = []
            for index, (key, value, weight, gate) in enumerate(experts):
                folded = fold(key, value, gate, ctx.scaling, ctx.dtype)
                probabilities_HPN = _probabilities(query_NHK, folded[0])
                weights_HPN = (probabilities_HPN * _of_tokens(weight, query)).to(ctx.dtype)
                if d_read is not None:
                    _add_read(d_read, d_z, weights_HPN, folded[1])
                d_folded_value = torch.bmm(weights_HPN, d_total_NHK.transpose(0, 1))
                d_weights_HPN = _heads_product(folded[1], d_total_NHK).float()
                d_weight_HN = torch.linalg.vecdot(probabilities_HPN, d_weights_HPN, dim=1)
                d_scores_HPN = d_weights_HPN.sub_(d_weight_HN[:, None]).mul_(weights_HPN).to(ctx.dtype)
                d_folded_key = torch.bmm(d_scores_HPN, query_NHK.transpose(0, 1))
                if d_query_NHK is not None:
                    d_query_HNK = d_query_NHK.transpose(0, 1)
                    d_query_HNK.baddbmm_(d_scores_HPN.transpose(1, 2), folded[0], beta=float(index > 0))
                d_key, d_value, d_gate = _unfold(d_folded_key, d_folded_value, key, value, gate, ctx.scaling)
                d_weight = d_weight_HN.sum(0).view(*attended.shape[:2], 1).sum_to_size(weight.shape)
                d_experts += (d_key, d_value, d_weight.to(weight.dtype), d_gate)
        d_query = None
        if d_query_NHK is not None:
            d_query = d_query_NHK.view(attended.shape).transpose(1, 2).to(query.dtype)
        d_reads = [] if d_read is None else split_rows(d_read, reads)
        return None, None, d_total, d_query, *d_reads, *d_experts


def _quadruples(tensors: Sequence[torch.Tensor]) -> list[tuple[torch.Tensor, ...]]:
    return [tuple(tensors[index : index + 4]) for index in range(0, len(tensors), 4)]


def _by_token(x_BTHK: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``[N, H, K]``; families whose queries are a transposed ``[B, T, H, K]``, which is most, need no copy."""
    return x_BTHK.flatten(0, 1).to(dtype)


def _of_tokens(weight_BT1: torch.Tensor, query_BHTK: torch.Tensor) -> torch.Tensor:
    """Routing weight ``[N]`` in float32."""
    batch, _, tokens, _ = query_BHTK.shape
    return weight_BT1.float().expand(batch, tokens, 1).reshape(-1)


def _heads_product(small_HPK: torch.Tensor, x_NHK: torch.Tensor) -> torch.Tensor:
    """``small x^T`` of each head, ``[H, P, N]``: contiguous, so that sums over the prompt run over whole rows."""
    if x_NHK.dtype in (torch.bfloat16, torch.float16):
        # On a CPU half-precision products are ten times as fast with the many rows first.
        return torch.bmm(x_NHK.transpose(0, 1), small_HPK.transpose(1, 2)).transpose(1, 2).contiguous()
    return torch.bmm(small_HPK, x_NHK.permute(1, 2, 0))


def _probabilities(query_NHK: torch.Tensor, key_HPK: torch.Tensor) -> torch.Tensor:
    """``[H, P, N]`` in float32."""
    return torch.softmax(_heads_product(key_HPK, query_NHK), 1, dtype=torch.float32)


def _add_read(d_read: torch.Tensor, d_z: torch.Tensor, weights_HPN: torch.Tensor, value_HPK: torch.Tensor) -> None:
    """``d_read += d_z^T part`` for the part of one expert in the sum, ``[N, H * K]``, without making the part.

    Args:
        d_read: ``[R, H * K]``.
        d_z: ``[N, R]``.
        weights_HPN: the expert's probabilities times its routing weights.
        value_HPK: folded values.
    """
    num_heads, prompt, tokens = weights_HPN.shape
    by_weight = (d_z.t() @ weights_HPN.view(-1, tokens).t().to(d_z.dtype)).view(-1, num_heads, prompt)
    d_read.view(-1, num_heads, value_HPK.shape[-1]).transpose(0, 1).baddbmm_(
        by_weight.transpose(0, 1), value_HPK.to(d_z.dtype)
    )


def _unfold(
    d_folded_key: torch.Tensor,
    d_folded_value: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    gate: torch.Tensor,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of prompt keys, prompt values and gate from those of what `fold` made of them."""
    grouped = (key.shape[0], -1, *key.shape[1:])
    gate_NG11 = gate.float().view(key.shape[0], -1, 1, 1)
    d_key = d_folded_key.view(grouped).sum(1, dtype=torch.float32) * scaling
    d_value_NGPK = d_folded_value.float().view(grouped)
    d_value = (d_value_NGPK * gate_NG11).sum(1)
    d_gate = (d_value_NGPK * value[:, None]).sum((2, 3)).view(gate.shape)
    return d_key.to(key.dtype), d_value.to(value.dtype), d_gate.to(gate.dtype)
