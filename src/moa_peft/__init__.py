"""Mixtures of heterogeneous adapters as a native PEFT method. Importing the package registers the method."""

from moa_peft.config import MoAConfig
from moa_peft.errors import UserError
from moa_peft.recording import RoutingRecord, record_routing
from moa_peft.registration import register
from moa_peft.routing import Routing
from moa_peft.tuner import MoAModel
from moa_peft.version import __version__

register()

__all__ = ["MoAConfig", "MoAModel", "Routing", "RoutingRecord", "UserError", "__version__", "record_routing"]
