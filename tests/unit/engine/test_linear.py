"""Linear layers of a checkpoint's parts: scales and biases of each, shares of ranks, bytes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from baton.shared.engine.batch import Batch, BatchRow
from baton.shared.engine.linear import LinearSpec, Part, Ranks, Split
from baton.shared.engine.model_loader import ModelLoader, plan_model
from baton.shared.engine.models import decoder, llama, registry
from baton.shared.engine.models.model_type import ModelType
from baton.shared.engine.operations import Operations
from baton.shared.engine.quantised.scheme import EVERY_LINEAR, Quantization, Rule, Scheme
from baton.shared.engine.reference_operations import ReferenceOperations
from baton.shared.engine.triton_operations import TritonOperations
from baton.shared.engine.weights import DummyWeights, WeightFiles
from baton.shared.kv.cache_spec import cache_groups
from baton.shared.model_files.fields import ModelError
from tests.device import ON_GPU
from tests.made_up_types import known
from tests.unit.engine.conftest import MakeLlama, MakeRunner

NUM_IN = 48
CPU = torch.device("cpu")
# Without its own kernel for few rows, the second leaves products to torch, on a CPU too.
TABLES: dict[str, Callable[..., Operations]] = {
    "reference": ReferenceOperations,
    "triton": partial(TritonOperations, use_skinny=False),
}


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def whole_numbers(num_out: int, seed: int, dtype: torch.dtype = torch.int8) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-127, 128, (num_out, NUM_IN), generator=generator).to(dtype)


def of_8_bits(number: torch.dtype) -> Quantization:
    """As config.json would say it."""
    scheme = Scheme(num_bits=8, kind="float" if number.is_floating_point else "int")
    return Quantization(method="compressed-tensors", rules=(Rule(EVERY_LINEAR, scheme),))


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., ModelLoader]:
    """A loader over the tensors given."""

    def load(
        tensors: dict[str, Tensor],
        ops: Operations | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        number: torch.dtype | None = torch.int8,
        device: torch.device = CPU,
    ) -> ModelLoader:
        save_file(tensors, tmp_path / "model.safetensors")
        return ModelLoader(
            ops or ReferenceOperations(),
            WeightFiles(tmp_path),
            dtype=dtype,
            device=device,
            num_positions=8,
            ropes_made_for=8,
            quantization=None if number is None else of_8_bits(number),
        )

    return load


def assert_near(got: Tensor, expected: Tensor) -> None:
    """Within 1e-5 of the largest."""
    limit = 1e-5 * float(expected.abs().max())
    torch.testing.assert_close(got.double(), expected.double(), atol=limit, rtol=0)


QKV = LinearSpec(NUM_IN, (Part("q", 32, has_bias=True), Part("k", 16), Part("v", 16, True)))
SCALES: dict[str, tuple[Tensor, Tensor, Tensor]] = {
    "tensor": (torch.tensor(0.01), torch.tensor([0.3]), torch.tensor(2.0)),
    "channel": (rand(32, 1).abs(), rand(16, 1).abs(), 9 * rand(16, 1).abs()),
    "group": (rand(32, 4).abs(), rand(16, 3).abs(), 9 * rand(16, 2).abs()),
    "mixed": (torch.tensor(0.01), rand(16, 1).abs(), rand(16, 6).abs()),
}


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("number", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("scales", SCALES)
def test_parts_have_scales_of_their_own(
    scales: str, number: torch.dtype, table: str, load: Callable[..., ModelLoader]
) -> None:
    tensors, rows = {"q.bias": rand(32, seed=5), "v.bias": rand(16, seed=6)}, []
    for name, num_out, scale in zip("qkv", (32, 16, 16), SCALES[scales], strict=True):
        weight = whole_numbers(num_out, ord(name), number)
        tensors |= {f"{name}.weight": weight, f"{name}.weight_scale": scale}
        wide = weight.double()
        groups = wide.view(num_out, scale.shape[1] if scale.dim() == 2 else 1, -1)
        rows.append(groups * scale.double().reshape(*scale.shape, *[1] * (3 - scale.dim())))
    expected_weight = torch.cat([each.reshape(len(each), NUM_IN) for each in rows])
    bias = torch.cat((tensors["q.bias"], torch.zeros(16), tensors["v.bias"]))
    ops = TABLES[table]()
    layer = load(tensors, ops, number=number).linear(QKV)
    x, residual = rand(20, NUM_IN, seed=9), rand(20, 64, seed=10)
    expected = x.double() @ expected_weight.T + bias.double()
    assert_near(ops.linear(x, layer), expected)
    assert_near(ops.linear(x, layer, residual.clone()), expected + residual.double())
    assert (layer.num_out, layer.num_in, layer.num_bytes) == (64, NUM_IN, 4 * 64 * (NUM_IN + 1))


def test_numbers_are_expanded_in_the_scale_s_dtype_and_rounded_once(
    load: Callable[..., ModelLoader],
) -> None:
    """As those who make such checkpoints expand them: to the same bits."""
    weight, scale = whole_numbers(32, 1), rand(32, 1).abs().bfloat16()
    ops = TritonOperations()
    tensors = {"a.weight": weight, "a.weight_scale": scale}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        layer = load(tensors, ops, dtype=dtype).linear(LinearSpec(NUM_IN, (Part("a", 32),)))
        assert layer.weight.dtype == dtype
        assert torch.equal(layer.weight, (weight.bfloat16() * scale).to(dtype))


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
def test_plain_weights_of_any_dtype(stored: torch.dtype, load: Callable[..., ModelLoader]) -> None:
    weight = rand(32, NUM_IN).to(stored)
    loader = load({"a.weight": weight}, TritonOperations(), dtype=torch.bfloat16)
    layer = loader.linear(LinearSpec(NUM_IN, (Part("a", 32),)))
    assert torch.equal(layer.weight, weight.to(torch.bfloat16)) and layer.bias is None
    assert loader.num_bytes == layer.num_bytes == 32 * NUM_IN * 2


def test_parts_may_be_rows_of_one_module(load: Callable[..., ModelLoader]) -> None:
    weight, bias = rand(64, NUM_IN), rand(64)
    parts = (Part("qkv", 16, True, 48, 64), Part("qkv", 32, True, 0, 64))
    loader = load({"qkv.weight": weight, "qkv.bias": bias}, TritonOperations())
    layer = loader.linear(LinearSpec(NUM_IN, parts))
    order = [*range(48, 64), *range(32)]
    assert layer.bias is not None and torch.equal(layer.bias, bias[order])
    assert torch.equal(layer.weight, weight[order])


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("size", [1, 2])
def test_outputs_of_a_run_are_put_in_order(
    size: int, scales: str, load: Callable[..., ModelLoader]
) -> None:
    """With their scales and biases, in each rank's share, of modules alone and fused."""
    fused, [scale, _, _] = rand(64, NUM_IN, seed=3), SCALES[scales]
    order = (3, 1, 0, 2, 7, 6, 5, 4)
    tensors = {
        "q.weight": whole_numbers(32, 1),
        "q.weight_scale": scale,
        "q.bias": rand(32, seed=2),
        "kv.weight": fused,
        "kv.bias": rand(64, seed=4),
    }

    def spec(order: tuple[int, ...] | None) -> LinearSpec:
        q = Part("q", 32, True, unit=8, order=order)
        k = Part("kv", 32, True, 0, 64, unit=8, order=order)
        return LinearSpec(NUM_IN, (q, k, Part("kv", 32, True, 32, 64, unit=8)), Split.COLUMNS)

    for rank in range(size):
        loader = load(tensors, TritonOperations(Ranks(rank, size)))
        plain, ordered = loader.linear(spec(None)), loader.linear(spec(order))
        num_moved = 64 // size
        expected = [8 * (row // 8) + order[row % 8] for row in range(num_moved)]
        expected += range(num_moved, 96 // size)
        assert plain.bias is not None and ordered.bias is not None
        assert torch.equal(ordered.weight, plain.weight[expected])
        assert torch.equal(ordered.bias, plain.bias[expected])


# Ranks


class Meeting:
    """Adds up the tensors of ranks that run on threads."""

    def __init__(self, size: int) -> None:
        self._barrier = threading.Barrier(size)
        self._given: dict[int, Tensor] = {}

    def rank(self, rank: int, size: int) -> Ranks:
        def all_reduce(tensor: Tensor) -> None:
            self._given[rank] = tensor.clone()
            self._barrier.wait(10)
            total = sum(self._given.values())
            assert isinstance(total, Tensor)
            tensor.copy_(total)
            self._barrier.wait(10)

        return Ranks(rank, size, all_reduce)


@pytest.mark.parametrize("table", TABLES)
def test_two_ranks_compute_what_one_does(table: str, load: Callable[..., ModelLoader]) -> None:
    """Columns of the first layer, rows of the second; bias and residual count once."""
    tensors = {
        "gate.weight": whole_numbers(32, 1),
        "gate.weight_scale": rand(32, 4).abs() / 99,
        "up.weight": rand(32, NUM_IN, seed=3),
        "down.weight": rand(NUM_IN, 32, seed=4),
        "down.bias": rand(NUM_IN, seed=5),
    }
    gate_up = LinearSpec(NUM_IN, (Part("gate", 32), Part("up", 32)), Split.COLUMNS)
    down = LinearSpec(32, (Part("down", NUM_IN, True),), Split.ROWS)
    x, residual = rand(20, NUM_IN, seed=6), rand(20, NUM_IN, seed=7)

    def mlp(loader: ModelLoader) -> Tensor:
        ops, layers = loader.ops, (loader.linear(gate_up), loader.linear(down))
        gate, up = ops.linear(x, layers[0]).chunk(2, -1)
        product = (torch.nn.functional.silu(gate) * up).contiguous()
        return ops.linear(product, layers[1], residual.clone())

    alone = mlp(load(tensors, TABLES[table]()))
    meeting = Meeting(2)
    loaders = [load(tensors, TABLES[table](meeting.rank(rank, 2))) for rank in range(2)]
    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(mlp, loaders)
    assert torch.equal(first, second)
    assert_near(first, alone)


def test_ranks_share_whole_heads_and_repeat_those_that_are_too_few() -> None:
    spans = {size: [Ranks(rank, size).share(64, 16) for rank in range(size)] for size in (1, 2, 8)}
    assert spans[1] == [slice(0, 64)]
    assert spans[2] == [slice(0, 32), slice(32, 64)]
    assert spans[8] == [slice(16 * head, 16 * head + 16) for head in (0, 0, 1, 1, 2, 2, 3, 3)]
    with pytest.raises(ModelError, match="4 units cannot be shared by 3 ranks"):
        Ranks(0, 3).share(64, 16)


# What is refused


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({}, "a.weight: missing tensor"),
        (
            {"a.qweight": torch.zeros(4, 4, dtype=torch.int32)},
            "a.qweight: is not of quant_method compressed-tensors, which config.json says",
        ),
        (
            {"a.weight_packed": torch.zeros(2, dtype=torch.int32)},
            r"a.weight_packed: shape \[2\] is not \[32, 12\]: config.json makes the weight",
        ),
        (
            {"a.weight": whole_numbers(32, 1, torch.float8_e4m3fn)},
            "a.weight: dtype F8_E4M3 where config.json's quantization_config says int8",
        ),
        ({"a.weight": whole_numbers(32, 1)}, "a.weight_scale: missing tensor"),
        ({"a.weight": whole_numbers(32, 1, torch.int32)}, "a.weight: dtype I32 is not one of"),
        (
            {"a.weight": whole_numbers(32, 1), "a.weight_scale": torch.ones(32, 5)},
            r"a.weight_scale: shape \[32, 5\] does not fit a weight of \[32, 48\]",
        ),
        (
            {"a.weight": whole_numbers(32, 1), "a.weight_scale": torch.ones(32)},
            "a.weight_scale: shape",
        ),
        (
            {"a.weight": whole_numbers(32, 1), "a.weight_scale": torch.ones(32, 0)},
            "a.weight_scale: shape",
        ),
        (
            {"a.weight": whole_numbers(32, 1), "a.weight_scale": torch.tensor(float("nan"))},
            "a.weight_scale: holds what is no number",
        ),
        (
            {"a.weight": whole_numbers(32, 1), "a.weight_scale": whole_numbers(32, 1)},
            "a.weight_scale: dtype I8",
        ),
        (
            {"a.weight": whole_numbers(31, 1), "a.weight_scale": torch.ones(31, 1)},
            r"a.weight: shape \[31, 48\] where config.json makes it \[32, 48\]",
        ),
    ],
)
def test_a_form_that_is_not_served_is_named(
    tensors: dict[str, Tensor], reason: str, load: Callable[..., ModelLoader]
) -> None:
    with pytest.raises(ModelError, match=reason):
        load({"other": torch.zeros(1), **tensors}).linear(LinearSpec(NUM_IN, (Part("a", 32),)))


def test_a_fault_of_the_headers_is_found_on_paper(load: Callable[..., ModelLoader]) -> None:
    tensors = {"a.weight": whole_numbers(32, 1), "a.weight_scale": torch.ones(32, 5)}
    loader = load(tensors, device=torch.device("meta"))
    with pytest.raises(ModelError, match="does not fit"):
        loader.linear(LinearSpec(NUM_IN, (Part("a", 32),)))


def test_small_numbers_need_the_config_s_word(load: Callable[..., ModelLoader]) -> None:
    tensors = {"a.weight": whole_numbers(32, 1), "a.weight_scale": torch.ones(32, 1)}
    with pytest.raises(ModelError, match="dtype I8, but config.json has no quantization_config"):
        load(tensors, number=None).linear(LinearSpec(NUM_IN, (Part("a", 32),)))
    with pytest.raises(ModelError, match="a.weight: dtype I8 is not one of F32, F16, BF16"):
        load(tensors).embedding("a", 32, NUM_IN)


# Whole models


def test_bytes_are_known_before_anything_is_read(
    make_llama: MakeLlama, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files hold float32; the layers will be bfloat16."""
    model_dir, model = make_llama(attention_bias=True)
    model_type, config = registry.load_model_config(model_dir)
    monkeypatch.setattr("baton.shared.engine.weights.safe_open", None)
    groups, ops = cache_groups(config.cache_specs), ReferenceOperations()
    plan = plan_model(model_type, config, groups, WeightFiles(model_dir), ops, torch.bfloat16)
    num_numbers = sum(parameter.numel() for parameter in model.parameters())
    assert plan.num_bytes == 2 * num_numbers
    assert plan.shapes == {name: tuple(p.shape) for name, p in model.state_dict().items()}
    dummy = plan_model(model_type, config, groups, DummyWeights(), ops, torch.bfloat16)
    assert dummy == plan


def quantise(weight: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """→ small numbers and their scales, in bfloat16 as such files have them."""
    largest = weight.abs().amax(1, keepdim=True) if kind == "channel" else weight.abs().max()
    scale = (largest / 127).bfloat16()
    return (weight / scale.float()).round().clamp(-128, 127).to(torch.int8), scale


def test_a_quantised_checkpoint_against_transformers_with_the_expanded_weights(
    make_llama: MakeLlama, make_runner: MakeRunner, edit_config: Callable[..., None]
) -> None:
    model_dir, model = make_llama()
    path = model_dir / "model.safetensors"
    tensors = load_file(path)
    expanded = {}
    for name in [name for name in tensors if "proj" in name]:
        kind = "channel" if "mlp" in name else "tensor"
        small, scale = quantise(tensors[name], kind)
        tensors[name], tensors[f"{name}_scale"] = small, scale
        expanded[name] = (small.to(scale.dtype) * scale).float()
    save_file(tensors, path)
    groups = {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "int"}}}
    edit_config(
        model_dir,
        quantization_config={
            "quant_method": "compressed-tensors",
            "format": "int-quantized",
            "config_groups": groups,
            "ignore": ["lm_head"],
        },
    )
    model.load_state_dict(expanded, strict=False)
    prompt = list(range(40))
    with torch.no_grad():
        expected = model(torch.tensor([prompt])).logits[0, -1]
    got = make_runner(model_dir).logits(Batch([BatchRow(prompt, 0, [[0, 1, 2]])]))[0].cpu()
    limit = 1e-3 * float(expected.abs().max()) if ON_GPU else 1e-4
    torch.testing.assert_close(got, expected, atol=limit, rtol=0)


def test_fused_projections_are_a_declaration(
    make_llama: MakeLlama,
    make_runner: MakeRunner,
    edit_config: Callable[..., None],
) -> None:
    """A type whose files have one module for q, k and v, and one for gate and up."""
    names = {
        **llama.NAMES,
        **dict.fromkeys(("q", "k", "v"), "self_attn.qkv_proj"),
        **dict.fromkeys(("gate", "up"), "mlp.gate_up_proj"),
    }
    fused_llama = ModelType("test_fused", llama.configure, decoder.build, (names,))
    model_dir, _ = make_llama(attention_bias=True)
    row = Batch([BatchRow(list(range(40)), 0, [[0, 1, 2]])])
    expected = make_runner(model_dir).logits(row)
    path = model_dir / "model.safetensors"
    tensors = load_file(path)
    for kind in ("weight", "bias"):
        for layer in ("model.layers.0", "model.layers.1"):
            for fused, pieces in (("self_attn.qkv", "qkv"), ("mlp.gate_up", ("gate", "up"))):
                block = fused.partition(".")[0]
                keys = [f"{layer}.{block}.{piece}_proj.{kind}" for piece in pieces]
                if keys[0] in tensors:
                    stacked = torch.cat([tensors.pop(key) for key in keys])
                    tensors[f"{layer}.{fused}_proj.{kind}"] = stacked
    save_file(tensors, path)
    edit_config(model_dir, model_type="test_fused")
    with known(fused_llama):
        assert torch.equal(make_runner(model_dir).logits(row), expected)


@pytest.mark.parametrize("is_small", [False, True])
def test_parts_that_alternate_in_a_module(is_small: bool, load: Callable[..., ModelLoader]) -> None:
    """Four heads of two numbers and a gate of three each, one after another: the gates, and the
    numbers in another order, of every rank."""
    weight = whole_numbers(20, 3) if is_small else rand(20, NUM_IN)
    tensors = {"m.weight": weight, "m.bias": rand(20, seed=2)}
    scale = rand(20, 1, seed=4).abs()
    if is_small:
        tensors["m.weight_scale"] = scale
    heads = (weight.float() * scale if is_small else weight).view(4, 5, NUM_IN)
    biases = tensors["m.bias"].view(4, 5)
    gates = Part("m", 12, True, module_out=20, unit=3, between=(5, 2))
    numbers = Part("m", 8, True, module_out=20, unit=2, order=(1, 0), between=(5, 0))
    spec = LinearSpec(NUM_IN, (gates, numbers), Split.COLUMNS)
    for rank in range(2):
        own = slice(2 * rank, 2 * rank + 2)
        expected = torch.cat((heads[own, 2:].flatten(0, 1), heads[own, :2].flip(1).flatten(0, 1)))
        loader = load(tensors, ReferenceOperations(Ranks(rank, 2)))
        layer = loader.linear(spec)
        x = torch.eye(NUM_IN)
        bias = torch.cat((biases[own, 2:].flatten(), biases[own, :2].flip(1).flatten()))
        assert_near(loader.ops.linear(x, layer), expected.t() + bias)
