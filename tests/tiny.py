"""Tiny random models and a tiny tokenizer for tests of training, generation and the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast, set_seed

SPECIALS = ["<pad>", "<s>", "</s>", "<unk>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)

_SIZES: dict[str, Any] = {
    "vocab_size": 132,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
# What each family adds: the settings that change how logits are made.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "gemma2": {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 5.0, "sliding_window": 64},
    "granite": {"logits_scaling": 4.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.5},
    "gpt2": {
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 2,
        "n_positions": 512,
        "attn_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
    },
}


def tiny_model(family: str = "llama", *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random model of about ten thousand parameters, the same for the same seed."""
    set_seed(seed)
    sizes = {key: value for key, value in _SIZES.items() if family != "gpt2" or not key.startswith(("hidden", "max"))}
    config = AutoConfig.for_model(family, **{**sizes, **FAMILIES[family], **changes})
    return AutoModelForCausalLM.from_config(config).eval().to(torch.float32)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per ASCII character, with pad, begin, end and a small chat template."""
    vocabulary = {token: index for index, token in enumerate(SPECIALS)}
    vocabulary |= {chr(code): len(SPECIALS) + code for code in range(128)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def save_tiny(folder: Path, family: str = "llama", **changes: Any) -> Path:
    """Save a tiny model with its tokenizer to a folder, as a base for recipes."""
    tiny_model(family, **changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def write_sums(file: Path, *, rows: int = 24) -> Path:
    """A small data file of additions in instruction form."""
    content = [
        {"instruction": f"{a}+{a + 1}", "input": "", "output": f"{2 * a + 1}.", "answer": str(2 * a + 1)}
        for a in range(rows)
    ]
    file.write_text(json.dumps(content), encoding="utf-8")
    return file


def tiny_recipe(folder: Path, **changes: Any) -> dict[str, Any]:
    """The content of a recipe for one step of Soft MoA on sums; saves the base and the data it names to `folder`."""
    return {
        "model": str(save_tiny(folder / "base")),
        "output_dir": str(folder / "run"),
        "method": "soft_moa",
        "data": {"path": str(write_sums(folder / "sums.json")), "validation_size": 0, "max_length": 300},
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "report_to": "none",
        "use_cpu": True,
        "save_strategy": "no",
        **changes,
    }
