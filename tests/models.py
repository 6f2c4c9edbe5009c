"""Tiny random models of every family, made from configurations: a few layers, no download."""

from collections.abc import Callable

import torch
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)

VOCABULARY = 96
LAYERS = 2

_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_HEAD = {"head_dim": 8}
_MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}


def _gemma3_image_text() -> Gemma3Config:
    text = Gemma3TextConfig(**_SIZES, **_HEAD, sliding_window=64, query_pre_attn_scalar=8)
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    return Gemma3Config(text_config=text.to_dict(), vision_config=vision, mm_tokens_per_image=4, image_token_index=90)


FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**_SIZES),
    "mistral": lambda: MistralConfig(**_SIZES, **_HEAD),
    "qwen2": lambda: Qwen2Config(**_SIZES),
    "qwen3": lambda: Qwen3Config(**_SIZES, **_HEAD),
    "gemma": lambda: GemmaConfig(**_SIZES, **_HEAD),
    "gemma2": lambda: Gemma2Config(**_SIZES, **_HEAD, query_pre_attn_scalar=8, sliding_window=64),
    "gemma3_text": lambda: Gemma3TextConfig(**_SIZES, **_HEAD, query_pre_attn_scalar=8, sliding_window=64),
    "gemma3": _gemma3_image_text,
    "phi3": lambda: Phi3Config(**_SIZES),
    "phi": lambda: PhiConfig(**_SIZES, qk_layernorm=True),
    "olmo2": lambda: Olmo2Config(**_SIZES),
    "granite": lambda: GraniteConfig(**_SIZES, logits_scaling=2.0, residual_multiplier=0.5),
    "smollm3": lambda: SmolLM3Config(**_SIZES),
    "gpt_neox": lambda: GPTNeoXConfig(**(_SIZES | {"num_key_value_heads": None})),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=LAYERS, n_head=4, n_positions=128, pad_token_id=0, eos_token_id=2
    ),
    "opt": lambda: OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        max_position_embeddings=128,
        word_embed_proj_dim=32,
        pad_token_id=0,
        dropout=0.0,
    ),
    "falcon": lambda: FalconConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=LAYERS, num_attention_heads=4, pad_token_id=0
    ),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **_SIZES, **_HEAD, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, mlp_only_layers=[1]
    ),
    "mixtral": lambda: MixtralConfig(**_SIZES, **_MOE),
}


def tiny_config(family: str) -> PreTrainedConfig:
    """The configuration of the tiny model of a family, without dropout."""
    config = FAMILIES[family]()
    for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop", "attention_dropout", "hidden_dropout", "resid_dropout"):
        if hasattr(config, name):
            setattr(config, name, 0.0)
    return config


def tiny_model(family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **kwargs: object) -> PreTrainedModel:
    """A tiny random model; its weights are wide enough for its outputs to depend on every part."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(family), **kwargs)
    randomise(model, std=0.15)
    return model.to(dtype).eval()


def randomise(module: torch.nn.Module, *, std: float = 0.1, seed: int = 0, only_trainable: bool = False) -> None:
    """Fill weights with reproducible non-trivial values; one-dimensional ones stay near what they were."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if only_trainable and not parameter.requires_grad:
                continue
            noise = torch.randn(parameter.shape, generator=generator) * std
            if parameter.dim() == 1:
                parameter.add_(noise.to(parameter.dtype) * 0.3)
            else:
                parameter.copy_(noise)


def tiny_batch(*, rows: int = 3, tokens: int = 9, seed: int = 1) -> dict[str, torch.Tensor]:
    """An unpadded batch of token ids with labels on all but the first three tokens, the prompt."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(3, 80, (rows, tokens), generator=generator)
    labels = input_ids.clone()
    labels[:, :3] = -100
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": labels}
