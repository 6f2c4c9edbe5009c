"""Generation through every kind of cache, and by beam search."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from tests.models import tiny_batch
from tests.native import soft, sparse, trained

CONFIGS = {
    "soft": soft,
    "sparse": sparse,
    "sequence": lambda: soft(granularity="sequence"),
}
FAMILIES = ("llama", "qwen3", "gemma3_text", "phi3", "gpt_neox")
SETTINGS = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
by_config = pytest.mark.parametrize("kind", CONFIGS)
by_family = pytest.mark.parametrize("family", FAMILIES)


def prompts(*, padded: bool = True) -> dict[str, torch.Tensor]:
    batch = {key: value for key, value in tiny_batch(rows=3, tokens=6).items() if key != "labels"}
    if padded:
        batch["attention_mask"][1, :3] = 0
    return batch


@by_config
@by_family
def test_static_cache_equals_dynamic_cache(family, kind):
    model = trained(family, CONFIGS[kind]())
    options = SETTINGS | {"output_logits": True, "return_dict_in_generate": True, "disable_compile": True}
    dynamic = model.generate(**prompts(), **options)
    static = model.generate(**prompts(), **options, cache_implementation="static")
    assert isinstance(static.past_key_values, StaticCache)
    assert isinstance(dynamic.past_key_values, DynamicCache)
    assert torch.equal(static.sequences, dynamic.sequences)
    torch.testing.assert_close(torch.stack(static.logits), torch.stack(dynamic.logits), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["soft", "sparse"])
@by_family
def test_beam_search_with_and_without_a_cache(family, kind):
    model = trained(family, CONFIGS[kind]())
    options = SETTINGS | {"num_beams": 3, "num_return_sequences": 3}
    cached = model.generate(**prompts(), **options)
    assert cached.shape[0] == 9
    assert torch.equal(cached, model.generate(**prompts(), **options, use_cache=False))


@by_config
@by_family
def test_beams_of_a_row_do_not_depend_on_the_other_rows(family, kind):
    model = trained(family, CONFIGS[kind]())
    options = SETTINGS | {"num_beams": 3, "num_return_sequences": 3}
    batch = prompts(padded=False)
    together = model.generate(**batch, **options)
    alone = [model.generate(**{k: v[row : row + 1] for k, v in batch.items()}, **options) for row in range(3)]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("kind", ["soft", "sparse"])
def test_a_cache_goes_on_where_it_stopped(kind):
    """A conversation: the second call continues the cache of the first with further tokens."""
    model = trained(config=CONFIGS[kind]())
    first = model.generate(**prompts(padded=False), **SETTINGS, return_dict_in_generate=True)
    ids = torch.cat([first.sequences, tiny_batch(rows=3, tokens=2, seed=9)["input_ids"]], dim=1)
    further = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    expected = model.generate(**further, **SETTINGS)
    assert torch.equal(model.generate(**further, past_key_values=first.past_key_values, **SETTINGS), expected)


@pytest.mark.parametrize("kind", ["soft", "sparse"])
def test_chunked_prefill_equals_one_prefill(kind):
    model = trained(config=CONFIGS[kind]())
    whole = model.generate(**prompts(padded=False), **SETTINGS)
    chunked = model.generate(**prompts(padded=False), **SETTINGS, prefill_chunk_size=2)
    assert torch.equal(chunked, whole)


def test_prompt_keys_are_computed_once_per_generation(monkeypatch):
    from moa_peft.prompt_attention import PromptSite

    calls = []
    project = PromptSite._project

    def counting(self, *args):
        calls.append(self)
        return project(self, *args)

    monkeypatch.setattr(PromptSite, "_project", counting)
    model = trained()
    model.generate(**prompts(), **SETTINGS)
    assert len(calls) == 2, "once in each of two blocks"
    model.generate(**prompts(), **SETTINGS)
    assert len(calls) == 4


def test_a_cache_does_not_keep_the_prompt_of_changed_weights():
    model = trained()
    ids = prompts(padded=False)["input_ids"]

    def next_logits(*, changed_before: bool) -> torch.Tensor:
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(ids[:, :-1], past_key_values=cache)
            for name, parameter in model.named_parameters():
                if changed_before and name.endswith("prompt_expert.embedding"):
                    parameter.mul_(-1.0)
            return model(ids[:, -1:], past_key_values=cache).logits

    kept = next_logits(changed_before=False)
    assert torch.equal(kept, next_logits(changed_before=False))
    assert not torch.allclose(kept, next_logits(changed_before=True), atol=1e-3)
