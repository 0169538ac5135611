"""What the compiler makes of the Triton kernels for a GPU, on a machine that need not have one.

For each kernel and architecture: registers a thread, spilled bytes, shared memory and the size of the machine code.
Triton writes the PTX; its own `ptxas` assembles it.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

TENSORS = {
    **dict.fromkeys(("y", "gamma", "beta", "best", "out", "g", "h", "gy", "gg", "ggamma", "hgamma", "hbeta"), "*fp32"),
    **dict.fromkeys(("partial", "statistics", "sums"), "*fp32"),
    "place": "*u8",
}
"""The types of the kernels' arguments; all others are numbers."""
KERNELS = ("choose", "normalise", "gather", "spread", "project", "spread_again")
ARCHITECTURES = (80, 90)
"""Ampere's A100, and Hopper's H100 and H200."""


class Resources(NamedTuple):
    """Of one kernel: `registers` a thread, bytes of `stack` and `spills` a thread, `shared` bytes a program."""

    kernel: str
    architecture: int
    registers: int
    stack: int
    spills: int
    shared: int
    cubin_bytes: int


def compiled(name: str, architecture: int, channels_last: bool = False, side: int = 84) -> Resources:
    """Compiles a kernel of `norm_relu_pool_triton` for `sm_{architecture}` and images of `side` pixels, float32."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fewshot_asam.models.gpu_kernels import norm_relu_pool_triton as kernels
    from fewshot_asam.models.gpu_kernels.norm_relu_pool import CHANNELS, OPTIONS, TILE

    kernel = getattr(kernels, name)
    block_c = CHANNELS if channels_last else 1
    constants = {
        **{
            "H": side,
            "W": side,
            "tiles": 4,
            "PROGRAMS": 8,
            "PADDED": 8,
            "BLOCK_C": block_c,
            "BLOCK_W": TILE // block_c,
        },
        **{"real": kernels.tl.float32, "EPS": 1e-5},
        **dict.fromkeys(("sc", "pc") if channels_last else ("sw", "pw"), 1),  # as Triton finds out at a call
    }
    given = {key: value for key, value in constants.items() if key in kernel.arg_names}
    kinds = {key: "constexpr" if key in given else TENSORS.get(key, "i32") for key in kernel.arg_names}
    source = ASTSource(
        fn=kernel, signature=kinds, constexprs={(kernel.arg_names.index(k),): v for k, v in given.items()}
    )
    target = GPUTarget("cuda", architecture, 32)
    binary = triton.compile(source, target=target, options=OPTIONS)
    said = assembled(binary.asm["ptx"], architecture)
    spilled = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said)
    registers = re.search(r"Used (\d+) registers", said)
    assert registers is not None, said
    assert spilled is not None, said
    stack, stores, loads = map(int, spilled.groups())
    shared, size = binary.metadata.shared, len(binary.asm["cubin"])
    return Resources(name, architecture, int(registers[1]), stack, stores + loads, shared, size)


def assembled(ptx: str, architecture: int) -> str:
    """What Triton's own assembler says of a program."""
    from triton.backends.nvidia.compiler import get_ptxas

    target = re.search(r"\.target (\w+)", ptx)
    assert target is not None
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "kernel.ptx")
        program.write_text(ptx)
        command = [get_ptxas(architecture).path, "-v", f"--gpu-name={target[1]}", str(program), "-o", f"{folder}/out"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def table(architectures: Sequence[int] = ARCHITECTURES) -> list[Resources]:
    """All kernels in both memory formats."""
    return [
        compiled(name, architecture, channels_last)
        for architecture in architectures
        for channels_last in (False, True)
        for name in KERNELS
    ]


if __name__ == "__main__":
    for row in table([int(word) for word in sys.argv[1:]] or ARCHITECTURES):
        print(*(f"{key} {value}" for key, value in row._asdict().items()), sep=", ")
