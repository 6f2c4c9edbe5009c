"""Named methods: complete configurations with their paper's defaults, and the knobs to change them.

Importing this package registers them all.
"""

from moa_peft.methods.experts import moa_experts
from moa_peft.methods.registry import METHODS, Method, method_config

# isort: off
# The order of `moa methods`.
from moa_peft.methods.moa import instance_moa, naive_composition, soft_moa, sparse_moa, unipeft
from moa_peft.methods.single import lora, parallel_adapter, prompt
from moa_peft.methods.dense import comol, hydralora, molora
from moa_peft.methods.sparse import adamole, dynmole, ld_mole, mixlora, moe_lora_topk, mola
# isort: on

__all__ = [
    "METHODS",
    "Method",
    "adamole",
    "comol",
    "dynmole",
    "hydralora",
    "instance_moa",
    "ld_mole",
    "lora",
    "method_config",
    "mixlora",
    "moa_experts",
    "moe_lora_topk",
    "mola",
    "molora",
    "naive_composition",
    "parallel_adapter",
    "prompt",
    "soft_moa",
    "sparse_moa",
    "unipeft",
]
