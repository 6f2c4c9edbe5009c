"""Two processes compute what one does: same losses, one writer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.tiny import save_tiny, write_sums


@pytest.mark.parametrize("method", ["soft_moa"])
def test_two_processes_equal_one(method: str, tmp_path: Path) -> None:
    save_tiny(tmp_path / "base")
    content = {
        "model": str(tmp_path / "base"),
        "method": method,
        "data": {"path": str(write_sums(tmp_path / "sums.json")), "validation_size": 4, "max_length": 300},
        "learning_rate": 1e-2,
        "max_steps": 4,
        "logging_steps": 1,
        "max_grad_norm": 0.0,
        "report_to": "none",
        "use_cpu": True,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    logs = []
    for processes in (1, 2):
        folder = tmp_path / f"run{processes}"
        launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"] if processes == 2 else []
        command = [sys.executable, "-m", *launcher, "moa_peft", "train", str(tmp_path / "recipe.yaml")]
        settings = ["--output_dir", str(folder), "--per_device_train_batch_size", str(4 // processes)]
        done = subprocess.run(
            [*command, *settings], env=environment, capture_output=True, text=True, check=False, timeout=120
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("Trained 4 steps") == 1
        run = json.loads((folder / "run.json").read_text())
        assert run["hardware"]["processes"] == processes
        logs.append([entry[key] for entry in run["log"] for key in ("loss", "eval_loss") if key in entry])
    assert len(logs[0]) == 6
    assert logs[1] == pytest.approx(logs[0], rel=1e-4)
