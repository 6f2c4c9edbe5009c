"""Mixtures of heterogeneous adapters as a native PEFT method. Importing the package registers the method."""

from moa_peft.config import MoAConfig
from moa_peft.errors import UserError
from moa_peft.recording import RoutingRecord, record_routing
from moa_peft.registration import register
from moa_peft.routing import Routing
from moa_peft.status import MoAStatus, moa_status, plain_path
from moa_peft.tuner import MoAModel
from moa_peft.version import __version__

register()

__all__ = [
    "MoAConfig",
    "MoAModel",
    "MoAStatus",
    "Routing",
    "RoutingRecord",
    "UserError",
    "__version__",
    "moa_status",
    "plain_path",
    "record_routing",
]
