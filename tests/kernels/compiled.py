"""Compiles kernels as their launchers would, for a GPU that need not be there.

Between `recording(...)` and its end, a launch compiles its kernel for the given target and runs
nothing. To be used without TRITON_INTERPRET: a kernel is compiled or interpreted for the whole
process.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime.jit import JITFunction

SHARED_BYTES = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448}
"""Shared memory that a program may have, by compute capability."""


@dataclass(frozen=True)
class Compiled:
    name: str
    capability: int
    kernel: Any
    """Triton's."""

    @property
    def shared(self) -> int:
        return int(self.kernel.metadata.shared)

    @cached_property
    def ptx(self) -> str:
        """Without what says where in which file it came from."""
        text = re.sub(r"//.*", "", self.kernel.asm["ptx"])
        text = re.split(r"\n\s*\.section", text)[0]
        debug = re.compile(r"\s*(\.loc\b|\.file\b|\$L__tmp\d+:|$)")
        return "\n".join(line for line in text.splitlines() if not debug.match(line))

    @property
    def read_ahead(self) -> set[str]:
        """Of the pointers and tensors that the kernel takes, those whose memory it touches before
        it waits for the kernel in front."""
        names = {f"{self.name}_param_{i}": name for i, name in enumerate(self._parameters)}
        before, waits, _ = self.ptx.partition("griddepcontrol.wait")
        assert waits, f"{self.name} does not wait"
        body = [re.sub(r"^\s*@!?%p\d+", "", line) for line in before.splitlines()]
        body = [line for line in body if not re.match(r"\s*[.}]", line)]
        made_of: dict[str, set[str]] = {}
        touched: set[str] = set()
        # What a loop carries comes around once.
        for line in body + body:
            used = re.findall(r"%[a-z]+\d+|\w+_param_\d+", line)
            sources = set().union(*(made_of.get(each, {each}) for each in used))
            if "global" in line and "cvta" not in line:
                touched |= sources
            made = re.match(r"\s*\S+\s+(\{[^}]*\}|[^,]*)", line)
            for register in re.findall(r"%[a-z]+\d+", made[1]) if made else ():
                made_of[register] = made_of.get(register, set()) | sources
        return {names[each] for each in touched if names.get(each)}

    @property
    def _parameters(self) -> list[str]:
        """Of the compiled kernel; numbers have no name. Those of a tensor are behind it."""
        names = []
        for name, kind in self.kernel.src.signature.items():
            if kind.startswith("tensordesc"):
                names += [name, "", "", "", ""]
            elif kind != "constexpr":
                names.append(name if kind.startswith("*") else "")
        return names

    @cached_property
    def spilled_bytes(self) -> int:
        """Stored to local memory for want of registers, as the assembler says."""
        with tempfile.TemporaryDirectory() as directory:
            source = Path(directory, "kernel.ptx")
            source.write_text(self.kernel.asm["ptx"])
            suffix = "a" if self.capability >= 90 else ""
            command = [get_ptxas(self.capability).path, "-v", "--regAllocOptLevel=2"]
            command.append(f"-arch=sm_{self.capability}{suffix}")
            registers = self.kernel.metadata.maxnreg
            command += [f"--maxrregcount={registers}"] if registers else []
            done = subprocess.run(
                [*command, str(source), "-o", str(Path(directory, "kernel.o"))],
                capture_output=True, text=True, check=True,
            )  # fmt: skip
        return sum(int(each) for each in re.findall(r"(\d+) bytes spill stores", done.stderr))


class OnGpu(torch.Tensor):
    """Memory of the host that says it is a GPU's: launchers then choose as they do there."""

    is_cuda = True


def on_gpu(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.as_subclass(OnGpu)


@contextmanager
def recording(capability: int) -> Iterator[list[Compiled]]:
    """Gives the kernels of the launches, each once, in their order."""
    found: dict[int, Compiled] = {}
    pretend = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", capability, 32),
        get_current_device=lambda: capability,
        get_current_stream=lambda _: 0,
    )
    run = JITFunction.run
    kernels: list[Compiled] = []

    def compile_only(self: Any, *args: Any, **options: Any) -> None:
        kernel = run(self, *args, **{**options, "warmup": True})
        if id(kernel) not in found:
            found[id(kernel)] = Compiled(kernel.metadata.name, capability, kernel)
            kernels.append(found[id(kernel)])

    previous = triton.runtime.driver._active
    triton.runtime.driver.set_active(pretend)
    JITFunction.run = compile_only
    try:
        yield kernels
    finally:
        JITFunction.run = run
        triton.runtime.driver._active = previous
