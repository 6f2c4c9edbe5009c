"""Recipes: types, overrides, unknown keys with a suggestion, and reading back what was written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from moa_peft.errors import UserError
from moa_peft.training import option_checks
from moa_peft.training.arguments import MoATrainingArguments
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


def test_the_bare_word_no_is_a_strategy() -> None:
    """YAML 1.1 reads it as false."""
    recipe = parse_recipe({**BASE, "save_strategy": False, "bf16": False})
    assert recipe.trainer == {"save_strategy": "no", "bf16": False}


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
        ({"output_dir": 5}, [], ["output_dir: 5 is no text", "'5'"]),
        ({"model": True}, [], ["model: True is no text", "'true'"]),
        ({"output_dir": ["out"]}, [], ["output_dir: ['out'] is a list"]),
        ({"data": {"path": "x", "max_length": [3]}}, [], ["data.max_length: [3] is a list"]),
        ({"max_steps": {"a": 1}}, [], ["max_steps: {'a': 1} is a block"]),
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


def test_the_best_checkpoint_needs_validation_and_checkpoints(tmp_path: Path) -> None:
    settings = {**BASE, "load_best_model_at_end": True, "report_to": "none", "use_cpu": True}
    with pytest.raises(UserError, match="data.validation_size is 0"):
        parse_recipe(settings).training_arguments(checkpoints=tmp_path, has_validation=False)
    for name in ("eval_strategy", "save_strategy"):
        recipe = parse_recipe({**settings, "save_strategy": "epoch", "eval_strategy": "epoch", name: "no"})
        with pytest.raises(UserError, match=f"{name}: 'no'"):
            recipe.training_arguments(checkpoints=tmp_path, has_validation=True)
    assert parse_recipe(settings).training_arguments(checkpoints=tmp_path, has_validation=True).load_best_model_at_end


def test_a_pushed_run_is_named_after_its_folder(tmp_path: Path) -> None:
    recipe = parse_recipe({**BASE, "push_to_hub": True, "report_to": "none", "use_cpu": True})
    arguments = recipe.training_arguments(checkpoints=tmp_path / "my-run" / "checkpoints", has_validation=False)
    assert arguments.hub_model_id == "my-run"


@pytest.mark.parametrize("is_offline", [True, False])
def test_a_push_that_cannot_be_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_offline: bool) -> None:
    def whoami(self: Any) -> None:
        raise OSError("no token found")

    monkeypatch.setattr(option_checks, "is_offline_mode", lambda: is_offline)
    monkeypatch.setattr(option_checks.HfApi, "whoami", whoami)
    arguments = MoATrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    option_checks.check_hub(arguments)
    arguments.push_to_hub = True
    with pytest.raises(UserError, match="offline mode is on" if is_offline else "no token found"):
        option_checks.check_hub(arguments)


@pytest.mark.parametrize(
    "settings",
    [
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-6}},
        {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"patience": 2}},
        {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 5}},
        {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 2}},
        {"optim": "ademamix", "optim_args": "beta3=0.999, alpha=4.0"},
        {"optim": "adafactor"},
    ],
    ids=str,
)
def test_optimizers_and_schedules_that_work_are_let_through(tmp_path: Path, settings: dict[str, Any]) -> None:
    recipe = parse_recipe({**BASE, **settings, "learning_rate": 1e-3, "report_to": "none", "use_cpu": True})
    arguments = recipe.training_arguments(checkpoints=tmp_path, has_validation=True)
    option_checks.check_optimizer(arguments, torch.nn.Linear(2, 2))


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
        ("--max_steps=0", "max_steps"),
        ("--save_steps=0", "save_steps"),
        ("--dataloader_num_workers=-1", "dataloader_num_workers"),
        ("--metric_for_best_model=accuracy", "metric_for_best_model"),
        ("--optim_args=a", "optim_args"),
        ("--optim_args=a=1,b", "optim_args"),
    ],
)
def test_trainer_options_out_of_range(override: str, words: str) -> None:
    content = {"model": "m", "output_dir": "o", "data": "d.json"}
    with pytest.raises(UserError, match=f"{words}: .* is not allowed"):
        parse_recipe(content, overrides=[override])


def test_an_unknown_key_without_a_near_one_names_the_help() -> None:
    with pytest.raises(UserError, match="--help` lists the keys"):
        parse_recipe({"model": "m", "output_dir": "o", "data": "d.json", "qqqqqq": 1})
