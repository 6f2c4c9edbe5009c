"""Quantised bases on CPU: bitsandbytes 8-bit and 4-bit, torchao int8 weights."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedModel,
    TorchAoConfig,
)
from transformers.pytorch_utils import Conv1D

from moa_peft import UserError
from tests.matrix import randomise_adapter
from tests.models import randomise, tiny_batch
from tests.native import adapter_tensors, footprint, gradients, logits, soft, sparse

pytestmark = [pytest.mark.quant, pytest.mark.filterwarnings("ignore:.*MatMul8bitLt.*")]

# 4-bit weights come in groups of 64.
SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "llama": lambda: LlamaConfig(**SIZES, num_key_value_heads=2),
    "gpt2": lambda: GPT2Config(
        vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    ),
    "gpt_neox": lambda: GPTNeoXConfig(**SIZES),
}


def _torchao() -> TorchAoConfig:
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


LIBRARIES = {"bnb8": "bitsandbytes", "bnb4": "bitsandbytes", "bnb4-nf4-bf16": "bitsandbytes", "torchao": "torchao"}
QUANTISATIONS: dict[str, Any] = {
    "bnb8": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "bnb4": lambda: BitsAndBytesConfig(load_in_4bit=True),
    "bnb4-nf4-bf16": lambda: BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    ),
    "torchao": _torchao,
}


def _marked(name: str) -> Any:
    library = LIBRARIES[name]
    missing = importlib.util.find_spec(library) is None
    reason = f"{library} is not installed: pip install 'moa-peft[quant]'"
    return pytest.param(name, marks=pytest.mark.skipif(missing, reason=reason))


by_quantisation = pytest.mark.parametrize("quantisation", [_marked(name) for name in LIBRARIES])
by_family = pytest.mark.parametrize("family", FAMILIES)
CONFIGS = {"soft": soft, "sparse": sparse}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bases")
    for family, config in FAMILIES.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config())
        randomise(model, std=0.15)
        model.save_pretrained(root / family)
    return root


def load(saved: Path, family: str, quantisation: str | None) -> PreTrainedModel:
    config = None if quantisation is None else QUANTISATIONS[quantisation]()
    return AutoModelForCausalLM.from_pretrained(saved / family, quantization_config=config, device_map="cpu").eval()


def quantised_linears(model: torch.nn.Module) -> int:
    """Linear layers of another class than torch's, or with another kind of weight."""
    return sum(
        type(m).__name__ in ("Linear8bitLt", "Linear4bit") or type(getattr(m, "weight", None)).__name__ == "Int8Tensor"
        for m in model.modules()
    )


@by_quantisation
@by_family
@pytest.mark.parametrize("kind", CONFIGS)
def test_training_saving_and_loading(family, quantisation, kind, saved, tmp_path):
    model = get_peft_model(load(saved, family, quantisation), CONFIGS[kind](), autocast_adapter_dtype=True)
    # GPT-2's Conv1D is not one of torchao's linear layers.
    assert quantised_linears(model) > 0 or (family, quantisation) == ("gpt2", "torchao")
    start = logits(model.eval())
    with model.disable_adapter():
        assert torch.equal(logits(model), start)
    randomise_adapter(model)
    before = adapter_tensors(model)
    assert {tensor.dtype for tensor in before.values()} == {torch.float32}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    losses = []
    for _ in range(3):
        loss = model.train()(**tiny_batch()).loss
        loss.backward()
        assert {name for name, p in model.named_parameters() if p.grad is not None} == set(before)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        logits(model.eval())
    assert losses[-1] < losses[0]
    after = adapter_tensors(model)
    assert not [name for name in before if torch.equal(before[name], after[name])]
    model.save_pretrained(tmp_path)
    expected = logits(model.eval())
    again = PeftModel.from_pretrained(load(saved, family, quantisation), tmp_path)
    assert torch.equal(logits(again), expected)
    assert torch.equal(logits(model.unload()), start)


def dequantised(saved: Path, family: str, quantisation: str) -> PreTrainedModel:
    """The same function without quantised layers: their weights are read off from what they make of unit vectors."""
    quantised, plain = load(saved, family, quantisation).train(), load(saved, family, None)
    with torch.no_grad():
        for name, module in plain.named_modules():
            if isinstance(module, Conv1D):
                rows = torch.eye(module.weight.shape[0])
                module.weight.copy_(quantised.get_submodule(name)(rows) - module.bias)
            elif isinstance(module, nn.Linear):
                rows = torch.eye(module.in_features)
                offset = 0.0 if module.bias is None else module.bias
                module.weight.copy_((quantised.get_submodule(name)(rows) - offset).T)
    return plain


# How much the libraries round inside their products: 8-bit activations, bf16, or nothing but float32.
LEAST_SIMILARITY = {"bnb8": 0.98, "bnb4": 0.9999, "bnb4-nf4-bf16": 0.98, "torchao": 0.9999}


@by_quantisation
@by_family
def test_gradients_equal_those_of_the_same_weights_dequantised(family, quantisation, saved):
    found = []
    for base in (dequantised(saved, family, quantisation), load(saved, family, quantisation)):
        torch.manual_seed(11)
        model = get_peft_model(base, soft())
        randomise_adapter(model)
        model.train()(**tiny_batch()).loss.backward()
        found.append(gradients(model))
    expected, actual = found
    assert set(actual) == set(expected)
    assert any("prompt_expert.embedding" in name for name in expected)
    for name, gradient in expected.items():
        similarity = torch.cosine_similarity(actual[name].flatten(), gradient.flatten(), dim=0)
        assert similarity > LEAST_SIMILARITY[quantisation], name


@by_quantisation
def test_preparing_for_training_and_checkpointing(quantisation, saved):
    base = prepare_model_for_kbit_training(load(saved, "llama", quantisation))
    model = get_peft_model(base, soft())
    randomise_adapter(model)
    model.train()(**tiny_batch()).loss.backward()
    found = gradients(model)
    assert set(found) == set(adapter_tensors(model))
    assert all(torch.isfinite(gradient).all() for gradient in found.values())


@by_quantisation
def test_generation(quantisation, saved):
    model = get_peft_model(load(saved, "llama", quantisation), sparse(prompt=True)).eval()
    randomise_adapter(model)
    batch = {key: value for key, value in tiny_batch(tokens=5).items() if key != "labels"}
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert model.generate(**batch, **settings).shape == (3, 9)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_weights_repacked_for_inference_are_refused_for_training(saved):
    base = load(saved, "llama", "bnb4")
    logits(base)
    if not getattr(base.model.layers[0].mlp.up_proj.weight.quant_state, "packing_format_for_cpu", False):
        pytest.skip("bitsandbytes repacks weights on CPUs with AVX512-BF16 only")
    before = footprint(base)
    with pytest.raises(UserError, match="repacked for inference.*Load the base model again"):
        get_peft_model(base, soft())
    assert footprint(base) == before
