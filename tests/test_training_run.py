"""Whole runs on a tiny model: what is written, resuming, interrupting, failing."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback

from moa_peft.errors import UserError
from moa_peft.training import load_recipe, parse_recipe, train
from moa_peft.training.interrupts import TrainingInterrupted
from moa_peft.training.trainer import MoATrainer
from tests.tiny import save_tiny, write_sums

Recipe = Callable[..., Any]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    save_tiny(folder / "base")
    write_sums(folder / "sums.json", rows=24)
    return folder


@pytest.fixture
def recipe(files: Path, tmp_path: Path) -> Recipe:
    def make(**changes: Any) -> Any:
        content = {
            "model": str(files / "base"),
            "output_dir": str(tmp_path / "run"),
            "method": "soft_moa",
            "moa": {"rank": 2, "dropout": 0.1, "prompt_length": 2, "adapter_size": 2},
            "data": {"path": str(files / "sums.json"), "validation_size": 4, "max_length": 300},
            "learning_rate": 1e-2,
            "max_steps": 6,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "logging_steps": 1,
            "save_strategy": "steps",
            "save_steps": 2,
            "use_cpu": True,
            "report_to": "none",
        }
        return parse_recipe({**content, **changes})

    return make


class At(TrainerCallback):
    """Does something at the end of one step."""

    def __init__(self, step: int, action: Callable[[], None]) -> None:
        self.step = step
        self.action = action

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.action()


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text())


def losses(folder: Path) -> list[tuple[int, float]]:
    return [(entry["step"], entry["loss"]) for entry in record(folder)["log"] if "loss" in entry]


def test_a_run_writes_a_usable_folder(recipe: Recipe, files: Path, tmp_path: Path) -> None:
    result = train(recipe())
    folder = tmp_path / "run"
    written = record(folder)
    assert written["status"] == "completed" and written["results"]["steps"] == 6
    assert written["data"]["train_rows"] == 20 and written["data"]["validation_rows"] == 4
    assert written["parameters"]["trainable"] == result.trainable_parameters > 0
    assert written["template"] == "alpaca" and written["seeds"]["seed"] == 42
    assert {"moa-peft", "torch", "transformers", "peft"} <= written["versions"].keys()
    assert written["timings"]["train_s"] > 0
    assert losses(folder)[-1][1] < losses(folder)[0][1]
    kept = {int(path.name.rpartition("-")[2]) for path in (folder / "checkpoints").iterdir()}
    assert kept == {6, result.saved_step} or kept == {4, 6}
    assert not list(folder.glob(".*"))
    card = (folder / "README.md").read_text()
    assert f"{result.trainable_parameters:,}" in card and "sums.json, 20 rows" in card
    assert str(files) not in card.partition("## Training run")[2].replace(str(files / "base"), "")
    assert load_recipe(folder / "recipe.yaml") == recipe()

    base = AutoModelForCausalLM.from_pretrained(files / "base")
    ids = torch.tensor([[7, 8, 9]])
    before = base(ids).logits
    adapted = PeftModel.from_pretrained(base, str(folder)).eval()
    assert not torch.equal(adapted(ids).logits, before)
    with torch.no_grad():
        best = load_file(folder / "checkpoints" / f"checkpoint-{result.saved_step}" / "adapter_model.safetensors")
    saved = load_file(folder / "adapter_model.safetensors")
    assert saved.keys() == best.keys() and all(torch.equal(saved[name], best[name]) for name in saved)


def test_an_interrupted_run_resumes_with_the_same_losses_and_weights(recipe: Recipe, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(recipe(output_dir=str(whole)))
    with pytest.raises(TrainingInterrupted, match="recipe.yaml --resume") as caught:
        train(recipe(output_dir=str(cut)), callbacks=[At(3, interrupt)])
    assert caught.value.signal_number == signal.SIGINT
    assert record(cut)["status"] == "interrupted"
    assert (cut / "checkpoints" / "checkpoint-3").is_dir()
    assert not (cut / "adapter_model.safetensors").exists()
    train(load_recipe(cut / "recipe.yaml", overrides=["--resume"]))
    assert losses(cut) == losses(whole)
    assert record(cut)["status"] == "completed" and len(record(cut)["resumed"]) == 1
    first, second = load_file(whole / "adapter_model.safetensors"), load_file(cut / "adapter_model.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)
    validation = [entry["eval_loss"] for entry in record(whole)["log"] if "eval_loss" in entry]
    assert validation == [entry["eval_loss"] for entry in record(cut)["log"] if "eval_loss" in entry]


def test_resume_skips_a_half_written_checkpoint(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(TrainingInterrupted):
        train(recipe(), callbacks=[At(4, interrupt)])
    checkpoints = tmp_path / "run" / "checkpoints"
    shutil.copytree(checkpoints / "checkpoint-4", checkpoints / "checkpoint-5")
    weights = checkpoints / "checkpoint-5" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    shutil.copytree(checkpoints / "checkpoint-4", checkpoints / "checkpoint-9")
    (checkpoints / "checkpoint-9" / "trainer_state.json").unlink()
    train(recipe(resume=True))
    assert record(tmp_path / "run")["results"]["steps"] == 6
    assert not (checkpoints / "checkpoint-9").exists()
    assert [step for step, _ in losses(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


def test_resume_refuses_another_recipe_and_a_complete_run(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no run"):
        train(recipe(resume=True))
    with pytest.raises(TrainingInterrupted):
        train(recipe(), callbacks=[At(2, interrupt)])
    with pytest.raises(UserError, match=r"learning_rate: 0.01 -> 0.5"):
        train(recipe(resume=True, learning_rate=0.5))
    train(recipe(resume=True))
    with pytest.raises(UserError, match="complete"):
        train(recipe(resume=True))


def test_a_failing_run_says_so_and_leaves_no_half_checkpoint(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(MoATrainer, "_save_optimizer_and_scheduler", full)
    with pytest.raises(OSError, match="No space"):
        train(recipe())
    folder = tmp_path / "run"
    assert record(folder)["status"] == "failed" and "No space" in record(folder)["error"]
    assert list((folder / "checkpoints").iterdir()) == []
    assert not (folder / "adapter_model.safetensors").exists()


def test_a_loss_that_is_not_finite_stops_the_run(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="learning_rate"):
        train(recipe(learning_rate=1e30, max_grad_norm=0.0, optim="sgd"))
    assert record(tmp_path / "run")["status"] == "failed"


def test_overwrite_replaces_a_run_once_everything_is_checked(recipe: Recipe, tmp_path: Path) -> None:
    train(recipe(max_steps=1))
    before = record(tmp_path / "run")
    with pytest.raises(UserError, match="--overwrite"):
        train(recipe(max_steps=1))
    with pytest.raises(UserError, match="unknown"):
        train(recipe(max_steps=1, overwrite=True, method="unknown"))
    assert record(tmp_path / "run") == before
    train(recipe(max_steps=2, overwrite=True))
    assert record(tmp_path / "run")["results"]["steps"] == 2
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="will not be deleted"):
        train(recipe(output_dir=str(other), overwrite=True))
    assert (other / "thesis.txt").exists()


def test_the_written_recipe_repeats_the_run(recipe: Recipe, tmp_path: Path) -> None:
    train(recipe(max_steps=3))
    file = tmp_path / "run" / "recipe.yaml"
    assert file.read_text().startswith("# moa train ")
    content = yaml.safe_load(file.read_text())
    train(parse_recipe({**content, "output_dir": str(tmp_path / "again")}))
    assert losses(tmp_path / "again") == losses(tmp_path / "run")


@pytest.mark.parametrize("method", ["sparse_moa", "sequence", "lora"])
def test_other_methods_and_settings(method: str, recipe: Recipe, tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "method": "soft_moa" if method == "sequence" else method,
        "moa": {"rank": 2, **({"granularity": "sequence"} if method == "sequence" else {})},
        "data": {"path": recipe().data.path, "validation_size": 0, "template": "chat", "loss_on": "all"},
        "max_steps": 2,
        "save_strategy": "no",
        "router_learning_rate": 1e-3,
        "activation_checkpointing": True,
        "train_sampling_strategy": "group_by_length",
    }
    train(recipe(**changes))
    written = record(tmp_path / "run")
    assert written["status"] == "completed" and written["template"] == "chat"
    assert written["results"]["validation_loss"] is None and written["results"]["saved_step"] == 2
