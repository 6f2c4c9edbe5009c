"""`init_from`: the weights of a PEFT LoRA adapter as the starting point of the LoRA experts."""

from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftConfig
from peft.utils import load_peft_weights
from peft.utils.other import get_pattern_key
from torch import nn

from moa_peft.config import MoAConfig
from moa_peft.errors import UserError
from moa_peft.experts.lora import LoraExpert, LoraOptions
from moa_peft.mixture import mixtures_of
from moa_peft.plan import Plan
from moa_peft.routers import ROUTERS
from moa_peft.sites import Slot

_PREFIX = "base_model.model."


@dataclass(frozen=True)
class StartingWeights:
    """LoRA matrices for the LoRA experts of a plan, read and checked before the model is changed.

    Attributes:
        matrices: ``(block, expert)`` to ``(A [r, in], B [out, r])``; B is scaled so that the experts of a site
            together add what the LoRA adapter added when every routing weight is the router's neutral one (0.5 for a
            sigmoid).
    """

    matrices: dict[tuple[str, str], tuple[torch.Tensor, torch.Tensor]]

    @classmethod
    def read(cls, config: MoAConfig, plan: Plan) -> "StartingWeights":
        """Read the adapter that ``config.init_from`` names.

        Raises:
            UserError: if it is no plain LoRA adapter, does not fit the model, or holds weights that no expert takes.
        """
        source = str(config.init_from)
        lora, tensors = _read(source)
        assert config.router is not None
        router_class, options = ROUTERS[config.router["type"]], config.router_options()
        matrices = {}
        for block_name, slots in plan.blocks.items():
            for slot in slots:
                if slot.expert_type != "lora":
                    continue
                module = f"{block_name}.{slot.modules[0]}"
                assert isinstance(slot.options, LoraOptions)
                keys = [f"{_PREFIX}{module}.lora_{part}.weight" for part in "AB"]
                if keys[0] not in tensors:
                    continue
                a, b = (tensors[key] for key in keys)
                _check_shapes(source, module, slot, a, b)
                width = mixtures_of(slots)[slot.mixture].num_columns
                neutral = router_class.neutral_weight(width, options) if slot.options.routed else 1.0
                sharing = sum(s.modules == slot.modules and s.expert_type == "lora" for s in slots)
                scale = _scale(lora, module, a.shape[0]) / (slot.options.scale * neutral * sharing)
                matrices[(block_name, slot.name)] = (a.float(), b.float() * scale)
        _check_complete(source, tensors, plan)
        if not matrices:
            raise UserError(f"init_from={source!r}: none of its LoRA layers has a LoRA expert in this configuration.")
        return cls(matrices)

    def apply(self, model: nn.Module, adapter_name: str) -> None:
        """Copy the matrices into the experts; ranks beyond the LoRA's keep their own A and a zero B."""
        with torch.no_grad():
            for (block_name, expert_name), (a, b) in self.matrices.items():
                expert = model.get_submodule(f"{block_name}.moa.moa_experts.{adapter_name}.{expert_name}")
                assert isinstance(expert, LoraExpert)
                rank = a.shape[0]
                expert.lora_A.weight[:rank].copy_(a)
                expert.lora_B.weight.zero_()
                expert.lora_B.weight[:, :rank].copy_(b)


def _read(source: str) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    try:
        config = PeftConfig.from_pretrained(source)
        tensors = load_peft_weights(source, device="cpu")
    except Exception as error:
        raise UserError(
            f"init_from={source!r} cannot be read as a PEFT adapter ({error}). It must be a folder or hub id with "
            "adapter_config.json and adapter_model.safetensors."
        ) from error
    if not isinstance(config, LoraConfig):
        raise UserError(f"init_from={source!r} is a {config.peft_type} adapter; only LoRA adapters can start experts.")
    if config.use_dora or any("lora_magnitude" in key for key in tensors):
        raise UserError(
            f"init_from={source!r} uses DoRA, which is no sum of base and low-rank update; use plain LoRA."
        )
    return config, tensors


def _scale(lora: LoraConfig, module: str, rank: int) -> float:
    alpha = lora.lora_alpha
    if lora.alpha_pattern:
        alpha = lora.alpha_pattern.get(get_pattern_key(list(lora.alpha_pattern), module), alpha)
    return alpha / (rank**0.5 if lora.use_rslora else rank)


def _check_shapes(source: str, module: str, slot: Slot, a: torch.Tensor, b: torch.Tensor) -> None:
    assert isinstance(slot.options, LoraOptions)
    if a.shape[1] != slot.shape.in_features or b.shape[0] != slot.shape.out_features:
        raise UserError(
            f"init_from={source!r} does not fit the model: {module} is {slot.shape.in_features} -> "
            f"{slot.shape.out_features}, the adapter's is {a.shape[1]} -> {b.shape[0]}. Use an adapter of the same "
            "base."
        )
    if a.shape[0] > slot.options.rank:
        raise UserError(
            f"init_from={source!r} has rank {a.shape[0]} at {module}, the expert has rank {slot.options.rank}. Give "
            f"the experts rank {a.shape[0]} or more."
        )


def _check_complete(source: str, tensors: dict[str, torch.Tensor], plan: Plan) -> None:
    lora = [(block, slot) for block, slots in plan.blocks.items() for slot in slots if slot.expert_type == "lora"]
    taken = {f"{block}.{slot.modules[0]}" for block, slot in lora}
    held = {key.removeprefix(_PREFIX).partition(".lora_")[0] for key in tensors if ".lora_" in key}
    dropped = sorted(held - taken)
    if dropped:
        raise UserError(
            f"init_from={source!r} holds LoRA weights for {len(dropped)} layers without a LoRA expert, such as "
            f"{dropped[0]}. Add experts for them (targets=...), so that nothing of the adapter is lost."
        )
