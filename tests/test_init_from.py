"""`init_from`: a LoRA adapter of the same base as the starting point of the LoRA experts."""

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, PrefixTuningConfig, get_peft_model

from moa_peft import MoAConfig, UserError
from moa_peft.layer import MoALayer
from tests.models import tiny_batch, tiny_model
from tests.native import footprint, logits, soft, sparse

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]


def lora_adapter(folder, family: str = "llama", **options) -> torch.Tensor:
    """Save a trained LoRA adapter; returns what it computes."""
    values = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM"} | options
    torch.manual_seed(2)
    model = get_peft_model(tiny_model(family), LoraConfig(**values)).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return logits(model)


def with_neutral_router(model: PeftModel) -> PeftModel:
    """Zero logits: every routing weight is the sigmoid's 0.5."""
    for module in model.modules():
        if isinstance(module, MoALayer):
            for parameter in module.moa_router.parameters():
                torch.nn.init.zeros_(parameter)
    return model.eval()


@pytest.mark.parametrize(
    ("lora", "knobs"),
    [
        ({}, {"rank": 4}),
        ({}, {"rank": 6, "alpha": 5}),
        ({"use_rslora": True}, {"rank": 4, "rslora": True}),
        ({"rank_pattern": {"k_proj": 2}, "alpha_pattern": {"down_proj": 3}}, {"rank": 4}),
    ],
    ids=["same-rank", "larger-rank-other-alpha", "rslora", "patterns"],
)
def test_it_starts_as_the_lora_function(lora, knobs, tmp_path):
    expected = lora_adapter(tmp_path, **lora)
    model = get_peft_model(tiny_model("llama"), soft(init_from=str(tmp_path), **knobs))
    assert not torch.allclose(logits(model), logits(tiny_model("llama")), atol=1e-2)
    torch.testing.assert_close(logits(with_neutral_router(model)), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "phi3", "opt"])
def test_other_families(family, tmp_path):
    targets = {
        "gpt2": ["c_attn", "attn.c_proj", "mlp.c_proj"],
        "phi3": ["qkv_proj", "o_proj", "down_proj"],
        "opt": ["q_proj", "k_proj", "v_proj", "out_proj", "fc2"],
    }
    expected = lora_adapter(tmp_path, family, target_modules=targets[family], fan_in_fan_out=family == "gpt2")
    model = get_peft_model(tiny_model(family), soft(init_from=str(tmp_path)))
    torch.testing.assert_close(logits(with_neutral_router(model)), expected, atol=1e-4, rtol=1e-4)


def test_experts_that_share_a_site_share_the_lora(tmp_path):
    expected = lora_adapter(tmp_path, target_modules=["q_proj"])
    experts = [{"type": "lora", "target": "q", "rank": 4, "num": 3}, {"type": "parallel"}]
    config = MoAConfig(experts=experts, init_from=str(tmp_path), task_type="CAUSAL_LM")
    model = get_peft_model(tiny_model("llama"), config)
    torch.testing.assert_close(logits(with_neutral_router(model)), expected, atol=1e-4, rtol=1e-4)


def test_sites_without_lora_weights_start_at_zero(tmp_path):
    expected = lora_adapter(tmp_path, target_modules=["v_proj"])
    model = get_peft_model(tiny_model("llama"), soft(init_from=str(tmp_path)))
    torch.testing.assert_close(logits(with_neutral_router(model)), expected, atol=1e-4, rtol=1e-4)


def test_it_trains_and_reloads_without_the_lora(tmp_path):
    lora_adapter(tmp_path / "lora")
    model = get_peft_model(tiny_model("llama"), sparse(init_from=str(tmp_path / "lora")))
    model.train()(**tiny_batch()).loss.backward()
    for name, parameter in model.named_parameters():
        if ".moa." in name:
            assert parameter.grad is not None and parameter.dtype == torch.float32
    model.save_pretrained(tmp_path / "moa")
    assert PeftConfig.from_pretrained(tmp_path / "moa").init_from is None
    (tmp_path / "lora" / "adapter_config.json").unlink()
    again = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "moa")
    assert torch.equal(logits(again), logits(model.eval()))


def test_only_the_new_adapter_starts_from_it(tmp_path):
    lora_adapter(tmp_path)
    model = get_peft_model(tiny_model("llama"), soft())
    base = logits(model.eval())
    model.add_adapter("second", soft(init_from=str(tmp_path)))
    assert torch.equal(logits(model), base)
    model.set_adapter("second")
    assert not torch.allclose(logits(model), base, atol=1e-2)


def assert_refused(config: MoAConfig, message: str, family: str = "llama") -> None:
    model = tiny_model(family)
    before = footprint(model)
    with pytest.raises(UserError, match=message):
        get_peft_model(model, config)
    assert footprint(model) == before


def test_dora_is_refused(tmp_path):
    lora_adapter(tmp_path, use_dora=True)
    assert_refused(soft(init_from=str(tmp_path)), "uses DoRA")


def test_a_larger_rank_is_refused(tmp_path):
    lora_adapter(tmp_path, r=16)
    assert_refused(soft(init_from=str(tmp_path), rank=8), "has rank 16 at .*the expert has rank 8.*rank 16 or more")


def test_another_base_is_refused(tmp_path):
    lora_adapter(tmp_path, "gpt2", target_modules=["c_attn"], fan_in_fan_out=True)
    assert_refused(soft(init_from=str(tmp_path)), "holds LoRA weights for 2 layers without a LoRA expert.*c_attn")


def test_another_size_is_refused(tmp_path):
    lora_adapter(tmp_path, "qwen3", target_modules=["k_proj"])
    changed = tiny_model("qwen3")
    changed.config.num_key_value_heads = 4
    model = type(changed)(changed.config)
    with pytest.raises(UserError, match=r"does not fit the model: .*k_proj is 32 -> 32, the adapter's is 32 -> 16"):
        get_peft_model(model, soft(init_from=str(tmp_path)))


def test_layers_without_an_expert_are_refused(tmp_path):
    lora_adapter(tmp_path, target_modules=["q_proj", "gate_proj"])
    assert_refused(
        soft(init_from=str(tmp_path)), r"holds LoRA weights for 2 layers without a LoRA expert, such as .*gate_proj"
    )


def test_an_expert_of_another_type_does_not_take_lora_weights(tmp_path):
    lora_adapter(tmp_path, target_modules=["q_proj"])
    config = MoAConfig(experts=[{"type": "parallel"}], init_from=str(tmp_path), task_type="CAUSAL_LM")
    assert_refused(config, "holds LoRA weights for 2 layers without a LoRA expert")


def test_other_methods_are_refused(tmp_path):
    prefix = get_peft_model(tiny_model("llama"), PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    prefix.save_pretrained(tmp_path)
    assert_refused(soft(init_from=str(tmp_path)), "only LoRA adapters can start experts")


def test_a_missing_folder_is_refused(tmp_path):
    assert_refused(soft(init_from=str(tmp_path / "nowhere")), "cannot be read as a PEFT adapter.*adapter_config.json")
