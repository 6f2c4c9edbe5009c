"""Mixtures of LoRA experts per linear layer in which every expert takes part: softmax weights."""

from typing import Any

from moa_peft.config import MoAConfig
from moa_peft.methods.experts import MOA_TARGETS, lora_experts, mixture
from moa_peft.methods.registry import Layers, Numbers, Targets, method


@method("out = W x + s sum_i p_i B_i A_i x,  p = softmax(G x)", "arXiv 2309.05444", "module")
def molora(
    *,
    num_experts: Numbers = 8,
    rank: int = 8,
    alpha: float | None = None,
    dropout: float = 0.0,
    rslora: bool = False,
    targets: Targets = MOA_TARGETS,
    layers: Layers = None,
    **config: Any,
) -> MoAConfig:
    """MoLoRA: `num_experts` LoRA experts per linear layer, all of them weighted by one softmax router per layer.

    The defaults are those of MoA's comparison (8 experts of rank 8 on q, k, v, o and down; 4 experts on Qwen3-14B).
    """
    experts = lora_experts(
        targets, num=num_experts, rank=rank, alpha=alpha, dropout=dropout, rslora=rslora, layers=layers
    )
    return mixture(experts, {"type": "softmax", "bias": False}, config, scope="module")


@method("out = W x + s sum_i p_i B_i A x,  p = softmax(G x)", "arXiv 2404.19245", "module")
def hydralora(
    *,
    num_experts: Numbers = 8,
    rank: int = 8,
    alpha: float | None = None,
    dropout: float = 0.0,
    rslora: bool = False,
    targets: Targets = MOA_TARGETS,
    layers: Layers = None,
    **config: Any,
) -> MoAConfig:
    """HydraLoRA: MoLoRA whose experts of a linear layer share one A, so that an expert is one B.

    The defaults are those of MoA's comparison. The authors' own script has 4 experts of rank 4, alpha 32 and dropout
    0.05 on gate, up and down: `recipes/originals/hydralora.yaml`. The number of experts from k-means over the data is
    left to the user.
    """
    experts = lora_experts(
        targets, "hydra", num=num_experts, rank=rank, alpha=alpha, dropout=dropout, rslora=rslora, layers=layers
    )
    return mixture(experts, {"type": "softmax", "bias": False}, config, scope="module")


@method("out = W x + s B (sum_i p_i M_i) A x,  p = softmax(G A x)", "arXiv 2603.00573", "module")
def comol(
    *,
    num_experts: Numbers = 8,
    rank: int = 16,
    alpha: float | None = None,
    dropout: float = 0.1,
    rslora: bool = False,
    targets: Targets = MOA_TARGETS,
    layers: Layers = None,
    **config: Any,
) -> MoAConfig:
    """CoMoL: one A and one B per linear layer, and between them a mixture of `num_experts` cores of rank x rank.

    The router reads A x as well, so eight experts cost hardly more than one LoRA. `router_input: input` is the
    ablation whose router reads x. Rank and number of experts are those that give the paper's parameter counts (25.16
    million on Qwen3-8B, 35.82 million on Qwen3-14B, 33.39 million on Qwen3-8B in the ablation).
    """
    experts = lora_experts(
        targets, "core", num=num_experts, rank=rank, alpha=alpha, dropout=dropout, rslora=rslora, layers=layers
    )
    return mixture(experts, {"type": "softmax", "bias": False}, config, scope="module", router_input="core")
