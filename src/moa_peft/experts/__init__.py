"""Experts: small modules that add to a site's output. Importing this package registers them all."""

from moa_peft.experts.base import EXPERTS, Expert, ExpertOptions, Factors, SiteShape
from moa_peft.experts.core import CoreExpert
from moa_peft.experts.hydra import HydraExpert
from moa_peft.experts.lora import LoraExpert
from moa_peft.experts.mlp_lora import MlpLoraExpert
from moa_peft.experts.parallel import ParallelExpert
from moa_peft.experts.prompt import PromptExpert

__all__ = [
    "EXPERTS",
    "CoreExpert",
    "Expert",
    "ExpertOptions",
    "Factors",
    "HydraExpert",
    "LoraExpert",
    "MlpLoraExpert",
    "ParallelExpert",
    "PromptExpert",
    "SiteShape",
]
