"""Single adapters: the parts of MoA alone, and plain LoRA."""

from typing import Any

from peft import LoraConfig

from moa_peft.architectures import ARCHITECTURES, ROLES
from moa_peft.config import MoAConfig
from moa_peft.errors import UserError
from moa_peft.experts.lora import LoraOptions
from moa_peft.methods.experts import MOA_TARGETS, mixture
from moa_peft.methods.registry import Layers, Targets, method

ALL_LINEAR = "all-linear"
"""PEFT's word for every linear layer but the head."""

OUTSIDE_THE_DECODER = r"(?!.*\.\d+\.).*|.*encoder\..*"
"""Regular expression over full names of modules: what is in no numbered block, and what is in one of an encoder, where
image-text models have names of decoders."""


@method("out = W x + s B A x,  s = alpha / r", "arXiv 2106.09685", "-")
def lora(
    *,
    rank: int = 16,
    alpha: float | None = None,
    dropout: float = 0.0,
    rslora: bool = False,
    targets: Targets = MOA_TARGETS,
    layers: Layers = None,
    **config: Any,
) -> LoraConfig:
    """Plain LoRA, the baseline: this returns PEFT's own `LoraConfig`, nothing of this package acts.

    PEFT knows no roles and matches the ends of names. So a role among `targets` becomes the names that all known
    families give it in their blocks, and what is outside the blocks of the decoder (a vision tower) is excluded,
    unless `exclude_modules` says what is. Module names, and `targets: all-linear`, reach PEFT as they are. `layers`
    becomes PEFT's `layers_to_transform`. On Qwen3-MoE, PEFT takes gate, up and down for those of the fused experts.
    """
    # Checked here as for every other method: PEFT's own messages do not name the setting.
    options = LoraOptions(target=list(targets), rank=rank, alpha=alpha, dropout=dropout, rslora=rslora, layers=layers)
    indices = options.layer_indices()
    target_modules: list[str] | str = [name for target in targets for name in _names(target)]
    if set(targets) & set(ROLES):
        config = {"exclude_modules": OUTSIDE_THE_DECODER} | config
    if ALL_LINEAR in targets:
        if len(targets) > 1 or indices is not None:
            raise UserError(
                f"targets is {list(targets)!r} and layers {layers!r}; {ALL_LINEAR!r} stands alone and for all layers. "
                "List roles or module names instead."
            )
        target_modules = ALL_LINEAR
    if indices is not None:
        config = {"layers_to_transform": sorted(indices)} | config
    return LoraConfig(
        r=rank,
        lora_alpha=rank if alpha is None else alpha,  # type: ignore[arg-type]
        lora_dropout=dropout,
        use_rslora=rslora,
        target_modules=target_modules,
        **config,
    )


def _names(target: str) -> list[str]:
    """The names of a role in all known families, each of which is one of the same role, or none, in the others."""
    if target not in ROLES:
        return [target]
    return sorted({family.roles[target] for family in ARCHITECTURES.values() if target in family.roles})


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
