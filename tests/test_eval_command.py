"""`moa eval` with programs and with tasks of lm-evaluation-harness, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from moa_peft import MoAConfig
from moa_peft.cli import main
from moa_peft.code_evaluation.sandbox import isolation_problem
from moa_peft.evaluation.folder import EvaluationFolder
from tests.matrix import randomise_adapter
from tests.test_harness import CHOICE, write_tasks
from tests.tiny import save_tiny

needs_sandbox = pytest.mark.skipif(
    isolation_problem() is not None, reason=f"programs cannot be confined here: {isolation_problem()}"
)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    save_tiny(folder / "base")
    base: Any = AutoModelForCausalLM.from_pretrained(folder / "base")
    adapted = get_peft_model(base, MoAConfig.soft(rank=2, task_type="CAUSAL_LM"))
    randomise_adapter(adapted)
    adapted.save_pretrained(str(folder / "adapter"))
    problems = [
        {
            "task_id": f"HumanEval/{n}",
            "prompt": f"def f{n}(x):\n    '''x + {n}'''\n",
            "entry_point": f"f{n}",
            "canonical_solution": f"    return x + {n}\n",
            "test": f"def check(candidate):\n    assert candidate(1) == {n + 1}\n",
        }
        for n in range(3)
    ]
    (folder / "HumanEval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in problems))
    return folder


def evaluate(files: Path, *words: str) -> int:
    return main(["eval", str(files / "adapter"), "--data", str(files), "--max-new-tokens", "6", *words])


@needs_sandbox
def test_programs_are_written_and_run(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from moa_peft.code_evaluation import sampling

    original = sampling.generate_texts
    asked: list[int] = []

    def right_for_the_first(model: Any, tokenizer: Any, prompts: Any, *, on_batch: Any, **options: Any) -> Any:
        """The model's own texts, but for the samples of the first problem, one of which is right."""
        asked.append(len(prompts))
        texts = original(model, tokenizer, prompts, on_batch=lambda batch: None, **options)
        if len(prompts) == 6:
            texts[:2] = ["    return x\n", "    return x + 5\n"]
        on_batch(dict(enumerate(texts)))
        return texts

    monkeypatch.setattr(sampling, "generate_texts", right_for_the_first)
    words = ["--tasks", "code", "--output", str(tmp_path / "out"), "--samples", "2", "--pass-at", "1,2"]
    (files / "mbpp.jsonl").write_text(
        json.dumps({"task_id": 11, "text": "Double x.", "code": "", "test_list": ["assert d(2) == 4"]}) + "\n"
    )
    assert evaluate(files, *words, "--execute-code") == 0
    assert "pass@" in capsys.readouterr().out
    sets = json.loads((tmp_path / "out" / "results.json").read_text())["sets"]
    code = sets["humaneval"]["code"]
    assert code["num_problems"] == 3 and code["num_samples"] == 6
    assert code["pass_at"]["1"]["value"] == pytest.approx(1 / 6)
    assert code["pass_at"]["2"]["value"] == pytest.approx(1 / 3)
    assert sets["mbpp"]["code"]["pass_at"]["1"]["value"] == 0 and sets["mbpp"]["sampling"]["temperature"] == 0.7
    assert asked == [6, 2]
    # Once more: the programs are run again, but not written again.
    assert evaluate(files, *words, "--execute-code") == 0
    assert asked == [6, 2]
    assert json.loads((tmp_path / "out" / "results.json").read_text())["sets"] == sets
    # Programs of other settings are not mixed with these.
    words[words.index("2")] = "3"
    capsys.readouterr()
    assert evaluate(files, *words, "--execute-code") == 2
    assert "sampling" in capsys.readouterr().err


def test_nothing_is_run_without_permission(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(files, "--tasks", "humaneval", "--output", str(tmp_path / "out")) == 2
    assert "--execute-code" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@needs_sandbox
@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--pass-at", "2"], "--pass-at: '2'"),
        (["--pass-at", "x"], "--pass-at: 'x'"),
        (["--samples", "0"], "--pass-at"),
        (["--tasks", "mbpp,humaneval,nothing"], "nothing"),
    ],
)
def test_wrong_options_of_programs(
    files: Path, capsys: pytest.CaptureFixture[str], words: list[str], part: str
) -> None:
    tasks = [] if "--tasks" in words else ["--tasks", "humaneval"]
    assert evaluate(files, *tasks, "--execute-code", *words) == 2
    assert part in capsys.readouterr().err


def test_harness_tasks_on_the_same_adapter(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = write_tasks(tmp_path, CHOICE)
    out = tmp_path / "out"
    words = ["--harness", "tiny_choice", "--include-path", place, "--output", str(out), "--num-fewshot", "0"]
    assert main(["eval", str(files / "adapter"), *words]) == 0
    assert "tiny_choice" in capsys.readouterr().out
    results = json.loads((out / "results.json").read_text())
    scores = results["harness"]["scores"]["tiny_choice"]
    assert 0 <= scores["acc,none"]["value"] <= 1 and results["status"] == "complete"
    lines = (out / "tiny_choice.harness.jsonl").read_text().splitlines()
    assert len(lines) == 6 and "resps" in json.loads(lines[0])
    EvaluationFolder(out).check(overwrite=True)
    assert main(["eval", str(files / "adapter"), "--harness", "tiny_chioce", "--include-path", place]) == 2
    assert "tiny_choice" in capsys.readouterr().err


@needs_sandbox
def test_what_cannot_be_scored_is_found_before_anything_is(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def not_yet(*args: Any, **options: Any) -> None:
        pytest.fail("work began")

    (tmp_path / "MultiArith").mkdir()
    row = {"instruction": "1 + 2?", "input": "", "output": "", "answer": "3"}
    (tmp_path / "MultiArith" / "test.json").write_text(json.dumps([row]))
    (tmp_path / "HumanEval.jsonl").write_text((files / "HumanEval.jsonl").read_text())
    with (tmp_path / "HumanEval.jsonl").open("a") as file:
        long = json.loads((files / "HumanEval.jsonl").read_text().splitlines()[0])
        file.write(json.dumps(long | {"task_id": "HumanEval/9", "prompt": long["prompt"] + "# x\n" * 600}) + "\n")
    words = ["eval", str(files / "adapter"), "--data", str(tmp_path), "--tasks", "MultiArith,humaneval"]
    monkeypatch.setattr("moa_peft.evaluation.run.score_sets", not_yet)
    assert main([*words, "--execute-code"]) == 2
    assert "HumanEval/9" in capsys.readouterr().err
    place = write_tasks(tmp_path, CHOICE)
    (tmp_path / "questions.json").unlink()
    monkeypatch.setattr("moa_peft.adapter_loading.load_adapter", not_yet)
    assert main([*words, "--execute-code", "--harness", "tiny_choice", "--include-path", place]) == 2
    assert "tiny_choice could not be loaded" in capsys.readouterr().err
