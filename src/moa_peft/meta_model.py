"""A model with an adapter but without any weights: what checks and counts need, in seconds for any size."""

from __future__ import annotations

import copy

import torch
from peft import PeftConfig, PeftMixedModel, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedConfig

from moa_peft.errors import UserError


def adapter_on_meta(config: PeftConfig, base_config: PreTrainedConfig) -> PeftModel | PeftMixedModel:
    """Build a base model from its configuration on the meta device and add the adapter to it.

    Args:
        config: configuration of the adapter; neither it nor `base_config` is changed.
        base_config: configuration of the base model.

    Raises:
        UserError: the architecture cannot carry the adapter.
    """
    fresh = copy.deepcopy(config)
    # PEFT would warn that the adapter moves to another base, which is what the caller wants to find out.
    fresh.base_model_name_or_path = None
    if hasattr(fresh, "init_from"):
        fresh.init_from = None  # type: ignore[attr-defined]
    try:
        with torch.device("meta"):
            base = AutoModelForCausalLM.from_config(copy.deepcopy(base_config))
            return get_peft_model(base, fresh, low_cpu_mem_usage=True)
    except UserError:
        raise
    except (ValueError, TypeError, IndexError, RuntimeError) as error:
        # PEFT's and transformers' own refusals: targets that match nothing, a configuration that is no language model.
        raise UserError(f"{config.peft_type} on {base_config.model_type}: {error}") from error
