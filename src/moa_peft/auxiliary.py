"""Auxiliary losses in any training loop: gradients without a place in the loss, values for the log.

A trainer computes its loss from what it chooses, and drops what a forward adds to ``outputs.loss``. So the losses of a
router ride on its weights: an identity in the forward pass whose backward pass starts the gradient of the loss. The
gradients are those of ``loss + coefficient * auxiliary loss``, with and without gradient checkpointing.

What a trainer does to its own loss before ``backward`` it does not do to these, so they are multiplied by a scale:

- In transformers' `Trainer` and TRL's trainers `moa_peft.training_callback` sets it.
- With accelerate alone it is one over its gradient accumulation steps, as in ``accelerator.backward``; otherwise 1.
- A loop that divides its loss itself, or multiplies it for a `GradScaler`, says so with `loss_scale`.

A forward in training mode with gradients counts as one micro-batch, so a loop that makes several before one backward
gets the losses of each.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import GradientState
from torch import nn

from moa_peft.losses import Loss, Reduce, loss_values
from moa_peft.pooling import SequenceRouting
from moa_peft.routers import Router
from moa_peft.routing import Routing

Scale = float | torch.Tensor


class Attachment:
    """Whether the losses of one routing count.

    A routing that another one replaced in the same forward is not used, and neither are its losses.
    """

    def __init__(self) -> None:
        self.counts = True


class _AddLoss(torch.autograd.Function):
    """The first argument unchanged; in the backward pass the second one gets a gradient of 1, or 0 if it does not
    count.
    """

    @staticmethod
    def forward(weights: torch.Tensor, loss: torch.Tensor, attachment: Attachment | None) -> torch.Tensor:
        return weights.view_as(weights)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.loss_dtype, ctx.attachment = inputs[1].dtype, inputs[2]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        (gradient,) = grad_outputs
        counts = ctx.attachment is None or ctx.attachment.counts
        return gradient, torch.full((), float(counts), dtype=ctx.loss_dtype, device=gradient.device), None


def add_loss(
    weights: torch.Tensor, loss: torch.Tensor, scale: Scale = 1.0, attachment: Attachment | None = None
) -> torch.Tensor:
    """``weights`` unchanged, whose backward pass also adds the gradient of ``scale * loss``.

    Args:
        weights: any tensor that the loss of the training loop depends on; no memory is used for it.
        loss: scalar on the device of `weights`.
        scale: what the loss is multiplied by.
        attachment: says in the backward pass whether the loss counts; None: it does.

    Returns:
        A view of `weights`.
    """
    if isinstance(scale, torch.Tensor):
        # One scale serves layers on different devices.
        scale = scale.to(loss.device)
    return _AddLoss.apply(weights, loss * scale, attachment)  # type: ignore[return-value]


def with_losses(
    routing: Routing,
    losses: Sequence[Loss],
    mask: torch.Tensor | None,
    *,
    scale: Scale,
    reduce: Reduce,
    log: Callable[[str, torch.Tensor], None],
    num_routers: int = 1,
    attachment: Attachment | None = None,
) -> Routing:
    """The routing with the losses of its router attached to its weights.

    Args:
        routing: what the router returned; returned as it is where no gradient is wanted.
        losses: the losses.
        mask: see `moa_peft.losses.loss_values`.
        scale: see `add_loss`.
        reduce: see `moa_peft.losses.loss_values`.
        log: is given the name and value of each loss, detached, without coefficient and scale.
        num_routers: of the model, for losses that are a mean over them.
        attachment: see `add_loss`.
    """
    if not losses or not torch.is_grad_enabled() or not routing.weights.requires_grad:
        return routing
    values = loss_values(losses, routing, mask, reduce=reduce)
    total = routing.weights.new_zeros(())
    for loss in losses:
        value = values[loss.name] * _share(loss, num_routers)
        log(loss.name, value.detach())
        total = total + loss.options.coefficient * value
    return replace(routing, weights=add_loss(routing.weights, total, scale, attachment))


def _share(loss: Loss, num_routers: int) -> float:
    return 1 / num_routers if loss.options.reduction == "mean" else 1.0


class LossLog:
    """The values of the losses of one layer since they were last read; they stay on their device until then."""

    def __init__(self) -> None:
        self._totals: dict[tuple[str, str, str], torch.Tensor] = {}

    def add(self, adapter_name: str, mixture_name: str, loss_name: str, value: torch.Tensor) -> None:
        """Note the value of one forward."""
        key = (adapter_name, mixture_name, loss_name)
        if key not in self._totals:
            self._totals[key] = torch.zeros(2, dtype=value.dtype, device=value.device)
        total = self._totals[key]
        # Replicas of `nn.DataParallel` share one log.
        total += torch.stack((value, torch.ones_like(value))).to(total.device)

    def read(self, adapter_name: str, loss_name: str) -> torch.Tensor | None:
        """``[2]``: the sum over routers of the mean over forwards, and whether there were any; None: never."""
        found = [total for (a, _, loss), total in self._totals.items() if (a, loss) == (adapter_name, loss_name)]
        if not found:
            return None
        sums, counts = torch.stack(found).unbind(-1)
        return torch.stack(((sums / counts.clamp(min=1)).sum(), counts.sum().clamp(max=1)))

    def clear(self) -> None:
        """Start anew."""
        for total in self._totals.values():
            # In place, so that a compiled forward goes on with the same tensors.
            total.zero_()

    def forget(self, adapter_name: str) -> None:
        """Keep nothing of an adapter."""
        self._totals = {key: total for key, total in self._totals.items() if key[0] != adapter_name}


@dataclass(frozen=True)
class _Attached:
    losses: tuple[Loss, ...]
    reduce: Reduce
    num_routers: int = 1
    router: Router | None = None

    @property
    def teach(self) -> bool:
        """Whether the losses can teach the router. They reach more than it, so a frozen one would teach others."""
        # A wrapper that flattens parameters leaves none to ask.
        parameters = [] if self.router is None else self.router.all_parameters()
        return not parameters or any(parameter.requires_grad for parameter in parameters)


class Auxiliary:
    """The auxiliary losses of one tuner layer, of all its adapters.

    Attributes:
        scale: what the losses are multiplied by beside their coefficients; None: see the module's docstring.
        log: the values.
    """

    def __init__(self) -> None:
        self.scale: Scale | None = None
        self.log = LossLog()
        self._attached: dict[str, dict[str, _Attached]] = {}

    def add(self, adapter_name: str, mixture_name: str, losses: Sequence[Loss], *, reduce: Reduce = "local") -> None:
        """Give the router of a mixture its losses; with none of them nothing is kept.

        `count_routers` must be called once all routers of the model have theirs.
        """
        if losses:
            self._attached.setdefault(adapter_name, {})[mixture_name] = _Attached(tuple(losses), reduce)

    def attach(
        self,
        adapter_name: str,
        mixture_name: str,
        routing: Routing,
        tokens: torch.Tensor | None,
        *,
        training: bool,
        attachment: Attachment | None = None,
    ) -> Routing:
        """The routing of one forward with the losses of its router, in training and where the router is trained.

        A sequence with one routing counts once, however many tokens it has.

        Args:
            adapter_name: whose mixture it is.
            mixture_name: which.
            routing: what its router returned.
            tokens: ``[B, T]`` bool, True where a token is no padding; None: no padding.
            training: whether the layer is in training mode.
            attachment: see `add_loss`.
        """
        found = self._attached.get(adapter_name, {}).get(mixture_name)
        if found is None or not training or not found.teach:
            return routing
        if isinstance(routing, SequenceRouting):
            tokens = routing.first

        def log(loss_name: str, value: torch.Tensor) -> None:
            self.log.add(adapter_name, mixture_name, loss_name, value)

        return with_losses(
            routing,
            found.losses,
            tokens,
            scale=_default_scale() if self.scale is None else self.scale,
            reduce=found.reduce,
            log=log,
            num_routers=found.num_routers,
            attachment=attachment,
        )

    def has_losses(self, adapter_names: Sequence[str]) -> bool:
        """Whether a mixture of one of these adapters has losses."""
        return any(name in self._attached for name in adapter_names)

    def names(self) -> set[tuple[str, str]]:
        """Adapter name and loss name of every loss."""
        mixtures = [(name, entry) for name, entries in self._attached.items() for entry in entries.values()]
        return {(name, loss.name) for name, entry in mixtures for loss in entry.losses}

    def __contains__(self, adapter_name: str) -> bool:
        return adapter_name in self._attached

    def __delitem__(self, adapter_name: str) -> None:
        """Forget an adapter; PEFT does this when it is deleted."""
        del self._attached[adapter_name]
        self.log.forget(adapter_name)


def _default_scale() -> float:
    # Read without making the state, which an Accelerator would find already there.
    return 1 / GradientState._shared_state.get("plugin_kwargs", {}).get("num_steps", 1)


def auxiliaries(model: nn.Module) -> list[Auxiliary]:
    """The auxiliary losses of every layer of a model, wrapped or not, that has some."""
    return [layer.auxiliary for layer in _layers(model)]


def _layers(model: nn.Module) -> list[Any]:
    found = [module for module in model.modules() if isinstance(getattr(module, "auxiliary", None), Auxiliary)]
    return [layer for layer in found if layer.auxiliary.names()]  # type: ignore[union-attr, operator]


def count_routers(model: nn.Module, adapter_name: str) -> None:
    """Tell the losses of an adapter whose they are, and how many routers with losses it has, for means over them.

    Args:
        model: the model.
        adapter_name: the adapter; the ``routers`` of a layer with its losses returns its routers by mixture.
    """
    layers = [layer for layer in _layers(model) if adapter_name in layer.auxiliary]
    total = sum(len(layer.auxiliary._attached[adapter_name]) for layer in layers)
    for layer in layers:
        mixtures, routers = layer.auxiliary._attached[adapter_name], layer.routers(adapter_name)
        for name, entry in mixtures.items():
            mixtures[name] = replace(entry, num_routers=total, router=routers[name])


@contextmanager
def loss_scale(model: nn.Module, scale: Scale) -> Iterator[None]:
    """Multiply the auxiliary losses of the forwards inside by what the loop multiplies its own loss by.

    For loops written by hand::

        with moa_peft.auxiliary.loss_scale(model, 1 / accumulation_steps):
            loss = model(**batch).loss / accumulation_steps
        loss.backward()

    Under gradient checkpointing `backward` belongs inside too, since it runs the forward again.

    Args:
        model: a model with a mixture of adapters, wrapped or not; one without auxiliary losses is left alone.
        scale: a number, or a scalar tensor such as ``scaler.scale(torch.ones((), device=device))``.
    """
    layers = auxiliaries(model)
    before = [layer.scale for layer in layers]
    try:
        for layer in layers:
            layer.scale = scale
        yield
    finally:
        for layer, old in zip(layers, before):
            layer.scale = old


def read_losses(model: nn.Module) -> dict[str, float]:
    """The auxiliary losses since they were last read, without their coefficients, and forget them.

    Each is the sum, or where its `reduction` says so the mean, over the routers of the model of the mean over their
    forwards in training, averaged over all processes: every process of the default group must call this.

    Returns:
        ``moa/LOSS`` to its value, ``moa/ADAPTER/LOSS`` where several adapters of the model have losses. Losses that no
        forward computed are left out.
    """
    layers = auxiliaries(model)
    names = sorted(set().union(*(layer.names() for layer in layers)))
    if not names:
        return {}
    values = _average_over_processes(model, [_over_layers(layers, *name) for name in names])
    for layer in layers:
        layer.log.clear()
    several = len({adapter_name for adapter_name, _ in names}) > 1
    return {
        f"moa/{adapter_name}/{loss_name}" if several else f"moa/{loss_name}": value
        for (adapter_name, loss_name), value in zip(names, values)
        if value is not None
    }


def _over_layers(layers: list[Auxiliary], adapter_name: str, loss_name: str) -> torch.Tensor:
    """``[2]``: the value summed over layers, and 1 if any forward computed it, else 0."""
    parts = [layer.log.read(adapter_name, loss_name) for layer in layers]
    found = [part for part in parts if part is not None]
    if not found:
        return torch.zeros(2)
    total = torch.stack([part.to(found[0].device) for part in found]).sum(0)
    return torch.stack((total[0], total[1].clamp(max=1)))


def _average_over_processes(model: nn.Module, values: list[torch.Tensor]) -> list[float | None]:
    """The numbers behind ``[2]`` values, averaged over the processes that have them, by one transfer to the host."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        device = next(model.parameters()).device
        table = torch.stack([value.to(device) for value in values])
        dist.all_reduce(table)
    else:
        table = torch.stack([value.to(values[0].device) for value in values])
    return [total / count if count else None for total, count in table.tolist()]
