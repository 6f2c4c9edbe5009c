"""`moa eval` goes on where it stopped, never counts twice, and refuses what does not belong together."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from moa_peft import MoAConfig
from moa_peft.adapter_loading import trained_template
from moa_peft.cli import main
from moa_peft.errors import UserError
from moa_peft.evaluation import answering
from moa_peft.evaluation.folder import EvaluationFolder
from moa_peft.evaluation.predictions import Prediction, PredictionFile, ReferenceLikelihood
from tests.tiny import save_tiny


def _write(file: Path, rows: list[tuple[str, str, str]]) -> None:
    keys = ("instruction", "output", "answer")
    file.write_text(json.dumps([{**dict(zip(keys, row)), "input": ""} for row in rows]))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    save_tiny(folder / "base")
    base: Any = AutoModelForCausalLM.from_pretrained(folder / "base")
    get_peft_model(base, MoAConfig.soft(rank=2, task_type="CAUSAL_LM")).save_pretrained(str(folder / "adapter"))
    sums = [(f"{a}+{b}", f"The answer is {a + b}.", str(a + b)) for a in range(3) for b in (1, 22)]
    _write(folder / "AddSub.json", [*sums, ("4+4", "The answer is 9.", "8")])
    options = "\n\nAnswer format: answer1/answer2/answer3"
    _write(
        folder / "ARC-Easy.test.json",
        [(f"Which {n}?{options}", f"the correct answer is answer{n}", f"answer{n}") for n in (1, 2, 3)],
    )
    _write(folder / "train.json", [("0+2", "The answer is 2.", "2"), ("other", "x", "y")])
    return folder


def evaluate(files: Path, out: Path, *words: str, model: str = "adapter") -> int:
    tasks = [] if "--tasks" in words else ["--tasks", "AddSub"]
    more = ["--data", str(files), "--output", str(out), "--max-new-tokens", "3", "--batch-size", "2"]
    return main(["eval", str(files / model), *tasks, *more, *words])


def results(out: Path) -> dict[str, Any]:
    return json.loads((out / "results.json").read_text())


def test_an_interrupted_evaluation_goes_on(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert evaluate(files, tmp_path / "whole") == 0
    whole = results(tmp_path / "whole")["sets"]
    original = answering.generate_texts
    asked: list[int] = []

    def killed_after_two_batches(model: Any, tokenizer: Any, prompts: Any, **options: Any) -> Any:
        asked.append(len(prompts))
        collect = options.pop("on_batch")
        batches = []

        def count(batch: Any) -> None:
            if len(batches) == 2:
                raise KeyboardInterrupt
            batches.append(batch)
            collect(batch)

        return original(model, tokenizer, prompts, on_batch=count, **options)

    out = tmp_path / "parts"
    with monkeypatch.context() as patch:
        patch.setattr(answering, "generate_texts", killed_after_two_batches)
        assert evaluate(files, out) == 130
    file = out / "AddSub.generate.jsonl"
    assert len(file.read_text().splitlines()) == 4 and results(out)["status"] == "running"
    with file.open("a") as stream:
        stream.write('{"index": 6, "question": "half a li')

    def counted(model: Any, tokenizer: Any, prompts: Any, **options: Any) -> Any:
        asked.append(len(prompts))
        return original(model, tokenizer, prompts, **options)

    monkeypatch.setattr(answering, "generate_texts", counted)
    assert evaluate(files, out) == 0
    assert asked == [7, 3]
    assert results(out)["sets"] == whole and results(out)["status"] == "complete"
    # Once more: nothing is asked, nothing counted twice.
    before = file.read_text()
    assert evaluate(files, out) == 0
    assert asked == [7, 3] and file.read_text() == before and results(out)["sets"] == whole


def test_tasks_and_scorings_are_added(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert evaluate(files, out, "--train", str(files / "train.json")) == 0
    assert evaluate(files, out, "--scoring", "nll") == 0
    assert evaluate(files, out, "--tasks", "arc_easy,addsub", "--scoring", "nll") == 0
    assert evaluate(files, out, "--tasks", "arc_easy", "--scoring", "loglikelihood") == 0
    assert [command.split()[:2] for command in results(out)["commands"]] == [["moa", "eval"]] * 4
    shown = capsys.readouterr().out
    assert "nats per token" in shown and "choice %" in shown
    sets = results(out)["sets"]
    assert set(sets) == {"AddSub", "ARC-Easy"} and results(out)["suites"] == {}
    assert sets["AddSub"]["nll"]["num_items"] == 6 and sets["AddSub"]["nll"]["left_out"] == 1
    assert sets["AddSub"]["generate"]["num_items"] == 7
    assert sets["AddSub"]["generate"]["parts"]["twins"]["num_items"] == 7
    assert sets["ARC-Easy"]["loglikelihood"]["choice"]["missing"] == 0
    assert {"nll", "loglikelihood"} <= set(sets["ARC-Easy"])


def test_means_of_a_suite_cover_what_is_in_the_folder(files: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copy(files / "AddSub.json", files / "SVAMP.json")
    assert evaluate(files, out, "--scoring", "nll") == 0
    assert evaluate(files, out, "--tasks", "SVAMP", "--scoring", "nll,generate") == 0
    content = results(out)
    nlls = [content["sets"][name]["nll"]["nll"] for name in ("AddSub", "SVAMP")]
    # What only one of the sets has is no mean of the suite.
    assert content["suites"] == {"math": {"sets": ["AddSub", "SVAMP"], "nll": pytest.approx(sum(nlls) / 2)}}


def test_what_does_not_belong_together_is_refused(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert evaluate(files, out) == 0
    before = results(out)

    def refused(*words: str, model: str = "adapter") -> str:
        capsys.readouterr()
        assert evaluate(files, out, *words, model=model) == 2
        assert results(out) == before
        return capsys.readouterr().err

    assert "legacy: False -> True" in refused("--legacy")
    assert "kind: 'adapter' -> 'base model'" in refused(model="base")
    assert "rows: 7 -> 2" in refused("--limit", "2")
    (out / "notes.txt").write_text("mine")
    assert "notes.txt" in refused() and "notes.txt" in refused("--overwrite")
    (out / "notes.txt").unlink()
    lines = (out / "AddSub.generate.jsonl").read_text()
    (out / "AddSub.generate.jsonl").write_text("{}\n" + lines)
    assert "line 1" in refused()
    (out / "AddSub.generate.jsonl").write_text(lines + lines.splitlines()[0] + "\n")
    assert "twice" in refused()
    (out / "AddSub.generate.jsonl").write_text(lines)
    (out / "results.json").write_text("{")
    capsys.readouterr()
    assert evaluate(files, out) == 2 and "results.json" in capsys.readouterr().err


def test_a_retrained_adapter_is_noticed(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, adapter = tmp_path / "out", tmp_path / "adapter"
    shutil.copytree(files / "adapter", adapter)
    words = ["eval", str(adapter), "--data", str(files / "AddSub.json"), "--output", str(out), "--limit", "1"]
    assert main(words) == 0
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"revision": "other"}))
    capsys.readouterr()
    assert main(words) == 2
    assert "adapter_digest" in capsys.readouterr().err


def test_another_base_is_noticed_and_another_path_is_none(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    shutil.copytree(files / "base", base)
    words = ["eval", "--data", str(files / "AddSub.json"), "--output", str(out), "--limit", "2", "--scoring", "nll"]
    assert main([*words, f"{files / 'adapter'}", "--base", str(base)]) == 0
    assert main([*words, f"{files / 'adapter'}/", "--base", f"{base}/"]) == 0
    save_tiny(base, seed=5)
    capsys.readouterr()
    assert main([*words, str(files / "adapter"), "--base", str(base)]) == 2
    assert "base_digest" in capsys.readouterr().err


def test_predictions_of_unknown_origin_are_not_adopted(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert evaluate(files, out) == 0
    file = out / "AddSub.generate.jsonl"
    (tmp_path / "results.json").write_text((out / "results.json").read_text())
    (out / "results.json").unlink()
    capsys.readouterr()
    assert evaluate(files, out) == 2 and "whose they are" in capsys.readouterr().err
    (out / "results.json").write_text((tmp_path / "results.json").read_text())
    lines = file.read_text().splitlines()
    foreign = json.loads(lines[0]) | {"index": 1000, "question": "mine", "correct": {"strict": True, "flexible": True}}
    file.write_text("\n".join([*lines, json.dumps(foreign)]) + "\n")
    assert evaluate(files, out) == 2 and "question 1000" in capsys.readouterr().err
    # What a text says counts, not what the file says of it.
    claimed = [json.loads(line) | {"correct": {"strict": True, "flexible": True}} for line in lines]
    file.write_text("".join(json.dumps(line) + "\n" for line in claimed))
    before = json.loads((tmp_path / "results.json").read_text())["sets"]
    assert evaluate(files, out) == 0 and results(out)["sets"] == before


def test_likelihoods_are_checked_and_choices_follow_from_them(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["--tasks", "arc_easy", "--scoring", "loglikelihood,nll"]
    assert evaluate(files, out, *words) == 0
    before = results(out)["sets"]
    file = out / "ARC-Easy.loglikelihood.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(line | {"correct": {"choice": True}}) + "\n" for line in lines))
    assert evaluate(files, out, *words) == 0 and results(out)["sets"] == before
    nll = out / "ARC-Easy.nll.jsonl"
    whole = nll.read_text()
    for wrong in ({"nll": -5.0}, {"num_tokens": 0}, {"nll": float("nan")}):
        first, *others = (json.loads(line) for line in whole.splitlines())
        nll.write_text("".join(json.dumps(line) + "\n" for line in (first | wrong, *others)))
        capsys.readouterr()
        assert evaluate(files, out, *words) == 2 and "cannot be" in capsys.readouterr().err


def test_questions_longer_than_the_model_are_refused_by_every_scoring(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _write(tmp_path / "long.json", [("1" * 600, "The answer is 1.", "1")])
    for scoring in ("nll", "generate"):
        assert main(["eval", str(files / "base"), "--data", str(tmp_path / "long.json"), "--scoring", scoring]) == 2
        assert "positions" in capsys.readouterr().err


def test_a_set_that_is_too_long_is_refused_before_others_are_scored(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _write(tmp_path / "long.json", [("1" * 600, "The answer is 1.", "1")])
    places = ["--data", str(files / "AddSub.json"), "--data", str(tmp_path / "long.json")]
    words = [*places, "--scoring", "nll", "--output", str(tmp_path / "out")]
    assert main(["eval", str(files / "base"), *words]) == 2 and "positions" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*.jsonl"))


def test_a_folder_is_complete_when_every_set_in_it_is(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("moa_peft.evaluation.run.answer_questions", lambda *words, **options: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            evaluate(files, out)
    assert results(out)["status"] == "running"
    assert evaluate(files, out, "--tasks", "ARC-Easy", "--scoring", "loglikelihood,generate") == 0
    assert results(out)["status"] == "running"
    assert evaluate(files, out) == 0
    assert results(out)["status"] == "complete"


def test_a_folder_is_complete_when_every_scoring_that_was_asked_is(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert evaluate(files, out) == 0 and results(out)["status"] == "complete"
    with monkeypatch.context() as patch:
        patch.setattr("moa_peft.evaluation.run.reference_likelihoods", lambda *words, **options: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            evaluate(files, out, "--scoring", "generate,nll")
    assert evaluate(files, out, "--tasks", "ARC-Easy", "--scoring", "loglikelihood") == 0
    assert results(out)["status"] == "running"
    assert evaluate(files, out, "--scoring", "nll") == 0
    assert results(out)["status"] == "complete"


def test_harness_tasks_that_were_asked_are_awaited(tmp_path: Path) -> None:
    folder = EvaluationFolder(tmp_path)
    folder.open({}, sets={}, command="a", harness=["one", "two"])
    folder.add_harness({"scores": {"one": {}}}, tasks=["one"])
    folder.write(complete=True)
    folder.open({}, sets={}, command="b")
    folder.write(complete=True)
    assert results(tmp_path)["status"] == "running" and results(tmp_path)["harness_missing"] == ["two"]
    folder.add_harness({"scores": {"two": {}}}, tasks=["two"])
    folder.write(complete=True)
    assert results(tmp_path)["status"] == "complete" and set(results(tmp_path)["harness"]["scores"]) == {"one", "two"}


def test_a_command_that_is_refused_changes_nothing(files: Path, tmp_path: Path) -> None:
    _write(tmp_path / "long.json", [("1" * 600, "The answer is 1.", "1")])
    refused = ["--data", str(tmp_path / "long.json")]
    out = tmp_path / "out"
    words = ["eval", str(files / "base"), "--data", str(files / "AddSub.json"), "--output", str(out)]
    assert main([*words, "--max-new-tokens", "2", *refused]) == 2 and not out.exists()
    assert main([*words, "--max-new-tokens", "3"]) == 0
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    assert main([*words, "--max-new-tokens", "3", "--overwrite", *refused]) == 2
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before


def test_parts_are_not_lost(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert evaluate(files, out, "--train", str(files / "train.json")) == 0
    before = results(out)["sets"]
    assert evaluate(files, out) == 2 and "Give the same --train again" in capsys.readouterr().err
    assert evaluate(files, out, "--train", str(files / "train.json")) == 0
    assert results(out)["sets"] == before and before["AddSub"]["generate"]["parts"]


@pytest.mark.parametrize(
    "change",
    [
        {"settings": []},
        {"commands": None},
        {"sets": {"other": 5}},
        {"sets": {"AddSub": {"generate": 7}}},
        {"sets": None},
    ],
)
def test_results_of_the_wrong_kind_are_damage(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any]
) -> None:
    out = tmp_path / "out"
    assert evaluate(files, out) == 0
    (out / "results.json").write_text(json.dumps(results(out) | change))
    assert evaluate(files, out) == 2 and "cannot be read" in capsys.readouterr().err


def test_predictions_with_and_without_legacy_answers_are_damage(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert evaluate(files, out) == 0
    file = out / "AddSub.generate.jsonl"
    first, *others = (json.loads(line) for line in file.read_text().splitlines())
    first["answers"]["legacy"] = None
    file.write_text("".join(json.dumps(line) + "\n" for line in (first, *others)))
    before = (out / "results.json").read_bytes()
    assert evaluate(files, out) == 2 and "legacy" in capsys.readouterr().err
    assert (out / "results.json").read_bytes() == before


@pytest.mark.parametrize("scoring", ["generate", "nll", "loglikelihood"])
def test_a_model_of_nans_has_no_score(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], scoring: str
) -> None:
    broken: Any = AutoModelForCausalLM.from_pretrained(files / "base")
    broken.lm_head.weight.data.fill_(float("nan"))
    shutil.copytree(files / "base", tmp_path / "broken")
    broken.save_pretrained(tmp_path / "broken")
    words = ["--data", str(files), "--tasks", "arc_easy", "--scoring", scoring, "--output", str(tmp_path / "out")]
    assert main(["eval", str(tmp_path / "broken"), *words]) == 2
    assert "damaged or diverged" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*.jsonl"))


def test_what_a_killed_process_left_is_in_nobodys_way(files: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / ".arc_easy.harness.jsonl.x1y2_z34").write_text("half a li")
    assert evaluate(files, out) == 0
    assert evaluate(files, out, "--overwrite") == 0
    assert not (out / ".arc_easy.harness.jsonl.x1y2_z34").exists()
    (out / ".my_notes.jsonl.bak").write_text("mine")
    assert evaluate(files, out, "--overwrite") == 2 and (out / ".my_notes.jsonl.bak").exists()


def test_an_overwrite_that_is_killed_can_be_repeated(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert evaluate(files, out, "--scoring", "generate,nll") == 0
    unlink, calls = Path.unlink, []

    def killed(path: Path, *words: Any, **options: Any) -> None:
        calls.append(path.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        unlink(path, *words, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", killed)
        evaluate(files, out, "--overwrite")
    assert len(calls) == 2 and "results.json" not in calls
    assert evaluate(files, out, "--overwrite") == 0


def test_predictions_without_results_are_never_replaced(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.nll.jsonl").write_text("{}\n")
    assert evaluate(files, tmp_path, "--overwrite") == 2 and "mine.nll.jsonl" in capsys.readouterr().err
    assert (tmp_path / "mine.nll.jsonl").read_text() == "{}\n"


def test_a_run_of_another_adapter_says_nothing_about_this_one(files: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(files / "adapter", run / "adapters" / "own")
    shutil.copytree(files / "adapter", run / "checkpoints" / "checkpoint-3")
    (run / "run.json").write_text(json.dumps({"recipe": {"model": "x/y", "data": {"template": "chat"}}}))
    assert trained_template(run / "adapters" / "own") is None
    assert trained_template(run / "checkpoints" / "checkpoint-3") == "chat"


def test_an_adapter_that_transformers_loads_as_a_model_is_refused(
    files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(files / "base")
    loaded.peft_config = {"default": object()}
    monkeypatch.setattr("moa_peft.base_models.load_model", lambda *words, **options: loaded)
    assert main(["eval", str(files / "base"), "--data", str(files / "AddSub.json")]) == 2
    assert "is an adapter on the hub" in capsys.readouterr().err


@pytest.mark.parametrize("library", ["require_scipy", "require_math_verify"])
def test_missing_libraries_are_told_before_the_model_is_loaded(
    files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    def missing() -> None:
        raise UserError("pip install 'moa-peft[eval]'")

    monkeypatch.setattr(f"moa_peft.evaluation.run.{library}", missing)
    monkeypatch.setattr("moa_peft.base_models.load_model", lambda *words, **options: 1 / 0)
    assert main(["eval", str(files / "base"), "--data", str(files / "AddSub.json")]) == 2
    assert "moa-peft[eval]" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change", [{"index": None}, {"index": True}, {"question": 3}, {"num_tokens": "3"}, {"nll": [1.0]}, {"other": 1}]
)
def test_lines_of_the_wrong_kind_are_damage(tmp_path: Path, change: dict[str, Any]) -> None:
    file = PredictionFile(tmp_path / "x.nll.jsonl", ReferenceLikelihood)
    file.append([ReferenceLikelihood(index=0, question="q", nll=1.5, num_tokens=3)])
    good = json.loads(file.path.read_text())
    file.path.write_text(json.dumps(good) + "\n" + json.dumps(good | {"index": 1} | change) + "\n")
    with pytest.raises(UserError, match="damaged in line 2"):
        file.read()


@pytest.mark.parametrize(
    "change", [{"output": None}, {"answers": None}, {"answers": {"strict": 3}}, {"correct": {"a": 1}}]
)
def test_answers_of_the_wrong_kind_are_damage(tmp_path: Path, change: dict[str, Any]) -> None:
    file = PredictionFile(tmp_path / "x.generate.jsonl", Prediction)
    line = {"index": 0, "question": "q", "reference": "1", "output": "1", "answers": {"strict": None}, "correct": {}}
    file.path.write_text(json.dumps(line) + "\n")
    assert file.read()[0].output == "1"
    file.path.write_text(json.dumps(line | change) + "\n")
    with pytest.raises(UserError, match="damaged in line 1"):
        file.read()


def test_one_process_at_a_time(tmp_path: Path) -> None:
    folder = EvaluationFolder(tmp_path / "out")
    with folder.locked(), pytest.raises(UserError, match="another process"), EvaluationFolder(folder.path).locked():
        pass
    with folder.locked():
        pass


def test_prediction_files_keep_whole_lines(tmp_path: Path) -> None:
    file = PredictionFile(tmp_path / "x.nll.jsonl", ReferenceLikelihood)
    assert file.read() == []
    records = [ReferenceLikelihood(index=i, question="q\u2028\n", nll=1.5 * i, num_tokens=3) for i in (2, 0)]
    file.append(records)
    file.append([])
    assert file.read() == sorted(records, key=lambda record: record.index)
    assert file.read()[1].nll_per_token == 1.0
