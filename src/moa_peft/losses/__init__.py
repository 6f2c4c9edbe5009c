"""Auxiliary losses: a `Routing` in, a number out. Importing this package registers them all.

Their statistics are over the routings of one router in one forward: those of the tokens that are no padding, or, with
``granularity: sequence``, those of the sequences, which count once each.
"""

from moa_peft.losses.balance import BalanceLoss
from moa_peft.losses.base import LOSSES, Loss, LossOptions
from moa_peft.losses.checks import check_losses, loss_entries, parse_losses
from moa_peft.losses.importance import ImportanceLoss
from moa_peft.losses.token_means import EntropyLoss, SparsityLoss, ZLoss
from moa_peft.losses.values import Reduce, loss_values

__all__ = [
    "LOSSES",
    "BalanceLoss",
    "EntropyLoss",
    "ImportanceLoss",
    "Loss",
    "LossOptions",
    "Reduce",
    "SparsityLoss",
    "ZLoss",
    "check_losses",
    "loss_entries",
    "loss_values",
    "parse_losses",
]
