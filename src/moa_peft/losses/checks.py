"""From the entries of ``losses: [...]`` to losses, and whether they fit the router."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

import torch

from moa_peft.errors import UserError
from moa_peft.fields import build_options
from moa_peft.losses.base import LOSSES, Loss, Needs
from moa_peft.routers import ROUTERS, RouterOptions

MISSING: dict[Needs, str] = {
    "logits": "returns no logits",
    "sparsity": "predicts no sparsity lambda (sparsegen does)",
    "threshold": "has no threshold",
    "selection": "selects every expert for every token, so the load says nothing; set load: weights",
    "probabilities": "has scores that do not add up to 1",
}
"""What a router lacks that does not meet a need."""


def parse_losses(entries: Any) -> tuple[Loss, ...]:
    """The losses of a configuration.

    Args:
        entries: list of dictionaries with a ``type`` and its options, or None.

    Raises:
        UserError: naming the entry and what is wrong with it.
    """
    if entries is None:
        return ()
    if not isinstance(entries, (list, tuple)):
        raise UserError(f"losses is {entries!r}; it must be a list of dictionaries with a 'type' ({_known()}).")
    losses: list[Loss] = []
    for index, entry in enumerate(entries):
        if not isinstance(entry, dict) or "type" not in entry:
            raise UserError(f"losses[{index}] is {entry!r}; it must be a dictionary with a 'type' ({_known()}).")
        where = f"losses[{index}] ({entry['type']})"
        values = {key: value for key, value in entry.items() if key != "type"}
        try:
            loss_class = LOSSES[entry["type"]]
            options = build_options(loss_class.Options, values, where=where)
        except UserError as error:
            raise UserError(str(error) if str(error).startswith(where) else f"{where}: {error}") from None
        if any(loss.name == loss_class.name for loss in losses):
            raise UserError(f"{where}: {entry['type']!r} is listed twice; each type can be used once.")
        losses.append(loss_class(options))
    return tuple(losses)


def loss_entries(losses: Iterable[Loss]) -> list[dict[str, Any]]:
    """The entries of ``losses: [...]`` with every option written out."""
    return [{"type": loss.name} | asdict(loss.options) for loss in losses]


def check_losses(
    losses: Sequence[Loss], router_type: str, router_options: RouterOptions, *, num_experts: Iterable[int] = ()
) -> None:
    """Refuse losses that do not fit a router; of the mixtures of an adapter the largest decides.

    Args:
        losses: from `parse_losses`.
        router_type: its name.
        router_options: its options.
        num_experts: numbers of experts its mixtures have, where they are known.

    Raises:
        UserError: naming the loss and what the router lacks.
    """
    if not losses:
        return
    numbers = sorted(set(num_experts))
    found = _returned(router_type, router_options, numbers[-1] if numbers else None)
    for loss in losses:
        for need in loss.needs():
            if need not in found:
                raise UserError(f"losses ({loss.name}): the router {router_type!r} {MISSING[need]}.")
        for number in numbers:
            loss.check_num_experts(number)


def _returned(router_type: str, router_options: RouterOptions, num_experts: int | None) -> set[Needs]:
    """What a router of this kind returns, seen by asking a small one."""
    width = 2
    # More than any option that keeps a number of experts, such as top-k's k.
    num_experts = num_experts or max(
        [8, *(1 + value for value in vars(router_options).values() if type(value) is int)]
    )
    router_class = ROUTERS[router_type]
    # On the meta device, where no number is drawn, also where a loader makes every module there.
    with torch.device("meta"), torch.no_grad():
        router = router_class(width, num_experts, router_options).eval()
        shared = router_class.shared_network(width, router_options)
        if shared is not None:
            router.share(shared.eval())
        routing = router(torch.zeros(1, 1, width))
        selects = router.may_skip(with_gradient=False)
    if not list(router.parameters()):
        raise UserError(f"losses: the router {router_type!r} learns nothing, so no loss can teach it. Remove losses.")
    present: list[tuple[Needs, bool]] = [
        ("logits", routing.logits is not None),
        ("sparsity", routing.sparsity is not None),
        ("threshold", routing.threshold is not None),
        ("selection", selects),
        ("probabilities", router_class.scores_are_probabilities),
    ]
    return {need for need, has in present if has}


def _known() -> str:
    return ", ".join(LOSSES)
