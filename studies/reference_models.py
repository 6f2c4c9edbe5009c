"""The sizes of the models that published parameter counts are about, as configurations; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Mapping

from transformers import LlamaConfig, PreTrainedConfig, Qwen3Config


def _qwen3(hidden_size: int, intermediate_size: int, layers: int, heads: int) -> Qwen3Config:
    return Qwen3Config(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
    )


LLAMA_2_7B = LlamaConfig(
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    vocab_size=32000,
)
LLAMA_31_8B = LlamaConfig(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
)
LLAMA_32_3B = LlamaConfig(
    hidden_size=3072,
    intermediate_size=8192,
    num_hidden_layers=28,
    num_attention_heads=24,
    num_key_value_heads=8,
    vocab_size=128256,
    tie_word_embeddings=True,
)
QWEN3_8B = _qwen3(4096, 12288, 36, 32)
QWEN3_14B = _qwen3(5120, 17408, 40, 40)

BY_HUB_ID: Mapping[str, PreTrainedConfig] = {
    "meta-llama/Llama-2-7b-hf": LLAMA_2_7B,
    "meta-llama/Llama-3.1-8B-Instruct": LLAMA_31_8B,
    "meta-llama/Llama-3.2-3B": LLAMA_32_3B,
    "Qwen/Qwen3-8B": QWEN3_8B,
    "Qwen/Qwen3-14B": QWEN3_14B,
}
"""The models that recipes name."""
