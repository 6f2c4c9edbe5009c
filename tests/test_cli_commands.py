"""The commands on a tiny model: train, generate from every source, exec, version, exit codes."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from moa_peft import __version__
from moa_peft.cli import main
from tests.tiny import tiny_recipe


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    content = tiny_recipe(folder, method="sparse_moa", max_steps=2)
    content["data"]["validation_size"] = 4
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
    assert main(["train", str(folder / "recipe.yaml"), "--moa.rank", "4"]) == 0
    return folder


def test_train_wrote_what_the_flags_said(files: Path) -> None:
    config = json.loads((files / "run" / "adapter_config.json").read_text())
    assert {expert["rank"] for expert in config["experts"] if expert["type"] == "lora"} == {4}
    assert json.loads((files / "run" / "run.json").read_text())["status"] == "completed"


def test_generate_from_argument_stdin_and_file_agree(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = str(files / "run")
    settings = ["--max-new-tokens", "6"]
    assert main(["generate", run, "3+4", *settings]) == 0
    answer = capsys.readouterr().out
    assert answer.strip()
    monkeypatch.setattr(sys, "stdin", io.StringIO("3+4\n"))
    assert main(["generate", run, *settings]) == 0
    assert capsys.readouterr().out == answer

    output = tmp_path / "answers.jsonl"
    source = ["--input", str(files / "sums.json"), "--limit", "5", "--batch-size", "2"]
    assert main(["generate", run, *source, "--output", str(output), *settings]) == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["0+1", "1+2", "2+3", "3+4", "4+5"]
    assert [row["answer"] for row in rows] == ["1", "3", "5", "7", "9"]
    assert rows[3]["generated"].strip() == answer.strip()
    assert main(["generate", run, *source, *settings]) == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == rows
    assert main(["generate", run, *source, "--output", str(output), "--overwrite", "--template", "chat"]) == 0


def test_exec_registers_the_method_and_passes_the_arguments(
    files: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "loads.py"
    script.write_text(
        "import sys\n"
        "from peft import AutoPeftModelForCausalLM\n"
        "model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "print(model.peft_config['default'].peft_type.value, sys.argv[2:], __name__)\n"
    )
    moa = [sys.executable, "-m", "moa_peft", "exec", "--"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*moa, str(script), str(files / "run"), "--help"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "MOA ['--help'] __main__"


def test_exec_of_modules_and_console_scripts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "greet.py").write_text("import sys\nprint('hello', sys.argv[1:])\nsys.exit(3)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    with pytest.raises(SystemExit) as caught:
        main(["exec", "--", "python", "-m", "greet", "--loud"])
    assert caught.value.code == 3
    assert capsys.readouterr().out.strip() == "hello ['--loud']"
    with pytest.raises(SystemExit) as caught:
        main(["exec", "--", "accelerate", "--help"])
    assert caught.value.code in (0, None)
    assert "accelerate" in capsys.readouterr().out


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"moa-peft {__version__}"
    for command in ("train", "generate", "exec"):
        assert main([command, "--help"]) == 0
        assert f"moa {command} " in capsys.readouterr().out


def test_ctrl_c_saves_a_checkpoint_and_exits_with_130(files: Path, tmp_path: Path) -> None:
    """Signals a real process, as a person would."""
    output = tmp_path / "run"
    command = [sys.executable, "-m", "moa_peft", "train", str(files / "recipe.yaml"), "--output_dir", str(output)]
    settings = ["--max_steps", "100000", "--logging_steps", "1", "--logging_strategy", "steps"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    process: Any = subprocess.Popen([*command, *settings], env=environment, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if line.startswith("step 3/"):
            process.send_signal(signal.SIGINT)
            break
    rest = process.stderr.read()
    assert process.wait(timeout=60) == 130, rest
    assert "--resume" in rest and "Traceback" not in rest
    assert json.loads((output / "run.json").read_text())["status"] == "interrupted"
    assert len(list((output / "checkpoints").glob("checkpoint-*"))) == 1


def test_exec_registers_in_processes_that_the_program_starts(tmp_path: Path) -> None:
    """accelerate's launcher, and with it `trl sft`, runs the training in a process of its own."""
    child = "import sys; early = 'moa_peft' in sys.modules; import peft; "
    child += "print(early, 'MOA' in peft.PeftType.__members__)"
    script = tmp_path / "parent.py"
    script.write_text(f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {child!r}], check=True)\n")
    own = tmp_path / "own"
    own.mkdir()
    (own / "sitecustomize.py").write_text("print('the own sitecustomize ran')\n")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(own), os.environ.get("PYTHONPATH", "")])}
    result = subprocess.run(
        [sys.executable, "-m", "moa_peft", "exec", "--", str(script)], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[-1] == "False True"
    assert lines.count("the own sitecustomize ran") == 2
