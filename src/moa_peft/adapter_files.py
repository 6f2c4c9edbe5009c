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
    path = Path(folder).expanduser()
    config = _read_config(path)
    shapes = _check_tensors(path / WEIGHTS_FILE)
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


def _check_tensors(file: Path) -> dict[str, torch.Size]:
    import torch
    from safetensors import SafetensorError, safe_open

    shapes: dict[str, torch.Size] = {}
    try:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - safe_open offers keys() but is no mapping
                tensor = tensors.get_tensor(name)
                if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                    raise UserError(
                        f"adapter: the tensor {name!r} in {str(file)!r} holds NaN or infinity.\n"
                        "The training run diverged: use an earlier checkpoint, or train again with a lower "
                        "learning_rate or max_grad_norm: 1.0."
                    )
                shapes[name] = tensor.shape
    except SafetensorError as error:
        raise UserError(
            f"adapter: {str(file)!r} is truncated or damaged ({error}).\n"
            "Copy or download the file again, or use another checkpoint."
        ) from error
    if not shapes:
        raise UserError(f"adapter: {str(file)!r} holds no tensor. Save the adapter again.")
    return shapes


def _check_fit(path: Path, config: PeftConfig, shapes: dict[str, torch.Size], base_config: PreTrainedConfig) -> None:
    expected = _expected_shapes(config, base_config)
    wrong = [
        f"  {name}: {tuple(shapes[name])} in the file, {tuple(expected[name])} for this base"
        for name in sorted(shapes.keys() & expected.keys())
        if shapes[name] != expected[name]
    ]
    unknown = [f"  {name}: not in this base" for name in sorted(shapes.keys() - expected.keys())]
    missing = [f"  {name}: not in the file" for name in sorted(expected.keys() - shapes.keys())]
    lines = [*wrong, *unknown, *missing]
    if lines:
        more = [f"  and {len(lines) - 4} more"] if len(lines) > 4 else []
        raise UserError(
            f"adapter: {str(path)!r} does not fit a {base_config.model_type} base of this size:\n"
            + "\n".join([*lines[:4], *more])
            + f"\nIt was trained on {config.base_model_name_or_path!r}. Give that model with --base."
        )


def _expected_shapes(config: PeftConfig, base_config: PreTrainedConfig) -> dict[str, torch.Size]:
    """Names and shapes of the adapter's tensors on a base of this configuration."""
    from peft import get_peft_model_state_dict

    from moa_peft.meta_model import adapter_on_meta

    model = adapter_on_meta(config, base_config)
    return {name: tensor.shape for name, tensor in get_peft_model_state_dict(model).items()}
