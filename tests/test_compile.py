"""torch.compile without graph breaks of ours: in training and in decoding with a static cache.

The backend is ``eager``: it traces the whole graph and runs it as it is, which is what can break here; generating code
takes minutes and tests the compiler.
"""

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, CompileConfig, StaticCache

from tests.matrix import randomise_adapter
from tests.models import randomise, tiny_batch, tiny_config
from tests.native import gradients, logits, soft, sparse

CONFIGS = {"soft": soft, "sparse": sparse}
by_config = pytest.mark.parametrize("kind", CONFIGS)
by_family = pytest.mark.parametrize("family", ["llama", "qwen3"])
CLOSE = {"atol": 1e-5, "rtol": 1e-4}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def one_block(family: str, kind: str) -> PeftModel:
    """Tracing takes time in proportion to the blocks, and they are alike."""
    config = tiny_config(family)
    values = {key: value for key, value in config.to_dict().items() if key != "layer_types"}
    base = AutoModelForCausalLM.from_config(type(config)(**(values | {"num_hidden_layers": 1})))
    randomise(base, std=0.15)
    model = get_peft_model(base, CONFIGS[kind]())
    randomise_adapter(model)
    return model.eval()


@by_config
@by_family
def test_training(family, kind):
    model = one_block(family, kind).train()
    model(**tiny_batch()).loss.backward()
    expected = gradients(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    compiled(**tiny_batch()).loss.backward()
    torch.testing.assert_close(gradients(model), expected, **CLOSE)


@by_config
@by_family
def test_decoding_with_a_static_cache(family, kind):
    model = one_block(family, kind)
    ids = tiny_batch(rows=2, tokens=7)["input_ids"]
    expected = logits(model, {"input_ids": ids}, use_cache=False)

    def prefill() -> StaticCache:
        cache = StaticCache(config=model.config, max_cache_len=16)
        with torch.no_grad():
            model(input_ids=ids[:, :4], past_key_values=cache)
        return cache

    compiled = torch.compile(model, backend="eager", fullgraph=True)
    cache = prefill()
    with torch.no_grad():
        for position in range(4, 7):
            output = compiled(
                input_ids=ids[:, position : position + 1],
                position_ids=torch.full((2, 1), position),
                past_key_values=cache,
            )
            torch.testing.assert_close(output.logits[:, 0], expected[:, position], **CLOSE)


@pytest.mark.parametrize(("family", "kind"), [("llama", "sparse"), ("qwen3", "soft")])
def test_generate_compiles_its_own_decoding(family, kind):
    """What transformers does by itself on an accelerator: a compiled forward and a static cache."""
    model = one_block(family, kind)
    batch = {key: value for key, value in tiny_batch(rows=2, tokens=5).items() if key != "labels"}
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(**batch, **settings)
    config = CompileConfig(backend="eager", fullgraph=True, mode=None)
    config._compile_all_devices = True
    output = model.generate(**batch, **settings, cache_implementation="static", compile_config=config)
    assert torch.equal(output, expected)


def test_switching_off_and_on_again():
    model = one_block("llama", "soft")
    expected = logits(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled), expected, **CLOSE)
    with model.disable_adapter():
        base = logits(model)
        torch.testing.assert_close(logits(compiled), base, **CLOSE)
    assert not torch.allclose(base, expected, atol=1e-3)
    torch.testing.assert_close(logits(compiled), expected, **CLOSE)
