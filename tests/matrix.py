"""The test matrix: method variants (rows) and model families (columns). A new router or expert is one row here.

An exception to an invariant is a field of the row or of the column, with its reason.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from peft import PeftModel, get_peft_model

from moa_peft import MoAConfig
from moa_peft.methods import METHODS
from tests.models import randomise, tiny_model


@dataclass(frozen=True)
class Variant:
    """One method variant.

    Attributes:
        name: shown in the test's name.
        config: makes a fresh configuration.
        inexact_start: why adding it changes the model's output at once; None where it must not.
        frozen: reason why parameters whose name contains `frozen_part` stay as they are; None where all move.
        frozen_part: see `frozen`.
        families: families it is tested on; None is all.
        needs_prompt: reason why it generates with a cache only; None where it needs none.
    """

    name: str
    config: Callable[[], MoAConfig]
    inexact_start: str | None = None
    frozen: str | None = None
    frozen_part: str = ""
    families: tuple[str, ...] | None = None
    needs_prompt: str | None = None


def _heterogeneous() -> MoAConfig:
    return MoAConfig(
        experts=[
            {"type": "lora", "target": "q", "rank": 2, "alpha": 4},
            {"type": "lora", "target": "q", "rank": 6, "rslora": True},
            {"type": "lora", "target": ["v", "down"], "rank": 3, "num": 2},
            {"type": "lora", "target": "up", "layers": [1]},
            {"type": "parallel", "size": 4, "num": 2},
            {"type": "prompt", "length": 3, "layers": "0"},
        ],
        task_type="CAUSAL_LM",
    )


CORE = ("llama", "qwen3", "gemma3_text")


def _preset(
    name: str, *, families: tuple[str, ...] = CORE, needs_prompt: str | None = None, **knobs: object
) -> Variant:
    """A named method: small, and without dropout, which would make two equal runs differ."""

    def config() -> MoAConfig:
        small = {"dropout": 0.0, "rank": 4, "alpha": 4.0}
        return MoAConfig.preset(
            name, task_type="CAUSAL_LM", **{k: v for k, v in small.items() if k in METHODS[name].knobs} | knobs
        )

    return Variant(name, config, families=families, needs_prompt=needs_prompt)


def _heterogeneous_modules() -> MoAConfig:
    return MoAConfig(
        experts=[
            {"type": "lora", "target": ["q", "o"], "rank": 2, "alpha": 4, "num": 2},
            {"type": "hydra", "target": ["q", "down"], "rank": 3, "num": 2, "optional": True},
            {"type": "core", "target": ["v", "up"], "rank": 4, "num": 3, "optional": True},
            {"type": "lora", "target": "k", "rank": 4, "routed": False},
            {"type": "parallel", "size": 4, "num": [2, 3]},
            {"type": "prompt", "length": 3, "routed": False},
        ],
        scope="module",
        router={"type": "softmax"},
        losses=[{"type": "importance", "coefficient": 0.1}],
        task_type="CAUSAL_LM",
    )


def _top_k_moa() -> MoAConfig:
    experts = MoAConfig.soft(rank=4).experts
    losses = [{"type": "balance", "coefficient": 0.1, "reduction": "mean"}, {"type": "z", "coefficient": 0.01}]
    return MoAConfig(experts=experts, router={"type": "top_k", "k": 3}, losses=losses, task_type="CAUSAL_LM")


VARIANTS = [
    Variant("soft", lambda: MoAConfig.soft(task_type="CAUSAL_LM")),
    Variant("sparse", lambda: MoAConfig.sparse(task_type="CAUSAL_LM")),
    Variant(
        "soft-linear-residual",
        lambda: MoAConfig.soft(hidden_per_expert=0, router_input="residual", task_type="CAUSAL_LM"),
        families=CORE,
    ),
    Variant(
        "sparse-prompt-shifted",
        lambda: MoAConfig.sparse(prompt=True, threshold_gradient="shifted", max_threshold=0.9, task_type="CAUSAL_LM"),
        families=CORE,
    ),
    Variant(
        "sparse-released",
        lambda: MoAConfig.sparse(threshold_gradient="none", task_type="CAUSAL_LM"),
        frozen="in the released code no gradient reaches the threshold",
        frozen_part=".threshold.",
        families=CORE,
    ),
    Variant(
        "sparse-constant",
        lambda: MoAConfig.sparse(threshold="constant", max_threshold=0.45, task_type="CAUSAL_LM"),
        families=CORE,
    ),
    Variant(
        "soft-sequence",
        lambda: MoAConfig.soft(granularity="sequence", task_type="CAUSAL_LM"),
        needs_prompt="one routing per sequence is pooled over its prompt",
    ),
    Variant("heterogeneous", _heterogeneous, families=CORE),
    Variant(
        "reference-start",
        lambda: MoAConfig.soft(init="reference", task_type="CAUSAL_LM"),
        inexact_start="the reference's parallel adapter starts near zero, not at it",
        families=CORE,
    ),
    Variant(
        "normal-start",
        lambda: MoAConfig.soft(init="normal", task_type="CAUSAL_LM"),
        inexact_start="the released transformers port starts every weight from N(0, 0.02)",
        families=CORE,
    ),
    _preset("instance_moa", needs_prompt="one routing per sequence is pooled over its prompt"),
    _preset("unipeft", needs_prompt="one routing per sequence is pooled over its prompt"),
    _preset("naive_composition"),
    _preset("parallel_adapter"),
    _preset("prompt"),
    _preset("molora", families=(*CORE, "phi3", "gpt2", "opt", "falcon", "mixtral")),
    _preset("hydralora"),
    _preset("moe_lora_topk"),
    _preset("adamole"),
    _preset("mixlora"),
    _preset("mola"),
    _preset("dynmole"),
    # With random weights lambda comes close to 1, where a difference in the last digit becomes a visible one.
    _preset("ld_mole", router={"type": "sparsegen", "hidden": 8, "epsilon": 0.5}),
    _preset("comol"),
    Variant("heterogeneous-modules", _heterogeneous_modules, families=(*CORE, "opt", "mixtral")),
    Variant("sparse-routing-of-moa", _top_k_moa, families=CORE),
]


@dataclass(frozen=True)
class Family:
    """One model family.

    Attributes:
        name: key of `tests.models.FAMILIES`.
        drops: experts of the presets that the family has no site for.
        no_sequence: reason why sequence granularity is refused; None where it works.
    """

    name: str
    drops: tuple[str, ...] = field(default=())
    no_sequence: str | None = None


FAMILIES = [
    Family("llama"),
    Family("mistral"),
    Family("qwen2"),
    Family("qwen3"),
    Family("gemma"),
    Family("gemma2"),
    Family("gemma3_text"),
    Family("gemma3"),
    Family("phi3"),
    Family("phi"),
    Family("olmo2", drops=("prompt",)),
    Family("granite"),
    Family("smollm3"),
    Family("gpt_neox"),
    Family("gpt2"),
    Family("opt"),
    Family("falcon", drops=("prompt",), no_sequence="the model keeps further arguments from its blocks"),
    Family("qwen3_moe"),
    Family("mixtral", drops=("lora on 'down'",)),
]

CASES = [
    (variant, family)
    for variant in VARIANTS
    for family in FAMILIES
    if (variant.families is None or family.name in variant.families)
    and not (family.no_sequence and variant.config().granularity == "sequence")
]


def adapted(
    variant: Variant, family: Family, *, trained: bool = True, dtype: torch.dtype = torch.float32, **kwargs: object
) -> PeftModel:
    """A tiny model with the variant's adapter; `trained` gives the adapter non-trivial weights."""
    torch.manual_seed(11)
    model = get_peft_model(tiny_model(family.name, dtype=dtype, **kwargs), variant.config())
    if trained:
        randomise_adapter(model)
    return model.eval()


def randomise_adapter(model: torch.nn.Module, *, seed: int = 5) -> None:
    """Non-trivial adapter weights, the frozen ones included."""
    for name, module in model.named_modules():
        if name.endswith(".moa"):
            randomise(module, std=0.3, seed=seed)
