"""Helpers for the tests of how a mixture fits into PEFT and transformers."""

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from moa_peft import MoAConfig
from tests.matrix import randomise_adapter
from tests.models import tiny_batch, tiny_model

CAUSAL = {"task_type": "CAUSAL_LM"}


def soft(**knobs: Any) -> MoAConfig:
    """Soft MoA for a causal language model."""
    return MoAConfig.soft(**(CAUSAL | knobs))


def sparse(**knobs: Any) -> MoAConfig:
    """Sparse MoA for a causal language model."""
    return MoAConfig.sparse(**(CAUSAL | knobs))


def trained(family: str = "llama", config: MoAConfig | None = None, *, seed: int = 5, **kwargs: Any) -> PeftModel:
    """A tiny model whose adapter has non-trivial weights."""
    torch.manual_seed(11)
    model = get_peft_model(tiny_model(family, **kwargs), soft() if config is None else config)
    randomise_adapter(model, seed=seed)
    return model.eval()


def logits(model: nn.Module, batch: dict[str, torch.Tensor] | None = None, **kwargs: Any) -> torch.Tensor:
    """The logits of a batch without labels."""
    inputs = {key: value for key, value in (batch or tiny_batch()).items() if key != "labels"}
    with torch.no_grad():
        return model(**inputs, **kwargs).logits


def adapter_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the tensors of every mixture in the model."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if ".moa." in name}


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """The gradients that are there, taken away from the model."""
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def footprint(model: nn.Module) -> list[tuple[str, type, int, int, tuple[str, ...]]]:
    """What adding an adapter changes of a model: modules, their classes, their hooks and their own attributes."""
    return [
        (name, type(m), len(m._forward_hooks), len(m._forward_pre_hooks), tuple(sorted(vars(m))))
        for name, m in model.named_modules()
    ]


def save_base_and_adapter(folder: Path, family: str = "llama", config: MoAConfig | None = None) -> Path:
    """Save a tiny base model under ``base`` and a trained adapter for it under ``adapter``, which is returned."""
    tiny_model(family).save_pretrained(folder / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "base"), soft() if config is None else config)
    randomise_adapter(model)
    model.save_pretrained(folder / "adapter")
    return folder / "adapter"
