"""Auxiliary losses in transformers' and TRL's trainers: the scale of each step, and the logs."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers.trainer
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

from moa_peft.auxiliary import Auxiliary
from moa_peft.losses import loss_values, parse_losses
from moa_peft.routing import Routing
from moa_peft.training_callback import AuxiliaryLossCallback, register_training_callback
from tests.test_auxiliary import (
    BLOCKS,
    Toy,
    batch,
    check_same,
    expected_gradients,
    explicit,
    gradients,
    rows_of,
    total,
)
from tests.tiny import save_tiny


class Rows(torch.utils.data.Dataset):
    """Single rows of one batch."""

    def __init__(self, rows: int) -> None:
        self.inputs = batch(rows, seed=4)
        self.rows = rows

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: tensor[index] for name, tensor in self.inputs.items()}


class Stream(torch.utils.data.IterableDataset):
    """The same rows without a length."""

    def __init__(self, rows: int) -> None:
        self.rows = Rows(rows)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return (self.rows[index] for index in range(len(self.rows)))


class Reporter(TrainerCallback):
    """Stands for a tracker: keeps what it is told, and the scale at each step."""

    def __init__(self) -> None:
        self.logs: list[dict[str, Any]] = []
        self.scales: list[Any] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.scales.append(model.blocks[0].auxiliary.scale)


@pytest.fixture(autouse=True)
def registered() -> None:
    register_training_callback()


def options(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "optim": "sgd",
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 1,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 3,
        "train_sampling_strategy": "sequential",
    } | changes


def trainer_of(model: Toy, folder: Path, data: Any, **changes: Any) -> tuple[Trainer, Reporter]:
    reporter = Reporter()
    arguments = TrainingArguments(**options(folder, **changes))
    return Trainer(model, arguments, train_dataset=data, eval_dataset=Rows(4), callbacks=[reporter]), reporter


def train_by_hand(model: Toy, steps: list[list[slice]], rows: int) -> list[dict[str, float]]:
    """Gradient descent on explicit losses; returns the values that belong in the log."""
    logs = []
    for micro_batches in steps:
        model.zero_grad()
        found = [explicit(model, rows_of(batch(rows, seed=4), rows_)) for rows_ in micro_batches]
        (sum(total(one) for one in found) / len(found)).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
        balance = sum(one["balance"].item() for one in found) / len(found)
        logs.append({"moa/balance": balance, "moa/z": sum(one["z"].item() for one in found) / len(found) / BLOCKS})
    return logs


def check_trained(model: Toy, expected: Toy) -> None:
    for (name, found), wanted in zip(model.named_parameters(), expected.parameters()):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12, msg=name)


def test_every_trainer_has_the_callback_once():
    register_training_callback()
    assert transformers.trainer.DEFAULT_CALLBACKS.count(AuxiliaryLossCallback) == 1


def test_trainer_equals_explicit_losses_also_in_a_short_last_step(tmp_path):
    """Five micro-batches in steps of two, two and one, for two epochs."""
    model = Toy()
    expected = copy.deepcopy(model)
    starts = range(0, 10, 2)
    pieces = [slice(start, start + 2) for start in starts]
    logs = train_by_hand(expected, [pieces[0:2], pieces[2:4], pieces[4:5]] * 2, rows=10)
    trainer, reporter = trainer_of(model, tmp_path, Rows(10), num_train_epochs=2)
    trainer.train()
    assert trainer.state.global_step == 6 and not trainer.model_accepts_loss_kwargs
    assert reporter.scales == [0.5, 0.5, 1.0] * 2
    check_trained(model, expected)
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    reported = [entry for entry in reporter.logs if "loss" in entry]
    for found in (history, reported):
        for entry, wanted in zip(found, logs, strict=True):
            assert {name: entry[name] for name in wanted} == pytest.approx(wanted, rel=1e-9)
    assert not any("moa/balance" in entry for entry in reporter.logs if "loss" not in entry)
    assert all(block.auxiliary.scale is None for block in model.blocks), "a finished trainer leaves no scale"


def test_trainer_on_a_stream(tmp_path):
    model = Toy()
    expected = copy.deepcopy(model)
    pieces = [slice(start, start + 2) for start in range(0, 8, 2)]
    train_by_hand(expected, [pieces[0:2], pieces[2:4]], rows=8)
    trainer, reporter = trainer_of(model, tmp_path, Stream(8), max_steps=2)
    trainer.train()
    assert reporter.scales == [0.5, 0.5]
    check_trained(model, expected)


def test_a_resumed_run_knows_where_its_epoch_ends(tmp_path):
    first, _ = trainer_of(Toy(), tmp_path, Rows(10), max_steps=1, save_strategy="steps", save_steps=1)
    first.train()
    second, reporter = trainer_of(Toy(), tmp_path, Rows(10), num_train_epochs=2)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert reporter.scales == [0.5, 1.0] + [0.5, 0.5, 1.0]
    anew, reporter = trainer_of(Toy(), tmp_path, Rows(10), max_steps=4, ignore_data_skip=True)
    anew.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert reporter.scales == [0.5, 0.5, 1.0]


def test_a_model_without_losses_is_left_alone(tmp_path):
    trainer, reporter = trainer_of(Toy(default=[]), tmp_path, Rows(4))
    trainer.train()
    assert reporter.scales == [None]
    assert not any(name.startswith("moa/") for entry in reporter.logs for name in entry)


def test_logs_of_evaluations_take_nothing(tmp_path):
    trainer, reporter = trainer_of(
        Toy(), tmp_path, Rows(8), logging_steps=2, eval_strategy="steps", eval_steps=1, learning_rate=0.0
    )
    trainer.train()
    evaluated = [entry for entry in reporter.logs if "eval_loss" in entry]
    assert len(evaluated) == 2 and not any("moa/z" in entry for entry in evaluated)
    (training,) = [entry for entry in reporter.logs if "loss" in entry]
    values = [explicit(Toy(), rows_of(batch(8, seed=4), slice(n, n + 2)))["z"].item() for n in range(0, 8, 2)]
    assert training["moa/z"] == pytest.approx(sum(values) / 4 / BLOCKS, rel=1e-9), "all four, also before evaluating"


def begin_step(model: Toy, optimizer: Any) -> Callable[[str], None]:
    """Put a callback into its first optimiser step of two micro-batches; returns how to tell it of further events."""
    callback = AuxiliaryLossCallback()
    arguments: Any = SimpleNamespace(gradient_accumulation_steps=2, n_gpu=1, ignore_data_skip=False)
    state: Any = SimpleNamespace(global_step=0)

    def tell(event: str) -> None:
        getattr(callback, event)(
            arguments, state, None, model=model, optimizer=optimizer, train_dataloader=[0, 1, 2, 3]
        )

    for event in ("on_train_begin", "on_epoch_begin", "on_step_begin"):
        tell(event)
    return tell


@pytest.mark.parametrize("event", ["on_step_end", "on_train_end"])
def test_the_scale_lasts_for_a_step(event):
    model = Toy()
    tell = begin_step(model, SimpleNamespace(scaler=None))
    assert [block.auxiliary.scale for block in model.blocks] == [0.5] * BLOCKS
    tell(event)
    assert [block.auxiliary.scale for block in model.blocks] == [None] * BLOCKS


@pytest.mark.parametrize("kind", ["grad_scaler", "deepspeed", "disabled"])
def test_half_precision_scales_the_losses_like_the_loss(kind):
    model = Toy()
    expected = expected_gradients(lambda m: total(explicit(m, batch())), model)
    scale = 1.0 if kind == "disabled" else 1024.0
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=kind == "grad_scaler")
    optimizer = SimpleNamespace(scaler=None if kind == "deepspeed" else scaler, optimizer=SimpleNamespace())
    if kind == "deepspeed":
        optimizer.optimizer.loss_scale = scale
    begin_step(model, optimizer)
    for _ in range(2):
        (model(**batch())["loss"] * scale / 2).backward()
    check_same({name: gradient / scale for name, gradient in gradients(model).items()}, expected)


class RoutedMLP(nn.Module):
    """The MLP of a block times a routed factor."""

    def __init__(self, mlp: nn.Module, coefficient: float, hidden: int) -> None:
        super().__init__()
        self.mlp = mlp
        self.router = nn.Linear(hidden, 3)
        self.factors = nn.Parameter(torch.tensor([0.5, 1.0, 2.0]))
        self.auxiliary = Auxiliary()
        self.auxiliary.add("default", "mlp", parse_losses([{"type": "balance", "coefficient": coefficient}]))
        self.seen: list[torch.Tensor] = []

    def route(self, x: torch.Tensor) -> Routing:
        scores = self.router(x).softmax(-1)
        kept = scores >= scores.amax(-1, keepdim=True)
        return Routing(weights=scores * kept, scores=scores)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.seen.append(x.detach())
        routing = self.auxiliary.attach("default", "mlp", self.route(x), None, training=self.training)
        return self.mlp(x) * (routing.weights @ self.factors)[..., None]


def test_sft_trainer_takes_the_gradient_of_the_losses(tmp_path):
    """With the losses, one step of gradient descent goes further by the mean of their gradients, and no more."""
    trl = pytest.importorskip("trl", reason="TRL is not installed: pip install 'moa-peft[train]'")
    datasets = pytest.importorskip("datasets", reason="datasets is not installed: pip install 'moa-peft[train]'")
    base = save_tiny(tmp_path / "base", "llama")

    def train(coefficient: float) -> tuple[RoutedMLP, RoutedMLP, dict[str, float]]:
        model = AutoModelForCausalLM.from_pretrained(base).requires_grad_(False)
        torch.manual_seed(0)
        routed = model.model.layers[0].mlp = RoutedMLP(model.model.layers[0].mlp, coefficient, 16)
        start = copy.deepcopy(routed)
        trainer = trl.SFTTrainer(
            model=model,
            args=trl.SFTConfig(**options(tmp_path, max_steps=1, bf16=False, gradient_checkpointing=False)),
            train_dataset=datasets.Dataset.from_list([{"text": f"{a}+{a}={2 * a}"} for a in range(10, 14)]),
            processing_class=AutoTokenizer.from_pretrained(base),
        )
        trainer.train()
        return start, routed, trainer.state.log_history[0]

    _, without, _ = train(1e-30)
    start, routed, log = train(3.0)
    assert len(routed.seen) == 2, "two micro-batches"
    plain = parse_losses([{"type": "balance", "coefficient": 1.0}])
    value = sum(loss_values(plain, start.route(x))["balance"] for x in routed.seen) / 2
    value.backward()
    assert log["moa/balance"] == pytest.approx(value.item(), rel=1e-5)
    assert start.router.weight.grad.abs().max() > 1e-2
    further = routed.router.weight - without.router.weight
    torch.testing.assert_close(further, -0.1 * 3.0 * start.router.weight.grad, rtol=1e-3, atol=1e-6)
