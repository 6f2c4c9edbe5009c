"""Two processes compute the gradients that one process computes, under DDP and FSDP2."""

import socket
from pathlib import Path

import pytest
import torch
import torch.multiprocessing

from tests import distributed_worker
from tests.distributed_worker import CASES, STEPS, Case


@pytest.fixture(scope="module")
def gradients_of_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the gradients of every case; both processes are started once, since starting takes longest."""
    folder = tmp_path_factory.mktemp("gradients")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(distributed_worker.run, args=(port, str(folder)), nprocs=distributed_worker.WORLD)
    return folder


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_two_processes_equal_one(case: Case, gradients_of_two: Path):
    found = torch.load(gradients_of_two / f"{case.name}.pt")
    model = distributed_worker.make_model(case)
    distributed_worker.train(model, [distributed_worker.batch_of(step) for step in range(STEPS)])
    expected = distributed_worker.read_gradients(model)
    assert set(expected) == {name for name, p in model.named_parameters() if p.requires_grad}
    assert any(gradient.abs().max() > 1e-3 for gradient in expected.values())
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
