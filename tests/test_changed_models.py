"""This package's models with a layer replaced or hooked into: no longer trusted, and every hook is heeded."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from fewshot_asam import MAML, Conv4, FewShotError
from fewshot_asam.models import ConvBlock
from problems import SHAPE, deviation, episodes

FILTERS = 16
"""Whose blocks are fused."""


def made(change: Callable[[Conv4], object], seed: int = 0) -> Conv4:
    torch.manual_seed(seed)
    model = Conv4(3, SHAPE, FILTERS).double()
    change(model)
    return model.double()


def with_head(head: Callable[[], nn.Module]) -> Callable[[Conv4], object]:
    return lambda model: setattr(model, "head", head())


def meta_loss(model: nn.Module, **options: Any) -> Tensor:
    return MAML(model, 0.4, **options).meta_loss(episodes(), 2).loss


@pytest.mark.parametrize(
    ("head", "engine", "message"),
    [
        (lambda: nn.Sequential(nn.LayerNorm(FILTERS), nn.Linear(FILTERS, 3)), "vmap", r"'head.0' \(LayerNorm\)"),
        (
            lambda: parametrizations.weight_norm(nn.Linear(FILTERS, 3)),
            "loop",
            r"'head.parametrizations.weight.0' \(_WeightNorm\)",
        ),
    ],
)
def test_a_head_that_is_differentiated_wrongly_is_refused(head: Any, engine: str, message: str) -> None:
    with pytest.raises(FewShotError, match=message):
        meta_loss(made(with_head(head)), engine=engine)


def test_a_head_that_is_differentiated_rightly_is_taken() -> None:
    def head() -> nn.Module:
        return nn.Sequential(nn.Linear(FILTERS, 8), nn.Tanh(), nn.Linear(8, 3))

    model = made(with_head(head))
    loops, vectorised = (
        torch.autograd.grad(meta_loss(model, engine=engine), list(model.parameters())) for engine in ("loop", "vmap")
    )
    assert max(deviation(*pair) for pair in zip(loops, vectorised, strict=True)) < 1e-10


def test_models_as_they_were_made_are_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fewshot_asam.verification.trials.diagnosed", lambda *_: pytest.fail("it was tried"))
    meta_loss(made(lambda model: None), engine="loop")


def textbook(block: ConvBlock, x: Tensor) -> Tensor:
    y = F.batch_norm(block.conv(x), None, None, block.norm.weight, block.norm.bias, training=True)
    return F.max_pool2d(F.relu(y), 2)


def test_hooks_are_called() -> None:
    seen: list[Tensor] = []
    model, x = made(lambda model: None), torch.rand(4, *SHAPE, dtype=torch.float64)
    plain = model(x)
    model.blocks[1].conv.register_forward_hook(lambda layer, given, found: seen.append(found))
    assert deviation(model(x), plain) < 1e-12
    assert len(seen) == 1
    assert deviation(textbook(model.blocks[1], model.blocks[0](x)), model.blocks[1](model.blocks[0](x))) < 1e-12


def test_a_pruned_model_is_what_its_stored_weights_say() -> None:
    def pruned(model: Conv4) -> None:
        prune.l1_unstructured(model.blocks[1].conv, "weight", 0.5)

    one, other = made(pruned, seed=0), made(pruned, seed=1)
    other.load_state_dict(one.state_dict())
    x = torch.rand(4, *SHAPE, dtype=torch.float64)
    assert torch.equal(one(x), other(x))


def test_a_pruned_model_is_trained() -> None:
    model = made(lambda model: prune.l1_unstructured(model.blocks[1].conv, "weight", 0.5))
    learner = MAML(model, 0.4, engine="loop", check=False)
    learner.meta_backward(episodes(), 1)
    gradient = model.blocks[1].conv.weight_orig.grad
    assert isinstance(gradient, Tensor)
    mask = model.blocks[1].conv.weight_mask
    assert bool((gradient[mask == 0] == 0).all())
    assert bool((gradient[mask == 1] != 0).any())
    learner.meta_backward(episodes(), 1)


class Positions(nn.Module):
    """Makes a buffer of the images' precision in its first forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(SHAPE[0] * SHAPE[1] * SHAPE[2], 3)
        self.register_buffer("positions", None)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        if self.positions is None:
            self.positions = torch.linspace(0, 1, flat.shape[1], dtype=x.dtype)
        return self.head(flat + self.positions)


def test_the_trial_leaves_no_buffer_behind() -> None:
    model, given = Positions(), episodes()
    single = replace(given, support_x=given.support_x.float(), query_x=given.query_x.float())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tried = MAML(model, 0.1, engine="loop").meta_loss(single, 1).loss
    assert model.positions.dtype == torch.float32
    assert torch.equal(tried, MAML(model, 0.1, engine="loop", check=False).meta_loss(single, 1).loss)


def test_a_norm_that_is_put_back_to_training_is_noticed() -> None:
    norm = nn.BatchNorm1d(8).eval()
    model = nn.Sequential(nn.Flatten(), nn.Linear(SHAPE[0] * SHAPE[1] * SHAPE[2], 8), norm, nn.Linear(8, 3)).double()
    learner = MAML(model, 0.1, engine="loop", check=False)
    learner.meta_loss(episodes(), 1)
    learner.train()
    with pytest.raises(FewShotError, match=r"layer '2' \(BatchNorm1d\) keeps running statistics"):
        learner.meta_loss(episodes(), 1)
    assert norm.num_batches_tracked == 0
