"""The random base model of a benchmark, its batch, and copies that share its weights."""

import copy
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, PreTrainedConfig, Qwen3Config

from benchmarks.base import Options

MAX_POSITIONS = 4096


def model_config(options: Options) -> PreTrainedConfig:
    """The configuration of the family, at the sizes of the options."""
    sizes = options.sizes
    shared: dict[str, Any] = {
        "vocab_size": sizes.vocabulary,
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.intermediate,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "head_dim": sizes.head_dim,
        "max_position_embeddings": MAX_POSITIONS,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if options.family == "llama":
        return LlamaConfig(**shared)
    if options.family == "qwen3":
        return Qwen3Config(**shared)
    return Gemma3TextConfig(**shared, query_pre_attn_scalar=sizes.head_dim)


def base_model(options: Options) -> Any:
    """A frozen model with random weights and PyTorch's fused attention."""
    torch.manual_seed(options.seed)
    model = AutoModelForCausalLM.from_config(model_config(options), attn_implementation="sdpa")
    model.requires_grad_(False)
    return model.to(device=options.device, dtype=getattr(torch, options.dtype))


def sharing_copy(model: nn.Module) -> Any:
    """A copy of the modules that holds the very same parameters.

    A run then keeps one set of base weights however many contenders it has, and all of them read the same memory.
    """
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def make_batch(options: Options) -> dict[str, torch.Tensor]:
    """Random token ids ``[batch, tokens]`` with a label on every position."""
    generator = torch.Generator().manual_seed(options.seed + 1)
    shape = (options.batch, options.tokens)
    ids = torch.randint(3, options.sizes.vocabulary, shape, generator=generator).to(options.device)
    # The first token has no label in any causal model's loss; for mixtures that pool over the prompt it is the prompt.
    labels = ids.clone()
    labels[:, 0] = -100
    return {"input_ids": ids, "labels": labels}
