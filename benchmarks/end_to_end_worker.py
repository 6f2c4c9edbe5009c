"""One training run of `end_to_end`, in a process of its own: `python -m benchmarks.end_to_end_worker JSON RESULT`."""

import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed

from moa_peft.base_models import load_model, load_tokenizer
from moa_peft.data import load_examples, tokenize_examples
from moa_peft.errors import UserError
from moa_peft.methods import method_config
from moa_peft.training import parse_recipe, train

TEMPLATE = "alpaca"


class Clock(TrainerCallback):
    """Time and tokens at the end of every optimiser step.

    On CUDA the device is awaited only at the two ends of the timed part, so no step waits for the host.
    """

    def __init__(self, *, warmup: int, steps: int) -> None:
        self.ends = (warmup, warmup + steps)
        self.times_s: list[float] = []
        self.tokens: list[int] = []
        self.mean_loss = float("nan")

    def _read(self, state: TrainerState) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times_s.append(time.perf_counter())
        self.tokens.append(int(state.num_input_tokens_seen))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start here where no step is thrown away."""
        if self.ends[0] == 0:
            self._read(state)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Read the clock at both ends of the timed steps."""
        if state.global_step in self.ends:
            self._read(state)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Keep the loss of the only log line, the mean over all steps."""
        self.mean_loss = float((kwargs.get("logs") or {}).get("loss", self.mean_loss))


def trainer_options(settings: dict[str, Any]) -> dict[str, Any]:
    """What both trainers are told, under the names of `transformers.TrainingArguments`."""
    num_steps = settings["warmup"] + settings["steps"]
    return {
        "max_steps": num_steps,
        "per_device_train_batch_size": settings["batch"],
        "train_sampling_strategy": settings["sampling"],
        "learning_rate": 1e-4,
        "logging_steps": num_steps,
        "include_num_input_tokens_seen": "non_padding",
        "save_strategy": "no",
        "report_to": "none",
        "bf16": settings["autocast"],
        "use_cpu": settings["device"] == "cpu",
        "activation_checkpointing": False,
        "dataloader_pin_memory": settings["device"] != "cpu",
        "seed": settings["seed"],
    }


def train_with_moa(settings: dict[str, Any], clock: Clock, folder: Path) -> None:
    """`moa train` as a function."""
    recipe = {
        "model": settings["base_model"],
        "output_dir": str(folder),
        "method": settings["method"],
        "moa": settings["knobs"],
        "dtype": settings["dtype"],
        "data": {
            "path": settings["data"],
            "limit": rows_needed(settings),
            "validation_size": 0,
            "template": TEMPLATE,
            "max_length": settings["max_length"],
        },
        **trainer_options(settings),
    }
    train(parse_recipe(recipe), callbacks=[clock])


def train_with_trl(settings: dict[str, Any], clock: Clock, folder: Path) -> None:
    """TRL's SFTTrainer on the rows that `moa train` makes of the data."""
    from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportPrivateImportUsage]

    set_seed(settings["seed"])
    tokenizer = load_tokenizer(settings["base_model"])
    examples = load_examples(settings["data"], limit=rows_needed(settings))
    rows, _ = tokenize_examples(examples, tokenizer, template=TEMPLATE, max_length=settings["max_length"])
    config = method_config(settings["method"], task_type="CAUSAL_LM", **settings["knobs"])
    trainer = SFTTrainer(
        model=load_model(settings["base_model"], dtype=settings["dtype"]),
        args=SFTConfig(output_dir=str(folder), max_length=None, disable_tqdm=True, **trainer_options(settings)),
        train_dataset=rows.select_columns(["input_ids", "labels"]),
        processing_class=tokenizer,
        peft_config=config,
        callbacks=[clock],
    )
    trainer.train()


def rows_needed(settings: dict[str, Any]) -> int:
    """Rows that fill every batch once."""
    return settings["batch"] * (settings["warmup"] + settings["steps"])


def measure(settings: dict[str, Any]) -> dict[str, float]:
    """Train, and say what it cost.

    Args:
        settings: from `benchmarks.end_to_end.run_settings`.

    Returns:
        The metrics of `benchmarks.end_to_end`.
    """
    if settings["threads"] is not None:
        torch.set_num_threads(settings["threads"])
    clock = Clock(warmup=settings["warmup"], steps=settings["steps"])
    with tempfile.TemporaryDirectory(prefix="moa_benchmark_") as folder:
        run = train_with_trl if settings["trainer"] == "trl" else train_with_moa
        run(settings, clock, Path(folder) / "run")
    elapsed_s = clock.times_s[1] - clock.times_s[0]
    found = {
        "tokens_per_second": (clock.tokens[1] - clock.tokens[0]) / elapsed_s,
        "step_seconds": elapsed_s / settings["steps"],
        "peak_resident_bytes": float(peak_resident_bytes()),
        "mean_loss": clock.mean_loss,
    }
    if settings["device"] == "cuda":
        found["cuda_peak_bytes"] = float(torch.cuda.max_memory_allocated())
    return found


def peak_resident_bytes() -> int:
    """The most memory this process has had, shared libraries included."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts kilobytes, macOS bytes.
    return peak if sys.platform == "darwin" else peak * 1024


def main() -> int:
    """Measure and write the result; 2 for a mistake of the user."""
    settings, result = json.loads(sys.argv[1]), Path(sys.argv[2])
    try:
        found = measure(settings)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    result.write_text(json.dumps(found), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
