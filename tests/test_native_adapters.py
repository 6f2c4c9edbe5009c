"""Several adapters in one model: different configurations, sums, and names that would collide in files."""

import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from moa_peft import MoAConfig, UserError
from tests.matrix import randomise_adapter
from tests.models import tiny_batch, tiny_model
from tests.native import CAUSAL, footprint, gradients, logits, soft, trained

FIRST = {"experts": [{"type": "lora", "target": "q", "rank": 2}, {"type": "prompt", "length": 3}], **CAUSAL}
SECOND = {
    "experts": [{"type": "lora", "target": ["v", "down"], "rank": 5, "layers": [1]}, {"type": "parallel", "size": 4}],
    "router": {"type": "sigmoid", "hidden_per_expert": 0, "threshold": "constant", "max_threshold": 0.4},
    "router_input": "residual",
    **CAUSAL,
}
LAST_DOWN = {"type": "lora", "target": "down", "rank": 4, "layers": [1]}


def with_active(model: PeftModel, *names: str) -> PeftModel:
    model.base_model.set_adapter(list(names))
    return model


def last_block_output(model: PeftModel) -> torch.Tensor:
    caught = []
    block = model.base_model.model.model.layers[-1]
    handle = block.register_forward_hook(lambda module, args, output: caught.append(output))
    logits(model)
    handle.remove()
    return caught[0]


def test_different_configurations_act_as_if_alone(tmp_path):
    model = trained(config=MoAConfig(**FIRST))
    model.add_adapter("second", MoAConfig(**SECOND))
    randomise_adapter(model)
    model.save_pretrained(tmp_path)
    for name, folder in (("default", tmp_path), ("second", tmp_path / "second")):
        alone = PeftModel.from_pretrained(tiny_model("llama"), folder)
        model.set_adapter(name)
        assert torch.equal(logits(model), logits(alone))
        assert {n.split(".moa.")[1].split(".")[1] for n, p in model.named_parameters() if p.requires_grad} == {name}


def test_two_active_adapters_add_up():
    """A LoRA expert on the last linear layer changes nothing that the router reads, so the sum is exact."""
    model = trained(config=MoAConfig(experts=[LAST_DOWN], **CAUSAL))
    model.add_adapter("second", MoAConfig(experts=[LAST_DOWN, LAST_DOWN | {"rank": 2}], **CAUSAL))
    randomise_adapter(model)
    with model.disable_adapter():
        base = last_block_output(model)
    first = last_block_output(with_active(model, "default")) - base
    second = last_block_output(with_active(model, "second")) - base
    both = last_block_output(with_active(model, "default", "second")) - base
    assert first.abs().max() > 1e-2 and second.abs().max() > 1e-2
    torch.testing.assert_close(both, first + second, atol=1e-5, rtol=1e-4)


def test_two_active_adapters_both_learn():
    model = trained()
    model.add_adapter("second", soft(rank=3))
    randomise_adapter(model)
    with_active(model, "default", "second")(**tiny_batch()).loss.backward()
    names = set(gradients(model))
    assert names == {name for name, _ in model.named_parameters() if ".moa." in name}
    assert any(".second." in name for name in names) and any(".default." in name for name in names)


def test_deleting_the_active_adapter_activates_the_other():
    model = trained()
    first = logits(model)
    model.add_adapter("second", soft(rank=3))
    model.set_adapter("second")
    assert not torch.allclose(logits(model), first, atol=1e-3)
    with pytest.warns(UserWarning, match="Setting active adapter to default"):
        model.delete_adapter("second")
    assert torch.equal(logits(model), first)


def test_a_later_adapter_may_reach_blocks_that_the_first_left_out(tmp_path):
    model = trained(config=soft(layers=[0]))
    assert not hasattr(model.base_model.model.model.layers[1], "moa")
    model.add_adapter("second", soft(layers=[1]))
    randomise_adapter(model)
    model.set_adapter("second")
    model.save_pretrained(tmp_path)
    alone = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "second")
    assert torch.equal(logits(model), logits(alone))
    model.delete_adapter("default")
    assert torch.equal(logits(model), logits(alone))


def _tensor_name_parts() -> list[str]:
    model = trained(config=soft(targets=["q", "down"]))
    names = [name for name in model.state_dict() if ".moa." in name]
    return sorted({part for name in names for part in name.split(".")} - {"default"})


@pytest.mark.parametrize("name", _tensor_name_parts())
def test_adapter_names_that_occur_in_tensor_names_are_refused(name):
    model = trained(config=soft(targets=["q", "down"]))
    before, expected = footprint(model), logits(model)
    with pytest.raises(UserError, match=f"adapter_name is '{name}'"):
        model.add_adapter(name, soft(targets=["q", "down"]))
    assert footprint(model) == before
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits(model), expected)
    with pytest.raises(UserError, match=f"adapter_name is '{name}'"):
        get_peft_model(tiny_model("llama"), soft(targets=["q", "down"]), adapter_name=name)


def test_a_name_taken_by_an_expert_of_a_later_adapter_is_refused():
    model = get_peft_model(tiny_model("llama"), soft(prompt=False), adapter_name="prompt_expert")
    before = footprint(model)
    with pytest.raises(UserError, match="prompt_expert"):
        model.add_adapter("second", soft())
    assert footprint(model) == before


@pytest.mark.parametrize("name", ["lm_head", "modules_to_save"])
def test_a_name_taken_by_a_module_to_save_is_refused(name):
    model = get_peft_model(tiny_model("llama"), soft(modules_to_save=["lm_head"]))
    before = footprint(model)
    with pytest.raises(UserError, match=f"adapter_name is '{name}'"):
        model.add_adapter(name, soft())
    assert footprint(model) == before


@pytest.mark.parametrize("name", ["v1.0", ""])
def test_a_name_that_cannot_name_a_module_is_refused_before_any_change(name):
    base = tiny_model("llama")
    before = footprint(base)
    with pytest.raises(ValueError):
        get_peft_model(base, soft(), adapter_name=name)
    assert footprint(base) == before


@pytest.mark.parametrize("name", ["prompt", "lora", "expert", "math"])
def test_saving_is_complete_beside_a_second_adapter(name, tmp_path):
    model = trained()
    expected = logits(model)
    model.save_pretrained(tmp_path / "alone")
    model.add_adapter(name, soft())
    model.save_pretrained(tmp_path / "both")
    for file in ("adapter_model.safetensors", f"{name}/adapter_model.safetensors"):
        assert set(load_file(tmp_path / "both" / file)) == set(load_file(tmp_path / "alone/adapter_model.safetensors"))
    again = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "both")
    assert torch.equal(logits(again), expected)


@pytest.mark.parametrize("name", ["m", "o", "a", "oa"])
def test_names_within_the_prefix_work_though_peft_warns_of_them(name, tmp_path):
    with pytest.warns(UserWarning, match="should not be contained in the prefix"):
        model = get_peft_model(tiny_model("llama"), soft(), adapter_name=name)
    randomise_adapter(model)
    model.add_adapter("second", soft(rank=3))
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        warnings.filterwarnings("ignore", message=".*contained in the prefix.*")
        again = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / name, adapter_name=name)
    assert torch.equal(logits(again), logits(model.eval()))
    model.delete_adapter(name)
    assert not [key for key in model.state_dict() if f".{name}." in key]


def test_a_name_that_is_taken_is_refused():
    model = trained()
    expected = logits(model)
    with pytest.raises(UserError, match=r"already has an adapter called 'default'.*delete_adapter.*unload\(\)"):
        get_peft_model(model.base_model.model, soft())
    assert torch.equal(logits(model), expected)
