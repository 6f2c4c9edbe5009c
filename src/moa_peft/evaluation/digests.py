"""What identifies a model, so that an evaluation goes on with the same one only."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from moa_peft.base_models import weights_digest

_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
_TOKENIZER_FILES = {
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
}


def adapter_digest(folder: Path) -> str | None:
    """SHA-256 of an adapter's weights, configuration and tokenizer; None where the folder holds no adapter."""
    digest = hashlib.sha256()
    if not all((folder / name).is_file() for name in _ADAPTER_FILES):
        return None
    tokenizer = sorted(file.name for file in folder.iterdir() if file.name in _TOKENIZER_FILES)
    for name in (*_ADAPTER_FILES, *tokenizer):
        with (folder / name).open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def base_digest(model: Any) -> str | None:
    """What identifies the base of a loaded model: the digest of its folder, or the commit it has on the hub."""
    config = model.config
    name = getattr(config, "_name_or_path", "")
    if name and Path(name).is_dir():
        return weights_digest(name)
    commit = getattr(config, "_commit_hash", None)
    return f"{name}@{commit}" if name else None
