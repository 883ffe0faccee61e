"""Layers whose kernels start while those before still run: launched and replayed they give the bits
of kernels that run one by one."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import triton
from torch import Tensor

from baton.kernels.reference_scaled import InputScheme
from baton.kernels.skinny_linear import linear_work
from baton.kernels.small_linear import SmallWeight, by_groups
from baton.shared.engine.linear import Linear
from baton.shared.engine.operations import GatedLinears, Norm
from baton.shared.engine.quantised.stored import StoredLinear
from baton.shared.engine.triton_operations import TritonOperations
from tests.device import ROOT, process_environment

HIDDEN, MIDDLE = 4096, 14336
SIZES = {
    "qkv": (6144, HIDDEN),
    "o": (HIDDEN, HIDDEN),
    "gate_up": (2 * MIDDLE, HIDDEN),
    "down": (HIDDEN, MIDDLE),
}
"""Of llama-8b, which the tables of configurations know."""
LAYERS = 3
"""Of the same weights."""


WEIGHTS = {"weight_ptr", "norm_ptr", "weight_tiles", "weight_scale_ptr"}
WEIGHTS |= {"words_ptr", "scale_ptr", "offset_ptr"}
"""What kernels call them."""


def test_what_is_read_ahead(tmp_path: Path) -> None:
    """Weights only: behind a kernel that lets it in before it waits itself, a kernel begins while
    even the one in front of that may still run."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compile_overlap"],
        env=process_environment(TRITON_CACHE_DIR=str(tmp_path)),
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=110,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    read_ahead = json.loads(done.stdout)
    assert len(read_ahead) > 10
    for kernel, pointers in read_ahead.items():
        assert {*pointers} <= WEIGHTS, kernel
    # It is seen at all.
    assert read_ahead["hopper_scaled_kernel"] == ["weight_scale_ptr", "weight_tiles"]


@dataclass(frozen=True)
class Layers:
    linears: dict[str, Linear]
    gains: list[Tensor]

    def run(self, ops: TritonOperations, hidden: Tensor) -> None:
        """hidden [T, HIDDEN] is what comes in, and what comes out."""
        mlp = GatedLinears(self.linears["gate_up"], self.linears["down"])
        for gain in self.gains:
            norm = Norm(gain, 1e-5)
            qkv = ops.norm_linear(hidden, norm, self.linears["qkv"])
            ops.linear(qkv[:, :HIDDEN], self.linears["o"], hidden)
            ops.gated_mlp(hidden, norm, mlp, residual=hidden)


def make_layers(form: str, device: torch.device) -> Layers:
    generator = torch.Generator(device).manual_seed(0)
    linears: dict[str, Linear] = {}
    for name, (num_out, num_in) in SIZES.items():
        inputs, size = None, num_in**0.5
        empty = torch.empty(0, dtype=torch.bfloat16, device=device)
        if form == "float8":
            numbers = torch.randn(num_out, num_in, device=device, generator=generator)
            codes = (numbers * 30).to(torch.float8_e4m3fn)
            scale = torch.rand(num_out, 1, device=device, generator=generator) / (30 * size)
            stored, inputs = SmallWeight(codes, scale, None, num_in), InputScheme()
        elif form == "int4":
            shape = num_out, num_in // 2
            codes = torch.randint(256, shape, device=device, generator=generator).to(torch.uint8)
            scale = torch.rand(num_out, num_in // 128, device=device, generator=generator)
            stored = SmallWeight(codes, scale / (5 * size), None, num_in)
            stored = by_groups(stored, torch.bfloat16)
        else:
            numbers = torch.randn(num_out, num_in, device=device, generator=generator) / size
            linears[name] = Linear(numbers.bfloat16(), None, num_out, num_in)
            continue
        linears[name] = StoredLinear(empty, None, num_out, num_in, inputs=inputs, stored=stored)
    gains = [
        torch.rand(HIDDEN, device=device, generator=generator).bfloat16() for _ in range(LAYERS)
    ]
    return Layers(linears, gains)


@pytest.fixture
def one_by_one() -> Iterator[Callable[[bool], None]]:
    """Whether a kernel is launched when the one before it has ended, not earlier."""
    hooks, is_on = triton.knobs.runtime.launch_exit_hook, False

    def wait(_: object) -> None:
        torch.cuda.synchronize()

    def switch(to: bool) -> None:
        nonlocal is_on
        if to != is_on:
            hooks.add(wait) if to else hooks.remove(wait)
        is_on = to

    yield switch
    switch(False)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("form", "all_rows"),
    [("float8", (1, 2, 16, 64, 256)), ("int4", (1, 8, 16, 40)), ("plain", (1, 16))],
)
def test_layers_that_overlap(
    form: str,
    all_rows: tuple[int, ...],
    device: torch.device,
    one_by_one: Callable[[bool], None],
) -> None:
    """Other inputs each time: what is read before it is there is that of another time."""
    if torch.cuda.get_device_capability(device) < (9, 0):
        pytest.skip("kernels overlap from compute capability 9.0 on")
    layers = make_layers(form, device)
    ops = TritonOperations(
        overlaps=True, keeps_small=True, takes_float8=True, quantises_inputs=True
    )
    generator = torch.Generator(device).manual_seed(1)
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        linear_work(layers.gains[0].device)
    for rows in all_rows:
        inputs = torch.randn(10, rows, HIDDEN, device=device, generator=generator).bfloat16()
        expected, launched, hidden = inputs.clone(), inputs.clone(), inputs[0].clone()
        one_by_one(True)
        for each in expected:
            layers.run(ops, each)
        one_by_one(False)
        assert expected.isfinite().all() and not torch.equal(expected, inputs)
        for each in launched:
            layers.run(ops, each)
        assert torch.equal(launched, expected)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            layers.run(ops, hidden)
        for given, wanted in zip(inputs, expected, strict=True):
            hidden.copy_(given)
            graph.replay()
            assert torch.equal(hidden, wanted)
