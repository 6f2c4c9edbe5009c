"""Checks of a saved adapter before it is loaded: is it whole, finite, and does it belong to this base model?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from moa_peft.errors import UserError

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig
    from transformers import PreTrainedConfig

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"


def check_adapter_folder(folder: str | Path, base_config: PreTrainedConfig | None = None) -> PeftConfig:
    """Check an adapter folder from its files alone.

    Args:
        folder: what `save_pretrained` wrote.
        base_config: configuration of the base model the adapter is going to be put on; with it, names and shapes are
            compared with those of the same adapter built on a base without weights.

    Returns:
        The adapter's configuration.

    Raises:
        UserError: a file is missing, truncated or no adapter; a tensor holds NaN or infinity; or the tensors do not
            fit the base model.
    """
    from moa_peft.adapter_tensors import read_adapter_shapes

    path = Path(folder).expanduser()
    config = _read_config(path)
    shapes = read_adapter_shapes(str(path))
    if base_config is not None:
        _check_fit(path, config, shapes, base_config)
    return config


def _read_config(path: Path) -> PeftConfig:
    from peft import PeftConfig

    if not path.is_dir():
        raise UserError(f"adapter: there is no folder {str(path)!r}. Give the output_dir of a run of `moa train`.")
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (path / name).is_file():
            raise UserError(
                f"adapter: {str(path)!r} has no {name}, so it is no saved adapter.\n"
                "Give the output_dir of a finished run of `moa train`, or one of its checkpoints/checkpoint-N folders."
            )
    try:
        content = json.loads((path / CONFIG_FILE).read_text(encoding="utf-8"))
        return PeftConfig.from_pretrained(str(path)) if isinstance(content, dict) else _raise_type(content)
    except UserError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"adapter: {str(path / CONFIG_FILE)!r} is no valid adapter configuration: {error}\nCopy the folder again."
        ) from error


def _raise_type(content: object) -> PeftConfig:
    raise TypeError(f"a mapping is expected, not {type(content).__name__}")


def _check_fit(path: Path, config: PeftConfig, shapes: dict[str, torch.Size], base_config: PreTrainedConfig) -> None:
    from moa_peft.adapter_tensors import describe_misfits

    misfits = describe_misfits(shapes, _expected_shapes(config, base_config))
    if misfits:
        raise UserError(
            f"adapter: {str(path)!r} does not fit a {base_config.model_type} base of this size:\n{misfits}"
            f"\nIt was trained on {config.base_model_name_or_path!r}. Give that model with --base."
        )


def _expected_shapes(config: PeftConfig, base_config: PreTrainedConfig) -> dict[str, torch.Size]:
    """Names and shapes of the adapter's tensors on a base of this configuration."""
    from peft import get_peft_model_state_dict

    from moa_peft.meta_model import adapter_on_meta

    model = adapter_on_meta(config, base_config)
    return {name: tensor.shape for name, tensor in get_peft_model_state_dict(model).items()}
