"""`MoAModel`: PEFT's tuner for mixtures of adapters."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _ExcludedModule
from torch import nn

from moa_peft import block as blocks
from moa_peft.adapter_names import check_adapter_name
from moa_peft.auxiliary import count_routers
from moa_peft.config import MoAConfig
from moa_peft.errors import UserError
from moa_peft.layer import MERGE_MESSAGE, MoALayer
from moa_peft.plan import Plan, make_plan
from moa_peft.pooling import add_pooling, check_generation
from moa_peft.prompt_attention import install_prompt_attention
from moa_peft.quantized_base import keep_trainable
from moa_peft.saved_modules import check_saved_modules
from moa_peft.shared_networks import SharedNetworks, check_devices, remove_shared_networks, share_networks
from moa_peft.starting_weights import StartingWeights
from moa_peft.status import MoAStatus, moa_status
from moa_peft.token_mask import add_token_mask
from moa_peft.training_callback import register_training_callback


class MoAModel(BaseTuner):
    """Adds a mixture of adapters to the blocks of a decoder; made by `peft.get_peft_model` with a `MoAConfig`."""

    prefix = "moa_"
    tuner_layer_cls = (MoALayer, SharedNetworks)  # type: ignore[assignment]
    target_module_mapping: dict[str, list[str]] = {}
    _plan: Plan

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Check everything, then add the adapter to every block of the plan.

        Raises:
            UserError: if the configuration does not fit the model; the model is unchanged then.
        """
        config = self.peft_config[adapter_name]
        assert isinstance(config, MoAConfig)
        _check_other_tuners(model)
        _check_tensor_parallel(model)
        # PEFT matches modules one at a time; the plan has decided for all of them, and a state dict adds nothing to
        # it.
        vars(self)["_plan"] = make_plan(config, model)
        check_adapter_name(adapter_name, model, config, self._plan)
        check_saved_modules(config, model)
        check_devices(model, self._plan, config)
        start = StartingWeights.read(config, self._plan) if config.init_from else None
        keep_trainable(model, inference=config.inference_mode)
        super().inject_adapter(
            model,
            adapter_name,
            autocast_adapter_dtype=autocast_adapter_dtype,
            low_cpu_mem_usage=low_cpu_mem_usage,
        )
        count_routers(model, adapter_name)
        _install_hooks(model, self.peft_config)
        if config.losses:
            register_training_callback()
        if start is not None and not low_cpu_mem_usage:
            start.apply(model, adapter_name)
        if getattr(model, "model_tags", None) is None:
            model.model_tags = []  # type: ignore[assignment]
        if "moa-peft" not in model.model_tags:  # type: ignore[operator]
            model.model_tags.append("moa-peft")  # type: ignore[union-attr, operator]

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        return peft_config

    def _check_target_module_exists(self, peft_config: Any, key: str) -> Any:  # type: ignore[override]
        # PEFT warns if exclude_modules is set and it is never told of an excluded module.
        return _ExcludedModule() if key in self._plan.excluded else key in self._plan.blocks

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        slots = self._plan.blocks[current_key]
        layer = getattr(target, blocks.CHILD, None)
        if layer is None:
            layer = MoALayer(target, self._plan.architecture)
            blocks.install(target, layer)
        if any(slot.expert_type == "prompt" for slot in slots):
            install_prompt_attention(target.get_submodule(self._plan.architecture.attention))
        config = self.model.config  # type: ignore[union-attr]
        hidden_size = config.get_text_config().hidden_size  # type: ignore[union-attr, operator]
        layer.add_mixture(adapter_name, peft_config, slots, hidden_size)
        share_networks(self.model, current_key, layer, adapter_name, peft_config)

    def moa_status(self) -> MoAStatus:
        """Which path, fused or plain, the router, every expert and the MLP of each block take, and why."""
        return moa_status(self.model)

    def _check_merge_allowed(self) -> None:
        raise NotImplementedError(MERGE_MESSAGE)

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Not possible: the weights of a mixture depend on the token."""
        raise NotImplementedError(MERGE_MESSAGE)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        # PEFT enters this around forward and generate, and drops adapter_names itself: it would be ignored.
        if kwargs.get("adapter_names") is not None:
            raise UserError(
                "adapter_names (another adapter for each row of a batch) is not supported by a mixture of adapters. "
                "Run one batch per adapter, each after set_adapter(NAME)."
            )
        generates = "prefill_chunk_size" in kwargs or "generation_config" in kwargs
        if generates and any(_pools_sequences(module) for module in self.model.modules()):
            check_generation(kwargs)
        yield

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        model = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        for module in list(self.model.modules()):
            if isinstance(getattr(module, blocks.CHILD, None), MoALayer):
                blocks.uninstall(module)
        remove_shared_networks(self.model)
        _remove_hooks(self.model)
        return model

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # Experts are nested, so the name stands further in front than PEFT's default looks: behind the container.
        for container in (*MoALayer.adapter_layer_names, *SharedNetworks.adapter_layer_names):
            key = key.replace(f".{container}.{adapter_name}.", f".{container}.", 1)
        return key


def _pools_sequences(module: nn.Module) -> bool:
    return isinstance(module, MoALayer) and module.pools_sequences()


def _install_hooks(model: nn.Module, configs: dict[str, Any]) -> None:
    """The hooks that hand call arguments from the model to its blocks, where a mixture asks for them."""
    own = [config for config in configs.values() if isinstance(config, MoAConfig)]
    hooks = [(add_pooling, any(config.granularity == "sequence" for config in own))]
    hooks += [(add_token_mask, any(config.losses for config in own))]
    for hook, wanted in hooks:
        if wanted and hook not in model._forward_pre_hooks.values():
            model.register_forward_pre_hook(hook, with_kwargs=True)


def _remove_hooks(model: nn.Module) -> None:
    for number, hook in list(model._forward_pre_hooks.items()):
        if hook in (add_pooling, add_token_mask):
            del model._forward_pre_hooks[number]
            model._forward_pre_hooks_with_kwargs.pop(number, None)


def _check_other_tuners(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and not isinstance(module, (MoALayer, TrainableTokensLayer)):
            if isinstance(module, SharedNetworks) or f".{blocks.CHILD}." in name:
                continue
            raise UserError(
                f"The model already carries another PEFT method ({type(module).__name__} at {name}). A mixture of "
                "adapters can be combined with modules_to_save and trainable tokens only. Call unload() first; to "
                "start from a LoRA adapter, save it and use MoAConfig(init_from=FOLDER)."
            )


def _check_tensor_parallel(model: nn.Module) -> None:
    if (getattr(model, "_tp_size", None) or 1) > 1:
        raise UserError(
            "The model was loaded with tensor parallelism (tp_plan), which a mixture of adapters does not support. "
            "Load it without tp_plan; data parallelism and FSDP work."
        )
