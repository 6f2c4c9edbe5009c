"""Checks of `modules_to_save` and `trainable_token_indices`, which PEFT applies after the experts are in place."""

from torch import nn

from moa_peft.config import MoAConfig
from moa_peft.errors import UserError


def check_saved_modules(config: MoAConfig, model: nn.Module) -> None:
    """Refuse names that match nothing and tokens that the embedding does not have, before the model is changed.

    Raises:
        UserError: naming the entry and what is allowed.
    """
    names = [name for name, _ in model.named_modules() if name]
    # For classification PEFT adds both of its names for the head, whichever the model has.
    added = {"classifier", "score"} if str(config.task_type).endswith("_CLS") else set()
    for wanted in config.modules_to_save or []:
        if wanted not in added and not any(name == wanted or name.endswith(f".{wanted}") for name in names):
            raise UserError(
                f"modules_to_save names {wanted!r}, which matches no module of {type(model).__name__}. Give the name "
                "of a module or its end, such as 'lm_head' or 'score'."
            )
    indices = config.trainable_token_indices
    if indices is None:
        return
    groups = list(indices.values()) if isinstance(indices, dict) else [indices]
    # Already wrapped, where another adapter trains tokens.
    num_tokens = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator, union-attr]
    for group in groups:
        if not isinstance(group, (list, tuple)) or not all(type(index) is int for index in group):
            raise UserError(f"trainable_token_indices is {indices!r}; it must be a list of token ids.")
        beyond = [index for index in group if not 0 <= index < num_tokens]
        if beyond:
            raise UserError(
                f"trainable_token_indices names token {beyond[0]}; the embedding has tokens 0 to "
                f"{num_tokens - 1}. Resize the embedding first, or correct the id."
            )
