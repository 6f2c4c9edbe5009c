"""Auxiliary losses: a `Routing` in, a number out. Importing this package registers them all."""

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
