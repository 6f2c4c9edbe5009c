"""Who listens to a module: where somebody does, its weights must not be used without calling it."""

from torch import nn
from torch.nn.modules import module as global_hooks


def is_plain(module: nn.Module) -> bool:
    """Whether a layer may be replaced by its weights: no hook listens, and they are in place."""
    own = module.__dict__
    hooks = own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
    return not (hooks or "_hf_hook" in own or "forward" in own or has_global_hooks())


def has_global_hooks() -> bool:
    """Whether a hook listens to every module."""
    forward = global_hooks._global_forward_hooks or global_hooks._global_forward_pre_hooks
    return bool(forward or global_hooks._global_backward_hooks or global_hooks._global_backward_pre_hooks)


def listens_alone(owner: object, module: nn.Module) -> bool:
    """Whether no hook but those of `owner` listens to a module."""
    own = module.__dict__
    if has_global_hooks() or own["_backward_hooks"] or own["_backward_pre_hooks"]:
        return False
    if "_hf_hook" in own or "forward" in own:
        return False
    return all(
        getattr(getattr(hook, "func", hook), "__self__", None) is owner
        for hook in (*own["_forward_hooks"].values(), *own["_forward_pre_hooks"].values())
    )
