"""Lists of experts and losses that several methods are made of."""

from typing import Any

from moa_peft.architectures import ROLES
from moa_peft.config import MoAConfig
from moa_peft.methods.registry import Layers, Targets

MOA_TARGETS = ("q", "k", "v", "o", "down")
"""The linear layers of MoA's experts, and of the baselines it is compared with."""

ATTENTION = ("q", "k", "v", "o")
MLP = ("gate", "up", "down")


def lora_experts(targets: Targets, kind: str = "lora", **options: Any) -> list[dict[str, Any]]:
    """One entry of ``experts: [...]`` per target.

    Args:
        targets: roles, which families may lack, or modules, which must be there.
        kind: type of the experts.
        **options: of each of them.
    """
    return [{"type": kind, "target": target, "optional": target in ROLES} | options for target in targets]


def moa_experts(
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
) -> list[dict[str, Any]]:
    """The experts of MoA in their canonical order: LoRA q, k, v; prompt; LoRA o, (up, gate,) down;
    parallel.

    Args:
        rank: LoRA rank.
        alpha: LoRA alpha; None is the rank.
        dropout: LoRA dropout.
        rslora: rank-stabilised scale.
        targets: roles or modules with a LoRA expert.
        adapter_size: inner width of the parallel adapter; 0 leaves it out.
        prompt: whether there is a prompt expert.
        prompt_length: number of prompt tokens.
        layers: blocks that get the experts; None is all.
    """
    before = [t for t in ("q", "k", "v") if t in targets]
    after = [t for t in ("o", "up", "gate", "down") if t in targets]
    after += [t for t in targets if t not in before + after]
    lora: dict[str, Any] = {"rank": rank, "alpha": alpha, "dropout": dropout, "rslora": rslora, "layers": layers}
    experts = lora_experts(before, **lora)
    if prompt:
        experts.append({"type": "prompt", "length": prompt_length, "layers": layers, "optional": True})
    experts += lora_experts(after, **lora)
    if adapter_size:
        experts.append({"type": "parallel", "size": adapter_size, "layers": layers, "optional": True})
    return experts


def mixture(
    experts: list[dict[str, Any]], router: dict[str, Any], given: dict[str, Any], **defaults: Any
) -> MoAConfig:
    """A configuration of these parts.

    Args:
        experts: its experts.
        router: its router, unless `given` has another.
        given: fields of the configuration that the user gave.
        **defaults: fields that the method sets, unless the user gave them.
    """
    values = {"router": router, **defaults, **given}
    if values["router"] is None:
        values["router"] = router
    return MoAConfig(experts=experts, **values)


def losses(*entries: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The entries of ``losses: [...]`` whose coefficient is not 0; None if there are none."""
    return [entry for entry in entries if entry["coefficient"] != 0] or None
