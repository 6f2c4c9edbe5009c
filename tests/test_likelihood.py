"""Likelihoods of continuations equal those of a direct forward; options and reference answers are scored with them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import get_peft_model

from moa_peft import MoAConfig
from moa_peft.answers import AnswerFormat
from moa_peft.data import Example
from moa_peft.data.examples import Message, Source
from moa_peft.errors import UserError
from moa_peft.evaluation import (
    Continuation,
    Score,
    choose_options,
    continuation_likelihoods,
    reference_likelihoods,
)
from moa_peft.evaluation import likelihood as module
from moa_peft.evaluation.choosing import choice_of
from moa_peft.evaluation.run import ScoringSettings
from moa_peft.tasks import Task
from tests.tiny import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
OPTIONS = Task(
    name="ARC-Easy",
    suite="commonsense",
    format=AnswerFormat(kind="option", choices=("answer1", "answer2", "answer3")),
    max_new_tokens=40,
)


def adapted(method: str = "soft_moa", family: str = "llama") -> Any:
    """A tiny model with an adapter whose weights all count."""
    model = get_peft_model(tiny_model(family), MoAConfig.preset(method, rank=2, task_type="CAUSAL_LM"))
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def direct(model: Any, prompt: list[int], tokens: list[int], **more: Any) -> float:
    ids = torch.tensor([[*prompt, *tokens]])
    with torch.inference_mode():
        log_probs = model(input_ids=ids, **more).logits[0].log_softmax(-1)
    return sum(log_probs[len(prompt) - 1 + place, token].item() for place, token in enumerate(tokens))


CONTINUATIONS = [
    Continuation([5, 6, 7], [8, 9]),
    Continuation([5, 6, 7], [8, 10]),
    Continuation([5, 6, 7], [11]),
    Continuation([5, 6], [7, 11]),
    Continuation([4, 9, 12, 13, 40, 41, 42], [50, 51, 52, 53, 54]),
    Continuation([90], [91]),
]


@pytest.mark.parametrize("method", ["soft_moa", "sparse_moa", "moe_lora_topk"])
@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_equals_a_direct_forward(method: str, batch_size: int) -> None:
    model = adapted(method)
    found = continuation_likelihoods(model, CONTINUATIONS, batch_size=batch_size)
    for continuation, likelihood in zip(CONTINUATIONS, found, strict=True):
        expected = direct(model, list(continuation.prompt), list(continuation.tokens))
        assert likelihood.log_prob == pytest.approx(expected, abs=2e-5)
        assert likelihood.num_tokens == len(continuation.tokens)
    with model.disable_adapter():
        plain = continuation_likelihoods(model, CONTINUATIONS, batch_size=batch_size)
    assert all(abs(a.log_prob - b.log_prob) > 1e-3 for a, b in zip(found, plain))


def test_one_routing_per_sequence_is_that_of_the_prompt() -> None:
    model = adapted("instance_moa")
    found = continuation_likelihoods(model, CONTINUATIONS, batch_size=16)
    for continuation, likelihood in zip(CONTINUATIONS, found, strict=True):
        prompt, tokens = list(continuation.prompt), list(continuation.tokens)
        mask = torch.zeros(1, len(prompt) + len(tokens), dtype=torch.bool)
        mask[0, : len(prompt)] = True
        expected = direct(model, prompt, tokens, prompt_mask=mask)
        assert likelihood.log_prob == pytest.approx(expected, abs=2e-5)
    # Pooling over the answer too, as a forward without the mask does, is something else.
    assert abs(direct(model, [4, 9, 12], [50, 51, 52, 53]) - continuation_likelihoods(
        model, [Continuation([4, 9, 12], [50, 51, 52, 53])], batch_size=1
    )[0].log_prob) > 1e-4  # fmt: skip


def test_models_without_an_adapter_and_with_one_of_transformers() -> None:
    base = tiny_model()
    (found,) = continuation_likelihoods(base, CONTINUATIONS[4:5], batch_size=1)
    expected = direct(base, list(CONTINUATIONS[4].prompt), list(CONTINUATIONS[4].tokens))
    assert found.log_prob == pytest.approx(expected, abs=2e-5)
    base.add_adapter(MoAConfig.preset("instance_moa", rank=2, task_type="CAUSAL_LM"))
    assert module.routes_by_prompt(base) and not module.routes_by_prompt(adapted())
    continuation_likelihoods(base, CONTINUATIONS, batch_size=2)


def test_what_differs_in_its_last_token_is_read_once() -> None:
    model = adapted()
    rows: list[int] = []
    handle = model.register_forward_pre_hook(
        lambda _module, args, kwargs: rows.append(kwargs["input_ids"].shape[0]), with_kwargs=True
    )
    continuation_likelihoods(model, CONTINUATIONS[:2], batch_size=16)
    handle.remove()
    assert rows == [1]


def test_batches_keep_to_the_limit_of_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()
    whole = continuation_likelihoods(model, CONTINUATIONS, batch_size=16)
    monkeypatch.setattr(module, "_MAX_POSITIONS", 5)
    monkeypatch.setattr(module, "_CHUNK", 2)
    batches: list[int] = []
    parts = continuation_likelihoods(
        model,
        CONTINUATIONS,
        batch_size=16,
        on_batch=lambda found: batches.append(sum(f.num_tokens for f in found.values())),
    )
    assert len(batches) > 2
    for first, second in zip(whole, parts):
        assert first.log_prob == pytest.approx(second.log_prob, abs=2e-5)


def _question(number: int, output: str = "") -> Example:
    text = f"Which of {'ab' * number}?\n\nAnswer format: answer1/answer2" + ("/answer3" if number % 2 else "")
    return Example(
        messages=(
            Message("user", text),
            Message("assistant", output or f"the correct answer is answer{1 + number % 2}"),
        ),
        source=Source(instruction=text, input=""),
        reference=f"answer{1 + number % 2}",
        where=f"row {number}",
    )


def test_the_likeliest_option_is_chosen() -> None:
    from moa_peft.data import render_prompt

    model = adapted()
    examples = [_question(number) for number in range(1, 6)]
    batches: list[int] = []
    found = choose_options(
        model, TOKENIZER, examples, task=OPTIONS, template="alpaca", batch_size=2,
        on_batch=lambda batch: batches.append(len(batch)),
    )  # fmt: skip
    assert sum(batches) == 5 and len(batches) > 1
    for example, choice in zip(examples, found, strict=True):
        assert choice.choices == OPTIONS.row_choices(example) and len(choice.choices) in (2, 3)
        prompt = render_prompt(example, TOKENIZER, template="alpaca")
        for option, log_likelihood in zip(choice.choices, choice.log_likelihoods, strict=True):
            tokens: Any = TOKENIZER(f"the correct answer is {option}", add_special_tokens=False)["input_ids"]
            assert log_likelihood == pytest.approx(direct(model, prompt, tokens), abs=1e-4)
        best = max(choice.log_likelihoods)
        assert choice.answers["choice"] == choice.choices[choice.log_likelihoods.index(best)]
        assert choice.correct["choice"] == (choice.answers["choice"] == example.reference)
    (again,) = choose_options(model, TOKENIZER, examples, task=OPTIONS, template="alpaca", indices=[3])
    assert again.index == 3 and again.log_likelihoods == pytest.approx(found[3].log_likelihoods, abs=1e-4)


def test_undecided_questions_are_counted() -> None:
    decided, undecided = (
        choice_of(index, "q", "answer1", ("answer1", "answer2"), values)
        for index, values in enumerate([(-1.0, -2.0), (-1.5, -1.5)])
    )
    assert not decided.is_tied and undecided.is_tied and undecided.answers == {"choice": "answer1"}
    assert Score([decided, undecided]).to_dict()["ties"] == 1


def test_options_are_checked() -> None:
    wrong = Example(
        messages=(Message("user", "q\n\nAnswer format: answer1/answer2"),), reference="answer3", where="row 9"
    )
    with pytest.raises(UserError, match="row 9 has the answer 'answer3'"):
        choose_options(adapted(), TOKENIZER, [wrong], task=OPTIONS, template="alpaca")
    numbers = Task(name="AddSub", suite="math", format=AnswerFormat(kind="number"), max_new_tokens=4)
    with pytest.raises(UserError, match="AddSub are numbers"):
        choose_options(adapted(), TOKENIZER, [_question(1)], task=numbers, template="alpaca")


def test_wrong_templates_and_batch_sizes_are_refused() -> None:
    bare = copy.deepcopy(TOKENIZER)
    bare.chat_template = None
    examples = [_question(1, "it is x")]
    with pytest.raises(UserError, match="no chat template"):
        reference_likelihoods(adapted(), bare, examples, template="chat")
    wrong: Any = "Alpaca"
    with pytest.raises(UserError, match="template='Alpaca' is unknown"):
        reference_likelihoods(adapted(), TOKENIZER, examples, template=wrong)
    with pytest.raises(UserError, match="template: 'Alpaca' is not allowed"):
        ScoringSettings(template=wrong, scorings=("nll",))
    with pytest.raises(UserError, match="batch_size: 0"):
        reference_likelihoods(adapted(), TOKENIZER, examples, template="alpaca", batch_size=0)


@pytest.mark.parametrize("template", ["alpaca", "chat"])
def test_reference_answers_are_scored_with_their_end_mark(template: Any) -> None:
    from moa_peft.data.templates import encode_examples

    model = adapted()
    examples = [_question(number, f"it is {'x' * number}") for number in (3, 1, 2)]
    found = reference_likelihoods(model, TOKENIZER, examples, template=template, batch_size=2)
    assert [record.index for record in found] == [0, 1, 2]
    for example, record in zip(examples, found, strict=True):
        encoded = encode_examples([example], TOKENIZER, template=template)[0]
        start, end = encoded.answers[-1]
        assert encoded.input_ids[end - 1] == TOKENIZER.eos_token_id
        expected = -direct(model, encoded.input_ids[:start], encoded.input_ids[start:end])
        assert record.nll == pytest.approx(expected, abs=1e-4) and record.num_tokens == end - start
        assert record.nll_per_token == pytest.approx(record.nll / record.num_tokens)
