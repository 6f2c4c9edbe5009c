"""A saved mixture is checked before PEFT or transformers put it on a model.

Both add the adapter to the model first, read its file then, and do no more than warn of tensors that the file lacks;
what they read is loaded even if it is NaN. Their hooks for tuners come after the adapter was added, or not at all
(transformers). So the three functions through which adapters are loaded are wrapped once, when the package is
imported: `PeftModel.from_pretrained`, `PeftModel.load_adapter`, and `load_adapter` of transformers' models, which its
`from_pretrained` and `pipeline` use. For adapters of other methods they do what they did.
"""

import functools
import inspect
import json
import warnings
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from peft import PeftConfig, PeftModel
from torch import nn
from transformers.integrations.peft import PeftAdapterMixin
from transformers.utils.peft_utils import find_adapter_config_file

from moa_peft.adapter_tensors import (
    PREFIX,
    check_adapter_tensors,
    describe_misfits,
    further_shapes,
    mixture_shapes,
    model_shapes,
    read_adapter_shapes,
)
from moa_peft.block import CHILD
from moa_peft.config import MoAConfig
from moa_peft.errors import UserError
from moa_peft.peft_type import MOA
from moa_peft.plan import make_plan

_loading: ContextVar[bool] = ContextVar("moa_loading", default=False)
"""Whether a wrapped function is running: those that it calls itself need no second check."""

_DOWNLOAD_OPTIONS = set(inspect.signature(hf_hub_download).parameters) - {"repo_id", "filename"}
_FIND_OPTIONS = set(inspect.signature(find_adapter_config_file).parameters) - {"model_id"}


@dataclass(frozen=True)
class LoadRequest:
    """One call that loads an adapter.

    Attributes:
        model: the base model.
        source: folder or hub id; None where the tensors are given.
        config: the configuration given with the call, or of the adapter that takes the weights; None: the source's.
        tensors: tensors given with the call.
        any_size: tensors of other shapes are to be left out (`ignore_mismatched_sizes`).
        key_mapping: renames names in the file, as in PEFT.
        download: where and how to find the source on the hub.
    """

    model: nn.Module
    source: str | None
    config: Any = None
    tensors: dict[str, torch.Tensor] | None = None
    any_size: bool = False
    key_mapping: dict[str, str] | None = None
    download: dict[str, Any] = field(default_factory=dict)


def guard_loading() -> None:
    """Wrap the functions of PEFT and transformers that load adapters. Call it once."""
    from_pretrained = vars(PeftModel)["from_pretrained"].__func__
    PeftModel.from_pretrained = classmethod(_guarded(from_pretrained, _from_pretrained))  # type: ignore[assignment]
    PeftModel.load_adapter = _guarded(PeftModel.load_adapter, _load_adapter)  # type: ignore[method-assign]
    PeftAdapterMixin.load_adapter = _guarded(  # type: ignore[method-assign]
        PeftAdapterMixin.load_adapter, _transformers_load_adapter
    )


def check_request(request: LoadRequest) -> None:
    """Refuse an adapter of this package that is damaged or does not fit the model; the model is not touched.

    Raises:
        UserError: naming the adapter, what is wrong with it, and what to do.
    """
    config = request.config if request.config is not None else _read_config(request)
    if not isinstance(config, MoAConfig):
        return
    if request.tensors is not None:
        source = "the given state dict"
        shapes = check_adapter_tensors(request.tensors, source)
    else:
        source = str(request.source)
        shapes = read_adapter_shapes(source, key_mapping=request.key_mapping, **request.download)
    # Names come with and without the prefix where tensors are given.
    found = {PREFIX + name.removeprefix(PREFIX): shape for name, shape in shapes.items()}
    expected = {PREFIX + name: shape for name, shape in _expected_shapes(config, request.model).items()}
    known = {PREFIX + name: shape for name, shape in model_shapes(request.model).items()}
    if config.ensure_weight_tying or isinstance(config.trainable_token_indices, dict):
        # PEFT alone knows under which of several names it keeps tied weights and tokens of several layers.
        found = {name: shape for name, shape in found.items() if f".{CHILD}." in name or name in expected}
    expected |= {name: known[name] for name in found.keys() & known.keys() - expected.keys()}
    misfits = describe_misfits(found, expected, any_size=request.any_size)
    if misfits:
        raise UserError(
            f"adapter: {source!r} does not fit this {type(request.model).__name__}:\n{misfits}\n"
            f"It was trained on {config.base_model_name_or_path!r}. Load it on that model, or save it again if "
            "tensors are missing. The model has not been changed."
        )


def _expected_shapes(config: MoAConfig, model: nn.Module) -> dict[str, torch.Size]:
    with warnings.catch_warnings():
        # Adding the adapter will warn of experts without a site; once is enough.
        warnings.simplefilter("ignore")
        plan = make_plan(config, model)
    hidden_size = model.config.get_text_config().hidden_size  # type: ignore[union-attr, operator]
    return mixture_shapes(config, plan, hidden_size) | further_shapes(config, model)


def _read_config(request: LoadRequest) -> PeftConfig | None:
    """The configuration of the source; None where it is none of ours, or unreadable, which the caller finds out."""
    if request.source is None:
        return None
    options = {key: value for key, value in request.download.items() if key in _FIND_OPTIONS}
    try:
        file = find_adapter_config_file(request.source, **options)
        content = None if file is None else json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(content, dict) or content.get("peft_type") != MOA.value:
        return None
    return PeftConfig.from_pretrained(request.source, **request.download)


def _guarded(original: Callable[..., Any], understand: Callable[[dict[str, Any]], LoadRequest]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        if _loading.get():
            return original(*args, **kwargs)
        token = _loading.set(True)
        try:
            arguments = signature.bind(*args, **kwargs).arguments
            check_request(understand(arguments | arguments.get("kwargs", {})))
            return original(*args, **kwargs)
        finally:
            _loading.reset(token)

    return guarded


def _from_pretrained(arguments: dict[str, Any]) -> LoadRequest:
    return LoadRequest(
        model=arguments["model"],
        source=str(arguments["model_id"]),
        config=arguments.get("config"),
        **_peft_options(arguments, arguments["model"]),
    )


def _load_adapter(arguments: dict[str, Any]) -> LoadRequest:
    peft_model = arguments["self"]
    return LoadRequest(
        model=peft_model.get_base_model(),
        source=str(arguments["model_id"]),
        # An adapter that is there already, as when training is resumed, takes the tensors as it is.
        config=peft_model.peft_config.get(arguments["adapter_name"]),
        **_peft_options(arguments, peft_model.get_base_model()),
    )


def _peft_options(arguments: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    mapping = arguments.get("key_mapping")
    return {
        "any_size": bool(arguments.get("ignore_mismatched_sizes")),
        "key_mapping": getattr(model, "_checkpoint_conversion_mapping", None) if mapping is None else mapping,
        "download": _download_options(arguments),
    }


def _transformers_load_adapter(arguments: dict[str, Any]) -> LoadRequest:
    load_config = arguments.get("load_config")
    source = arguments.get("peft_model_id") or getattr(load_config, "pretrained_model_name_or_path", None)
    download = dict(getattr(load_config, "download_kwargs", None) or {})
    download |= arguments.get("download_kwargs") or {}
    download |= arguments.get("adapter_kwargs") or {}
    if arguments.get("local_files_only"):
        download["local_files_only"] = True
    any_size = arguments.get("ignore_mismatched_sizes", getattr(load_config, "ignore_mismatched_sizes", False))
    return LoadRequest(
        model=arguments["self"],
        source=None if source is None else str(source),
        config=arguments.get("peft_config"),
        tensors=arguments.get("adapter_state_dict"),
        any_size=bool(any_size),
        download=_download_options(download),
    )


def _download_options(arguments: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in arguments.items() if key in _DOWNLOAD_OPTIONS and value is not None}
