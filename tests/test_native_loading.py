"""Loading a saved adapter through every door that PEFT and transformers have."""

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, pipeline

from moa_peft import MoAConfig
from moa_peft.layer import MoALayer
from tests.matrix import randomise_adapter
from tests.models import tiny_model
from tests.native import adapter_tensors, logits, save_base_and_adapter, soft, sparse, trained
from tests.tiny import save_tiny

pytestmark = pytest.mark.filterwarnings("ignore:.*has no site for.*:UserWarning")


def test_auto_class(tmp_path):
    folder = save_base_and_adapter(tmp_path)
    model = AutoPeftModelForCausalLM.from_pretrained(folder)
    assert isinstance(model, PeftModel)
    assert torch.equal(logits(model), logits(trained()))


def test_config_is_found_by_its_type(tmp_path):
    folder = save_base_and_adapter(tmp_path, config=sparse(rank=3, max_threshold=0.4))
    config = PeftConfig.from_pretrained(folder)
    assert type(config) is MoAConfig
    assert config.inference_mode
    assert config.router is not None and config.router["max_threshold"] == 0.4
    assert config.experts is not None and config.experts[0]["rank"] == 3


def test_low_cpu_mem_usage_loads_the_same_numbers(tmp_path):
    folder = save_base_and_adapter(tmp_path)
    model = PeftModel.from_pretrained(tiny_model("llama"), folder, low_cpu_mem_usage=True)
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert torch.equal(logits(model), logits(trained()))
    model.load_adapter(folder, adapter_name="again", low_cpu_mem_usage=True)
    model.set_adapter("again")
    assert torch.equal(logits(model), logits(trained()))


def test_loading_to_train_on(tmp_path):
    folder = save_base_and_adapter(tmp_path)
    for trainable in (False, True):
        model = PeftModel.from_pretrained(tiny_model("llama"), folder, is_trainable=trainable)
        assert {p.requires_grad for name, p in model.named_parameters() if ".moa." in name} == {trainable}


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "qwen3_moe", "mixtral"])
def test_transformers_load_adapter(family, tmp_path):
    """The families with experts rename and fuse their own weights while loading; ours must come through untouched."""
    folder = save_base_and_adapter(tmp_path, family)
    model = tiny_model(family)
    before = logits(model)
    model.load_adapter(str(folder))
    expected = trained(family)
    assert torch.equal(logits(model), logits(expected))
    assert not torch.allclose(logits(model), before, atol=1e-3)
    assert {p.requires_grad for name, p in model.named_parameters() if ".moa." in name} == {False}


def test_transformers_from_pretrained_of_the_adapter_folder(tmp_path):
    folder = save_base_and_adapter(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert any(isinstance(module, MoALayer) for module in model.modules())
    assert torch.equal(logits(model), logits(trained()))


def test_transformers_pipeline_of_the_adapter_folder(tmp_path):
    base_folder, folder = save_tiny(tmp_path / "base"), tmp_path / "adapter"
    base = AutoModelForCausalLM.from_pretrained(base_folder)
    base.add_adapter(soft())
    randomise_adapter(base)
    base.save_pretrained(folder)
    settings = {"max_new_tokens": 8, "do_sample": False, "return_full_text": False, "eos_token_id": None}
    generate = pipeline("text-generation", model=str(folder), tokenizer=str(base_folder))
    plain = pipeline("text-generation", model=str(base_folder))
    answer = generate("1+2=", **settings)[0]["generated_text"]
    assert answer != plain("1+2=", **settings)[0]["generated_text"]
    assert (
        answer
        == pipeline("text-generation", model=base.eval(), tokenizer=plain.tokenizer)("1+2=", **settings)[0][
            "generated_text"
        ]
    )


def test_transformers_add_set_disable_and_delete():
    model = tiny_model("llama")
    base = logits(model)
    model.add_adapter(soft(rank=3), adapter_name="first")
    model.add_adapter(sparse(rank=5), adapter_name="second")
    randomise_adapter(model)
    assert model.active_adapters() == ["second"]
    second = logits(model)
    model.set_adapter("first")
    first = logits(model)
    assert not torch.allclose(first, second, atol=1e-3)
    assert {n.split(".moa.")[1].split(".")[1] for n, p in model.named_parameters() if p.requires_grad} == {"first"}
    model.disable_adapters()
    assert torch.equal(logits(model), base)
    model.enable_adapters()
    assert torch.equal(logits(model), first)
    model.delete_adapter("first")
    assert not [name for name, _ in model.named_parameters() if ".first." in name]
    model.set_adapter("second")
    assert torch.equal(logits(model), second)
    model.delete_adapter("second")
    assert torch.equal(logits(model), base)


def test_transformers_saves_the_adapter_alone(tmp_path):
    model = tiny_model("llama")
    model.add_adapter(soft())
    randomise_adapter(model)
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert set(saved) == {f"base_model.model.{name.replace('.default', '')}" for name in adapter_tensors(model)}
    again = PeftModel.from_pretrained(tiny_model("llama"), tmp_path)
    assert torch.equal(logits(again), logits(model))


def test_injection_without_a_wrapper():
    model = inject_adapter_in_model(soft(), tiny_model("llama"))
    assert torch.equal(logits(model), logits(tiny_model("llama")))
    randomise_adapter(model)
    assert torch.equal(logits(model), logits(trained()))
    assert len(get_peft_model_state_dict(model)) == len(adapter_tensors(model))


def test_injection_on_the_meta_device():
    model = inject_adapter_in_model(soft(), tiny_model("llama"), low_cpu_mem_usage=True)
    assert {p.device.type for name, p in model.named_parameters() if ".moa." in name} == {"meta"}
    assert {p.device.type for name, p in model.named_parameters() if ".moa." not in name} == {"cpu"}
