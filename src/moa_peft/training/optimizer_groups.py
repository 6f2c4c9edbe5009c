"""Parameter groups: experts and routers with their own learning rates, weight decay on matrices only."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn


def parameter_groups(
    model: nn.Module,
    *,
    learning_rate: float,
    router_learning_rate: float | None,
    weight_decay: float,
    router_parameters: Iterable[nn.Parameter] = (),
) -> list[dict[str, Any]]:
    """Split the trainable parameters for the optimiser.

    Weight decay applies to tensors with at least two dimensions and to nothing else, as in the paper's code: biases,
    gates and norms are not decayed.

    Args:
        model: the model with adapters; parameters without `requires_grad` are left out.
        learning_rate: peak learning rate of the experts and of everything that is not a router.
        router_learning_rate: peak learning rate of the routers; None means `learning_rate`.
        weight_decay: decay of the tensors with at least two dimensions.
        router_parameters: the parameters that belong to routers.

    Returns:
        Groups `{"name", "params", "lr", "weight_decay"}` in a fixed order, experts first, empty ones left out.
    """
    router_ids = {id(parameter) for parameter in router_parameters}
    router_rate = learning_rate if router_learning_rate is None else router_learning_rate
    groups: dict[str, dict[str, Any]] = {}
    for part, rate in (("experts", learning_rate), ("routers", router_rate)):
        for kind, decay in (("matrices", weight_decay), ("vectors", 0.0)):
            name = f"{part}_{kind}"
            groups[name] = {"name": name, "params": [], "lr": rate, "weight_decay": decay}
    for parameter in model.parameters():
        if parameter.requires_grad:
            part = "routers" if id(parameter) in router_ids else "experts"
            kind = "matrices" if parameter.ndim >= 2 else "vectors"
            groups[f"{part}_{kind}"]["params"].append(parameter)
    return [group for group in groups.values() if group["params"]]
