"""Every mistake of a user ends with one screen of text and exit code 2, without traceback and without files."""

from __future__ import annotations

import collections
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load, save_file

from moa_peft.cli import main
from moa_peft.training.trainer import MoATrainer
from tests.tiny import save_tiny, tiny_recipe

Moa = Callable[..., str]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base, another one of another size, a data file, a recipe, and an adapter trained with them."""
    folder = tmp_path_factory.mktemp("files")
    save_tiny(folder / "wider", hidden_size=32)
    save_tiny(folder / "gpt2", family="gpt2")
    content = tiny_recipe(folder, output_dir=str(folder / "adapter"))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
    assert main(["train", str(folder / "recipe.yaml")]) == 0
    return folder


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Moa:
    def run(*words: str) -> str:
        code = main(list(words))
        shown = capsys.readouterr()
        assert code == 2, shown.err
        assert "Traceback" not in shown.err + shown.out
        message = shown.err.rpartition("Error\n" if "Error\n" in shown.err else "Error")[2]
        assert 0 < len(message.strip().splitlines()) <= 20
        return message

    return run


@pytest.fixture
def train_fails(fails: Moa, files: Path, tmp_path: Path) -> Moa:
    """Train with overrides; afterwards nothing may have been written."""

    def run(*words: str) -> str:
        message = fails("train", str(files / "recipe.yaml"), "--output_dir", str(tmp_path / "out"), *words)
        assert not (tmp_path / "out").exists()
        return message

    return run


@pytest.fixture
def adapter(files: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(files / "adapter", tmp_path / "adapter"))


def rows(file: Path, content: Any) -> list[str]:
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return ["--data.path", str(file)]


def test_data_that_is_missing_empty_or_wrong(train_fails: Moa, tmp_path: Path) -> None:
    file = tmp_path / "data.json"
    assert "missing.json" in train_fails("--data.path", str(tmp_path / "missing.json"))
    assert "data.json" in train_fails(*rows(file, ""))
    assert "data.json" in train_fails(*rows(file, []))
    assert "data.json" in train_fails(*rows(file, "{not json"))
    assert "question" in train_fails(*rows(file, [{"question": "1+1", "reply": "2"}]))
    assert "output" in train_fails(*rows(file, [{"instruction": "1+1", "input": ""}]))
    empty_folder = tmp_path / "empty"
    empty_folder.mkdir()
    assert "empty" in train_fails("--data.path", str(empty_folder))


def test_rows_that_leave_nothing_to_learn(train_fails: Moa, tmp_path: Path) -> None:
    file = tmp_path / "data.json"
    empty_answers = [{"instruction": f"{a}+1", "input": "", "output": ""} for a in range(4)]
    assert "answer" in train_fails(*rows(file, empty_answers))
    assert "max_length" in train_fails("--data.max_length", "20", "--data.too_long", "drop")
    assert "max_length" in train_fails("--data.max_length", "20", "--data.too_long", "error")
    assert "validation" in train_fails("--data.limit", "3", "--data.validation_size", "3")


def test_adapters_that_cannot_be(train_fails: Moa, files: Path) -> None:
    assert "rank" in train_fails("--moa.rank", "0")
    assert "nowhere" in train_fails("--moa.targets", "[nowhere]")
    gpt2 = ["--model", str(files / "gpt2"), "--method", "custom"]
    message = train_fails(*gpt2, "--moa.experts", "[{type: lora, target: gate}]")
    assert "gate" in message
    assert "unheard_of" in train_fails("--method", "unheard_of")
    assert "rnk" in train_fails("--moa.rnk", "4")
    assert "nowhere" in train_fails("--method", "lora", "--moa.targets", "[nowhere]")


def test_recipes_that_are_wrong(fails: Moa, train_fails: Moa, tmp_path: Path) -> None:
    assert "missing.yaml" in fails("train", str(tmp_path / "missing.yaml"))
    assert "'learning_rate'" in train_fails("--lerning_rate", "1")
    assert "fast" in train_fails("--learning_rate", "fast")
    assert "fp16" in train_fails("--bf16", "--fp16")
    assert "stray" in train_fails("stray")
    assert "RECIPE" in fails("train")
    assert "frobnicate" in fails("frobnicate")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--optim_args", "fused"], ["optim_args: 'fused'", "name=value"]),
        (["--optim", "ademamix", "--optim_args", "beta3=high"], ["optim: 'ademamix'", "'beta3=high'"]),
        (["--lr_scheduler_kwargs", '{"min_lr": 0.1}'], ["lr_scheduler_kwargs: {'min_lr': 0.1}", "'linear'", "none"]),
        (["--lr_scheduler_kwargs", "steep"], ["lr_scheduler_kwargs: 'steep'", "mapping"]),
        (["--lr_scheduler_type", "cosine_with_min_lr"], ["'cosine_with_min_lr'", "num_cycles, min_lr"]),
        (
            ["--lr_scheduler_type", "cosine", "--lr_scheduler_kwargs", '{"num_cycles": "two"}'],
            ["{'num_cycles': 'two'}", "num_cycles"],
        ),
        (["--moa.inference_mode", "true"], ["moa.inference_mode: True", "nothing to train"]),
        (["--moa.task_type", "SEQ_CLS"], ["moa.task_type: 'SEQ_CLS'"]),
        (["--moa.prompt", "'yes'"], ["prompt is 'yes'", "true or false"]),
        (["--load_best_model_at_end"], ["load_best_model_at_end", "data.validation_size is 0"]),
        (["--load_best_model_at_end", "--data.validation_size", "4"], ["eval_strategy: 'no'", "nothing is evaluated"]),
        (["--push_to_hub"], ["push_to_hub", "HF_HUB_OFFLINE", "hf upload"]),
        (["--report_to", "tardis"], ["the trainer refuses its options", "tardis"]),
    ],
    ids=lambda value: value[0] if value[0].startswith("--") else "",
)
def test_settings_that_would_fail_late(
    train_fails: Moa, words: list[str], parts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moa_peft.training.option_checks.is_offline_mode", lambda: True)
    message = train_fails(*words)
    assert all(part in message for part in parts), message


def test_values_of_the_wrong_kind_in_a_file(fails: Moa, files: Path, tmp_path: Path) -> None:
    """On the command line everything is text; YAML has kinds."""
    content = yaml.safe_load((files / "recipe.yaml").read_text())
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"output_dir": 5}, "output_dir: 5 is no text"),
        ({"output_dir": ["out"]}, "output_dir: ['out'] is a list"),
        ({"learning_rate": [1e-3]}, "learning_rate: [0.001] is a list"),
        ({"data": {"path": {"train": "x.json"}}}, "data.path: {'train': 'x.json'} is a block"),
    ]
    for change, part in wrong:
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**content, **change}))
        assert part in fails("train", str(tmp_path / "recipe.yaml"))


def test_half_characters(fails: Moa, train_fails: Moa, adapter: Path, tmp_path: Path) -> None:
    rows_of = [{"instruction": "1+1", "output": "2"}, {"instruction": "1+2", "output": "3 \ud83d"}]
    message = train_fails(*rows(tmp_path / "data.json", rows_of))
    assert "data.json row 2: output has \\ud83d at position 3" in message
    assert "the prompt has \\udce4" in fails("generate", str(adapter), "K\udce4se")


def test_models_that_are_not_there(train_fails: Moa, tmp_path: Path) -> None:
    (tmp_path / "hollow").mkdir()
    assert "config.json" in train_fails("--model", str(tmp_path / "hollow"))
    assert "no folder" in train_fails("--model", str(tmp_path / "absent"))
    message = train_fails("--model", "nobody/nothing")
    assert "nobody/nothing" in message and "network" in message and "packaged" in message
    assert "hub" in train_fails("--data.path", "nobody/nothing")
    assert "init" in train_fails("--init_from", str(tmp_path / "hollow"))


def test_output_folder_that_exists(fails: Moa, files: Path, tmp_path: Path) -> None:
    before = (files / "adapter" / "run.json").read_text()
    message = fails("train", str(files / "recipe.yaml"))
    assert "--overwrite" in message and "--resume" in message
    assert (files / "adapter" / "run.json").read_text() == before
    (tmp_path / "file").write_text("x")
    assert "is a file" in fails("train", str(files / "recipe.yaml"), "--output_dir", str(tmp_path / "file"))
    assert "nothing to resume" in fails("train", str(files / "recipe.yaml"), "--resume")
    longer = fails("train", str(files / "recipe.yaml"), "--resume", "--max_steps", "9")
    assert "cannot be made longer" in longer and "--overwrite" in longer
    assert (files / "adapter" / "run.json").read_text() == before


def test_output_folder_that_cannot_be_made(fails: Moa, files: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    places = {
        tmp_path / "link": "link to",
        tmp_path / "link" / "run": "link to",
        tmp_path / "file" / "run": "'" + str(tmp_path / "file") + "' is a file",
        tmp_path / ("x" * 300): "too long",
    }
    for place, part in places.items():
        message = fails("train", str(files / "recipe.yaml"), "--output_dir", str(place))
        assert "output_dir: " in message and part in message
        message = fails("eval", str(files / "base"), "--data", str(files / "sums.json"), "--output", str(place))
        assert "--output: " in message and part in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]


def test_no_disk_space_before_training(train_fails: Moa, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(100, 99, 1000))
    assert "MiB free" in train_fails()


def test_no_disk_space_while_saving(fails: Moa, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Any, folder: str, **kwargs: Any) -> None:
        Path(folder).mkdir()
        (Path(folder) / "adapter_model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(MoATrainer, "save_model", full)
    out = tmp_path / "out"
    assert "disk is full" in fails("train", str(files / "recipe.yaml"), "--output_dir", str(out))
    assert json.loads((out / "run.json").read_text())["status"] == "failed"
    assert not list(out.glob("adapter*")) and not list(out.glob(".*"))


def test_adapter_files_that_are_broken(fails: Moa, adapter: Path, tmp_path: Path) -> None:
    weights = adapter / "adapter_model.safetensors"
    content = weights.read_bytes()
    tensors = load(content)  # from memory: load_file maps the file, which is truncated below
    assert "no folder" in fails("generate", str(tmp_path / "absent"), "hi")

    weights.write_bytes(content[: len(content) // 2])
    assert "truncated" in fails("generate", str(adapter), "hi")
    weights.write_bytes(b"")
    assert "truncated" in fails("generate", str(adapter), "hi")

    name = sorted(tensors)[0]
    save_file({**tensors, name: tensors[name] * float("nan")}, weights)
    message = fails("generate", str(adapter), "hi")
    assert "NaN" in message and name in message

    save_file({key: value for key, value in tensors.items() if key != name}, weights)
    assert f"{name}: not in the file" in fails("generate", str(adapter), "hi")

    weights.write_bytes(content)
    config = adapter / "adapter_config.json"
    config.write_text(config.read_text()[:50])
    assert "adapter_config.json" in fails("generate", str(adapter), "hi")
    config.unlink()
    assert "adapter_config.json" in fails("generate", str(adapter), "hi")


def test_adapter_of_another_model(fails: Moa, files: Path, adapter: Path) -> None:
    message = fails("generate", str(adapter), "hi", "--base", str(files / "wider"))
    assert "does not fit" in message and str(files / "base") in message
    assert "gpt2" in fails("generate", str(adapter), "hi", "--base", str(files / "gpt2"))
    assert "nobody/nothing" in fails("generate", str(adapter), "hi", "--base", "nobody/nothing")


def test_adapter_of_a_newer_version(fails: Moa, adapter: Path) -> None:
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "moa_format": 99, "moa_version": "9.0"}))
    message = fails("generate", str(adapter), "hi")
    assert "9.0" in message and "pip install -U moa-peft" in message


def test_generate_settings_that_are_wrong(fails: Moa, adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    out.write_text("kept")
    assert "exists" in fails("generate", str(adapter), "hi", "--output", str(out))
    assert out.read_text() == "kept"
    assert "does not exist" in fails("generate", str(adapter), "hi", "--output", str(tmp_path / "no" / "x.jsonl"))
    assert "alpacca" in fails("generate", str(adapter), "hi", "--template", "alpacca")
    assert "empty" in fails("generate", str(adapter), "  ")
    assert "max_new_tokens" in fails("generate", str(adapter), "hi", "--max-new-tokens", "0")
    assert "temperature" in fails("generate", str(adapter), "hi", "--temperature", "0")
    assert "top_p" in fails("generate", str(adapter), "hi", "--top-p", "0.5")
    assert "both given" in fails("generate", str(adapter), "hi", "--input", str(out))


def test_generate_checks_its_output_before_loading(
    fails: Moa, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the adapter was loaded before --output was checked")

    monkeypatch.setattr("moa_peft.adapter_loading.load_adapter", load)
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "nowhere")
    words = ["generate", str(adapter), "hi", "--overwrite", "--output"]
    assert "link to" in fails(*words, str(tmp_path / "link.jsonl"))
    assert "is no file" in fails(*words, str(tmp_path))
    assert "is no file" in fails(*words, os.devnull)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    assert "no permission" in fails(*words, str(tmp_path / "answers.jsonl"))


def test_prompts_that_leave_no_room(fails: Moa, train_fails: Moa, adapter: Path, files: Path, tmp_path: Path) -> None:
    """The tiny models have 512 positions, and one token per character."""
    assert "the prompt has" in fails("generate", str(adapter), "x" * 600)
    message = fails("generate", str(adapter), "hi", "--max-new-tokens", "500")
    room = int(message.partition("at most ")[2].split(",")[0])
    assert 300 < room < 500
    assert main(["generate", str(adapter), "hi", "--max-new-tokens", str(room)]) == 0

    questions = [{"instruction": "1+1", "output": "2"}, {"instruction": "1" * 600, "output": "2"}]
    path = rows(tmp_path / "long.json", questions)[1]
    assert "long.json row 2 has" in fails("generate", str(adapter), "--input", path)
    # The file that is too long comes second, and nothing of the first has been scored by then.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moa_peft.evaluation.run.answer_questions", None)
        message = fails("eval", str(adapter), "--data", str(files / "sums.json"), "--data", path)
    assert "long.json row 2 has" in message
    message = train_fails("--data.path", path, "--data.max_length", "1000")
    assert "data.max_length: 1000" in message and "512 positions" in message


def test_an_adapter_that_writes_no_text(fails: Moa, adapter: Path) -> None:
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "task_type": "SEQ_CLS"}))
    message = fails("generate", str(adapter), "hi")
    assert "SEQ_CLS" in message and "CAUSAL_LM" in message


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--rank"], "--rank needs a value"),
        (["--targets", "[q"], "the value of --targets is no valid YAML: '[q'"),
        (["--targets=[q"], "the value of --targets is no valid YAML: '[q'"),
        (["--targets", "5"], "targets is 5"),
        (["--prompt", "'no'"], "prompt is 'no'"),
        (["8"], "unexpected '8'"),
    ],
)
def test_knobs_of_count_that_are_wrong(fails: Moa, files: Path, words: list[str], part: str) -> None:
    assert part in fails("count", "--model", str(files / "base"), *words)


@pytest.mark.parametrize(
    "content", ["{half", "[]", "{}", '{"recipe": 3}', '{"recipe": {"model": 3}}', '{"recipe": {"data": []}}']
)
def test_a_damaged_record_beside_an_adapter(fails: Moa, adapter: Path, content: str) -> None:
    (adapter / "run.json").write_text(content)
    message = fails("generate", str(adapter), "hi")
    assert "run.json" in message and "is damaged" in message


def test_programs_that_are_not_there(fails: Moa) -> None:
    assert "no-such-program" in fails("exec", "--", "no-such-program", "--flag")
    assert "no_such_module" in fails("exec", "--", "python", "-m", "no_such_module")
    assert "absent.py" in fails("exec", "--", "absent.py")
    assert "-m MODULE" in fails("exec", "--", "python", "-c", "1")


def test_traceback_on_request(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="missing"):
        main(["train", "missing.yaml", "--traceback"])
    monkeypatch.setenv("MOA_TRACEBACK", "1")
    with pytest.raises(ValueError, match="missing"):
        main(["train", "missing.yaml"])


def test_errors_of_the_program_keep_their_traceback(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("moa_peft.training.load_recipe", bug)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["train", str(files / "recipe.yaml")])
