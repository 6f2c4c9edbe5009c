"""Quantised base models: what has to be arranged so that adapters on them can be trained."""

from torch import nn

from moa_peft.errors import UserError

_PACKS = "support_avx512bf16_for_cpu"


def keep_trainable(model: nn.Module, *, inference: bool) -> None:
    """Keep bitsandbytes from repacking 4-bit weights for inference on CPUs with AVX512-BF16.

    At the first forward in eval mode it changes them to a layout through which no gradient passes, and which cannot be
    undone exactly when a state dict is made (bitsandbytes 0.50): training after an evaluation would go wrong silently.

    Args:
        model: the base model.
        inference: the adapter is not going to be trained.

    Raises:
        UserError: if weights have been repacked already and the adapter is to be trained.
    """
    packing = {name: module for name, module in model.named_modules() if hasattr(module, _PACKS)}
    for name, module in packing.items():
        state = getattr(module.weight, "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False) and not inference:
            raise UserError(
                f"The 4-bit weights of this model ({name}, ...) have been repacked for inference on this CPU, and no "
                "gradient passes through them any more. Load the base model again and add the adapter before the "
                "first forward in eval mode."
            )
    for module in packing.values():
        setattr(module, _PACKS, False)
