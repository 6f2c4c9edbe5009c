"""Training end to end: tokens per second and peak resident memory of whole training runs on real rows.

Anchor: TRL's SFTTrainer with PEFT LoRA, the usual way to fine-tune. Contenders: the same adapter and the mixtures
under `moa_peft.training`, and a mixture under SFTTrainer.

How: every run is a process of its own, because the peak of resident memory belongs to a process. All of them load the
same base model, tokenise the same rows with the same template, take them in the same order in the same batches, and
run the same optimiser without activation checkpointing; a few optimiser steps are thrown away, then the clock runs
over `--steps` of them. Tokens are those of the data, padding does not count. Runs take turns, in changing order.
`mean_loss` shows that the runs saw the same rows: adapters that start as the identity begin at the same loss. Ratios
of tokens per second are better above 1.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.base import BENCHMARKS, Benchmark, Options, Track, silent
from benchmarks.rows import Row, rows_of
from benchmarks.timing import interleave
from moa_peft.errors import UserError

# Contender to trainer and method.
RUNS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "trl_lora": ("trl", "lora", {}),
    "trl_sparse": ("trl", "sparse_moa", {}),
    "moa_lora": ("moa", "lora", {}),
    "moa_soft": ("moa", "soft_moa", {"prompt": False}),
    "moa_soft_prompt": ("moa", "soft_moa", {"prompt": True}),
    "moa_sparse": ("moa", "sparse_moa", {}),
}
METRICS = {"tokens_per_second": "tokens/s", "step_seconds": "s", "peak_resident_bytes": "B", "mean_loss": "nat"}
CUDA_METRICS = {"cuda_peak_bytes": "B"}
_SHOWN_OUTPUT = 2000
_EXIT_USER_ERROR = 2


def run_settings(name: str, options: Options) -> dict[str, Any]:
    """What the worker is told about one run; plain values."""
    trainer, method, knobs = RUNS[name]
    size = {} if method == "lora" else {"adapter_size": 2 * options.rank}
    return {
        "trainer": trainer,
        "method": method,
        "knobs": {"rank": options.rank, **size, **knobs},
        "base_model": options.base_model,
        "data": str(options.data),
        "batch": options.batch,
        "max_length": options.tokens,
        "steps": options.steps,
        "warmup": options.warmup,
        "sampling": options.sampling,
        "dtype": options.dtype,
        "autocast": options.autocast,
        "device": options.device,
        "threads": options.threads,
        "seed": options.seed,
    }


def launch(settings: dict[str, Any]) -> dict[str, float]:
    """Run one training in a process of its own.

    Raises:
        UserError: the run refused its settings or its data.
        RuntimeError: the run failed otherwise.
    """
    with tempfile.TemporaryDirectory(prefix="moa_benchmark_") as folder:
        result = Path(folder) / "result.json"
        words = [sys.executable, "-m", "benchmarks.end_to_end_worker", json.dumps(settings), str(result)]
        # A process that is started with -m finds this package in the working directory only.
        search = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(search)}
        done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
        if done.returncode == _EXIT_USER_ERROR:
            raise UserError(f"end_to_end: {done.stderr.strip()[-_SHOWN_OUTPUT:]}")
        if done.returncode != 0:
            raise RuntimeError(f"The training process failed ({done.returncode}):\n{done.stderr[-_SHOWN_OUTPUT:]}")
        return json.loads(result.read_text(encoding="utf-8"))


@BENCHMARKS.register("end_to_end")
class EndToEnd(Benchmark):
    """See the module's docstring."""

    summary = "tokens per second and peak memory of training, beside TRL with PEFT LoRA (--data)"
    methods = ("trl_lora", "moa_lora", "moa_soft_prompt", "moa_sparse")
    allowed = tuple(RUNS)
    repeats = 3

    def check(self, options: Options) -> None:
        super().check(options)
        if options.data is None:
            raise UserError("end_to_end trains on real rows: give --data FILE, JSON with instruction and output.")
        if not options.data.exists():
            raise UserError(f"--data: there is no file {options.data}.")

    def run(self, options: Options, track: Track = silent) -> list[Row]:
        assert options.data is not None
        names = self.contenders(options)
        tasks = {name: lambda name=name: launch(run_settings(name, options)) for name in names}
        # A process starts cold in every round, so there is no round to throw away.
        results = interleave(
            tasks, repeats=self.rounds(options), warmup=0, track=track, description="end_to_end, whole runs"
        )
        shared = run_settings(names[0], options)
        settings = {key: value for key, value in shared.items() if key not in ("trainer", "method", "knobs")}
        settings |= {"tokens": options.tokens, "rank": options.rank, "data": options.data.name}
        metrics = METRICS | CUDA_METRICS if options.device == "cuda" else METRICS
        rows = []
        for metric, unit in metrics.items():
            rows += rows_of(
                {name: [found[metric] for found in founds] for name, founds in results.items()},
                benchmark="end_to_end",
                model=Path(options.base_model).name,
                metric=metric,
                unit=unit,
                settings=dict.fromkeys(names, settings),
                against=dict.fromkeys(names, (names[0],)),
            )
        return rows
