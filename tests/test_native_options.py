"""PEFT's own options and reports on a mixture: further modules to save, exclusions, trained tokens, status, counts."""

import warnings

import pytest
import torch
from peft import PeftModel, get_layer_status, get_model_status, get_peft_model
from safetensors.torch import load_file

from moa_peft import MoAConfig, UserError
from moa_peft.layer import MoALayer
from tests.matrix import randomise_adapter
from tests.models import LAYERS, tiny_batch, tiny_model
from tests.native import CAUSAL, adapter_tensors, footprint, logits, soft, sparse, trained


def train_a_step(model: PeftModel) -> set[str]:
    """The names of the parameters that an optimiser step changes."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    model.train()(**tiny_batch()).loss.backward()
    optimizer.step()
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


def test_model_status():
    model = trained()
    model.add_adapter("second", sparse())
    status = get_model_status(model)
    assert status.peft_types == {"default": "MOA", "second": "MOA"}
    assert status.num_adapter_layers == LAYERS
    assert status.trainable_params == sum(
        t.numel() for name, t in adapter_tensors(model).items() if "second" not in name
    )
    assert status.enabled is True
    assert status.active_adapters == ["default"]
    assert status.merged_adapters == []
    assert status.requires_grad == {"default": True, "second": False}
    assert set(status.available_adapters) == {"default", "second"}
    with model.disable_adapter():
        assert get_model_status(model).enabled is False


def test_layer_status():
    model = trained(config=sparse(layers=[1], threshold_gradient="none"))
    (status,) = get_layer_status(model)
    assert status.name == "model.model.layers.1.moa"
    assert status.module_type == "MoALayer"
    assert status.active_adapters == ["default"]
    assert status.requires_grad == {"default": "irregular"}, "the threshold is frozen"
    assert status.devices == {"default": ["cpu"]}


def test_print_trainable_parameters(capsys):
    model = trained()
    model.print_trainable_parameters()
    number = sum(tensor.numel() for tensor in adapter_tensors(model).values())
    total = number + tiny_model("llama").num_parameters()
    assert capsys.readouterr().out.startswith(f"trainable params: {number:,} || all params: {total:,} ||")


def test_modules_to_save_are_trained_saved_and_loaded(tmp_path):
    model = trained(config=soft(modules_to_save=["lm_head"]))
    moved = train_a_step(model)
    assert {name for name in moved if ".moa." not in name} == {
        "base_model.model.lm_head.modules_to_save.default.weight"
    }
    expected = logits(model.eval())
    model.save_pretrained(tmp_path)
    assert "base_model.model.lm_head.weight" in load_file(tmp_path / "adapter_model.safetensors")
    again = PeftModel.from_pretrained(tiny_model("llama"), tmp_path)
    assert torch.equal(logits(again), expected)
    with again.disable_adapter():
        assert torch.equal(logits(again), logits(tiny_model("llama")))


def test_trainable_tokens_are_trained_saved_and_loaded(tmp_path):
    tokens = [3, 5, 8]
    model = trained(config=soft(trainable_token_indices=tokens))
    base = tiny_model("llama").get_input_embeddings().weight
    moved = train_a_step(model)
    (name,) = {name for name in moved if ".moa." not in name}
    assert name.endswith("embed_tokens.token_adapter.trainable_tokens_delta.default")
    expected = logits(model.eval())
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    (delta,) = [tensor for key, tensor in saved.items() if "trainable_tokens_delta" in key]
    assert delta.shape == (3, base.shape[1])
    assert not torch.equal(delta, base[tokens])
    again = PeftModel.from_pretrained(tiny_model("llama"), tmp_path)
    assert torch.equal(logits(again), expected)


@pytest.mark.parametrize(
    ("patterns", "gone"),
    [
        (["q_proj"], {"lora_q"}),
        (["self_attn.q_proj", "mlp"], {"lora_q", "parallel_adapter"}),
        (r".*\.self_attn(\..*)?", {"lora_q", "lora_k", "lora_v", "lora_o", "prompt_expert"}),
    ],
    ids=["name", "names", "regex"],
)
def test_excluded_modules_get_no_expert(patterns, gone, tmp_path):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=UserWarning)
        model = get_peft_model(tiny_model("llama"), soft(exclude_modules=patterns))
    layers = [module for module in model.modules() if isinstance(module, MoALayer)]
    everything = {"lora_q", "lora_k", "lora_v", "prompt_expert", "lora_o", "lora_down", "parallel_adapter"}
    assert len(layers) == LAYERS
    for layer in layers:
        assert set(layer.moa_experts["default"]) == everything - gone
        assert layer.moa_router["default"].num_experts == len(everything - gone)
    randomise_adapter(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_model("llama"), tmp_path)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("patterns", [["layers.0"], r"model\.layers\.0"], ids=["name", "regex"])
def test_an_excluded_block_gets_nothing(patterns):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=UserWarning)
        model = get_peft_model(tiny_model("llama"), soft(exclude_modules=patterns))
    assert [n for n, m in model.named_modules() if isinstance(m, MoALayer)] == ["base_model.model.model.layers.1.moa"]


@pytest.mark.parametrize("optional", [True, False])
@pytest.mark.parametrize("patterns", [["layers.0", "layers.1"], ".*"], ids=["names", "regex"])
def test_excluding_everything_is_an_error_and_changes_nothing(patterns, optional, recwarn):
    model = tiny_model("llama")
    before = footprint(model)
    experts = [{"type": "lora", "target": "q", "optional": optional}]
    with pytest.raises(UserError, match="No module is left to adapt.*exclude_modules"):
        get_peft_model(model, MoAConfig(experts=experts, exclude_modules=patterns, **CAUSAL))
    assert footprint(model) == before
    assert not [w for w in recwarn if "no site" in str(w.message)]


def test_excluding_nothing_is_said():
    with pytest.warns(UserWarning, match="exclude_modules.*no modules were excluded"):
        get_peft_model(tiny_model("llama"), soft(exclude_modules=["query"]))


def test_target_modules_is_a_shorthand_for_lora_experts():
    short = MoAConfig(target_modules=["q", "mlp.down_proj"], **CAUSAL)
    layers = [m for m in get_peft_model(tiny_model("llama"), short).modules() if isinstance(m, MoALayer)]
    assert [list(layer.moa_experts["default"]) for layer in layers] == [["lora_q", "lora_down"]] * LAYERS
