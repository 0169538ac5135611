"""The GPU's kernels where there is no GPU: interpreted on a CPU, and compiled for GPUs; what runs without Triton."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from fewshot_asam.models import ConvBlock, cpu_kernels, gpu_kernels
from fewshot_asam.models.gpu_kernels import Kernels, block

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="no Triton")
ROOT = Path(__file__).parents[1]
GROUPS = ["engine or meta or used", "not (engine or meta or used)"]


@needs_triton
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("interpreted", [True, False])
def test_the_kernels_compute_what_the_plain_block_computes(group: str, interpreted: bool) -> None:
    if not interpreted and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    variables = {**os.environ, "TRITON_INTERPRET": str(int(interpreted)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu_kernel_cases.py", "-k", group]
    done = subprocess.run([*command, "-n", "0"], cwd=ROOT, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:]
    assert "skipped" not in done.stdout


@needs_triton
@pytest.mark.skipif(sys.platform != "linux", reason="Triton's assembler is Linux's")
@pytest.mark.parametrize("architecture", [80, 90])
def test_the_kernels_compile_for_gpus_and_spill_nothing(
    architecture: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a process that interprets nothing; each of its lines is a kernel."""
    command = [sys.executable, "-m", "benchmarks.kernel_resources", str(architecture)]
    variables = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]
    print(done.stdout)
    rows = [dict(part.split(" ") for part in line.split(", ")) for line in done.stdout.splitlines()]
    assert len(rows) == 12
    for row in rows:
        assert row["architecture"] == str(architecture)
        assert int(row["spills"]) == int(row["stack"]) == 0, row
        assert int(row["registers"]) <= 128, row
        assert int(row["cubin_bytes"]) > 0


def test_a_cpu_runs_no_gpu_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    conv = ConvBlock(3, 4)
    with gpu_kernels.using(Kernels("unfold", triton=True)), cpu_kernels.disabled():
        x = torch.rand(2, 3, 6, 6)
        assert not gpu_kernels.applies(x, *conv.parameters())
        assert torch.equal(gpu_kernels.conv2d(x, conv.conv.weight), torch.conv2d(x, conv.conv.weight, padding=1))


def test_without_triton_the_plain_block_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block, "find_spec", lambda name: None)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    block.available.cache_clear()
    x, conv = torch.rand(2, 3, 6, 6), ConvBlock(3, 4)
    with cpu_kernels.disabled():
        expected = conv(x)
        with gpu_kernels.using(Kernels(triton=True)):
            assert not gpu_kernels.applies(x, *conv.parameters())
            assert torch.equal(conv(x), expected)
    block.available.cache_clear()


def test_kernels_are_put_back() -> None:
    before = gpu_kernels.current(), torch.backends.cudnn.benchmark
    with gpu_kernels.using(Kernels("unfold", True, cudnn_benchmark=True)):
        assert torch.backends.cudnn.benchmark
    assert before == (gpu_kernels.current(), torch.backends.cudnn.benchmark)
