"""A saved adapter with its base model and tokenizer, ready to generate or to be scored."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from moa_peft.adapter_files import CONFIG_FILE, check_adapter_folder
from moa_peft.base_models import Dtype, Quantization, load_adapter_tokenizer, load_config, load_model, load_tokenizer
from moa_peft.errors import UserError

TOKENIZER_FILE = "tokenizer_config.json"
_CHECKPOINTS = "checkpoints"


@dataclass(frozen=True, kw_only=True)
class LoadedAdapter:
    """A model ready to generate.

    Attributes:
        model: the base with the adapter, in evaluation mode.
        tokenizer: the tokenizer of the run, or of the base.
        template: the prompt template the adapter was trained with, None when the folder does not say.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    template: str | None


def load_adapter(
    folder: str | Path,
    *,
    base: str | None = None,
    dtype: Dtype = "auto",
    attn_implementation: str | None = None,
    quantization: Quantization = "none",
    trust_remote_code: bool = False,
    device: str | torch.device | None = None,
) -> LoadedAdapter:
    """Load an adapter folder and its base model.

    Args:
        folder: output of `moa train`, or any folder that `save_pretrained` wrote.
        base: base model; default: the one that the run (run.json) or the adapter names.
        dtype: storage type of the base.
        attn_implementation: transformers' name of an attention implementation.
        quantization: quantise the base with bitsandbytes.
        trust_remote_code: run Python code that comes with the base model.
        device: default: the first GPU, else the CPU.

    Raises:
        UserError: see `check_adapter_folder` and `load_model`; everything is checked before weights are loaded.
    """
    from peft import PeftModel

    path = Path(folder).expanduser()
    config = check_adapter_folder(path)
    if config.task_type not in (None, "CAUSAL_LM"):
        kind = getattr(config.task_type, "value", config.task_type)
        raise UserError(
            f"adapter: {str(path)!r} was trained for task_type {kind}, so it writes no text; CAUSAL_LM does.\n"
            "Load it in Python with peft.PeftModel.from_pretrained and the model class of its task."
        )
    recipe = _run_recipe(path)
    reference = base or recipe.get("model") or config.base_model_name_or_path
    if not reference:
        raise UserError(f"adapter: {str(path)!r} does not say which model it belongs to. Give it with --base.")
    # A revision that the run was trained on belongs to the model that the run names.
    revision = recipe.get("revision") if reference == recipe.get("model") else None
    remote: dict[str, Any] = {"trust_remote_code": trust_remote_code, "revision": revision}
    base_config = load_config(reference, **remote)
    config = check_adapter_folder(path, base_config)
    has_tokenizer = (path / TOKENIZER_FILE).is_file()
    tokenizer = (
        load_adapter_tokenizer(path, trust_remote_code=trust_remote_code)
        if has_tokenizer
        else load_tokenizer(reference, **remote)
    )
    model = load_model(
        reference,
        dtype=dtype,
        attn_implementation=attn_implementation,
        quantization=quantization,
        **remote,
    )
    target = device or ("cuda" if torch.cuda.is_available() else "cpu")
    adapted = PeftModel.from_pretrained(model, str(path), config=config)
    # Quantised weights are where they are used already, and some of them cannot be moved.
    adapted = adapted if quantization != "none" else adapted.to(target)
    return LoadedAdapter(model=adapted.eval(), tokenizer=tokenizer, template=recipe.get("data", {}).get("template"))


def is_adapter_folder(folder: Path) -> bool:
    """Whether a folder holds an adapter."""
    return (folder / CONFIG_FILE).is_file()


def trained_template(folder: Path) -> str | None:
    """The prompt template of the run that made an adapter folder; None where there is no record of it."""
    return _run_recipe(folder).get("data", {}).get("template")


def _run_recipe(path: Path) -> dict[str, Any]:
    """The recipe in run.json of the folder, or two levels up when it is one of a run's checkpoints."""
    above = (path.parent.parent,) if path.parent.name == _CHECKPOINTS else ()
    for folder in (path, *above):
        file = folder / "run.json"
        if file.is_file():
            try:
                recipe = json.loads(file.read_text(encoding="utf-8"))["recipe"]
                model, template = recipe.get("model"), recipe.get("data", {}).get("template")
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(f"adapter: {str(file)!r} is damaged: {type(error).__name__}: {error}") from error
            if not all(value is None or isinstance(value, str) for value in (model, template)):
                raise UserError(f"adapter: {str(file)!r} is damaged: model is {model!r}, template {template!r}.")
            return recipe
    return {}
