"""Routers: a hidden state in, one `Routing` out. Importing this package registers them all."""

from moa_peft.routers.adamole import AdaMoLERouter
from moa_peft.routers.base import ROUTERS, Router, RouterOptions
from moa_peft.routers.constant import ConstantRouter
from moa_peft.routers.dynmole import DynMoLERouter
from moa_peft.routers.sigmoid import SigmoidRouter
from moa_peft.routers.softmax import SoftmaxRouter
from moa_peft.routers.sparsegen import SparsegenRouter
from moa_peft.routers.top_k import TopKRouter
from moa_peft.routers.top_p import TopPRouter

__all__ = [
    "ROUTERS",
    "AdaMoLERouter",
    "ConstantRouter",
    "DynMoLERouter",
    "Router",
    "RouterOptions",
    "SigmoidRouter",
    "SoftmaxRouter",
    "SparsegenRouter",
    "TopKRouter",
    "TopPRouter",
]
