"""The optimizers in two processes of DistributedDataParallel, and with a compiled model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fewshot_asam.optim import SAM

RHO, LR = 0.3, 0.1


def problem(rank: int) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(rank)
    return torch.randn(8, 3, generator=draws, dtype=torch.float64), torch.randint(2, (8,), generator=draws)


def model() -> nn.Linear:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Linear(3, 2, bias=False).double()


def process(rank: int, folder: str) -> None:
    """One of two processes: a step whose gradients are all averaged, and one whose first gradient is its own."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for name in ("averaged", "own"):
        parallel = DistributedDataParallel(model())
        options: dict[str, Any] = {"no_sync": parallel.no_sync} if name == "own" else {}
        optimizer = SAM(parallel.parameters(), torch.optim.SGD, RHO, lr=LR, **options)

        def evaluate(net: nn.Module = parallel, optimizer: SAM = optimizer) -> Tensor:
            optimizer.zero_grad()
            images, labels = problem(rank)
            loss = F.cross_entropy(net(images), labels)
            loss.backward()
            return loss

        optimizer.step(evaluate)
        torch.save(parallel.module.weight.detach(), f"{folder}/{name}{rank}")
    dist.destroy_process_group()


def grad(weight: Tensor, rank: int) -> Tensor:
    weight = weight.detach().requires_grad_()
    images, labels = problem(rank)
    (found,) = torch.autograd.grad(F.cross_entropy(images @ weight.T, labels), weight)
    return found


def test_every_process_makes_the_same_step(tmp_path: Path) -> None:
    """With `no_sync` each perturbs by its own gradient; the step is the mean of theirs, in both ways."""
    torch.multiprocessing.spawn(process, (str(tmp_path),), nprocs=2)
    weight = model().weight.detach()
    own = [grad(weight, rank) for rank in range(2)]
    mean = (own[0] + own[1]) / 2
    perturbed = {"averaged": [mean, mean], "own": own}
    for name, directions in perturbed.items():
        moved = [grad(weight + RHO * one / one.norm(), rank) for rank, one in enumerate(directions)]
        expected = weight - LR * (moved[0] + moved[1]) / 2
        for rank in range(2):
            found = torch.load(tmp_path / f"{name}{rank}", weights_only=True)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("in_place", [False, True])
def test_statistics_of_a_compiled_model_move_once_a_step(in_place: bool) -> None:
    images, labels = problem(0)
    plain = nn.Sequential(model(), nn.BatchNorm1d(2).double())
    compiled: Any = nn.Sequential(model(), nn.BatchNorm1d(2).double())
    norm = compiled[1]
    plain(images)
    if in_place:
        compiled.compile(backend="eager")
    else:
        compiled = torch.compile(compiled, backend="eager")
    optimizer = SAM(compiled.parameters(), torch.optim.SGD, RHO, lr=LR)

    def evaluate() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(compiled(images), labels)
        loss.backward()
        return loss

    optimizer.step(evaluate)
    assert norm.num_batches_tracked == 1
    torch.testing.assert_close(norm.running_mean, plain[1].running_mean)
