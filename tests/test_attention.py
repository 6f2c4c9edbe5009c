"""The prompt expert in every attention implementation, and packed rows."""

from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AttentionInterface

from moa_peft import MoAConfig, prompt_attention, record_routing
from tests.models import tiny_batch, tiny_model
from tests.native import gradients, logits, trained

FAMILIES = ("llama", "qwen3", "gemma3_text", "phi3", "gpt_neox", "gpt2")
families = pytest.mark.parametrize("family", FAMILIES)
FLEX_FAMILIES = [family for family in FAMILIES if family != "gpt2"]  # transformers has no flex_attention for GPT-2
CLOSE = {"atol": 2e-5, "rtol": 1e-4}


@pytest.fixture(autouse=True)
def uncompiled():
    """flex_attention is compiled at its first call, which takes longer than all the tests; uncompiled is the same."""
    with torch.compiler.set_stance("force_eager"):
        yield


def padded_batch() -> dict[str, torch.Tensor]:
    batch = tiny_batch(rows=3, tokens=9)
    batch["attention_mask"][0, :4] = 0
    batch["attention_mask"][1, 7:] = 0
    # The first token of a row is predicted from padding, where implementations may differ.
    batch["labels"][(batch["attention_mask"] == 0) | (batch["attention_mask"].cumsum(-1) == 1)] = -100
    batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    return batch


def real_tokens(model: torch.nn.Module) -> torch.Tensor:
    batch = padded_batch()
    return logits(model, batch)[batch["attention_mask"].bool()]


def prompt_matters(model: torch.nn.Module, output: torch.Tensor) -> bool:
    """Whether the prompt experts have a part in an output."""
    gates = [p for name, p in model.named_parameters() if name.endswith("prompt_expert.gate")]
    kept = [gate.detach().clone() for gate in gates]
    for gate in gates:
        torch.nn.init.zeros_(gate)
    without = real_tokens(model)
    for gate, value in zip(gates, kept, strict=True):
        gate.data.copy_(value)
    return not torch.allclose(output, without, atol=1e-3)


IMPLEMENTATIONS = [(family, "sdpa") for family in FAMILIES] + [(family, "flex_attention") for family in FLEX_FAMILIES]


@pytest.mark.parametrize(("family", "implementation"), IMPLEMENTATIONS)
def test_implementations_agree(family, implementation):
    eager = trained(family, attn_implementation="eager")
    other = trained(family, attn_implementation=implementation)
    expected = real_tokens(eager)
    assert prompt_matters(eager, expected)
    assert prompt_matters(other, real_tokens(other))
    torch.testing.assert_close(real_tokens(other), expected, **CLOSE)


@families
def test_gradients_of_eager_and_sdpa_agree(family):
    found = {}
    for implementation in ("eager", "sdpa"):
        model = trained(family, attn_implementation=implementation).train()
        model(**padded_batch()).loss.backward()
        found[implementation] = gradients(model)
    assert any("prompt_expert.embedding" in name for name in found["eager"])
    torch.testing.assert_close(found["sdpa"], found["eager"], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("family", FLEX_FAMILIES)
def test_flex_generates_what_eager_generates(family):
    batch = {key: value for key, value in tiny_batch(tokens=5).items() if key != "labels"}
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    eager = trained(family, attn_implementation="eager").generate(**batch, **settings)
    flex = trained(family, attn_implementation="flex_attention").generate(**batch, **settings)
    assert torch.equal(eager, flex)


@pytest.mark.parametrize(("family", "after"), [*IMPLEMENTATIONS, *((family, "eager") for family in FAMILIES)])
def test_an_implementation_chosen_after_the_adapter(family, after):
    model = trained(family, attn_implementation="sdpa" if after == "eager" else "eager")
    expected = real_tokens(model)
    model.base_model.model.set_attn_implementation(after)
    assert model.config._attn_implementation == after
    torch.testing.assert_close(real_tokens(model), expected, **CLOSE)


def test_an_implementation_registered_after_the_adapter_says_that_it_cannot_serve_it():
    model = trained()
    expected = real_tokens(model)
    original = AttentionInterface._global_mapping["sdpa"].__wrapped__
    AttentionInterface.register("sdpa_of_tomorrow", original)
    try:
        model.config._attn_implementation = "sdpa_of_tomorrow"
        with pytest.raises(RuntimeError, match="prompt expert did not run.*before adding the adapter"):
            real_tokens(model)
        prompt_attention.install_prompt_attention(model.base_model.model.model.layers[0].self_attn)
        model.config._attn_implementation = "sdpa"
        assert torch.equal(real_tokens(model), expected)
    finally:
        del AttentionInterface._global_mapping["sdpa_of_tomorrow"]


def test_every_registered_implementation_is_wrapped_once_under_its_own_name():
    names = set(AttentionInterface._global_mapping)
    trained()
    trained("gpt2")
    assert set(AttentionInterface._global_mapping) == names
    assert {"sdpa", "flex_attention", "flash_attention_2"} <= names
    for function in AttentionInterface._global_mapping.values():
        assert hasattr(function, "__moa_wrapped__")
        assert not hasattr(function.__wrapped__, "__moa_wrapped__")


def test_flash_attention_gets_the_prompt_expert_through_the_same_wrapper(monkeypatch):
    """No flash kernel runs here; a stand-in with its signature shows what it would be called with."""
    model = trained(attn_implementation="sdpa")
    expected = logits(model)
    plain = AttentionInterface._global_mapping["sdpa"].__wrapped__
    calls = []

    def flash(module, query, key, value, attention_mask, dropout=0.0, scaling=None, sliding_window=None, **kwargs):
        calls.append(attention_mask)
        return plain(module, query, key, value, None, dropout=dropout, scaling=scaling, is_causal=True)

    monkeypatch.setitem(AttentionInterface._global_mapping, "flash_attention_2", flash)
    prompt_attention.install_prompt_attention(model.base_model.model.model.layers[0].self_attn)
    assert AttentionInterface._global_mapping["flash_attention_2"].__wrapped__ is flash
    model.config._attn_implementation = "flash_attention_2"
    torch.testing.assert_close(logits(model), expected, **CLOSE)
    assert calls == [None, None]


def test_models_without_a_prompt_expert_are_served_unchanged():
    base = tiny_model("llama")
    expected = logits(base)
    trained("llama")
    assert torch.equal(logits(base), expected)


@families
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_packed_rows_equal_separate_rows(family, implementation):
    """Positions that start again are all that separates the sequences of a row, as in TRL's packing."""
    model = trained(family, attn_implementation=implementation)
    rows = [tiny_batch(rows=1, tokens=length, seed=length)["input_ids"] for length in (5, 3, 7)]
    positions = torch.cat([torch.arange(row.shape[1])[None] for row in rows], dim=1)
    packed = logits(model, {"input_ids": torch.cat(rows, dim=1), "position_ids": positions}, use_cache=False)
    separate = torch.cat([logits(model, {"input_ids": row}) for row in rows], dim=1)
    torch.testing.assert_close(packed, separate, **CLOSE)


class Recorder:
    """Stands in the registry for sdpa and keeps what it is called with, in the first block."""

    def __init__(self) -> None:
        self.function = AttentionInterface._global_mapping["sdpa"]
        self.calls: list[dict[str, Any]] = []

    def __call__(self, module, query, key, value, *args, **kwargs):
        scaling = kwargs.get("scaling")
        self.calls.append({"query": query, "key": key, "value": value, "scaling": scaling})
        return self.function(module, query, key, value, *args, **kwargs)


@pytest.mark.parametrize("family", [*FAMILIES, "granite", "opt", "phi"])
def test_what_the_prompt_expert_adds(family, monkeypatch):
    """The formula, with keys and values made by the attention module itself: at position 0 it does not rotate."""
    config = MoAConfig(experts=[{"type": "prompt", "length": 3}], task_type="CAUSAL_LM")
    model = trained(family, config, attn_implementation="sdpa")
    block = next(module for module in model.modules() if hasattr(module, "moa"))
    expert = block.moa.moa_experts["default"]["prompt_expert"]
    attention = block.get_submodule(block.moa.architecture.attention)
    recorder = Recorder()
    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", recorder)
    outputs = []
    output_layer = block.get_submodule(block.moa.architecture.roles["o"])
    handle = output_layer.register_forward_pre_hook(lambda module, args: outputs.append(args[0]))
    with record_routing(model) as record:
        logits(model)
    call = recorder.calls[0]
    with model.disable_adapter():
        logits(model)
        recorder.calls.clear()

        def feed_prompt(module, args, kwargs):
            prompt = expert.embedding.detach()[:, None]
            return ((prompt, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": prompt})

        attention.register_forward_pre_hook(feed_prompt, with_kwargs=True)
        logits(model, {"input_ids": torch.ones(3, 1, dtype=torch.long)})
    handle.remove()
    key, value = (recorder.calls[0][name][:, :, 0].transpose(0, 1) for name in ("key", "value"))
    groups = call["query"].shape[1] // key.shape[0]
    key, value = key.repeat_interleave(groups, dim=0), value.repeat_interleave(groups, dim=0)
    scaling = call["query"].shape[-1] ** -0.5 if call["scaling"] is None else call["scaling"]
    probabilities = torch.softmax(scaling * torch.einsum("bhtk,hpk->bhtp", call["query"], key), dim=-1)
    weight = next(iter(record.routings.values()))[0].weights
    added = torch.einsum("bhtp,hpk->bthk", probabilities * expert.gate.detach(), value).flatten(2) * weight
    assert added.abs().max() > 1e-2
    torch.testing.assert_close(outputs[0] - outputs[1], added, atol=1e-5, rtol=1e-4)


def test_prompt_states_of_a_model_loaded_in_inference_mode(tmp_path):
    trained("llama").save_pretrained(tmp_path)
    ids = tiny_batch()["input_ids"]
    with torch.inference_mode():
        model = PeftModel.from_pretrained(tiny_model("llama"), tmp_path).eval()
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
    assert out.shape[1] > ids.shape[1]
