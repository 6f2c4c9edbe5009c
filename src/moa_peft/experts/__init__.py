"""Experts: small modules that add to a site's output. Importing this package registers them all."""

from moa_peft.experts.base import EXPERTS, Expert, ExpertOptions, Factors, SiteShape
from moa_peft.experts.lora import LoraExpert
from moa_peft.experts.parallel import ParallelExpert
from moa_peft.experts.prompt import PromptExpert

__all__ = [
    "EXPERTS",
    "Expert",
    "ExpertOptions",
    "Factors",
    "LoraExpert",
    "ParallelExpert",
    "PromptExpert",
    "SiteShape",
]
