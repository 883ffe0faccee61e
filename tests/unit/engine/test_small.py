"""Weights that stay small on a CPU: products with what is stored against the expanded numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from baton.kernels import cpu_small_linear
from baton.kernels.cpu_small_linear import MOST_ROWS
from baton.shared.engine.batch import Batch, BatchRow
from baton.shared.engine.config import EngineConfig
from baton.shared.engine.linear import Linear, LinearSpec, Part, Ranks, Split
from baton.shared.engine.model_loader import ModelLoader
from baton.shared.engine.model_runner import ModelRunner
from baton.shared.engine.native_operations import NativeOperations
from baton.shared.engine.quantised.scheme import EVERY_LINEAR, Quantization, Rule, Scheme
from baton.shared.engine.quantised.small import SmallLinear
from baton.shared.engine.quantised.weight import QuantisedWeight
from baton.shared.engine.reference_operations import ReferenceOperations
from baton.shared.engine.weights import DummyWeights, WeightFiles
from baton.shared.model_files.gguf.directory import write_directory
from tests.unit.launcher.made_up_gguf import Q4_1, Q8_0, llama, write_llama

NUM_IN = 128
CPU = torch.device("cpu")


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Given(ModelLoader):
    """A loader of weights that are there."""

    def __init__(self, weights: dict[str, QuantisedWeight | Tensor], *, paper: bool = False):
        super().__init__(
            ReferenceOperations(keeps_small=True),
            _Nothing(),
            dtype=torch.bfloat16,
            device=torch.device("meta") if paper else CPU,
            num_positions=1,
            ropes_made_for=1,
            quantization=None,
        )
        self.weights = weights


class _Nothing(DummyWeights):
    """There are no tensors."""


KINDS: dict[str, dict[str, Any]] = {
    "signed": {"codes": (-8, 7), "groups": 4},
    "unsigned with zeros": {"codes": (0, 15), "groups": 2, "zero": (0, 15)},
    "with offsets": {"codes": (0, 15), "groups": 4, "has_offset": True},
    "one scale": {"codes": (-8, 7), "groups": 1},
    "three bits": {"codes": (-4, 3), "groups": 4, "bits": 3},
    "eight": {"codes": (-128, 127), "groups": 1, "bits": 8},
    "eight in runs": {"codes": (-128, 127), "groups": 4, "bits": 8},
    "eight with zeros": {"codes": (0, 255), "groups": 4, "bits": 8, "zero": (0, 255)},
    "five with offsets": {"codes": (0, 31), "groups": 4, "bits": 8, "has_offset": True},
}


def weight_of(kind: str, num_out: int, seed: int = 0) -> QuantisedWeight:
    fields = KINDS[kind]
    generator, (least, most) = torch.Generator().manual_seed(seed), fields["codes"]
    dtype = torch.int8 if least < 0 else torch.uint8
    codes = torch.randint(least, most + 1, (num_out, NUM_IN), generator=generator).to(dtype)
    scale = rand(num_out, fields["groups"], seed=seed + 1).abs() + 0.5
    zero = None
    if "zero" in fields:
        first, last = fields["zero"]
        zero = torch.randint(first, last + 1, scale.shape, generator=generator).to(torch.int16)
    offset = -most / 2 * scale if "has_offset" in fields else None
    return QuantisedWeight(codes, scale, fields.get("bits", 4), zero=zero, offset=offset)


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Linear, ModelLoader]]:
    """The layer of parts that are there, and its loader."""

    def load(
        *weights: QuantisedWeight, ops: ReferenceOperations | None = None, paper: bool = False
    ) -> tuple[Linear, ModelLoader]:
        by_name = {f"p{index}": weight for index, weight in enumerate(weights)}

        def read(module: str, shape: tuple[int, int], reader: Any) -> QuantisedWeight:
            weight = by_name[module]
            if not paper:
                return weight
            groups, dtype = weight.scale.shape[1], weight.codes.dtype
            return QuantisedWeight.on_paper(*shape, weight.num_bits, groups, dtype)

        monkeypatch.setattr("baton.shared.engine.linear.read_quantised", read)
        loader = Given({}, paper=paper)
        loader.ops = ops or loader.ops
        parts = tuple(Part(name, weight.num_out) for name, weight in by_name.items())
        return loader.linear(LinearSpec(NUM_IN, parts)), loader

    return load


def assert_product(layer: Linear, expanded: Tensor, num_rows: int) -> None:
    """As near as scales and results in bfloat16 can be."""
    x = rand(num_rows, NUM_IN, seed=9).bfloat16()
    got = ReferenceOperations(keeps_small=True).linear(x, layer).double()
    expected = x.double() @ expanded.double().t()
    size = x.double().abs() @ expanded.double().abs().t()
    assert bool(((got - expected).abs() <= 2**-7 * size).all())
    assert float((got - expected).norm() / expected.norm()) < 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_products_with_what_is_stored(kind: str, load: Callable[..., Any]) -> None:
    """Of few rows and of many, of outputs that fill the kernel's blocks and that do not."""
    for num_out in (80, 128):
        weight = weight_of(kind, num_out)
        layer, loader = load(weight)
        assert isinstance(layer, SmallLinear) and loader.has_small
        assert layer.num_bytes < 2 * num_out * NUM_IN
        for num_rows in (1, 7, MOST_ROWS + 1):
            assert_product(layer, weight.expand(torch.float64), num_rows)
        on_paper, _ = load(weight, paper=True)
        assert on_paper.num_bytes == layer.num_bytes
        assert (layer.num_out, layer.num_in) == (num_out, NUM_IN)


@pytest.mark.parametrize("num_in", [24, 36, 72])
def test_eight_bits_of_rows_that_torch_s_kernel_would_leave_are_expanded(
    num_in: int, load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{__name__}.NUM_IN", num_in)
    for paper in (False, True):
        layer, loader = load(weight_of("eight", 80), paper=paper)
        assert not isinstance(layer, SmallLinear) and not loader.has_small


def test_where_the_kernel_s_order_is_another_it_multiplies_many_rows_too(
    load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_small_linear, "_BLOCK", 32)
    weight = weight_of("signed", 128)
    layer, _ = load(weight)
    assert_product(layer, weight.expand(torch.float64), MOST_ROWS + 1)


def test_parts_that_are_stored_alike_are_one_matrix(load: Callable[..., Any]) -> None:
    parts = weight_of("with offsets", 48), weight_of("with offsets", 16, 1)
    layer, _ = load(*parts)
    assert len(layer.pieces) == 1
    assert_product(layer, torch.cat([each.expand(torch.float64) for each in parts]), 5)
    both = (weight_of("one scale", 48), weight_of("signed", 16, 1))
    layer, _ = load(*both)
    assert len(layer.pieces) == 1
    assert_product(layer, torch.cat([each.expand(torch.float64) for each in both]), 5)


def test_others_are_beside_each_other_and_what_no_kernel_takes_is_expanded(
    load: Callable[..., Any],
) -> None:
    floats = QuantisedWeight(rand(24, NUM_IN).to(torch.float8_e4m3fn), rand(24, 1), 8)
    parts = weight_of("signed", 48), weight_of("eight", 16), floats
    layer, _ = load(*parts)
    assert len(layer.pieces) == 3
    assert_product(layer, torch.cat([each.expand(torch.float64) for each in parts]), 5)
    odd, _ = load(weight_of("signed", 17))
    assert not isinstance(odd, SmallLinear) and odd.weight.numel() == 17 * NUM_IN


def test_groups_that_are_out_of_order(load: Callable[..., Any]) -> None:
    whole = weight_of("unsigned with zeros", 32)
    shuffled = torch.randperm(NUM_IN, generator=torch.Generator().manual_seed(4)) % 2
    weight = QuantisedWeight(whole.codes, whole.scale, 4, zero=whole.zero, group_of=shuffled)
    layer, _ = load(weight)
    assert isinstance(layer, SmallLinear)
    for num_rows in (3, MOST_ROWS + 1):
        assert_product(layer, weight.expand(torch.float64), num_rows)
    uneven = QuantisedWeight(whole.codes, whole.scale, 4, group_of=shuffled.clone())
    assert uneven.group_of is not None
    uneven.group_of[int(shuffled.argmin())] = 1
    layer, _ = load(uneven)
    assert not isinstance(layer, SmallLinear)


def test_two_ranks_compute_what_one_does(tmp_path: Path) -> None:
    """Rows of a layer whose groups they cut."""
    codes = weight_of("signed", 32).codes
    scale = (rand(32, 1).abs() / 8).bfloat16()
    save_file({"a.weight": codes, "a.weight_scale": scale}, tmp_path / "model.safetensors")
    rule = Rule(EVERY_LINEAR, Scheme(num_bits=8))
    x, products = rand(3, NUM_IN, seed=3).bfloat16(), []
    for size in (1, 2):
        for rank in range(size):
            ops = ReferenceOperations(Ranks(rank, size, lambda tensor: None), keeps_small=True)
            loader = ModelLoader(
                ops,
                WeightFiles(tmp_path),
                dtype=torch.bfloat16,
                device=CPU,
                num_positions=1,
                ropes_made_for=1,
                quantization=Quantization(method="compressed-tensors", rules=(rule,)),
            )
            layer = loader.linear(LinearSpec(NUM_IN, (Part("a", 32),), Split.ROWS, in_unit=32))
            assert isinstance(layer, SmallLinear)
            own = ops.ranks.share(NUM_IN, 32)
            products.append(ops.linear(x[:, own].contiguous(), layer).float())
    whole, first, second = products
    torch.testing.assert_close(first + second, whole, atol=0.05, rtol=0.02)


def test_a_gguf_file_in_bfloat16(tmp_path: Path) -> None:
    """Small in memory, near the float32 of the same numbers, and told apart from other workers."""
    torch.manual_seed(5)
    kinds = {
        **dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), Q4_1),
        **dict.fromkeys(("ffn_gate", "ffn_up", "ffn_down"), Q4_1),
        "token_embd": Q8_0,
    }
    write_llama(tmp_path / "model.gguf", llama(), kinds=kinds)
    write_directory(tmp_path / "model.gguf", tmp_path, generation={})
    row = Batch([BatchRow([3, 4, 5, 6], 0, [[0]])])
    runners = [
        ModelRunner(
            EngineConfig(tmp_path, num_blocks=8, device="cpu", dtype=dtype, kernels=kernels)
        )
        for dtype, kernels in (("float32", "auto"), ("bfloat16", "torch"), ("bfloat16", "auto"))
    ]
    exact, *both = (runner.logits(row) for runner in runners)
    for small in both:
        # In bfloat16 with the expanded numbers it is 0.013.
        assert float((small - exact).norm() / exact.norm()) < 0.06
    assert [runner.determinism for runner in runners] == ["exact", "consistent", "consistent"]
    plain, torchs, auto = (runner.numerics for runner in runners)
    assert "small" not in plain and "small weights" in torchs and "small weights" in auto
    is_native = isinstance(runners[2]._ops, NativeOperations)
    assert ("native" in auto) == is_native and "native" not in plain + torchs
