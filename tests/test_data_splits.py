"""Validation rows come from the training rows, without repeated questions on both sides; batches are padded."""

import pytest
import torch

from moa_peft.data import CompletionCollator, Example, Message, split_validation
from moa_peft.errors import UserError


def rows(questions, split=None):
    return [
        Example(messages=(Message("user", question), Message("assistant", "a")), split=split, where=f"row {number}")
        for number, question in enumerate(questions, start=1)
    ]


def test_split_is_deterministic_disjoint_and_of_the_size_asked_for():
    examples = rows([f"question {number}" for number in range(50)])
    train, validation = split_validation(examples, size=7, seed=1)
    assert (len(train), len(validation)) == (43, 7)
    assert sorted([*train, *validation], key=examples.index) == examples
    assert train == sorted(train, key=examples.index)
    assert split_validation(examples, size=7, seed=1) == (train, validation)
    assert split_validation(examples, size=7, seed=2)[1] != validation
    assert len(split_validation(examples, size=0.1, seed=1)[1]) == 5
    assert split_validation(examples, size=0, seed=1) == (examples, [])
    assert split_validation(examples, size=0.0, seed=1) == (examples, [])


@pytest.mark.parametrize("seed", range(5))
def test_repeated_questions_stay_on_one_side(seed):
    spellings = ["How many {}?", "how  many {}", "HOW MANY: {} ?!", "How\nmany ({})?"]
    examples = rows([spelling.format(f"item{number}") for spelling in spellings for number in range(10)])
    train, validation = split_validation(examples, size=9, seed=seed)
    assert len(validation) == 8  # two groups of four; a third would exceed the size
    numbers = [{"".join(filter(str.isdigit, e.question)) for e in side} for side in (train, validation)]
    assert not numbers[0] & numbers[1]


def test_questions_without_letters_are_not_one_group():
    assert len(split_validation(rows(["+ - ?", "* / ?", "!!", "??"]), size=2, seed=0)[1]) == 2


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (4, "leaves none to train on"),
        (9, "leaves none to train on"),
        (-1, "must not be negative"),
        (1.0, "must be at least 0 and below 1"),
        (-0.1, "must be at least 0 and below 1"),
        (float("nan"), "must be at least 0 and below 1"),
        (True, "must be a number of rows"),
        ("3", "must be a number of rows"),
    ],
)
def test_bad_sizes(size, message):
    with pytest.raises(UserError, match=message):
        split_validation(rows("abcd"), size=size, seed=0)


def test_splits_that_cannot_be_made():
    with pytest.raises(UserError, match="every question occurs more often"):
        split_validation(rows(["same", "Same", "same!"]), size=2, seed=0)
    with pytest.raises(UserError, match="row 1 is test data"):
        split_validation(rows("abcd", split="test"), size=1, seed=0)
    with pytest.raises(UserError, match="seed"):
        split_validation(rows("abcd"), size=1, seed=None)
    assert split_validation(rows("abcd", split="test"), size=0, seed=0)[1] == []


FEATURES = [
    {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "length": 3},
    {"input_ids": [8], "labels": [8], "length": 1},
]


def test_collator_pads_right_and_left():
    right = CompletionCollator(0)(FEATURES)
    assert right["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert right["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert right["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]
    assert {tensor.dtype for tensor in right.values()} == {torch.int64} and len(right) == 3
    left = CompletionCollator(0, 4, "left")(FEATURES)
    assert left["input_ids"].tolist() == [[0, 5, 6, 7], [0, 0, 0, 8]]
    assert left["attention_mask"].tolist() == [[0, 1, 1, 1], [0, 0, 0, 1]]
    assert left["labels"].tolist() == [[-100, -100, 6, 7], [-100, -100, -100, 8]]


def test_collator_never_trusts_the_padding_id_for_the_mask():
    batch = CompletionCollator(8, pad_to_multiple_of=2)([FEATURES[1]])
    assert batch["attention_mask"].tolist() == [[1, 0]] and batch["labels"].tolist() == [[8, -100]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pad_token_id": None}, "pad_token = tokenizer.eos_token"),
        ({"pad_token_id": 0, "padding_side": "middle"}, "allowed: right, left"),
        ({"pad_token_id": 0, "pad_to_multiple_of": 0}, "at least 1"),
    ],
)
def test_collator_settings(arguments, message):
    with pytest.raises(UserError, match=message):
        CompletionCollator(**arguments)
