"""`moa compare`: from a study file to tables, resumed after kills, refused where the study or the folder is wrong."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from moa_peft.cli import main
from moa_peft.errors import UserError
from moa_peft.study.jobs import REPORT_FILES, Job, chosen_rates, job_digest, job_recipe, run_jobs, search_jobs
from moa_peft.study.questions import Question
from moa_peft.study.runner import Study
from moa_peft.study.study_file import load_study, parse_study
from moa_peft.study.work import _rows_seen

SMOKE = Path(__file__).parent.parent / "studies" / "smoke.yaml"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smoke study, run once for all tests of this file."""
    out = tmp_path_factory.mktemp("study") / "out"
    assert main(["compare", str(SMOKE), "--data", str(SMOKE.parent), "--output", str(out), "--processes", "2"]) == 0
    return out


def smoke(**changes: Any) -> dict[str, Any]:
    content = yaml.safe_load(SMOKE.read_text())
    content["recipe"]["model"] = str(SMOKE.parent / "smoke" / "base")
    if "rows" in changes:
        # Its question is about a row that may not be there.
        del content["comparisons"]
    return {**content, **changes}


def study(out: Path, **changes: Any) -> Study:
    return Study(parse_study(smoke(**changes)), roots=[SMOKE.parent], output=out)


def test_the_smoke_study_ends_in_tables(finished: Path) -> None:
    names = {*REPORT_FILES, "records", "search"}
    assert names <= {path.name for path in finished.iterdir()}
    results = json.loads((finished / "results.json").read_text())
    assert results["seeds"] == [0, 1] and results["missing"] == [] and results["budget_mismatches"] == []
    (origin,) = results["runs_made_with"]
    assert origin["versions"]["torch"] and origin["hardware"]["processes"] == 1
    assert results["command"].startswith(f"moa compare {SMOKE} --data") and "torch" in results["versions"]
    assert [(row["data"], row["row"]) for row in results["rows"]] == [("sums", "soft_moa"), ("sums", "lora")]
    runs = {(run["row"], run["seed"]): run for run in results["runs"]}
    assert set(runs) == {(row, seed) for row in ("soft_moa", "lora") for seed in (0, 1)}
    for run in runs.values():
        assert run["steps"] == 3 and run["rows_seen"] == 12 and run["peak_memory_bytes"] > 2**20
        assert run["step_seconds"] > 0 and run["trainable_parameters"] > 0
        assert {score["measure"] for score in run["scores"]} == {"nll", "accuracy_strict", "accuracy_flexible"}
    # The same rows in the same order, whatever the method.
    for seed in (0, 1):
        assert runs["soft_moa", seed]["tokens"] == runs["lora", seed]["tokens"]
    assert runs["lora", 0]["validation_loss"] != runs["lora", 1]["validation_loss"]
    for file in (*finished.glob("records/*.json"), *finished.glob("search/*.json")):
        assert str(finished) not in file.read_text() and "path" not in json.loads(file.read_text())["recipe"]["data"]
    table = (finished / "table.md").read_text()
    assert "soft_moa" in table and "lora" in table and "## sums: Is LoRA worse?" in table


@pytest.mark.parametrize(
    ("accumulated", "drop_last", "steps", "expected"),
    [
        (1, False, 6, 36),
        (1, False, 8, 36 + 14),
        (1, True, 8, 35 + 21),
        (2, False, 3, 36),
        (2, True, 3, 35),
        (2, True, 4, 35 + 14),
        (9, True, 1, 35),
    ],
)
def test_rows_seen_are_those_of_whole_epochs_and_a_rest(
    accumulated: int, drop_last: bool, steps: int, expected: int
) -> None:
    arguments = {
        "per_device_train_batch_size": 7,
        "gradient_accumulation_steps": accumulated,
        "dataloader_drop_last": drop_last,
    }
    about = {"hardware": {"processes": 1}, "data": {"train_rows": 36}, "results": {"steps": steps}}
    assert _rows_seen({"training_arguments": arguments, **about}) == expected


def test_the_rate_with_the_least_validation_loss_is_taken(finished: Path) -> None:
    work = study(finished)
    rates = chosen_rates(work.spec, work.folder, data=work.data)
    for row in ("soft_moa", "lora"):
        tries = {}
        for job in search_jobs(work.spec):
            if job.row == row:
                tries[job.learning_rate] = json.loads(work.folder.result(job).read_text())["validation_loss"]
        assert len(set(tries.values())) == 2
        assert rates[row] == min(tries, key=tries.__getitem__)
    runs = json.loads((finished / "results.json").read_text())["runs"]
    assert all(run["learning_rate"] == rates[run["row"]] for run in runs)
    inherited = parse_study(
        smoke(rows={"soft_moa": {"moa": smoke()["rows"]["soft_moa"]["moa"]}, "lora": {"learning_rate_of": "soft_moa"}})
    )
    assert {job.row for job in search_jobs(inherited)} == {"soft_moa"}


def test_what_is_there_is_not_run_again(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.glob("records/*.json")}
    table = (finished / "table.csv").read_bytes()
    assert main(["compare", str(SMOKE), "--data", str(SMOKE.parent), "--output", str(finished), "--dry-run"]) == 0
    assert capsys.readouterr().out == ""
    assert main(["compare", str(SMOKE), "--data", str(SMOKE.parent), "--output", str(finished)]) == 0
    assert {path: path.stat().st_mtime_ns for path in finished.glob("records/*.json")} == before
    assert (finished / "table.csv").read_bytes() == table
    more = study(finished, seeds=[0, 1, 2])
    assert [job.seed for job in more.jobs()[0]] == [2, 2]
    assert [run.seed for run in more.outcome().missing] == [2, 2]


def test_results_of_other_settings_are_refused(finished: Path) -> None:
    for key, value in (("max_steps", 4), ("weight_decay", 0.5)):
        changed = smoke()
        changed["recipe"][key] = value
        work = Study(parse_study(changed), roots=[SMOKE.parent], output=finished)
        with pytest.raises(UserError, match="other settings or other data"):
            work.jobs()


def test_a_killed_study_goes_on(tmp_path: Path) -> None:
    """Killed hard in the middle, then stopped by a signal, then finished: the same records as without a stop."""
    content = smoke(seeds=[0], search=None, rows={"soft_moa": smoke()["rows"]["soft_moa"]})
    content["recipe"] |= {"max_steps": 30, "save_steps": 5, "learning_rate": 1e-3}
    file, out = tmp_path / "study.yaml", tmp_path / "out"
    file.write_text(yaml.safe_dump(content))
    words = ["compare", str(file), "--data", str(SMOKE.parent), "--output", str(out)]
    command = [sys.executable, "-m", "moa_peft", *words]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 120
    while (
        not list(out.glob("runs/*/checkpoints/checkpoint-*"))
        and time.monotonic() < deadline
        and process.poll() is None
    ):
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not list(out.glob("records/*.json"))
    assert main(words) == 0
    assert main([*words[:-1], str(tmp_path / "whole")]) == 0
    first, second = (
        json.loads((place / "records" / "sums.soft_moa.seed0.json").read_text())["record"]
        for place in (out, tmp_path / "whole")
    )
    for record in (first, second):
        record.pop("peak_memory_bytes")
        record.pop("step_seconds")
    assert first == second


def test_a_run_that_fails_is_named_and_the_others_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    content = smoke(seeds=[0], search=None)
    content["recipe"] |= {"learning_rate": 1e-3, "max_steps": 1}
    # A rate at which the loss is not finite after the first step.
    content["recipe"] |= {"max_grad_norm": 0.0}
    content["rows"]["lora"]["recipe"] = {"learning_rate": 1e38}
    file, out = tmp_path / "study.yaml", tmp_path / "out"
    file.write_text(yaml.safe_dump(content))
    assert main(["compare", str(file), "--data", str(SMOKE.parent), "--output", str(out)]) == 1
    shown = capsys.readouterr()
    assert "lora.seed0" in shown.err and ".log" in shown.err
    results = json.loads((out / "results.json").read_text())
    assert [run["row"] for run in results["runs"]] == ["soft_moa"]
    assert [(run["row"], run["seed"]) for run in results["missing"]] == [("lora", 0)]
    log = next((out / "runs" / "logs").glob("*lora*.log"))
    assert "loss became" in log.read_text()


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"baseline": "softmoa"}, "Did you mean 'soft_moa'"),
        ({"rowz": {}}, "unknown key rowz"),
        ({"rows": {"soft_moa": {"metod": "x"}}}, "unknown key rows.soft_moa.metod"),
        ({"rows": {"soft_moa": 5}}, "rows.soft_moa must be a block"),
        ({"rows": {"soft_moa": {}, "lora": {"matched_to": "nobody"}}}, "rows.lora.matched_to"),
        ({"rows": {"soft_moa": {}, "a": {"learning_rate_of": "b"}, "b": {"learning_rate_of": "soft_moa"}}}, "itself"),
        ({"seeds": [0, "one"]}, "seeds"),
        ({"seeds": None}, "seeds must be set"),
        ({"margin": 0}, "margin"),
        ({"margin": float("inf")}, "margin"),
        ({"parameter_tolerance": -0.1}, "parameter_tolerance"),
        ({"parameter_tolerance": float("nan")}, "parameter_tolerance"),
        ({"seeds": 3}, "seeds must be a list"),
        ({"rows": {"soft_moa": {}, 1: {"method": "lora"}}}, "the name 1 is not allowed"),
        ({"data": {2024: smoke()["data"]["sums"]}}, "the name 2024 is not allowed"),
        ({"recipe": {"model": "x", "max_steps": 3, "data": "train.json"}}, "recipe.data must be a block"),
        ({"recipe": {"model": "x", "max_steps": 3, "data": {"split": "validation"}}}, "recipe.data.split"),
        ({"recipe": {"model": "x", "max_steps": 3, "eval_steps": 1}}, "recipe.eval_steps cannot be set"),
        ({"rows": {"soft_moa": {}, "lora": {"recipe": {"model": "y"}}}}, "one model"),
        ({"rows": {"soft_moa": {}, "lora": {"recipe": {"train_sampling_strategy": "random"}}}}, "one budget"),
        ({"rows": {"soft_moa": {}, "lora": {"learning_rate_of": "soft_moa"}}, "search": None}, "needs a search"),
        ({"comparisons": [{"question": "?", "rows": ["lora"]}] * 2}, "asked twice"),
        ({"comparisons": False}, "comparisons must be a list"),
        ({"primary": "loss"}, "primary 'loss'"),
        ({"data": {}}, "data must be a block"),
        ({"data": {"sums": {"train": "x", "test": "y", "tasks": ["AddSub"], "scorings": ["guess"]}}}, "scorings"),
        ({"seeds": []}, "seeds is empty"),
        ({"seeds": [1, 1]}, "has 1 twice"),
        ({"rows": {"soft_moa": {}, "lo/ra": {}}}, "'lo/ra' is not allowed"),
        ({"primary": "accuracy"}, "measured by loglikelihood"),
        ({"rows": {"soft_moa": {}, "lora": {"seeds": [7]}}}, "no seed in common"),
        ({"rows": {"soft_moa": {}, "lora": {"recipe": {"max_steps": 1}}}}, "one budget"),
        ({"rows": {"soft_moa": {}, "lora": {"recipe": {"init_from": "x"}}}}, "one budget"),
        ({"rows": {"soft_moa": {}, "lora": {"recipe": {"dtype": "float32"}}}}, "one model"),
        ({"rows": {"soft_moa": {}, "lora": {"recipe": {"learning_rate": 1e-3}}}}, "learning_rate and search"),
        ({"search": {"data": "sum", "learning_rate": [1], "max_steps": 1}}, "Did you mean 'sums'"),
        ({"recipe": {"model": "x", "max_steps": 3, "seed": 1}}, "recipe.seed cannot be set"),
        ({"recipe": {"model": "x", "max_steps": 3, "learning_rate": 1e-3}}, "learning_rate and search"),
        (
            {"data": {"sums": smoke()["data"]["sums"] | {"recipe": {"learning_rate": 1}}}},
            "data.sums.recipe.learning_r",
        ),
        ({"search": {**smoke()["search"], "recipe": {"seed": 1}}}, "search.recipe.seed cannot be set"),
    ],
)
def test_studies_are_checked(changes: dict[str, Any], part: str) -> None:
    with pytest.raises(UserError) as error:
        parse_study(smoke(**changes))
    assert part in str(error.value), str(error.value)


def test_rows_that_could_never_run_are_refused() -> None:
    two = {"sums": smoke()["data"]["sums"] | {"rows": ["soft_moa"]}}
    with pytest.raises(UserError, match="'lora' is on no data set"):
        parse_study(smoke(data=two))
    two["more"] = smoke()["data"]["sums"]
    with pytest.raises(UserError, match="where learning rates are searched"):
        parse_study(smoke(data=two))
    rows = smoke()["rows"]
    rows["lora"]["learning_rate_of"] = "soft_moa"
    assert parse_study(smoke(data=two, rows=rows)).rows_on("sums") == ["soft_moa"]


def test_a_deleted_record_is_not_filled_from_a_run_with_other_settings(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    for file in out.glob("records/*.json"):
        file.unlink()
    changed = smoke(seeds=[0])
    changed["recipe"]["max_steps"] = 4
    file = tmp_path / "smoke.yaml"
    file.write_text(yaml.safe_dump(changed))
    assert main(["compare", str(file), "--data", str(SMOKE.parent), "--output", str(out)]) == 0
    runs = json.loads((out / "results.json").read_text())["runs"]
    assert [run["steps"] for run in runs] == [4, 4]


def test_a_run_stopped_before_its_record_was_written_starts_anew(tmp_path: Path) -> None:
    work = study(tmp_path / "out", seeds=[0], search=None, rows={"soft_moa": smoke()["rows"]["soft_moa"]})
    (job,) = work.jobs()[0]
    work.folder.run(job, job_digest(work.spec, job, data=work.data)).mkdir(parents=True)
    outcome = work.run(processes=1, threads=1, console=Console(quiet=True))
    assert len(outcome.records) == 1 and not outcome.failed


def test_a_rate_that_diverges_is_a_try_like_others(tmp_path: Path) -> None:
    content = smoke(seeds=[0], rows={"soft_moa": smoke()["rows"]["soft_moa"]})
    content["search"]["learning_rate"] = [1e38, 1e-3]
    content["recipe"]["max_grad_norm"] = 0.0
    work = Study(parse_study(content), roots=[SMOKE.parent], output=tmp_path / "out")
    outcome = work.run(processes=2, threads=1, console=Console(quiet=True))
    assert [record.learning_rate for record in outcome.records] == [1e-3] and not outcome.failed
    assert work.rates_at_the_ends() == []  # Of two tries, each is an end.
    content["search"]["learning_rate"] = [1e38, 2e38]
    hopeless = Study(parse_study(content), roots=[SMOKE.parent], output=tmp_path / "hopeless")
    assert [run.reason for run in hopeless.outcome().missing] == ["its learning rate is not chosen yet"]
    outcome = hopeless.run(processes=2, threads=1, console=Console(quiet=True))
    assert [run.reason for run in outcome.missing] == ["training diverged at every learning rate"]


def test_rates_at_an_end_of_the_tries_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = smoke()
    content["search"]["learning_rate"] = [1e-4, 1e-3, 1e-2]
    work = Study(parse_study(content), roots=[SMOKE.parent], output=tmp_path / "out")
    assert work.rates_at_the_ends() == []
    for row, losses in (("soft_moa", [3.0, 2.0, 1.0]), ("lora", [2.0, 1.0, 3.0])):
        for job, loss in zip([job for job in search_jobs(work.spec) if job.row == row], losses, strict=True):
            file = work.folder.result(job)
            file.parent.mkdir(parents=True, exist_ok=True)
            digest = job_digest(work.spec, job, data=work.data)
            file.write_text(json.dumps({"digest": digest, "validation_loss": loss}))
    assert work.rates_at_the_ends() == [
        "Chosen learning rates at an end of the tries, beyond which a better one may lie: soft_moa (0.01)."
    ]


def test_folders_of_something_else_are_left_alone(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds the study 'smoke', not 'other'"):
        study(finished, name="other")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".table.md.123").write_text("left by a process that was killed")
    (tmp_path / "out" / ".accuracy.123.png").write_text("left by a process that was killed")
    study(tmp_path / "out")
    for name in (".git", "table.csv"):
        (tmp_path / "out" / name).write_text("of something else")
        with pytest.raises(UserError, match=name):
            study(tmp_path / "out")
        (tmp_path / "out" / name).unlink()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="thesis.tex"):
        study(tmp_path / "out")


def test_sets_without_training_rows_are_reported_apart(tmp_path: Path) -> None:
    content = smoke(seeds=[0], search=None, rows={"soft_moa": smoke()["rows"]["soft_moa"]})
    content["recipe"]["learning_rate"] = 1e-3
    content["data"]["sums"] |= {"transfer": ["AddSub"], "scorings": ["nll"]}
    work = Study(parse_study(content), roots=[SMOKE.parent], output=tmp_path / "out")
    (record,) = work.run(processes=1, threads=1, console=Console(quiet=True)).records
    assert {scores.task for scores in record.scores} >= {"AddSub (transfer)"}
    # It is a matter of the report, so it may change afterwards.
    del content["data"]["sums"]["transfer"]
    again = Study(parse_study(content), roots=[SMOKE.parent], output=tmp_path / "out")
    assert again.jobs()[0] == [] and again.outcome().records[0].scores[0].task == "AddSub"
    content["data"]["sums"]["transfer"] = ["boolq"]
    with pytest.raises(UserError, match="transfer names 'boolq'"):
        Study(parse_study(content), roots=[SMOKE.parent], output=tmp_path / "out")


def test_records_are_made_of_what_texts_say(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    for file in out.glob("runs/*/evaluation/AddSub.generate.jsonl"):
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        claimed = [line | {"correct": {"strict": True, "flexible": True}} for line in lines]
        file.write_text("".join(json.dumps(line) + "\n" for line in claimed))
    for file in out.glob("records/*.json"):
        file.unlink()
    assert main(["compare", str(SMOKE), "--data", str(SMOKE.parent), "--output", str(out)]) == 0
    for file in out.glob("records/*.json"):
        assert (
            json.loads(file.read_text())["record"]["scores"]
            == (json.loads((finished / "records" / file.name).read_text())["record"]["scores"])
        )


@pytest.mark.parametrize(
    ("row", "part"),
    [
        ({"method": "no_such"}, "rows.other"),
        ({"method": "lora", "moa": {"rank": -1}}, "rows.other"),
        ({"method": "lora", "moa": {"rank": 8}, "matched_to": "soft_moa"}, "parameter_tolerance"),
        ({"method": "lora", "recipe": {"learning_rat": 1}}, "learning_rat"),
        ({"method": "lora", "recipe": {"data": {"validation_size": 0}}}, "one budget"),
    ],
)
def test_rows_are_checked_before_anything_runs(tmp_path: Path, row: dict[str, Any], part: str) -> None:
    with pytest.raises(UserError) as error:
        study(tmp_path / "out", rows={"soft_moa": smoke()["rows"]["soft_moa"], "other": row})
    assert part in str(error.value), str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_data_set_has_keys_of_a_recipe_of_its_own(tmp_path: Path) -> None:
    content = smoke()
    content["search"]["recipe"] = {"train_sampling_strategy": "group_by_length"}
    other = content["data"]["sums"] | {
        "recipe": {"train_sampling_strategy": "sequential", "data": {"max_length": 200}}
    }
    content["data"] = {"sums": content["data"]["sums"], "other": other}
    content["rows"]["lora"]["recipe"] = {"weight_decay": 0.5}
    work = Study(parse_study(content), roots=[SMOKE.parent], output=tmp_path / "out")
    jobs = [Job(kind="run", row="lora", data=data, seed=0, learning_rate=1e-3) for data in ("sums", "other")]
    jobs.append(Job(kind="search", row="lora", data="sums", seed=0, learning_rate=1e-3))
    first, second, tried = (
        job_recipe(work.spec, job, data=work.data[job.data], output_dir=str(tmp_path / "run")) for job in jobs
    )
    assert tried.trainer["train_sampling_strategy"] == "group_by_length" and tried.trainer["max_steps"] == 2
    assert tried.trainer["weight_decay"] == 0.5
    assert first.trainer["weight_decay"] == second.trainer["weight_decay"] == 0.5
    assert second.trainer["train_sampling_strategy"] == "sequential"
    assert "train_sampling_strategy" not in first.trainer
    assert (first.data.max_length, second.data.max_length) == (300, 200)
    assert first.data.validation_size == second.data.validation_size == 4
    with pytest.raises(UserError, match="other.recipe.model cannot be set"):
        parse_study(content | {"data": {**content["data"], "other": other | {"recipe": {"model": "x"}}}})
    with pytest.raises(UserError, match="rows.soft_moa: .*max_lenght"):
        wrong = parse_study(content | {"data": {**content["data"], "other": other | {"recipe": {"max_lenght": 2}}}})
        Study(wrong, roots=[SMOKE.parent], output=tmp_path / "out")


def test_questions_have_the_baseline_of_the_study_unless_they_name_one() -> None:
    asked = [
        {"question": "Is LoRA worse?", "rows": ["lora"]},
        {"question": "Is soft MoA better?", "rows": ["soft_moa"], "baseline": "lora"},
    ]
    question = Question.of(parse_study(smoke(comparisons=asked)))
    assert [(each.baseline, each.rows) for each in question.comparisons] == [
        ("soft_moa", ("lora",)),
        ("lora", ("soft_moa",)),
    ]
    assert question.baseline == "soft_moa" and question.primary == "nll" and question.margin is None


def test_a_set_without_a_way_of_scoring_is_refused(tmp_path: Path) -> None:
    content = smoke(primary="accuracy_strict")
    content["data"]["sums"] |= {"tasks": ["AddSub", "SVAMP"], "scorings": ["generate"], "generate_tasks": ["AddSub"]}
    content["data"]["sums"]["test"] = str(tmp_path)
    for name in ("AddSub", "SVAMP"):
        shutil.copy(SMOKE.parent / "smoke" / "AddSub.test.json", tmp_path / f"{name}.json")
    with pytest.raises(UserError, match="generate_tasks leaves 'SVAMP' out"):
        Study(parse_study(content), roots=[SMOKE.parent], output=tmp_path / "out")


def test_a_question_needs_runs_in_common() -> None:
    rows = smoke()["rows"] | {"other": {"method": "lora", "seeds": [1]}, "third": {"method": "lora", "seeds": [0]}}
    asked = {"question": "Is the third one better?", "rows": ["third"]}
    assert parse_study(smoke(rows=rows, comparisons=[asked])).comparisons[0].baseline is None
    with pytest.raises(UserError, match="'third' and 'other' have no data set and seed in common"):
        parse_study(smoke(rows=rows, comparisons=[asked | {"baseline": "other"}]))


def test_seeds_come_one_after_another() -> None:
    spec = parse_study(smoke(seeds=[1, 0], rows={"soft_moa": {}, "lora": {"seeds": [0]}}))
    jobs = run_jobs(spec, {"soft_moa": 1e-3, "lora": 1e-2})
    assert [(job.seed, job.row) for job in jobs] == [(0, "soft_moa"), (0, "lora"), (1, "soft_moa")]
    assert run_jobs(spec, {"lora": 1e-2}) == [Job(kind="run", row="lora", data="sums", seed=0, learning_rate=1e-2)]


def test_shipped_studies_are_read() -> None:
    for file in SMOKE.parent.glob("*.yaml"):
        spec = load_study(file)
        assert spec.baseline in spec.rows and spec.seeds


def test_wrong_places_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("x")
    for words, part in (
        ([str(tmp_path / "no.yaml"), "--output", str(tmp_path / "out")], "there is no file"),
        ([str(SMOKE), "--output", str(tmp_path / "file")], "is a file"),
        ([str(SMOKE), "--output", str(tmp_path / "out"), "--data", str(tmp_path / "nowhere")], "--data"),
        ([str(SMOKE), "--output", str(tmp_path / "out"), "--processes", "0"], "--processes"),
    ):
        assert main(["compare", *words]) == 2
        assert part in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]
