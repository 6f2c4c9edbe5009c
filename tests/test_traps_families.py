"""Model families: unknown ones, described ones, and the ones whose blocks differ from Llama's."""

import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from moa_peft import MoAConfig, UserError
from moa_peft.architectures import ARCHITECTURES
from moa_peft.layer import MoALayer
from tests.matrix import FAMILIES, Family, randomise_adapter
from tests.models import FAMILIES as MODELS
from tests.models import tiny_batch, tiny_config, tiny_model
from tests.native import CAUSAL, footprint, logits, soft, trained

LLAMA_PARTS = {
    "blocks": "model.layers",
    "attention": "self_attn",
    "roles": {
        **{role: f"self_attn.{role}_proj" for role in "qkvo"},
        **{role: f"mlp.{role}_proj" for role in ("gate", "up", "down")},
    },
    "mlp": "mlp",
    "norm": "input_layernorm",
}


class ForeignConfig(LlamaConfig):
    """Llama under a name that no list knows."""

    model_type = "foreign_llama"


class ForeignModel(LlamaForCausalLM):
    config_class = ForeignConfig


def foreign_model() -> ForeignModel:
    values = tiny_config("llama").to_dict()
    values.pop("model_type")
    model = ForeignModel(ForeignConfig(**values))
    model.load_state_dict(tiny_model("llama").state_dict())
    return model.eval()


def _encoder() -> BertForMaskedLM:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return BertForMaskedLM(BertConfig(vocab_size=32, **sizes))


def _encoder_decoder() -> T5ForConditionalGeneration:
    return T5ForConditionalGeneration(T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))


def _state_space() -> torch.nn.Module:
    return AutoModelForCausalLM.from_config(MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1))


def test_every_listed_family_has_a_column_of_the_matrix():
    assert {family.name for family in FAMILIES} == set(MODELS)
    model_types = set()
    for name in MODELS:
        config = tiny_config(name)
        model_types |= {config.model_type, config.get_text_config().model_type}
    assert set(ARCHITECTURES) <= model_types


@pytest.mark.parametrize("make", [_encoder, _encoder_decoder, _state_space, foreign_model])
def test_an_unknown_family_fails_with_the_list_and_stays_untouched(make):
    model = make()
    before = footprint(model)
    with pytest.raises(UserError) as caught:
        get_peft_model(model, MoAConfig.soft())
    message = str(caught.value)
    assert f"{model.config.model_type!r} is not known" in message
    assert ", ".join(ARCHITECTURES) in message
    assert "no encoders, no encoder-decoder models" in message
    assert "MoAConfig(architecture=" in message
    assert footprint(model) == before


def test_a_described_family_equals_the_listed_one(tmp_path):
    torch.manual_seed(11)
    model = get_peft_model(foreign_model(), soft(architecture=LLAMA_PARTS)).eval()
    randomise_adapter(model)
    assert torch.equal(logits(model), logits(trained()))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(foreign_model(), tmp_path)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks": "layer"}, "names 0 module lists.*model.layers"),
        ({"attention": "attn"}, "no module 'attn'. They have: .*self_attn"),
        ({"norm": "ln_1"}, "architecture.norm is 'ln_1'.*input_layernorm"),
        ({"mlp": ["mlp"]}, "architecture.mlp"),
        ({"roles": {"qq": "self_attn.q_proj"}}, "architecture.roles is 'qq'; allowed: 'q'"),
        ({"key_value_layout": "mixed"}, "key_value_layout is 'mixed'; allowed: 'separate'"),
        ({"heads": 3}, "unknown option 'heads'"),
    ],
)
def test_a_wrong_description_says_what_is_wrong(change, message):
    model = foreign_model()
    before = footprint(model)
    with pytest.raises(UserError, match=message):
        get_peft_model(model, soft(architecture=LLAMA_PARTS | change))
    assert footprint(model) == before


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.drops], ids=lambda family: family.name)
def test_presets_drop_what_a_family_lacks_with_one_warning(family: Family):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        model = get_peft_model(tiny_model(family.name), soft())
    messages = [str(w.message) for w in caught if "no site" in str(w.message)]
    assert len(messages) == 1
    assert messages[0].endswith(f"has no site for: {', '.join(family.drops)}. The mixture goes without.")
    kinds = {
        slot.expert_type for m in model.modules() if isinstance(m, MoALayer) for slot in m.mixtures["default"].slots
    }
    assert ("prompt" in kinds) == ("prompt" not in family.drops)


@pytest.mark.parametrize(
    ("family", "expert", "message"),
    [
        (
            "mixtral",
            {"type": "lora", "target": "down"},
            r"experts\[0\] \(lora on 'down'\) has no site.*roles q, k, v, o",
        ),
        ("gpt2", {"type": "lora", "target": "gate"}, r"lora on 'gate'\) has no site.*roles q, k, v, o, up, down"),
        ("llama", {"type": "lora", "target": "k_projj"}, r"lora on 'k_projj'\) has no site"),
        ("llama", {"type": "lora", "target": "(q"}, "neither a role, nor a module name, nor a regular expression"),
        ("olmo2", {"type": "prompt"}, "prompt expert cannot work.*full width"),
        ("falcon", {"type": "prompt"}, "prompt expert cannot work.*attention interface"),
        ("llama", {"type": "parallel", "layers": [5]}, r"names block 5; the model has blocks 0 to 1"),
    ],
)
def test_an_expert_listed_by_hand_without_a_site_is_an_error(family, expert, message):
    model = tiny_model(family)
    before = footprint(model)
    with pytest.raises(UserError, match=message):
        get_peft_model(model, MoAConfig(experts=[expert], **CAUSAL))
    assert footprint(model) == before


def test_roles_of_one_fused_layer_must_agree():
    experts = [{"type": "lora", "target": "q", "rank": 2}, {"type": "lora", "target": "k", "rank": 3}]
    with pytest.raises(UserError, match="roles of one fused layer .*c_attn.* different options"):
        get_peft_model(tiny_model("gpt2"), MoAConfig(experts=experts, **CAUSAL))


def test_tokens_that_a_block_flattens():
    """OPT's fc1 and fc2 see [B * T, D]; every token must still get the weight of its own row and position."""
    model = trained("opt", MoAConfig(experts=[{"type": "lora", "target": "up"}, {"type": "parallel"}], **CAUSAL))
    batch = tiny_batch(rows=3)
    together = logits(model, batch)
    for row in range(3):
        alone = logits(model, {key: value[row : row + 1] for key, value in batch.items()})
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "gpt_neox"])
def test_hidden_states_and_attentions_can_be_read(family):
    model = trained(family, attn_implementation="eager")
    batch = {key: value for key, value in tiny_batch().items() if key != "labels"}
    with torch.no_grad():
        output = model(**batch, output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == 3
    assert len(output.attentions) == 2
    assert torch.equal(output.logits, logits(model))
    with torch.no_grad(), model.disable_adapter():
        base = model(**batch, output_hidden_states=True)
    assert torch.equal(output.hidden_states[0], base.hidden_states[0])
    for after, before in zip(output.hidden_states[1:], base.hidden_states[1:], strict=True):
        assert not torch.allclose(after, before, atol=1e-3)
