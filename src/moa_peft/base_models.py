"""Finding and loading the base model, its configuration and its tokenizer, with errors a user can act on.

A model reference is the word `packaged` (the Gemma 3 270M of the `quickstart` extra), a local folder, or a hub id.
"""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from moa_peft.errors import UserError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

PACKAGED = "packaged"
_DIGEST_PIECES = 64
_DIGEST_PIECE_BYTES = 2**16
_DIGEST_SUFFIXES = {".json", ".jinja", ".model", ".safetensors", ".bin"}

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Quantization = Literal["none", "8bit", "4bit"]
_CONFIG_FILE = "config.json"


def resolve_model(reference: str) -> str:
    """Turn a model reference into what transformers loads: a folder path or a hub id.

    Raises:
        UserError: the reference looks like a path that does not exist, or a folder without a model configuration.
    """
    if reference == PACKAGED:
        from moa_peft.quickstart.base_model import packaged_base_model

        return str(packaged_base_model())
    folder = Path(reference).expanduser()
    if folder.is_dir():
        if not (folder / _CONFIG_FILE).is_file():
            raise UserError(
                f"model: the folder {reference!r} holds no config.json, so it is not a saved transformers model.\n"
                "Give the folder that save_pretrained() wrote, a hub id such as Qwen/Qwen3-0.6B, or 'packaged'."
            )
        return str(folder)
    is_path = reference.startswith((".", "/", "~")) or reference.count("/") > 1 or not reference.strip()
    if is_path:
        raise UserError(
            f"model: there is no folder {reference!r}.\n"
            "Give an existing folder, a hub id such as Qwen/Qwen3-0.6B, or 'packaged' for the packaged Gemma 3 270M."
        )
    return reference


def load_config(reference: str, *, trust_remote_code: bool = False, revision: str | None = None) -> PreTrainedConfig:
    """Load the model's configuration only; `reference` may be its config.json too.

    Raises:
        UserError: see `resolve_model`; or the hub does not answer, does not know the id, or wants a login.
    """
    from transformers import AutoConfig

    file = Path(reference).expanduser()
    source = resolve_model(str(file.parent) if file.name == _CONFIG_FILE and file.is_file() else reference)
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code, revision=revision or "main")
    except (OSError, ValueError) as error:
        raise _load_error("configuration", reference, error) from error


def load_tokenizer(
    reference: str, *, trust_remote_code: bool = False, revision: str | None = None
) -> PreTrainedTokenizerBase:
    """Load the tokenizer that belongs to a model.

    Raises:
        UserError: as `load_config`; or the tokenizer has no end-of-text token.
    """
    source = resolve_model(reference)
    try:
        return _read_tokenizer(source, trust_remote_code=trust_remote_code, revision=revision or "main")
    except (OSError, ValueError) as error:
        raise _load_error("tokenizer", reference, error) from error


def load_adapter_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer that a run saved beside its adapter.

    Raises:
        UserError: it cannot be read, or has no end-of-text token.
    """
    try:
        return _read_tokenizer(str(folder), trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(f"adapter: the tokenizer in {str(folder)!r} cannot be read: {error}") from error


def _read_tokenizer(source: str, **options: Any) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source, **options)
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"tokenizer: that of {source!r} has no end-of-text token, so answers could not end.\n"
            "Set eos_token in its tokenizer_config.json."
        )
    return tokenizer


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id to pad with: the pad token, else the end token (padding is masked everywhere, so any id would do)."""
    token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    assert isinstance(token_id, int)
    return token_id


def resolve_dtype(name: Dtype) -> torch.dtype:
    """`auto` is bfloat16 on an accelerator that computes in it and float32 elsewhere, above all on the CPU.

    Raises:
        UserError: the name is none of `Dtype`.
    """
    import torch

    if name not in get_args(Dtype):
        raise UserError(f"dtype: {name!r} is not allowed; give one of {', '.join(get_args(Dtype))}.")
    if name != "auto":
        return getattr(torch, name)
    return torch.bfloat16 if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else torch.float32


def load_model(
    reference: str,
    *,
    dtype: Dtype = "auto",
    attn_implementation: str | None = None,
    quantization: Quantization = "none",
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> PreTrainedModel:
    """Load the base model for causal language modelling.

    Args:
        reference: `packaged`, a folder, or a hub id.
        dtype: storage type of the weights; see `resolve_dtype` for `auto`.
        attn_implementation: transformers' name (`eager`, `sdpa`, ...), None for its default.
        quantization: bitsandbytes 8-bit, or 4-bit NormalFloat, or none.
        trust_remote_code: run the Python code that comes with the model.
        revision: branch, tag or commit of a hub model.

    Raises:
        UserError: the model cannot be found or loaded, dtype or quantization is unknown, or bitsandbytes is missing.
    """
    from transformers import AutoModelForCausalLM

    if quantization not in get_args(Quantization):
        allowed = ", ".join(get_args(Quantization))
        raise UserError(f"quantization: {quantization!r} is not allowed; give one of {allowed}.")
    options: dict[str, Any] = {"dtype": resolve_dtype(dtype), "revision": revision or "main"}
    source = resolve_model(reference)
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    if quantization != "none":
        options["quantization_config"] = _quantization_config(quantization, options["dtype"])
    try:
        return AutoModelForCausalLM.from_pretrained(source, trust_remote_code=trust_remote_code, **options)
    except (OSError, ValueError, ImportError) as error:
        raise _load_error("weights", reference, error) from error


def weights_digest(folder: str | Path) -> str:
    """SHA-256 over samples of the files of a model folder, to notice that the model or its tokenizer has changed.

    Of every file its size and 64 pieces of 64 KiB count: the whole of a small one, and a moment's reading of a large
    one.
    """
    digest = hashlib.sha256()
    path = Path(folder).expanduser()
    for file in sorted(file for file in path.iterdir() if file.suffix in _DIGEST_SUFFIXES):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as stream:
            for piece in range(_DIGEST_PIECES):
                stream.seek(max(0, piece * (size - _DIGEST_PIECE_BYTES) // (_DIGEST_PIECES - 1)))
                digest.update(stream.read(_DIGEST_PIECE_BYTES))
    return digest.hexdigest()


def _quantization_config(quantization: Quantization, dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            f"quantization: {quantization!r} needs bitsandbytes, which is not installed.\n"
            "Run: pip install 'moa-peft[quant]'   or set quantization: none"
        )
    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def _load_error(part: str, reference: str, error: Exception) -> UserError:
    lines = [f"model: cannot load the {part} of {reference!r}.", f"transformers says: {_first_lines(error)}"]
    if not Path(reference).expanduser().is_dir() and reference != PACKAGED:
        lines.append(
            "If this is a hub id: check its spelling, the network, and HF_TOKEN for models that want a licence "
            "accepted.\nWithout network: give a folder with the model, or 'packaged' for the packaged Gemma 3 270M."
        )
    return UserError("\n".join(lines))


def _first_lines(error: Exception, limit: int = 400) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= limit else text[:limit] + " ..."
