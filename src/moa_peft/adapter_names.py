"""Which names adapters may have.

PEFT tells the tensors of adapters apart by the components of their names: from the file of one adapter it leaves out
every tensor with a component that is the name of another adapter. A name that is also the name of a module would
therefore take tensors from other adapters' files, without a word.
"""

from torch import nn

from moa_peft.adapter_tensors import mixture_shapes
from moa_peft.config import MoAConfig
from moa_peft.errors import UserError
from moa_peft.layer import MoALayer
from moa_peft.plan import Plan

# What PEFT wraps around the modules of modules_to_save and of trained tokens, and around the model itself.
_WRAPPERS = {"base_model", "model", "base_layer", "modules_to_save", "original_module", "token_adapter"}
_WRAPPERS |= {"trainable_tokens_delta", "trainable_tokens_original"}


def check_adapter_name(adapter_name: str, model: nn.Module, config: MoAConfig, plan: Plan) -> None:
    """Refuse a name by which PEFT could not tell this model's adapters apart.

    Args:
        adapter_name: name of the new adapter.
        model: the model, with the adapters that it has.
        config: configuration of the new adapter.
        plan: experts of the new adapter.

    Raises:
        UserError: for a name that is taken, cannot name a module, or is part of a tensor's name; also if the name of
            an adapter that the model has is part of the names of the new adapter's tensors.
    """
    if not adapter_name or "." in adapter_name or hasattr(nn.ModuleDict(), adapter_name):
        raise UserError(
            f"adapter_name is {adapter_name!r}, which torch cannot use as the name of a module: it must not be empty, "
            "hold a dot, or be a method of torch.nn.ModuleDict (train, type, ...). Choose another name."
        )
    others = {name for m in model.modules() if isinstance(m, MoALayer) for name in m.mixtures}
    if adapter_name in others:
        raise UserError(
            f"The model already has an adapter called {adapter_name!r}. Choose another name, or first remove that one "
            f"with delete_adapter({adapter_name!r}), or take all adapters off with the wrapped model's unload()."
        )
    hidden_size = model.config.get_text_config().hidden_size  # type: ignore[union-attr, operator]
    added = _parts_of(config, plan, hidden_size)
    present = {part for name, _ in model.named_parameters() for part in name.split(".")} - others
    if adapter_name in added | present:
        raise UserError(
            f"adapter_name is {adapter_name!r}, which is also part of the names of this model's tensors; PEFT would "
            "then drop tensors of other adapters when saving. Choose another name."
        )
    for other in sorted(others & added):
        raise UserError(
            f"The model has an adapter called {other!r}, which is also part of the names of the new adapter's "
            f"tensors; PEFT would then drop them when saving {adapter_name!r}. Load the other one under another name."
        )


def _parts_of(config: MoAConfig, plan: Plan, hidden_size: int) -> set[str]:
    """The components of the names of a new adapter's tensors, but for its own name."""
    return _WRAPPERS | {part for name in mixture_shapes(config, plan, hidden_size) for part in name.split(".")}
