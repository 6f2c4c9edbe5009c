"""What an adapter file must hold, and what it does hold: names and shapes of tensors, and whether they are finite."""

from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, load_peft_weights
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import SafetensorError
from torch import nn

from moa_peft.config import MoAConfig
from moa_peft.errors import UserError
from moa_peft.mixture import make_routers
from moa_peft.plan import Plan
from moa_peft.shared_networks import shared_shapes

PREFIX = "base_model.model."
"""What stands before every name in an adapter file."""

_SHOWN = 4
# Parts of names that PEFT puts into the model around modules to save and trained tokens, and takes out of files.
_WRAPPER_PARTS = {"original_module", "modules_to_save", "token_adapter"}


def read_adapter_shapes(source: str, **options: Any) -> dict[str, torch.Size]:
    """Names and shapes of the tensors of an adapter, after a look at every one of them.

    Args:
        source: folder or hub id.
        options: further arguments of `peft.utils.load_peft_weights`.

    Raises:
        UserError: the file is missing, truncated, damaged or empty, or a tensor holds NaN or infinity.
    """
    folder = Path(source, options.get("subfolder") or "")
    damaged = [SafetensorError, UnpicklingError, EOFError, RuntimeError, KeyError, AttributeError]
    files = [SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME]
    if folder.is_dir() and not any((folder / name).is_file() for name in files):
        raise UserError(
            f"adapter: {str(folder)!r} has no {files[0]}, so it is no saved adapter. Give the folder that "
            "save_pretrained() wrote, or copy the folder again."
        )
    if folder.is_dir():
        # Elsewhere it is the hub that cannot be reached, which PEFT's own message says.
        damaged.append(OSError)
    try:
        tensors = load_peft_weights(source, device="cpu", **options)
    except tuple(damaged) as error:
        raise UserError(
            f"adapter: the weights in {str(folder)!r} cannot be read, they are truncated or damaged ({error}).\n"
            "Copy or download the file again, or use another checkpoint."
        ) from error
    return check_adapter_tensors(tensors, str(folder))


def check_adapter_tensors(tensors: Mapping[str, torch.Tensor], source: str) -> dict[str, torch.Size]:
    """The shapes of tensors that all are finite.

    Args:
        tensors: the adapter's tensors by name.
        source: where they come from, for the message.

    Raises:
        UserError: there are none, or one holds NaN or infinity.
    """
    if not tensors:
        raise UserError(f"adapter: {source!r} holds no tensor. Save the adapter again.")
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.is_meta and not torch.isfinite(tensor.float()).all():
            raise UserError(
                f"adapter: the tensor {name!r} in {source!r} holds NaN or infinity.\n"
                "The training run diverged: use an earlier checkpoint, or train again with a lower "
                "learning_rate or max_grad_norm: 1.0."
            )
    return {name: tensor.shape for name, tensor in tensors.items()}


def mixture_shapes(config: MoAConfig, plan: Plan, hidden_size: int) -> dict[str, torch.Size]:
    """Names and shapes of the tensors of a mixture that is not there yet; names of the model, without the adapter's.

    Args:
        config: configuration of the mixture.
        plan: experts of every block.
        hidden_size: width of the residual stream.
    """
    shapes = {}
    with torch.device("meta"):
        for block, slots in plan.blocks.items():
            parts: dict[str, nn.Module] = {"moa_router": make_routers(config, slots, hidden_size)}
            parts |= {f"moa_experts.{slot.name}": slot.expert() for slot in slots}
            for part, module in parts.items():
                shapes |= {f"{block}.moa.{part}.{name}": p.shape for name, p in module.state_dict().items()}
    return shapes | shared_shapes(config, plan, hidden_size)


def further_shapes(config: MoAConfig, model: nn.Module) -> dict[str, torch.Size]:
    """Names and shapes of what the file holds besides: modules to save, and trained tokens of the input embedding.

    Args:
        config: configuration of the mixture.
        model: the model it is meant for.
    """
    shapes: dict[str, torch.Size] = {}
    if config.ensure_weight_tying:
        # Which of the tied modules the file holds is then up to PEFT.
        return shapes
    indices = config.trainable_token_indices
    embedding = model.get_input_embeddings() if isinstance(indices, list) else None  # type: ignore[operator]
    for name, module in model.named_modules(remove_duplicate=False):
        if not name or not _WRAPPER_PARTS.isdisjoint(name.split(".")):
            continue
        # PEFT compares the ends of names, without regard to their parts.
        if any(name.endswith(wanted) for wanted in config.modules_to_save or []):
            whole = module.original_module if isinstance(module, AuxiliaryTrainingWrapper) else module
            shapes |= {f"{name}.{key}": _whole_shape(t) for key, t in whole.state_dict(keep_vars=True).items()}
        if embedding is not None and module is embedding:
            width = _whole_shape(embedding.weight)[1]
            shapes[f"{name}.token_adapter.trainable_tokens_delta"] = torch.Size((len(indices or ()), width))
    return shapes


def model_shapes(model: nn.Module) -> dict[str, torch.Size]:
    """Names in files and shapes of the model's own parameters: a file holds embeddings that were resized, too."""
    shapes = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        name = name.replace(".original_module.", ".").replace(".token_adapter.base_layer.", ".")
        shapes[name] = _whole_shape(parameter)
    return shapes


def _whole_shape(tensor: torch.Tensor) -> torch.Size:
    """The shape, also where DeepSpeed keeps the parameter elsewhere and leaves an empty one in its place."""
    return getattr(tensor, "ds_shape", tensor.shape)


def describe_misfits(
    found: Mapping[str, torch.Size], expected: Mapping[str, torch.Size], *, any_size: bool = False
) -> str:
    """The differences between a file and what a model needs, a few lines of them; empty where there is none.

    Args:
        found: names and shapes in the file.
        expected: names and shapes for the model.
        any_size: whether shapes may differ.
    """
    wrong = [
        f"  {name}: {tuple(found[name])} in the file, {tuple(expected[name])} for this base"
        for name in sorted(found.keys() & expected.keys())
        if found[name] != expected[name] and not any_size
    ]
    unknown = [f"  {name}: not in this base" for name in sorted(found.keys() - expected.keys())]
    missing = [f"  {name}: not in the file" for name in sorted(expected.keys() - found.keys())]
    lines = [*wrong, *unknown, *missing]
    more = [f"  and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
    return "\n".join([*lines[:_SHOWN], *more])
