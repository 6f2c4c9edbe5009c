"""accelerate's hooks replace `forward` on instances; put there before the adapter, they must not switch it off."""

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module, remove_hook_from_submodules
from peft import PeftModel, get_peft_model
from torch import nn

from tests.matrix import randomise_adapter
from tests.models import LAYERS, tiny_batch, tiny_model
from tests.native import gradients, logits, soft, trained

DEVICE_MAP = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
DEVICE_MAP |= {f"model.layers.{index}": "cpu" for index in range(LAYERS)}


class Counting(ModelHook):
    """Counts how often it ran."""

    def __init__(self) -> None:
        self.calls = 0

    def pre_forward(self, module, *args, **kwargs):
        self.calls += 1
        return args, kwargs


def _plain(model: nn.Module) -> None:
    for block in model.model.layers:
        add_hook_to_module(block, ModelHook())


def _align(model: nn.Module) -> None:
    for block in model.model.layers:
        add_hook_to_module(block, AlignDevicesHook(execution_device="cpu", io_same_device=True))


def _dispatch(model: nn.Module) -> None:
    dispatch_model(model, DEVICE_MAP, force_hooks=True)


def _offload(model: nn.Module) -> None:
    cpu_offload(model, execution_device=torch.device("cpu"))


attach = pytest.mark.parametrize("attach", [_plain, _align, _dispatch, _offload])


@attach
def test_the_adapter_acts_on_a_model_with_hooks(attach):
    model = tiny_model("llama")
    attach(model)
    torch.manual_seed(11)
    model = get_peft_model(model, soft()).eval()
    base = logits(tiny_model("llama"))
    assert torch.equal(logits(model), base)
    randomise_adapter(model)
    assert torch.equal(logits(model), logits(trained()))
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model.unload()), base)


@attach
def test_gradients_on_a_model_with_hooks(attach):
    model = tiny_model("llama")
    attach(model)
    model = get_peft_model(model, soft())
    randomise_adapter(model)
    model.train()(**tiny_batch()).loss.backward()
    expected = trained().train()
    expected(**tiny_batch()).loss.backward()
    torch.testing.assert_close(gradients(model), gradients(expected))


@attach
def test_loading_onto_a_model_with_hooks(attach, tmp_path):
    trained().save_pretrained(tmp_path)
    model = tiny_model("llama")
    attach(model)
    model = PeftModel.from_pretrained(model, tmp_path)
    assert torch.equal(logits(model), logits(trained()))


def test_the_hooks_still_run():
    model = tiny_model("llama")
    hook = Counting()
    add_hook_to_module(model.model.layers[0], hook)
    model = get_peft_model(model, soft())
    logits(model)
    assert hook.calls == 1
    base = model.unload()
    logits(base)
    assert hook.calls == 2


def test_hooks_attached_and_taken_away_after_the_adapter():
    model = trained()
    expected = logits(model)
    hook = Counting()
    block = model.base_model.model.model.layers[0]
    add_hook_to_module(block, hook)
    assert torch.equal(logits(model), expected)
    assert hook.calls == 1
    remove_hook_from_submodules(block)
    assert torch.equal(logits(model), expected)
    assert hook.calls == 1
