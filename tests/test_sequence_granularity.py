"""Sequence granularity: what is pooled, where the routing lives in generation, and what is refused."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import GenerationConfig

from moa_peft import MoAConfig, UserError, record_routing
from moa_peft.pooling import plan_pooling, prompt_mask
from tests.matrix import randomise_adapter
from tests.models import tiny_batch, tiny_model

GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def sequence_model(family: str = "llama", **knobs: object) -> PeftModel:
    config = MoAConfig.sparse(granularity="sequence", prompt=True, task_type="CAUSAL_LM", **knobs)
    model = get_peft_model(tiny_model(family), config)
    randomise_adapter(model)
    return model.eval()


def routing_of(model: PeftModel, **batch: torch.Tensor) -> torch.Tensor:
    with record_routing(model) as record, torch.no_grad():
        model(**batch)
    return record.weights()


def test_only_the_prompt_is_pooled():
    model = sequence_model()
    batch = tiny_batch()
    weights = routing_of(model, **batch)
    assert torch.equal(weights, weights[:, :, :1].expand_as(weights)), "one routing per sequence"
    changed = {**batch, "input_ids": batch["input_ids"].clone()}
    changed["input_ids"][:, 5:] = 4
    first_block = routing_of(model, **changed)[0]
    assert torch.equal(first_block, weights[0]), "the answer must not be seen"
    changed["input_ids"][0, 1] = 5
    first_block = routing_of(model, **changed)[0]
    assert not torch.equal(first_block[0], weights[0][0])
    assert torch.equal(first_block[1:], weights[0][1:])


def test_the_pooled_routing_is_the_router_of_the_mean():
    model = sequence_model(router_input="residual")
    batch = tiny_batch()
    weights = routing_of(model, **batch)[0]
    base = model.get_base_model().model
    mean = base.embed_tokens(batch["input_ids"])[:, :3].mean(1)
    expected = base.layers[0].moa.moa_router["default"](mean).weights
    torch.testing.assert_close(weights[:, 0], expected, atol=1e-6, rtol=1e-5)


def test_the_router_learns_from_the_pooled_routing():
    model = sequence_model().train()
    model(**tiny_batch()).loss.backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert p.grad is not None and p.grad.abs().sum() > 0, name


def test_decoding_keeps_the_routing_of_the_prompt():
    model = sequence_model()
    ids = tiny_batch(tokens=5)["input_ids"]
    with record_routing(model) as record:
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **GREEDY)
    for routings in record.routings.values():
        assert len(routings) == GREEDY["max_new_tokens"]
        for later in routings[1:]:
            assert torch.equal(later.weights, routings[0].weights[:, :1])


def test_generation_equals_scoring_the_text_with_its_prompt():
    model = sequence_model()
    ids = tiny_batch(tokens=5)["input_ids"]
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), **GREEDY, output_logits=True, return_dict_in_generate=True
    )
    mask = torch.zeros_like(out.sequences)
    mask[:, :5] = 1
    with torch.no_grad():
        scored = model(input_ids=out.sequences, prompt_mask=mask).logits[:, 4:-1]
    torch.testing.assert_close(torch.stack(out.logits, 1), scored, atol=1e-4, rtol=1e-4)


def test_a_conversation_keeps_the_routing_of_its_first_prompt():
    """Further turns on the cache of the first: what the cache holds was computed with that routing."""
    model = sequence_model()
    first = tiny_batch(rows=2, tokens=5)["input_ids"]
    out = model.generate(
        input_ids=first, attention_mask=torch.ones_like(first), **GREEDY, return_dict_in_generate=True
    )
    further = torch.cat([out.sequences, tiny_batch(rows=2, tokens=3, seed=4)["input_ids"]], dim=1)
    arguments = {"input_ids": further, "attention_mask": torch.ones_like(further), **GREEDY}
    answer = model.generate(
        **arguments, past_key_values=out.past_key_values, output_logits=True, return_dict_in_generate=True
    )
    mask = torch.zeros_like(answer.sequences)
    mask[:, :5] = 1
    with torch.no_grad():
        scored = model(input_ids=answer.sequences, prompt_mask=mask).logits[:, further.shape[1] - 1 : -1]
    torch.testing.assert_close(torch.stack(answer.logits, 1), scored, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_beam_search_takes_the_routing_along(cache: str):
    """Every beam of a batch must score as its own text does, though beams change rows at every step."""
    model = sequence_model()
    ids = tiny_batch(rows=2, tokens=5)["input_ids"]
    settings = {**GREEDY, "num_beams": 3, "num_return_sequences": 3, "cache_implementation": cache}
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        **settings,
        output_scores=True,
        return_dict_in_generate=True,
        length_penalty=0.0,
    )
    mask = torch.zeros_like(out.sequences)
    mask[:, :5] = 1
    with torch.no_grad():
        scored = model(input_ids=out.sequences, prompt_mask=mask).logits[:, 4:-1].log_softmax(-1)
    total = scored.gather(-1, out.sequences[:, 5:, None]).sum((1, 2))
    torch.testing.assert_close(out.sequences_scores, total, atol=1e-3, rtol=1e-4)


def test_rows_do_not_influence_each_other():
    model = sequence_model()
    ids = tiny_batch(rows=2, tokens=5)["input_ids"]
    together = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **GREEDY)
    alone = model.generate(input_ids=ids[1:], attention_mask=torch.ones_like(ids[1:]), **GREEDY)
    assert torch.equal(together[1:], alone)


def test_packed_segments_are_pooled_apart():
    model = sequence_model()
    first, second = tiny_batch(rows=1, tokens=7, seed=2), tiny_batch(rows=1, tokens=9, seed=3)
    second["labels"][:, 3:5] = -100
    packed = {key: torch.cat([first[key], second[key]], dim=1) for key in ("input_ids", "labels")} | {
        "position_ids": torch.cat([torch.arange(7), torch.arange(9)])[None]
    }
    weights = routing_of(model, **packed)[0]
    torch.testing.assert_close(weights[:, :7], routing_of(model, **first)[0])
    torch.testing.assert_close(weights[:, 7:], routing_of(model, **second)[0])
    assert not torch.allclose(weights[:, 0], weights[:, 7])


def test_prompt_mask_helper():
    labels = torch.tensor([[-100, -100, 5, -100, 6], [-100, -100, -100, 7, 8]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    assert prompt_mask(labels, mask).tolist() == [
        [True, True, False, False, False],
        [False, False, True, False, False],
    ]


def test_an_inactive_adapter_asks_nothing_of_the_caller():
    model = sequence_model()
    ids = tiny_batch()["input_ids"]
    with model.disable_adapter():
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **GREEDY)
        model.train()
        assert model(input_ids=ids).logits.shape[:2] == ids.shape
    model.add_adapter("token", MoAConfig.soft(task_type="CAUSAL_LM"))
    model.set_adapter("token")
    assert model(input_ids=ids).logits.shape[:2] == ids.shape
    model.delete_adapter("default")
    assert model(input_ids=ids).logits.shape[:2] == ids.shape


class TestRefusals:
    """Each says what to pass instead, and none computes something else silently."""

    def test_training_without_labels(self):
        model = sequence_model().train()
        with pytest.raises(UserError, match="prompt_mask"):
            model(input_ids=tiny_batch()["input_ids"])

    def test_generation_without_cache(self):
        model = sequence_model()
        with pytest.raises(UserError, match="use_cache"):
            model.generate(input_ids=tiny_batch()["input_ids"], use_cache=False, **GREEDY)

    def test_a_row_without_prompt(self):
        model = sequence_model()
        batch = tiny_batch()
        batch["labels"] = batch["input_ids"].clone()
        with pytest.raises(UserError, match="no prompt"):
            model(**batch)

    def test_a_cache_filled_without_the_adapter(self):
        model = sequence_model()
        ids = tiny_batch()["input_ids"]
        with model.disable_adapter():
            cache = model(input_ids=ids, use_cache=True).past_key_values
        with pytest.raises(UserError, match="no routing"):
            model(input_ids=ids[:, :1], past_key_values=cache)

    @pytest.mark.parametrize(("tokens", "size"), [(5, 2), (5, 4), (3, 1)])
    @pytest.mark.parametrize("where", ["argument", "generation_config"])
    def test_a_prompt_in_chunks(self, tokens: int, size: int, where: str):
        model = sequence_model()
        ids = tiny_batch(tokens=tokens)["input_ids"]
        if where == "argument":
            settings = {**GREEDY, "prefill_chunk_size": size}
        else:
            settings = {"generation_config": GenerationConfig(**GREEDY, prefill_chunk_size=size)}
        with pytest.raises(UserError, match="prefill_chunk_size"):
            model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
        with model.disable_adapter():
            model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)

    @pytest.mark.parametrize("cache", ["dynamic", "static"])
    def test_a_prompt_in_chunks_without_a_peft_model(self, cache: str):
        """transformers' own door, where generate is not ours to look into."""
        model = sequence_model().get_base_model()
        ids = tiny_batch(tokens=6)["input_ids"]
        settings = {**GREEDY, "prefill_chunk_size": 4, "cache_implementation": cache}
        with pytest.raises(UserError, match="prefill_chunk_size"):
            model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)

    def test_a_cache_that_holds_the_beginning_of_the_prompt(self):
        model = sequence_model()
        ids = tiny_batch(tokens=6)["input_ids"]
        with torch.no_grad():
            cache = model(input_ids=ids[:, :3], use_cache=True).past_key_values
        with pytest.raises(UserError, match="in pieces"):
            model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **GREEDY)

    def test_proposed_tokens_beside_the_prompt(self):
        model = sequence_model()
        ids = tiny_batch(rows=1, tokens=3)["input_ids"].repeat(1, 3)
        with pytest.raises(UserError, match="assisted generation"):
            model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), prompt_lookup_num_tokens=2, **GREEDY)

    def test_a_mask_that_does_not_tell_padding(self):
        model = sequence_model()
        ids = tiny_batch()["input_ids"]
        with pytest.raises(UserError, match="two or four dimensions"):
            plan_pooling(model, {"input_ids": ids, "attention_mask": torch.ones(3, 9, 9)})

    def test_a_family_that_cannot(self):
        with pytest.raises(UserError, match="'token'"):
            get_peft_model(tiny_model("falcon"), MoAConfig.soft(granularity="sequence"))
