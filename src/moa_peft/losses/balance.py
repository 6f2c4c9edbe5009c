"""The load-balancing loss of Switch Transformers (arXiv 2101.03961) and its relatives.

``L = E sum_i f_i P_i`` over E experts, for the N real tokens t of one router:

- ``f_i``: ``load: selected`` is ``(number of t that select i) / N``, which has no gradient; under top-k routing the f
  add up to k. ``load: weights`` is the mean weight of i (DynMoLE), with its gradient. ``normalised: true`` divides f
  by its sum (MoLA's obalance, LD-MoLE).
- ``P_i``: ``importance: scores`` is the mean score of i before the selection. ``importance: above_threshold`` is the
  mean of ``score - threshold`` (AdaMoLE), which can be negative, and the loss with it.

Where the scores are probabilities, L is least when the load is even. Scores of a sigmoid router do not add up to 1:
there L also falls when all of them do, and so asks for small weights as well as for even ones.

A router that keeps all of its experts (top-k with k = E, as in MoLA's lowest blocks) selects each for every token, so
under ``load: selected`` its L is a constant, E or, normalised, 1. It teaches nothing there, but its share stays in the
logged value and in the number of routers that ``reduction: mean`` divides by. The loss is refused where all routers of
an adapter are like that.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from moa_peft.errors import UserError
from moa_peft.fields import check_choice
from moa_peft.losses.base import LOSSES, Loss, LossOptions, Needs, sum_over_tokens
from moa_peft.routing import Routing


@dataclass(kw_only=True)
class BalanceOptions(LossOptions):
    """Options of the balance loss, see the module's docstring.

    Attributes:
        load: what f counts.
        importance: what P is the mean of.
        normalised: whether f is divided by its sum.
    """

    load: Literal["selected", "weights"] = "selected"
    importance: Literal["scores", "above_threshold"] = "scores"
    normalised: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("load", self.load, ("selected", "weights"))
        check_choice("importance", self.importance, ("scores", "above_threshold"))
        if not isinstance(self.normalised, bool):
            raise UserError(f"normalised is {self.normalised!r}; it must be true or false.")


@LOSSES.register("balance")
class BalanceLoss(Loss):
    """``E sum_i f_i P_i``, see the module's docstring."""

    Options = BalanceOptions
    name = "balance"
    options: BalanceOptions

    def sums(self, routing: Routing, real: torch.Tensor | None) -> torch.Tensor:
        if self.options.load == "selected":
            load = routing.selected.to(routing.scores.dtype)
        else:
            load = routing.weights
        importance = routing.scores
        if self.options.importance == "above_threshold":
            assert routing.threshold is not None
            importance = importance - routing.threshold
        return torch.cat((sum_over_tokens(load, real), sum_over_tokens(importance, real)))

    def value(self, sums: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        load, importance = (sums / count).chunk(2)
        if self.options.normalised:
            # Where nothing is selected every load is 0, and stays so.
            load = load / load.sum().clamp(min=torch.finfo(load.dtype).tiny)
        return load.numel() * (load * importance).sum()

    def needs(self) -> tuple[Needs, ...]:
        wanted: list[Needs] = ["selection"] if self.options.load == "selected" else []
        return (*wanted, "threshold") if self.options.importance == "above_threshold" else tuple(wanted)
