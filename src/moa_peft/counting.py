"""Trainable parameters of a mixture, counted from configurations alone: no weights are made or loaded."""

from collections import defaultdict
from dataclasses import dataclass, field

from peft import PeftConfig
from torch import nn
from transformers import PreTrainedConfig

from moa_peft.layer import MoALayer
from moa_peft.meta_model import adapter_on_meta
from moa_peft.shared_networks import SharedNetworks


@dataclass
class ParameterCount:
    """Parameters of one adapter.

    Attributes:
        base: parameters of the frozen model.
        experts: expert name (over all blocks) to parameters.
        types: expert type to parameters.
        router: parameters of the routers' heads.
        threshold: parameters of the learned thresholds, trained or (with ``threshold_gradient: none``) frozen.
        other: adapter parameters outside the mixture (modules to save, other PEFT methods).
    """

    base: int = 0
    experts: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    types: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    router: int = 0
    threshold: int = 0
    other: int = 0

    @property
    def total(self) -> int:
        """All parameters of the adapter."""
        return sum(self.types.values()) + self.router + self.threshold + self.other

    def to_dict(self) -> dict[str, object]:
        """The same as plain values, for result files."""
        return {
            "total": self.total,
            "router": self.router,
            "threshold": self.threshold,
            "other": self.other,
            "types": dict(self.types),
            "experts": dict(self.experts),
            "base": self.base,
        }


def count_adapter(model: nn.Module, adapter_name: str = "default") -> ParameterCount:
    """Count the parameters of one adapter of an adapted model.

    Args:
        model: a model with an adapter, wrapped or not; it may be on the meta device.
        adapter_name: which adapter.
    """
    count = ParameterCount()
    mixture = set()
    for layer in model.modules():
        if isinstance(layer, SharedNetworks) and adapter_name in layer.moa_shared:
            mixture.update(id(p) for p in layer.parameters())
            count.router += sum(p.numel() for p in layer.moa_shared[adapter_name].parameters())
        if not isinstance(layer, MoALayer) or adapter_name not in layer.mixtures:
            continue
        mixture.update(id(p) for p in layer.parameters())
        for slot in layer.mixtures[adapter_name].slots:
            size = sum(p.numel() for p in layer.moa_experts[adapter_name].get_submodule(slot.name).parameters())
            count.experts[slot.name] += size
            count.types[slot.expert_type] += size
        for name, parameter in layer.moa_router[adapter_name].named_parameters():
            if "threshold" in name.split("."):
                count.threshold += parameter.numel()
            else:
                count.router += parameter.numel()
    for parameter in model.parameters():
        if id(parameter) in mixture:
            continue
        if parameter.requires_grad:
            count.other += parameter.numel()
        else:
            count.base += parameter.numel()
    return count


def count_parameters(model_config: PreTrainedConfig, config: PeftConfig) -> ParameterCount:
    """Count the parameters that `config` would add to a model, on the meta device.

    Args:
        model_config: configuration of the base model.
        config: configuration of the adapter, a `MoAConfig` or any other of PEFT.

    Raises:
        UserError: if the configuration does not fit the model.
    """
    return count_adapter(adapter_on_meta(config, model_config))
