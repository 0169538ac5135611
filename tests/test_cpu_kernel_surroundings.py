"""What else a process does: changes images, starts threads, forks, sets defaults, traces; the block stays right."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewshot_asam.models import ConvBlock, cpu_kernels
from fewshot_asam.models.cpu_kernels import build, input_block
from kernel_cases import FILTERS, agree, derivatives, make_block, make_images

pytestmark = pytest.mark.skipif(build.library() is None, reason="no C++ compiler")


def shift_data(x: Tensor) -> None:
    x.data.add_(1)


def shift_array(x: Tensor) -> None:
    x.numpy()[0] += 1


def shift_view(x: Tensor) -> None:
    x.data.view(-1)[3] = 5


def shift_in_inference(x: Tensor) -> None:
    with torch.inference_mode():
        x.add_(1)


def other_data(x: Tensor) -> None:
    x.data = x.data + 1


def other_size(x: Tensor) -> None:
    x.data = x.data[:1, :, 1:].clone()


@pytest.mark.parametrize(
    "change", [shift_data, shift_array, shift_view, shift_in_inference, other_data, other_size, Tensor.neg_]
)
def test_images_that_changed_are_looked_at_again(change: Callable[[Tensor], object]) -> None:
    block, x = make_block(3, 16), make_images(2, 3, 6, 6)
    block(x)
    change(x)
    agree(block, x)


def test_images_seen_without_gradients_first_can_be_trained_on() -> None:
    block, x = make_block(3, 16), make_images(2, 3, 6, 6)
    with torch.inference_mode():
        block(x)
    agree(block, x)


def test_images_are_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    block, x, prepared = make_block(3, 16), make_images(2, 3, 6, 6), []
    genuine = input_block._prepared
    monkeypatch.setattr(input_block, "_prepared", lambda images: prepared.append(1) or genuine(images))
    derivatives(block, x)
    block(x)
    assert len(prepared) == 1


@pytest.mark.parametrize("filters", FILTERS)
def test_saved_tensors_may_come_back_in_another_format(filters: int) -> None:
    block, x = make_block(3, filters), make_images(2, 3, 7, 6)
    expected = derivatives(block, x)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda value: value.detach().clone(memory_format=torch.contiguous_format), lambda value: value
    ):
        torch.testing.assert_close(block(x).square().sum(), expected[0].square().sum())
        loss = block(x).square().sum()
    grads = torch.autograd.grad(loss, list(block.parameters()))
    torch.testing.assert_close(grads, torch.autograd.grad(block(x).square().sum(), list(block.parameters())))


def test_many_threads_at_once() -> None:
    """Of Python, on shared images that some of them see for the first time, and of OpenMP."""
    block, threads = make_block(3, 16), torch.get_num_threads()
    images = [make_images(2, 3, 9, 6) + shift for shift in range(4)]
    expected = [derivatives(block, x) for x in images]
    torch.set_num_threads(16)
    try:
        with ThreadPoolExecutor(8) as pool:
            for found, true in zip(pool.map(partial(derivatives, block), images * 8), expected * 8, strict=True):
                torch.testing.assert_close(found, true)
    finally:
        torch.set_num_threads(threads)


def test_a_forked_process_can_go_on() -> None:
    block, x = make_block(3, 16), make_images(2, 3, 6, 6)
    expected = block(x).sum().item()
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply_async(forked, (block.state_dict(), x)).get(timeout=60) == pytest.approx(expected)


def forked(state: dict[str, Tensor], x: Tensor) -> float:
    block = make_block(3, 16)
    block.load_state_dict(state)
    return float(block(x).sum().item())


SURROUNDINGS = {
    "with torch.device": "torch.device('meta').__enter__()",
    "a default device": "torch.set_default_device('meta')",
    "float64": "torch.set_default_dtype(torch.float64)",
    "float16": "torch.set_default_dtype(torch.float16)",
    "inference mode before": "with torch.inference_mode(): model(x)",
}
CODE = """
import torch
from fewshot_asam.models import build_model
model, x = build_model("conv4", 3, (3, 16, 16), {filters}, 0), torch.linspace(-1, 1, 1536).reshape(2, 3, 16, 16)
def found():
    gradients = torch.autograd.grad(model(x.clone()).square().sum(), list(model.parameters()), create_graph=True)
    return [*gradients, *torch.autograd.grad(sum(v.square().sum() for v in gradients), list(model.parameters()))]
expected = found()
{surroundings}
print(all(torch.equal(a, b) for a, b in zip(found(), expected)))
"""


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_surroundings(name: str) -> None:
    """In a process of its own: an address that is not one ends it."""
    environment = {**os.environ, "PYTHONPATH": str(Path(cpu_kernels.__file__).parents[2])}
    code = CODE.format(filters=32, surroundings=SURROUNDINGS[name])
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert (result.returncode, result.stdout) == (0, "True\n"), result.stderr


def traced(block: ConvBlock, x: Tensor) -> Any:
    from torch.fx.experimental.proxy_tensor import make_fx

    return make_fx(block)(torch.zeros_like(x))(x)


def forward_mode(block: ConvBlock, x: Tensor) -> Any:
    from torch.autograd import forward_ad

    with forward_ad.dual_level():
        return forward_ad.unpack_dual(block(forward_ad.make_dual(x, torch.ones_like(x)))).primal


def scripted(block: ConvBlock, x: Tensor) -> Any:
    return torch.jit.trace(block, torch.zeros_like(x), check_trace=False)(x)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("way", [traced, forward_mode, scripted])
def test_what_observes_operations_sees_them(way: Callable[[ConvBlock, Tensor], Tensor]) -> None:
    """What records a call on some images computes others rightly."""
    block, x = make_block(3, 16), make_images(2, 3, 6, 6)
    torch.testing.assert_close(way(block, x), block(x))


def test_fake_tensors_have_no_numbers() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    block, x = make_block(3, 16), make_images(2, 3, 6, 6)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        image = mode.from_tensor(x)
        assert block(image).shape == (2, 16, 3, 3)
    assert not cpu_kernels.applies(image)
    assert not cpu_kernels.applies(x.to_sparse())
