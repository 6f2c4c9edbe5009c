"""What each of two processes does in the tests of distributed training; started once for all of them."""

import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from tests.models import tiny_batch
from tests.native import soft, sparse, trained

WORLD = 2
STEPS = 2


@dataclass(frozen=True)
class Case:
    """One way to train.

    Attributes:
        name: shown in the test's name, and the name of the file with its gradients.
        strategy: ``ddp`` or ``fsdp``.
        method: ``soft``, ``sparse``, or ``released`` (no gradient reaches the threshold).
        family: key of `tests.models.FAMILIES`.
        checkpointing: whether activations are recomputed.
    """

    strategy: str
    method: str
    family: str = "llama"
    checkpointing: bool = False

    @property
    def name(self) -> str:
        """All that makes the case."""
        return "-".join([self.strategy, self.method, self.family] + ["checkpointing"] * self.checkpointing)


CASES = [
    Case("ddp", "soft"),
    Case("ddp", "sparse"),
    Case("ddp", "released"),
    Case("ddp", "sparse", "opt"),
    Case("ddp", "soft", "gpt2", checkpointing=True),
    Case("fsdp", "soft"),
    Case("fsdp", "released"),
    Case("fsdp", "soft", "qwen3", checkpointing=True),
]


def make_model(case: Case) -> PeftModel:
    """The model of a case, the same in every process."""
    config = {
        "soft": soft,
        "sparse": sparse,
        "released": lambda: sparse(threshold_gradient="none", prompt=True),
    }[case.method]()
    model = trained(case.family, config).train()
    if case.checkpointing:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def batch_of(step: int) -> dict[str, torch.Tensor]:
    """The whole batch of a step."""
    return tiny_batch(rows=2 * WORLD, tokens=6, seed=20 + step)


def train(model: nn.Module, batches: list[dict[str, torch.Tensor]]) -> None:
    """Add the gradients of every batch up."""
    for batch in batches:
        model(**batch).loss.backward()


def read_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """The gradients by parameter name, whole."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradient = parameter.grad
            found[name] = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
    return found


def run(rank: int, port: int, folder: str) -> None:
    """One process: train every case on its share of the batches; the first process writes the gradients."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD)
    try:
        for case in CASES:
            model = make_model(case)
            if case.strategy == "ddp":
                trained_model: nn.Module = DistributedDataParallel(model)
            else:
                for block in _blocks(model):
                    fully_shard(block)
                trained_model = fully_shard(model)
            share = [{key: value.chunk(WORLD)[rank] for key, value in batch_of(s).items()} for s in range(STEPS)]
            train(trained_model, share)
            gradients = read_gradients(model)
            if rank == 0:
                torch.save(gradients, Path(folder) / f"{case.name}.pt")
    finally:
        dist.destroy_process_group()


def _blocks(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if hasattr(module, "moa")]
