"""Compiles Triton launches for an H100/H200 (sm_90) on a machine without a GPU, and reads what they use.

A call is made on meta tensors while kernels only note how they are launched; each launch is then compiled with the very
arguments, block sizes and warps that a GPU would get. It needs a process of its own without TRITON_INTERPRET:

    python tests/kernels/compiled_ahead.py            # every case of tests/kernels/ahead_cases.py
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)
sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

TARGET = GPUTarget("cuda", 90, 32)
_POINTERS = {
    torch.float64: "*fp64", torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16",
    torch.int64: "*i64", torch.int32: "*i32", torch.int16: "*i16", torch.uint8: "*u8", torch.bool: "*i1",
    torch.float8_e4m3fn: "*fp8e4nv", torch.float8_e5m2: "*fp8e5",
}  # fmt: skip
_OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg")


@dataclass(frozen=True)
class Usage:
    """What a compiled launch takes. registers: of a thread; shared: bytes of a program; spilled: bytes of a thread in
    local memory, of which a good kernel has none.
    """

    kernel: str
    warps: int
    registers: int
    shared: int
    spilled: int


Launch = tuple[JITFunction, tuple[Any, ...], dict[str, Any]]


@contextmanager
def noted_launches() -> Iterator[list[Launch]]:
    """Within it, kernels are not run: each launch is added to the list."""
    launches: list[Launch] = []
    before = JITFunction.__getitem__

    def noting(kernel: JITFunction, grid: Any) -> Callable[..., None]:
        def note(*args: Any, **named: Any) -> None:
            launches.append((kernel, args, named))

        return note

    JITFunction.__getitem__ = noting  # type: ignore[method-assign]
    try:
        yield launches
    finally:
        JITFunction.__getitem__ = before  # type: ignore[method-assign]


def compile_launch(launch: Launch) -> Usage:
    """Compiles one launch for sm_90 and reads its resources."""
    kernel, args, named = launch
    options = {key: named[key] for key in _OPTIONS if key in named}
    bound = dict(zip(kernel.arg_names, args, strict=False)) | {k: v for k, v in named.items() if k not in _OPTIONS}
    constants = {p.name for p in kernel.params if p.is_constexpr}
    signature, values, attributes = {}, {}, {}
    for number, name in enumerate(kernel.arg_names):
        value = bound.get(name, kernel.signature.parameters[name].default)
        if name in constants or value is None or (type(value) is int and value == 1):  # as a launch does
            signature[name], values[name] = "constexpr", value
        else:
            signature[name] = _type_of(value)
            if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
                attributes[(number,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(ASTSource(kernel, signature, values, attributes), target=TARGET, options=options)
    return _usage(compiled)


def _type_of(value: Any) -> str:
    if isinstance(value, Tensor):
        return _POINTERS[value.dtype]
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    if isinstance(value, float):
        return "fp32"
    raise TypeError(f"no Triton type for {value!r}")


def _usage(compiled: Any) -> Usage:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        done = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True, timeout=60
        )
    found = re.search(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", done.stdout)
    assert found is not None, done.stdout
    name, registers, stack, local = found.groups()
    return Usage(name, compiled.metadata.num_warps, int(registers), compiled.metadata.shared, int(stack) + int(local))


def usages(call: Callable[[], object]) -> list[Usage]:
    """Of every different launch that a call on meta tensors makes."""
    with noted_launches() as launches:
        call()
    assert launches, "the call launched nothing"
    return [compile_launch(launch) for launch in launches]


def main() -> int:
    """Prints a line for each launch of every case; 1 where one spills."""
    from kernels.ahead_cases import CASES

    spilling = 0
    for name, call in CASES.items():
        for usage in usages(call):
            spilling += usage.spilled > 0
            taken = f"{usage.warps} warps, {usage.registers} registers, {usage.shared} bytes shared"
            print(f"{name}: {usage.kernel}: {taken}, {usage.spilled} bytes spilled", flush=True)
    print(f"{len(CASES)} cases, {spilling} launches spill")
    return int(spilling > 0)


if __name__ == "__main__":
    sys.exit(main())
