"""Registration with PEFT; done once, when the package is imported."""

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method

from moa_peft.config import MoAConfig
from moa_peft.loading import guard_loading
from moa_peft.peft_type import MOA
from moa_peft.tuner import MoAModel


def register() -> None:
    """Make PEFT, and through it transformers, TRL and lm-eval, know the method. Idempotent.

    Raises:
        RuntimeError: if another package has taken the name.
    """
    known = PEFT_TYPE_TO_CONFIG_MAPPING.get(MOA)
    if known is MoAConfig:
        return
    if known is not None:
        raise RuntimeError(f"Another package has registered the PEFT method 'moa' ({known}); only one can be used.")
    register_peft_method(name="moa", config_cls=MoAConfig, model_cls=MoAModel)
    guard_loading()
