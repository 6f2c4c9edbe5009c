"""Routers: a hidden state in, one `Routing` out. Importing this package registers them all."""

from moa_peft.routers.base import ROUTERS, Router, RouterOptions
from moa_peft.routers.sigmoid import SigmoidRouter

__all__ = ["ROUTERS", "Router", "RouterOptions", "SigmoidRouter"]
