"""Single adapters: the parts of MoA alone, and plain LoRA."""

from typing import Any

from peft import LoraConfig

from moa_peft.architectures import ROLES
from moa_peft.config import MoAConfig
from moa_peft.experts import ExpertOptions
from moa_peft.methods.experts import mixture
from moa_peft.methods.registry import Layers, Targets, method


@method("out = W x + s B A x,  s = alpha / r", "arXiv 2106.09685", "-")
def lora(
    *,
    rank: int = 16,
    alpha: float | None = None,
    dropout: float = 0.0,
    rslora: bool = False,
    targets: Targets = ("q_proj", "k_proj", "v_proj", "o_proj", "down_proj"),
    layers: Layers = None,
    **config: Any,
) -> LoraConfig:
    """Plain LoRA, the baseline: this returns PEFT's own `LoraConfig`, nothing of this package acts.

    PEFT knows no roles: `targets` are module names, and a role stands for the name it has in Llama-like families (`q`
    for `q_proj`). `layers` becomes PEFT's `layers_to_transform`.
    """
    indices = ExpertOptions(layers=layers).layer_indices()
    if indices is not None:
        config = {"layers_to_transform": sorted(indices)} | config
    return LoraConfig(
        r=rank,
        lora_alpha=rank if alpha is None else alpha,  # type: ignore[arg-type]
        lora_dropout=dropout,
        use_rslora=rslora,
        target_modules=[f"{target}_proj" if target in ROLES else target for target in targets],
        **config,
    )


@method("out = MLP(x) + U silu(D x + b_D) + b_U", "arXiv 2110.04366", "-")
def parallel_adapter(*, adapter_size: int = 16, layers: Layers = None, **config: Any) -> MoAConfig:
    """Parallel adapter: a bottleneck of `adapter_size` beside each MLP, with the constant weight 1.

    As MoA's expert it has neither the scale nor the norm of the paper. The released code starts it near zero
    (`init: reference`), here it starts at zero.
    """
    experts = [{"type": "parallel", "size": adapter_size, "layers": layers}]
    return mixture(experts, {"type": "constant"}, config)


@method("out = attention(x) + g softmax(q K_P^T / sqrt(d_h)) V_P,  K_P, V_P = W_k P, W_v P", "arXiv 2303.16199", "-")
def prompt(*, prompt_length: int = 10, layers: Layers = None, **config: Any) -> MoAConfig:
    """Prompt: attention of each block to `prompt_length` learned tokens P, behind a gate g per head that starts at 0.

    MoA's papers call it prompt tuning; it is the zero-initialised attention of LLaMA-Adapter, with a plain gate
    instead of tanh, in every block.
    """
    experts = [{"type": "prompt", "length": prompt_length, "layers": layers}]
    return mixture(experts, {"type": "constant"}, config)
