"""The values of the losses of one router: padding left out, the sums of all processes added up where asked for."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.distributed as dist

from moa_peft.errors import UserError
from moa_peft.losses.base import Loss
from moa_peft.routing import Routing

Reduce = Literal["local", "global"]
"""``local``: each process takes its own tokens, and averaging gradients averages the losses. ``global``: the losses of
the tokens of all processes, the same as one process would compute from all of them."""


def loss_values(
    losses: Sequence[Loss], routing: Routing, mask: torch.Tensor | None = None, *, reduce: Reduce = "local"
) -> dict[str, torch.Tensor]:
    """The losses of one router in one forward, without their coefficients.

    Args:
        losses: which.
        routing: of ``[...]`` tokens.
        mask: bool, True where a token is no padding, of as many elements as the routing has tokens: a ``[B, T]`` mask
            serves a routing of ``[B, T]`` and one of ``[B*T]`` tokens. None: no padding. Without any real token every
            loss is 0, and so is its gradient.
        reduce: ``global`` adds the sums of all processes of the default process group up first. The gradient is then
            that of the global loss times the number of processes, for those who average the gradients of processes.

    Returns:
        Loss name to a float32 scalar.
    """
    real = _real_tokens(routing, mask)
    routing = _harmless_padding(routing, real)
    sums = [loss.sums(routing, real) for loss in losses]
    if real is None:
        count = sums[0].new_tensor(float(routing.weights[..., 0].numel()))
    else:
        count = real.sum().to(sums[0].dtype)
    if reduce == "global" and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        sums, count = _over_processes(sums, count)
    count = count.clamp(min=1)
    return {loss.name: loss.value(part, count) for loss, part in zip(losses, sums)}


def _real_tokens(routing: Routing, mask: torch.Tensor | None) -> torch.Tensor | None:
    """``[..., 1]`` bool in the shape of the routing's tokens."""
    if mask is None:
        return None
    shape = routing.weights.shape[:-1]
    if mask.numel() != shape.numel():
        raise UserError(
            f"losses: the padding mask tells about {mask.numel()} tokens, and the router saw {shape.numel()}. "
            "Auxiliary losses need every token of the batch to reach the router; remove `losses`, or this mixture."
        )
    return mask.to(device=routing.weights.device, dtype=torch.bool).reshape(*shape, 1)


def _harmless_padding(routing: Routing, real: torch.Tensor | None) -> Routing:
    """The routing with padding replaced, because 0 * nan is nan, in values as in gradients."""
    if real is None:
        return routing
    even = 1 / routing.scores.shape[-1]
    replaced = routing.map(lambda values: torch.where(real, values, 0.0))
    return Routing(
        weights=replaced.weights,
        scores=torch.where(real, routing.scores, even),
        threshold=replaced.threshold,
        logits=replaced.logits,
        sparsity=replaced.sparsity,
    )


def _over_processes(sums: list[torch.Tensor], count: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Sums and count of all processes, by one collective in the forward pass; its gradient needs none."""
    local = torch.cat(sums)
    everywhere = torch.cat((local.detach(), count[None]))
    dist.all_reduce(everywhere)
    # The value is that of all processes; the gradient reaches the local tokens only, times the number of processes,
    # by which the averaging of gradients divides it again. The bracket is exactly zero.
    total = everywhere[:-1] + dist.get_world_size() * (local - local.detach())
    return list(total.split([part.numel() for part in sums])), everywhere[-1]
