"""Recipes: types, overrides, unknown keys with a suggestion, and reading back what was written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moa_peft.errors import UserError
from moa_peft.training.recipe import load_recipe, parse_overrides, parse_recipe

BASE: dict[str, Any] = {"model": "packaged", "output_dir": "out", "data": "train.json"}


def test_keys_become_typed_values() -> None:
    recipe = parse_recipe(
        {**BASE, "learning_rate": "1e-3", "bf16": False, "lr_scheduler_kwargs": {"min_lr": 0.1}, "moa": {"rank": 4}},
        overrides=[
            "--moa.rank",
            "16",
            "--moa.max-threshold=5e-1",
            "--data.limit",
            "7",
            "--resume",
            "--max_steps",
            "9",
        ],
    )
    assert recipe.trainer == {
        "learning_rate": 0.001,
        "bf16": False,
        "lr_scheduler_kwargs": {"min_lr": 0.1},
        "max_steps": 9,
    }
    assert recipe.moa == {"rank": 16, "max_threshold": 0.5}
    assert recipe.data.path == "train.json" and recipe.data.limit == 7
    assert recipe.options.resume and not recipe.options.overwrite


def test_a_recipe_reads_back_equal() -> None:
    recipe = parse_recipe({**BASE, "seed": 3, "data": {"path": "a", "validation_size": 12}, "report_to": ["none"]})
    again = parse_recipe(recipe.to_dict())
    assert again == recipe
    assert "resume" not in recipe.to_dict() and recipe.to_dict()["data"]["validation_size"] == 12


def test_null_is_the_default() -> None:
    assert parse_recipe({**BASE, "seed": None, "dtype": None}) == parse_recipe(BASE)


@pytest.mark.parametrize(
    ("change", "words", "parts"),
    [
        ({"lerning_rate": 1}, [], ["'lerning_rate'", "'learning_rate'"]),
        ({"limit": 3}, [], ["'limit'", "'data.limit'"]),
        ({}, ["--data.pth", "x"], ["'data.pth'", "'data.path'"]),
        ({"data": {"path": "x", "template": "foo"}}, [], ["data.template", "'foo'", "'alpaca'"]),
        ({"learning_rate": "fast"}, [], ["learning_rate", "'fast'"]),
        ({"quantization": "3bit"}, [], ["quantization", "'3bit'", "'4bit'"]),
        ({"do_train": True}, [], ["do_train"]),
        ({"hub_token": "secret"}, [], ["hub_token", "HF_TOKEN"]),
        ({"moa": 3}, [], ["moa", "block"]),
        ({"model": None}, [], ["model must be set"]),
        ({"data": None}, [], ["data.path must be set"]),
        ({"data": {"path": "x", "validation_size": 1.5}}, [], ["validation_size", "1.5"]),
        ({"data": {"path": "x", "max_length": 1}}, [], ["data.max_length", "at least 2"]),
        ({"overwrite": True}, ["--resume"], ["overwrite and resume"]),
        ({"save_total_limit": 1}, [], ["save_total_limit"]),
        ({}, ["stray"], ["'stray'"]),
    ],
)
def test_mistakes_name_the_key_and_what_is_allowed(change: dict[str, Any], words: list[str], parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        parse_recipe({**BASE, **change}, overrides=words)
    for part in parts:
        assert part in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 3


def test_overrides_are_nested() -> None:
    words = ["--a.b", "1", "--flag", "--c-d=x=y", "--moa.experts", "[{type: lora, rank: 2}]"]
    assert parse_overrides(words) == {
        "a": {"b": "1"},
        "flag": "true",
        "c_d": "x=y",
        "moa": {"experts": [{"type": "lora", "rank": 2}]},
    }


@pytest.mark.parametrize(("content", "part"), [("- a\n- b\n", "a list"), ("", "empty"), ("a: [", "no valid YAML")])
def test_files_that_are_no_recipe(content: str, part: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(content)
    with pytest.raises(UserError, match=part):
        load_recipe(file)
    with pytest.raises(UserError, match="there is no file"):
        load_recipe(tmp_path / "missing.yaml")


def test_validation_follows_the_checkpoints(tmp_path: Path) -> None:
    recipe = parse_recipe({**BASE, "save_strategy": "steps", "save_steps": 7, "report_to": "none", "use_cpu": True})
    arguments = recipe.training_arguments(checkpoints=tmp_path, has_validation=True)
    assert (arguments.eval_strategy, arguments.eval_steps, arguments.load_best_model_at_end) == ("steps", 7, True)
    without = recipe.training_arguments(checkpoints=tmp_path, has_validation=False)
    assert (without.eval_strategy, without.load_best_model_at_end) == ("no", False)
    with pytest.raises(UserError, match="validation_size"):
        parse_recipe({**BASE, "eval_strategy": "steps"}).training_arguments(checkpoints=tmp_path, has_validation=False)


def test_warmup_in_epochs(tmp_path: Path) -> None:
    recipe = parse_recipe({**BASE, "num_train_epochs": 3, "warmup_epochs": 1, "report_to": "none", "use_cpu": True})
    arguments = recipe.training_arguments(checkpoints=tmp_path, has_validation=False)
    assert arguments.get_warmup_steps(300) == 100
    both = parse_recipe({**BASE, "warmup_epochs": 1, "warmup_steps": 5, "report_to": "none"})
    with pytest.raises(UserError, match="warmup_steps"):
        both.training_arguments(checkpoints=tmp_path, has_validation=False)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("--learning_rate=-1", "learning_rate"),
        ("--learning_rate=nan", "learning_rate"),
        ("--per_device_train_batch_size=0", "per_device_train_batch_size"),
        ("--gradient_accumulation_steps=0", "gradient_accumulation_steps"),
        ("--weight_decay=-1", "weight_decay"),
        ("--adam_beta2=2", "adam_beta2"),
        ("--seed=-1", "seed"),
        ("--num_train_epochs=-1", "num_train_epochs"),
        ("--label_smoothing_factor=2", "label_smoothing_factor"),
    ],
)
def test_trainer_options_out_of_range(override: str, words: str) -> None:
    content = {"model": "m", "output_dir": "o", "data": "d.json"}
    with pytest.raises(UserError, match=f"{words}: .* is not allowed"):
        parse_recipe(content, overrides=[override])


def test_an_unknown_key_without_a_near_one_names_the_help() -> None:
    with pytest.raises(UserError, match="--help` lists the keys"):
        parse_recipe({"model": "m", "output_dir": "o", "data": "d.json", "qqqqqq": 1})
