"""The quickstart on a tiny random model: time budget with a fake clock, the whole run, and bad input."""

from __future__ import annotations

import functools
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from moa_peft.cli import main
from moa_peft.errors import UserError
from moa_peft.quickstart import run
from moa_peft.quickstart.run import (
    QuickstartSettings,
    faster_dtype,
    quickstart_recipe,
    run_quickstart,
    with_steps,
)
from moa_peft.quickstart.time_budget import MIN_STEPS, StopInTime, TimeBudget, fitted_steps
from moa_peft.quickstart.word_problems import (
    TEST_TEMPLATES,
    WordProblem,
    generate_word_problems,
    write_word_problems,
)
from moa_peft.training.step_times import StepTimer
from studies import quickstart_rate
from studies.quickstart_rate import Study, run_study
from tests.tiny import save_tiny


class FakeClock:
    """A clock that only moves when told to."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Recorded:
    """`generate_word_problems`, keeping the last rows of every split."""

    def __init__(self, generate: Any) -> None:
        self._generate = generate
        self.rows: dict[str, list[WordProblem]] = {}

    def __call__(self, split: str, **settings: Any) -> list[WordProblem]:
        self.rows[split] = self._generate(split, **settings)
        return self.rows[split]


def steps_of(callback: Any, clock: FakeClock, seconds: list[float], *, max_steps: int) -> int:
    """Let a callback see steps of these lengths, as the trainer would; returns how many ran."""
    state, control = SimpleNamespace(global_step=0, max_steps=max_steps), SimpleNamespace(should_training_stop=False)
    for step_s in seconds[:max_steps]:
        callback.on_step_begin(None, state, control)
        clock.now_s += step_s
        state.global_step += 1
        callback.on_step_end(None, state, control)
        if control.should_training_stop:
            break
    return state.global_step


def test_the_steps_fill_the_time_left() -> None:
    clock = FakeClock()
    budget = TimeBudget(total_s=600, started_s=clock(), clock=clock)
    clock.now_s += 120
    timer = StepTimer(clock=clock)
    steps_of(timer, clock, [30.0, 4.0, 5.0, 36.0], max_steps=4)
    assert timer.fastest_s == 4.0
    left_s = budget.left_s(reserve_s=60)
    assert left_s == 600 - 120 - 75 - 60
    assert fitted_steps(step_s=timer.fastest_s, left_s=left_s, max_steps=300) == 86
    assert fitted_steps(step_s=timer.fastest_s, left_s=left_s, max_steps=50) == 50
    assert fitted_steps(step_s=100.0, left_s=left_s, max_steps=300) == MIN_STEPS
    assert fitted_steps(step_s=1.0, left_s=-5.0, max_steps=300) == MIN_STEPS


def test_training_stops_in_time_when_steps_become_slower() -> None:
    clock = FakeClock()
    budget = TimeBudget(total_s=200, started_s=clock(), clock=clock)
    callback = StopInTime(budget, reserve_s=50)
    assert steps_of(callback, clock, [10.0] * 40, max_steps=40) == 15
    assert callback.stopped
    clock.now_s = 100.0
    in_time = StopInTime(budget, reserve_s=50)
    assert steps_of(in_time, clock, [5.0] * 20, max_steps=20) == 20
    assert not in_time.stopped
    clock.now_s = 100.0
    late = StopInTime(TimeBudget(total_s=1, started_s=clock(), clock=clock), reserve_s=50)
    assert steps_of(late, clock, [10.0] * 40, max_steps=40) == MIN_STEPS


def test_the_schedule_is_made_for_the_fitted_steps(tmp_path: Path) -> None:
    recipe = with_steps(quickstart_recipe(QuickstartSettings(output_dir=tmp_path)), 70)
    assert (recipe.trainer["max_steps"], recipe.trainer["warmup_steps"]) == (70, 7)


def test_the_faster_dtype_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    assert faster_dtype() in ("float32", "bfloat16")
    clock, multiply = FakeClock(), torch.mm
    slow = torch.bfloat16

    def timed(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        clock.now_s += 5.0 if left.dtype == slow else 1.0
        return multiply(left[:1], right[:, :1])

    monkeypatch.setattr(torch, "mm", timed)
    monkeypatch.setattr("time.perf_counter", clock)
    assert faster_dtype() == "float32"
    slow = torch.float32
    assert faster_dtype() == "bfloat16"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture
def few_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    few = functools.partial(write_word_problems, num_train=160, num_validation=8, num_test=40)
    monkeypatch.setattr(run, "write_word_problems", few)


def test_the_whole_quickstart(
    base: Path, tmp_path: Path, few_problems: None, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "quick"
    words = ["quickstart", "--model", str(base), "--output_dir", str(out), "--minutes", "0.01", "--num_test", "6"]
    assert main([*words, "--seed", "3"]) == 0
    shown = capsys.readouterr()
    assert "before" in shown.out and "after" in shown.out and "Rise:" in shown.out
    assert shown.out.count("Question:") == 2
    assert f"moa generate {out / 'adapter'}" in shown.out and "moa train recipes/small" in shown.out
    results = json.loads((out / "quickstart.json").read_text())
    assert results["steps"] == MIN_STEPS and results["settings"]["seed"] == 3
    assert results["before"]["num_items"] == results["after"]["num_items"] == len(results["predictions"]) == 6
    assert results["rise"]["interval_95"]["low"] <= results["rise"]["strict"] <= results["rise"]["interval_95"]["high"]
    assert results["peak_memory_bytes"] > 2**20 and results["versions"]["torch"] == torch.__version__
    record = json.loads((out / "adapter" / "run.json").read_text())
    assert record["status"] == "completed" and record["recipe"]["max_steps"] == MIN_STEPS
    assert record["recipe"]["data"]["path"] == str(out / "data" / "train.jsonl")
    assert sorted(file.name for file in out.iterdir()) == ["adapter", "data", "quickstart.json"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["quick"]

    assert main(["generate", str(out / "adapter"), "3 + 4?", "--max-new-tokens", "3"]) == 0
    test_file = str(out / "data" / "test.jsonl")
    assert main(["eval", str(out / "adapter"), "--data", test_file, "--limit", "2", "--max-new-tokens", "3"]) == 0

    before = (out / "quickstart.json").read_text()
    assert main(words) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (out / "quickstart.json").read_text() == before


def test_overwrite_replaces_an_earlier_quickstart(base: Path, tmp_path: Path, few_problems: None) -> None:
    for name in ("adapter", "data"):
        (tmp_path / "out" / name).mkdir(parents=True)
        (tmp_path / "out" / name / "old").write_text("old")
    settings = QuickstartSettings(
        output_dir=tmp_path / "out", model=str(base), minutes=0.01, num_test=2, method="sparse_moa", overwrite=True
    )
    result = run_quickstart(settings)
    assert not list((tmp_path / "out").rglob("old"))
    assert result.before.num_items == 2
    config = json.loads((result.adapter_dir / "adapter_config.json").read_text())
    assert config["router"]["threshold"] == "learned"


def test_the_seed_reaches_data_and_training(base: Path, tmp_path: Path, few_problems: None) -> None:
    out, seed = tmp_path / "quick", 5
    words = ["quickstart", "--model", str(base), "--output_dir", str(out), "--minutes", "0.01", "--num_test", "1"]
    assert main([*words, "--seed", str(seed)]) == 0
    for split, num_rows in (("train", 160), ("test", 40)):
        written = [json.loads(line) for line in (out / "data" / f"{split}.jsonl").read_text().splitlines()]
        assert written == [problem.as_row() for problem in generate_word_problems(split, num_rows=num_rows, seed=seed)]
    record = json.loads((out / "adapter" / "run.json").read_text())
    assert record["seeds"]["seed"] == record["training_arguments"]["seed"] == seed


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--minutes", "0"], "minutes"),
        (["--minutes", "soon"], "minutes"),
        (["--method", "soft_mao"], "soft_moa"),
        (["--num_test", "0"], "num_test"),
        (["--num_test", "301"], "num_test"),
        (["--model", "./absent"], "absent"),
        (["--output_dir", "{folder}/file"], "is a file"),
        (["--output_dir", "{folder}", "--overwrite"], "something else"),
        (["--frobnicate"], "frobnicate"),
    ],
)
def test_bad_input_writes_nothing(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], named: str
) -> None:
    (tmp_path / "file").write_text("x")
    words = [word.replace("{folder}", str(tmp_path)) for word in words]
    assert main(["quickstart", "--model", str(base), "--output_dir", str(tmp_path / "out"), *words]) == 2
    shown = capsys.readouterr()
    assert named in shown.err and "Traceback" not in shown.err
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_missing_scipy_is_said_before_anything_runs(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(UserError, match=r"moa-peft\[eval\]"):
        run_quickstart(QuickstartSettings(output_dir=tmp_path / "out", model=str(base)))
    assert not (tmp_path / "out").exists()


def test_the_rate_is_chosen_on_templates_that_are_neither_trained_nor_tested() -> None:
    development, kept = quickstart_rate.DEVELOPMENT_TEMPLATES, quickstart_rate.KEPT_TEMPLATES
    keys = [template.key for template in development + kept + TEST_TEMPLATES]
    assert len(set(keys)) == len(keys) and len(kept) == pytest.approx(2 * len(development), abs=2)
    assert {template.operation for template in development} == {template.operation for template in kept}


def test_the_rate_is_the_chosen_one(tmp_path: Path) -> None:
    study = json.loads((Path(__file__).parents[1] / "docs" / "results" / "quickstart_rate.json").read_text())
    losses = {done["learning_rate"]: done["development_loss"] for done in study["rates"]}
    recipe = quickstart_recipe(QuickstartSettings(output_dir=tmp_path))
    assert recipe.trainer["learning_rate"] == study["chosen"] == min(losses, key=losses.__getitem__)


def test_a_study_goes_on_where_it_was(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = Study(steps=2, model=str(base), num_train=32, num_loss=29, num_scored=2)
    output, trained = tmp_path / "rate.json", []
    train = quickstart_rate.train
    monkeypatch.setattr(
        quickstart_rate, "train", lambda recipe, **more: trained.append(recipe) or train(recipe, **more)
    )
    monkeypatch.setattr(quickstart_rate, "generate_word_problems", recorded := Recorded(generate_word_problems))

    def sweep(*rates: float) -> dict[str, Any]:
        return run_study(study, rates=rates, output=output, command="again", console=Console(quiet=True))

    sweep(1e-3)
    result = sweep(1e-2, 1e-3)
    assert result == json.loads(output.read_text())
    assert [recipe.trainer["learning_rate"] for recipe in trained] == [1e-3, 1e-2]
    assert [recipe.trainer["max_steps"] for recipe in trained] == [2, 2]
    losses = {done["learning_rate"]: done["development_loss"] for done in result["rates"]}
    assert list(losses) == [1e-3, 1e-2] and result["chosen"] == min(losses, key=losses.__getitem__)
    assert {problem.template for problem in recorded.rows["train"]} <= set(result["training_templates"])
    assert {problem.template for problem in recorded.rows["validation"]} == set(result["development_templates"])
    with pytest.raises(UserError, match="other settings"):
        run_study(replace(study, seed=1), rates=[1e-3], output=output, command="", console=Console(quiet=True))
