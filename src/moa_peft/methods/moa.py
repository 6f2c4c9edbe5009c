"""MoA (arXiv 2506.05928), and the mixtures of the same experts that it is compared with."""

from typing import Any

from moa_peft.config import MoAConfig
from moa_peft.methods.experts import MOA_TARGETS, mixture, moa_experts
from moa_peft.methods.registry import Layers, Targets, method

PAPER = "arXiv 2506.05928"


@method("out = base + sum_i sigmoid(r(z))_i E_i(x)", PAPER, "block")
def soft_moa(
    *,
    rank: int = 8,
    alpha: float | None = None,
    dropout: float = 0.0,
    rslora: bool = False,
    targets: Targets = MOA_TARGETS,
    adapter_size: int = 16,
    prompt: bool = True,
    prompt_length: int = 10,
    layers: Layers = None,
    hidden_per_expert: int = 4,
    **config: Any,
) -> MoAConfig:
    """Soft MoA: every expert takes part in every token, with an independent sigmoid weight.

    `hidden_per_expert` is the inner width of the router per expert (0: a linear router); the other knobs are those of
    `moa_experts`. The released transformers code has no prompt expert (`prompt: false`) and, by accident, starts every
    weight from N(0, 0.02), so that the first step is not the base model (`init: normal`); here the start is exact.
    """
    experts = moa_experts(
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        rslora=rslora,
        targets=targets,
        adapter_size=adapter_size,
        prompt=prompt,
        prompt_length=prompt_length,
        layers=layers,
    )
    return mixture(experts, {"type": "sigmoid", "hidden_per_expert": hidden_per_expert}, config)


@method("out = base + sum_i w_i 1[w_i >= tau(z)] E_i(x),  w = sigmoid(r(z))", PAPER, "block")
def sparse_moa(
    *,
    rank: int = 8,
    alpha: float | None = None,
    dropout: float = 0.0,
    rslora: bool = False,
    targets: Targets = MOA_TARGETS,
    adapter_size: int = 16,
    prompt: bool = False,
    prompt_length: int = 10,
    layers: Layers = None,
    hidden_per_expert: int = 4,
    threshold: str = "learned",
    max_threshold: float = 0.5,
    threshold_gradient: str = "straight_through",
    threshold_temperature: float = 0.1,
    **config: Any,
) -> MoAConfig:
    """Sparse MoA: experts whose weight stays below a learned (or constant) threshold are left out per token.

    The threshold's knobs are those of `moa_peft.routers.sigmoid`; the prompt expert is off, as in the paper. In the
    released code no gradient reaches the threshold, which so keeps its random start (`threshold_gradient: none`);
    here it learns, through the straight-through gradient.
    """
    experts = moa_experts(
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        rslora=rslora,
        targets=targets,
        adapter_size=adapter_size,
        prompt=prompt,
        prompt_length=prompt_length,
        layers=layers,
    )
    router = {
        "type": "sigmoid",
        "hidden_per_expert": hidden_per_expert,
        "threshold": threshold,
        "max_threshold": max_threshold,
        "threshold_gradient": threshold_gradient,
        "threshold_temperature": threshold_temperature,
    }
    return mixture(experts, router, config)


@method("out = base + sum_i sigmoid(r(m))_i E_i(x),  m = mean_t z_t over the prompt", PAPER, "block")
def instance_moa(
    *,
    rank: int = 8,
    alpha: float | None = None,
    dropout: float = 0.0,
    rslora: bool = False,
    targets: Targets = MOA_TARGETS,
    adapter_size: int = 16,
    prompt: bool = True,
    prompt_length: int = 10,
    layers: Layers = None,
    hidden_per_expert: int = 4,
    **config: Any,
) -> MoAConfig:
    """Instance-level MoA, an ablation: one routing per sequence and block, from the mean hidden state of its prompt.

    The released code takes the mean over padding and, in training, over the answer too, which generation does not
    have; here it is the mean over the tokens of the prompt, in training as in generation. It also pools the residual
    stream itself: `router_input: residual`.
    """
    experts = moa_experts(
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        rslora=rslora,
        targets=targets,
        adapter_size=adapter_size,
        prompt=prompt,
        prompt_length=prompt_length,
        layers=layers,
    )
    router = {"type": "sigmoid", "hidden_per_expert": hidden_per_expert}
    return mixture(experts, router, config, granularity="sequence")


@method(
    "out = base + sum_i sigmoid(g_kind(i) . m) E_i(x),  kinds: lora, prompt, parallel", "arXiv 2110.07577", "block"
)
def unipeft(
    *,
    rank: int = 8,
    alpha: float | None = None,
    dropout: float = 0.0,
    rslora: bool = False,
    targets: Targets = MOA_TARGETS,
    adapter_size: int = 16,
    prompt: bool = True,
    prompt_length: int = 10,
    layers: Layers = None,
    hidden_per_expert: int = 0,
    **config: Any,
) -> MoAConfig:
    """UniPEFT, the gates of UniPELT as MoA's authors compare them: one gate per kind of expert, sequence and block.

    All LoRA experts share a gate. In the released code the gate of the parallel adapter is, by mistake, that of the
    prompt, and the mean state covers padding and the answer; here each kind has its own gate, over the prompt's mean
    m. Parameters are the same: the unused gate was there, too. The released code pools the residual stream itself:
    `router_input: residual`.
    """
    experts = moa_experts(
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        rslora=rslora,
        targets=targets,
        adapter_size=adapter_size,
        prompt=prompt,
        prompt_length=prompt_length,
        layers=layers,
    )
    experts = [entry | {"group": entry["type"]} for entry in experts]
    router = {"type": "sigmoid", "hidden_per_expert": hidden_per_expert}
    return mixture(experts, router, config, granularity="sequence")


@method("out = base + sum_i E_i(x)", PAPER, "block")
def naive_composition(
    *,
    rank: int = 8,
    alpha: float | None = None,
    dropout: float = 0.0,
    rslora: bool = False,
    targets: Targets = MOA_TARGETS,
    adapter_size: int = 16,
    prompt: bool = True,
    prompt_length: int = 10,
    layers: Layers = None,
    weight: float = 1.0,
    **config: Any,
) -> MoAConfig:
    """Naive composition: MoA's experts side by side without a router, each with the constant weight `weight`."""
    experts = moa_experts(
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        rslora=rslora,
        targets=targets,
        adapter_size=adapter_size,
        prompt=prompt,
        prompt_length=prompt_length,
        layers=layers,
    )
    return mixture(experts, {"type": "constant", "weight": weight}, config)
