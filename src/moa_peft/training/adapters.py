"""From a recipe to a model with trainable adapters."""

from __future__ import annotations

from typing import Any

from peft import PeftConfig, PeftMixedModel, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import PreTrainedModel

from moa_peft.base_models import load_model
from moa_peft.config import MoAConfig
from moa_peft.errors import UserError
from moa_peft.routers.base import Router
from moa_peft.training.arguments import MoATrainingArguments
from moa_peft.training.recipe import TrainRecipe

CUSTOM = "custom"

# Fields of every PEFT configuration that a run sets itself.
_SET_BY_RUN = {
    "task_type": "`moa train` trains causal language models",
    "inference_mode": "it would leave nothing to train",
    "peft_type": "the key method says which adapters are trained",
    "base_model_name_or_path": "the key model says which model is the base",
    "revision": "write it outside the block moa, beside model",
}


def adapter_config(recipe: TrainRecipe) -> PeftConfig:
    """The PEFT configuration that a recipe's `method` and `moa:` block describe.

    Args:
        recipe: with `method: custom` the block is the configuration written out, else it changes a named method.

    Raises:
        UserError: an unknown method or key, or a value that the method refuses.
    """
    for key, reason in _SET_BY_RUN.items():
        if key in recipe.moa:
            raise UserError(f"moa.{key}: {recipe.moa[key]!r} cannot be set here; {reason}. Remove the key.")
    knobs: dict[str, Any] = {"task_type": "CAUSAL_LM", **recipe.moa}
    if recipe.options.init_from is not None:
        knobs["init_from"] = recipe.options.init_from
    try:
        if recipe.options.method == CUSTOM:
            return MoAConfig(**knobs)
        return MoAConfig.preset(recipe.options.method, **knobs)
    except TypeError as error:
        raise UserError(f"moa: {error}. `moa methods` lists each method's keys.") from error
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"moa: {error}") from error


def build_model(
    recipe: TrainRecipe, config: PeftConfig, arguments: MoATrainingArguments
) -> PeftModel | PeftMixedModel:
    """Load the base model and add the adapters.

    Args:
        recipe: says which base and how it is loaded.
        config: from `adapter_config`.
        arguments: decide whether activations are checkpointed.

    Raises:
        UserError: the base cannot be loaded, or the architecture cannot carry an expert.
    """
    options = recipe.options
    base = load_model(
        options.model,
        dtype=options.dtype,
        attn_implementation=options.attn_implementation,
        quantization=options.quantization,
        trust_remote_code=options.trust_remote_code,
        revision=options.revision,
    )
    prepare_base(base, arguments, quantized=options.quantization != "none")
    config.base_model_name_or_path = base.name_or_path
    try:
        return get_peft_model(base, config)
    except UserError:
        raise
    except ValueError as error:
        # PEFT's own refusals, such as targets that match no module.
        raise UserError(f"moa: {error}") from error


def prepare_base(base: PreTrainedModel, arguments: MoATrainingArguments, *, quantized: bool) -> None:
    """Let gradients pass a frozen base: through quantised layers, and into reentrant checkpoints."""
    if quantized:
        prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    options = arguments.activation_checkpointing_kwargs or {}
    if arguments.activation_checkpointing and isinstance(options, dict) and options.get("use_reentrant"):
        base.enable_input_require_grads()


def router_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of all routers in `model`, each once."""
    found: dict[int, nn.Parameter] = {}
    for module in model.modules():
        if isinstance(module, Router):
            found.update({id(parameter): parameter for parameter in module.parameters()})
    return list(found.values())
