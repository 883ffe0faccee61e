"""Experts: how tokens are given to them, the forms in which checkpoints hold them, what is said of
tensors that do not fit, and that dummy routers use them all."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from baton.kernels import reference_experts
from baton.kernels.reference_experts import Routes, route
from baton.kernels.routing import ClampedSwiglu, RoutingRule
from baton.shared.engine import model_runner
from baton.shared.engine.batch import Batch, BatchRow
from baton.shared.engine.config import EngineConfig
from baton.shared.engine.experts import ExpertNames, Experts, ExpertsSpec, read_experts
from baton.shared.engine.linear import Ranks
from baton.shared.engine.model_loader import ModelLoader
from baton.shared.engine.model_runner import ModelRunner
from baton.shared.engine.quantised import fp4
from baton.shared.engine.quantised.read import read_quantised
from baton.shared.engine.quantised.scheme import EVERY_LINEAR, Quantization, Rule, Scheme
from baton.shared.engine.reference_operations import ReferenceOperations
from baton.shared.engine.triton_operations import TritonOperations
from baton.shared.engine.weights import DummyWeights, WeightFiles
from baton.shared.model_files.fields import ModelError
from tests.device import ENGINE
from tests.unit.engine.tiny_models import TINY_MODELS, make_tiny

NUM_EXPERTS, HIDDEN, SIZE = 5, 64, 32
NAMES = ExpertNames(
    fused_gate_up="e.gate_up", fused_down="e.down", gate="e.{}.g", up="e.{}.u", down="e.{}.d"
)
SPEC = ExpertsSpec(names=NAMES, num_experts=NUM_EXPERTS, num_in=HIDDEN, size=SIZE)
Load = Callable[..., ModelLoader]


INT8 = Quantization(method="compressed-tensors", rules=(Rule(EVERY_LINEAR, Scheme(num_bits=8)),))


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """A loader over the tensors given, or over random ones."""

    def load(
        tensors: dict[str, Tensor] | None,
        ranks: Ranks | None = None,
        device: str = "cpu",
        *,
        quantization: Quantization | None = None,
    ) -> ModelLoader:
        if tensors is not None:
            save_file(tensors, tmp_path / "model.safetensors")
        return ModelLoader(
            ReferenceOperations(ranks or Ranks()),
            DummyWeights() if tensors is None else WeightFiles(tmp_path),
            dtype=torch.float32,
            device=torch.device(device),
            num_positions=8,
            ropes_made_for=8,
            quantization=quantization,
        )

    return load


def separate() -> dict[str, Tensor]:
    return {
        name.format(index): rand(*shape, seed=10 * index + place)
        for index in range(NUM_EXPERTS)
        for place, (name, shape) in enumerate(
            [
                ("e.{}.g.weight", (SIZE, HIDDEN)),
                ("e.{}.u.weight", (SIZE, HIDDEN)),
                ("e.{}.d.weight", (HIDDEN, SIZE)),
            ]
        )
    }


def fused(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    def all_of(name: str) -> Tensor:
        return torch.stack([tensors[f"e.{index}.{name}.weight"] for index in range(NUM_EXPERTS)])

    return {"e.gate_up": torch.cat((all_of("g"), all_of("u")), 1), "e.down": all_of("d")}


def alternating(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    whole = fused(tensors)
    gate, up = whole["e.gate_up"].chunk(2, 1)
    gate_up = torch.stack((gate, up), 2).flatten(1, 2).transpose(1, 2)
    return {
        "e.gate_up": gate_up.contiguous(),
        "e.down": whole["e.down"].transpose(1, 2).contiguous(),
    }


ALTERNATES = ExpertsSpec(
    names=NAMES, num_experts=NUM_EXPERTS, num_in=HIDDEN, size=SIZE, alternates=True
)
FORMS: dict[str, tuple[ExpertsSpec, Callable[[dict[str, Tensor]], dict[str, Tensor]]]] = {
    "separate": (SPEC, dict),
    "fused": (SPEC, fused),
    "alternating": (ALTERNATES, alternating),
}


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same_experts(form: str, num_ranks: int, load: Load) -> None:
    tensors = separate()
    spec, change = FORMS[form]
    x = rand(7, HIDDEN, seed=99)
    routes = Routes(torch.tensor([[0, 3], [4, 1], [3, 2]] * 2 + [[2, 0]]), rand(7, 2).abs())
    expected = torch.zeros(7, HIDDEN, dtype=torch.float64)
    for token, (chosen, weights) in enumerate(zip(*routes, strict=True)):
        for expert, weight in zip(chosen.tolist(), weights.tolist(), strict=True):
            g, u, d = (tensors[f"e.{expert}.{name}.weight"].double() for name in "gud")
            wide = x[token].double()
            expected[token] += weight * (d @ (torch.nn.functional.silu(g @ wide) * (u @ wide)))
    got = torch.zeros(7, HIDDEN)
    for rank in range(num_ranks):
        partial = load(change(tensors), Ranks(rank, num_ranks, lambda y: None))
        layer = partial.experts(spec)
        assert partial.num_bytes == 4 * NUM_EXPERTS * 3 * SIZE * HIDDEN // num_ranks
        got = partial.ops.experts(x, routes, layer, got)
        on_paper = load(change(tensors), Ranks(rank, num_ranks), "meta")
        on_paper.experts(spec)
        assert (on_paper.num_bytes, on_paper.taken) == (partial.num_bytes, partial.taken)
        assert on_paper.linear_shapes == partial.linear_shapes
    torch.testing.assert_close(got.double(), expected, atol=1e-4, rtol=1e-5)


def test_experts_of_8_bits_are_expanded_as_any_linear_layer(load: Load) -> None:
    tensors: dict[str, Tensor] = {}
    expanded: dict[str, Tensor] = {}
    for name, weight in separate().items():
        numbers, scale = (weight * 20).to(torch.int8), rand(len(weight), 1).abs()
        tensors |= {name: numbers, f"{name}_scale": scale}
        expanded[name] = numbers * scale
    ours = list(read_experts(SPEC, load(tensors, quantization=INT8), Ranks()))
    theirs = list(read_experts(SPEC, load(expanded), Ranks()))
    for one, other in zip(ours, theirs, strict=True):
        for a, b in zip(one.expanded(torch.float32), other.expanded(torch.float32), strict=True):
            assert a is b is None or (a is not None and b is not None and torch.equal(a, b))
    assert_kept(
        lambda *at: load(tensors, None, *at, quantization=INT8), lambda: load(expanded), SPEC, 0.28
    )
    assert_stored(lambda device: load(tensors, None, device, quantization=INT8), SPEC)
    with pytest.raises(ModelError, match=r"e.gate_up: dtype I8 is not one of"):
        load({"e.gate_up": torch.ones(5, 64, 64).char()}, device="meta").experts(SPEC)


def assert_kept(
    small: Callable[..., ModelLoader],
    plain: Callable[..., ModelLoader],
    spec: ExpertsSpec,
    share: float,
) -> None:
    """In memory as small as they are stored, on paper too, and computed to the same bits."""
    loader = small()
    loader.ops.keep_experts_small()
    layer = loader.experts(spec)
    on_paper = small("meta")
    on_paper.ops.keep_experts_small()
    on_paper.experts(spec)
    assert on_paper.num_bytes == loader.num_bytes
    expanded = plain().experts(spec)
    assert loader.num_bytes == layer.num_bytes < share * expanded.num_bytes
    x, routes = rand(7, HIDDEN, seed=99), Routes(whole(0, 4, 7, 2), rand(7, 2).abs())
    ours, theirs = (loader.ops.experts(x, routes, each) for each in (layer, expanded))
    assert torch.equal(ours, theirs) and bool(ours.any())


def whole(least: int, most: int, *shape: int) -> Tensor:
    return torch.randint(least, most + 1, shape, generator=torch.Generator().manual_seed(5))


INT4 = Quantization(
    method="gptq",
    rules=(Rule(EVERY_LINEAR, Scheme(num_bits=4, group_size=16, is_symmetric=False)),),
)


def four_bits() -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, weight in separate().items():
        module, (num_out, num_in) = name.removesuffix(".weight"), weight.shape
        words = torch.iinfo(torch.int32)
        tensors |= {
            f"{module}.qweight": whole(words.min, words.max, num_in // 8, num_out).int(),
            f"{module}.qzeros": whole(words.min, words.max, num_in // 16, num_out // 8).int(),
            f"{module}.scales": (rand(num_in // 16, num_out).abs() / 8).half(),
        }
    return tensors


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_experts_of_4_bits_stay_so_until_they_are_used(num_ranks: int, load: Load) -> None:
    """Of ranks that cut groups, too; and as many bytes on paper as there are."""
    tensors = four_bits()
    for name in "gud":
        # All zeros are the middle: of the first expert nothing is added.
        tensors[f"e.0.{name}.qzeros"].fill_(0x88888888 - 2**32)
    expanded = {}
    reader = load(tensors, quantization=INT4)
    for index in range(NUM_EXPERTS):
        for name, num_out, num_in in (
            ("g", SIZE, HIDDEN),
            ("u", SIZE, HIDDEN),
            ("d", HIDDEN, SIZE),
        ):
            module = f"e.{index}.{name}"
            read = read_quantised(module, (num_out, num_in), reader)
            assert read is not None
            expanded[f"{module}.weight"] = read.expand(torch.float32)
    for rank in range(num_ranks):
        ranks = Ranks(rank, num_ranks, lambda y: None)
        assert_kept(
            lambda *at: load(tensors, ranks, *at, quantization=INT4),  # noqa: B023
            lambda: load(expanded, ranks),  # noqa: B023
            SPEC,
            0.2,
        )
        assert_stored(lambda *at: load(tensors, ranks, *at, quantization=INT4), SPEC)  # noqa: B023


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("module", ["e.3.u", "e.3.d"])
def test_of_experts_whose_groups_are_out_of_order_it_is_known_on_paper(
    module: str, num_ranks: int, load: Load
) -> None:
    """A GPU expands them: a plan that counts them as small would take more memory than it says."""
    tensors = four_bits()
    num_in = 8 * len(tensors[f"{module}.qweight"])
    order = torch.arange(num_in) // 16
    for is_shuffled in (False, True):
        tensors[f"{module}.g_idx"] = (order.flip(0) if is_shuffled else order).int()
        for rank in range(num_ranks):
            found = []
            for device in ("cpu", "meta"):
                loader = load(tensors, None, device, quantization=INT4)
                ops = TritonOperations(Ranks(rank, num_ranks, lambda y: None), keeps_small=True)
                ops.keep_experts_small()
                loader.ops = ops
                found.append((loader.experts(SPEC).is_small, loader.num_bytes))
            assert found[0] == found[1] and found[0][0] is not is_shuffled
            on_host = [load(tensors, ops.ranks, at, quantization=INT4) for at in ("cpu", "meta")]
            for loader in on_host:
                loader.ops.keep_experts_small()
                loader.experts(SPEC)
            assert on_host[0].num_bytes == on_host[1].num_bytes


def test_a_plan_reads_no_orders_of_experts_that_are_expanded(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a large mixture that would be tens of thousands of small reads."""
    tensors = four_bits()
    orders = set()
    for name in list(tensors):
        module, _, suffix = name.rpartition(".")
        if suffix == "qweight":
            orders.add(f"{module}.g_idx")
            tensors[f"{module}.g_idx"] = (torch.arange(8 * len(tensors[name])) // 16).flip(0).int()
    read, read_of = [], WeightFiles.read

    def recorded(files: WeightFiles, name: str, shape: Any, device: Any, *rest: Any) -> Tensor:
        if device.type != "meta":
            read.append(name)
        return read_of(files, name, shape, device, *rest)

    monkeypatch.setattr(WeightFiles, "read", recorded)
    on_paper = load(tensors, None, "meta", quantization=INT4)
    on_paper.experts(SPEC)
    assert read == [] and orders <= on_paper.taken.keys()
    loader = load(tensors, quantization=INT4)
    loader.experts(SPEC)
    assert on_paper.num_bytes == loader.num_bytes and orders <= set(read)


def assert_stored(small: Callable[..., ModelLoader], spec: ExpertsSpec) -> None:
    """As a GPU reads them: the same numbers, in as many bytes as on paper."""
    made: dict[str, ModelLoader] = {}
    for device in ("cpu", "meta"):
        made[device] = small(device)
        ranks = made[device].ops.ranks
        ops = TritonOperations(ranks, keeps_small=True, takes_float8=True)
        ops.keep_experts_small()
        made[device].ops = ops
    layer, on_paper = (each.experts(spec) for each in made.values())
    assert layer.is_small and made["cpu"].has_small_experts
    assert layer.num_bytes == on_paper.num_bytes
    expected = small("cpu").experts(spec)
    for ours, theirs in zip(layer.weights[:2], expected.weights[:2], strict=True):
        for index in range(NUM_EXPERTS):
            wanted = theirs[index].to_dense() if theirs[index].is_mkldnn else theirs[index]
            torch.testing.assert_close(ours.expand(index), wanted, atol=1e-5, rtol=2e-3)


def packed(*shape: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random blocks of all codes and scales from the lowest to the highest."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(100, 140, shape, generator=generator, dtype=torch.uint8)
    scales.view(-1)[:2] = torch.tensor([0, 254], dtype=torch.uint8)
    return blocks, scales


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_mxfp4_is_expanded_to_transformers_bits(dtype: torch.dtype, load: Load) -> None:
    """gate_up of a layer, as they come alternating; rows behind each other there, columns here."""
    blocks, scales = packed(NUM_EXPERTS, 2 * SIZE, HIDDEN // 32, seed=1)
    expected = convert_moe_packed_tensors(blocks, scales, dtype=dtype)
    for expert in range(NUM_EXPERTS):
        got = fp4.mxfp4(blocks[expert], scales[expert]).expand(dtype)
        assert got.dtype == dtype and torch.equal(got, expected[expert].t())


def mxfp4() -> dict[str, Tensor]:
    up_blocks, up_scales = packed(NUM_EXPERTS, 2 * SIZE, HIDDEN // 32, seed=1)
    down_blocks, down_scales = packed(NUM_EXPERTS, HIDDEN, SIZE // 32, seed=2)
    return {
        "e.gate_up_blocks": up_blocks,
        "e.gate_up_scales": up_scales,
        "e.gate_up_bias": rand(NUM_EXPERTS, 2 * SIZE),
        "e.down_blocks": down_blocks,
        "e.down_scales": down_scales,
        "e.down_bias": rand(NUM_EXPERTS, HIDDEN),
    }


MXFP4 = ExpertsSpec(
    names=ExpertNames(fused_gate_up="e.gate_up", fused_down="e.down"),
    num_experts=NUM_EXPERTS,
    num_in=HIDDEN,
    size=SIZE,
    has_bias=True,
    alternates=True,
    may_be_mxfp4=True,
)


def test_mxfp4_experts_are_those_that_transformers_expands(load: Load) -> None:
    tensors = mxfp4()

    def by_transformers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: convert_moe_packed_tensors(
                tensors[f"{name}_blocks"], tensors[f"{name}_scales"], dtype=torch.float32
            )
            for name in ("e.gate_up", "e.down")
        }

    expanded = by_transformers(tensors)
    # Products with the largest numbers are none.
    mild = {
        name: each.clamp(110, 130) if name.endswith("scales") else each
        for name, each in tensors.items()
    }
    mildly = by_transformers(mild)
    biases = {name: tensor for name, tensor in tensors.items() if name.endswith("bias")}
    ours = list(read_experts(MXFP4, load(tensors), Ranks()))
    theirs = list(read_experts(MXFP4, load({**expanded, **biases}), Ranks()))
    for one, other in zip(ours, theirs, strict=True):
        for a, b in zip(one.expanded(torch.float32), other.expanded(torch.float32), strict=True):
            assert a is not None and b is not None and torch.equal(a, b)
    assert_kept(lambda *at: load(mild, None, *at), lambda: load({**mildly, **biases}), MXFP4, 0.2)
    assert_stored(lambda device: load(mild, None, device), MXFP4)
    gate_bias = tensors["e.gate_up_bias"][0, ::2]
    assert ours[0].gate_up_bias is not None
    assert torch.equal(ours[0].gate_up_bias[:SIZE], gate_bias)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("e.down_scales"), "e.down_scales: missing tensor"),
        (lambda t: t.pop("e.gate_up_bias"), "e.gate_up_bias: missing tensor"),
        (
            lambda t: t.update({"e.down_blocks": t["e.down_blocks"][:, :-1].contiguous()}),
            r"e.down_blocks: shape \[5, 63, 1, 16\] where config.json makes it \[5, 64, 1, 16\]",
        ),
        (
            lambda t: t.update({"e.gate_up_scales": t["e.gate_up_scales"].float()}),
            "e.gate_up_scales: dtype F32 is not U8",
        ),
    ],
)
def test_mxfp4_tensors_that_do_not_fit_are_named_before_weights_are_read(
    load: Load, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    tensors = mxfp4()
    change(tensors)
    with pytest.raises(ModelError, match=message):
        load(tensors, device="meta").experts(MXFP4)


def test_an_exponent_that_is_none_is_refused(load: Load) -> None:
    tensors = mxfp4()
    tensors["e.down_scales"][3, 1] = 255
    with pytest.raises(ModelError, match="e.down_scales: holds what is no number"):
        load(tensors).experts(MXFP4)


@pytest.mark.parametrize(
    ("model_type", "case", "change", "message"),
    [
        (
            "qwen3_moe",
            "as they come",
            lambda t: t.pop("model.layers.1.mlp.experts.3.up_proj.weight"),
            r"model.layers.1.mlp.experts.3.up_proj.weight: missing tensor",
        ),
        (
            "qwen3_moe",
            "as they come",
            lambda t: t.update({"model.layers.1.mlp.experts.8.up_proj.weight": torch.ones(48, 64)}),
            "model.layers.1.mlp.experts.8.up_proj.weight: unexpected tensor",
        ),
        (
            "glm4_moe",
            "as they come",
            lambda t: t.update({"model.layers.1.mlp.gate.e_score_correction_bias": torch.ones(4)}),
            r"e_score_correction_bias: shape \[4\] where config.json makes it \[8\]",
        ),
        (
            "gpt_oss",
            "as they come",
            lambda t: t.pop("model.layers.0.self_attn.sinks"),
            "model.layers.0.self_attn.sinks: missing tensor",
        ),
        (
            "gpt_oss",
            "as they come",
            lambda t: t.update(
                {"model.layers.0.mlp.experts.gate_up_proj_blocks": torch.ones(1).byte()}
            ),
            "gate_up_proj_blocks: MXFP4, but config.json has no such quantization_config",
        ),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(
    model_type: str,
    case: str,
    change: Callable[[dict[str, Tensor]], object],
    message: str,
    tmp_path: Path,
) -> None:
    make_tiny(tmp_path, model_type, TINY_MODELS[model_type][case])
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ModelError, match=message):
        ModelRunner(EngineConfig(tmp_path, num_blocks=64, **ENGINE))


def test_layers_that_guess_ahead_are_not_read(tmp_path: Path) -> None:
    make_tiny(tmp_path, "glm4_moe", TINY_MODELS["glm4_moe"]["as they come"])
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    last = max(int(name.split(".")[2]) for name in weights if name.startswith("model.layers."))
    for ahead in (last + 1, 92):
        save_file({**weights, f"model.layers.{ahead}.eh_proj.weight": torch.ones(4)}, path)
        ModelRunner(EngineConfig(tmp_path, num_blocks=64, **ENGINE))
    save_file({**weights, f"model.layers.{last}.eh_proj.weight": torch.ones(4)}, path)
    with pytest.raises(ModelError, match="eh_proj.weight: unexpected tensor"):
        ModelRunner(EngineConfig(tmp_path, num_blocks=64, **ENGINE))


def test_where_there_is_no_room_for_what_is_expanded_another_plan_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_tiny(tmp_path, "qwen3_moe", TINY_MODELS["qwen3_moe"]["as they come"])
    asked: list[int] = []
    monkeypatch.setattr(ReferenceOperations, "keep_experts_small", lambda _: asked.append(1))
    load_experts = ReferenceOperations.load_experts

    def load(ops: ReferenceOperations, spec: ExpertsSpec, reader: Any) -> Experts:
        return replace(load_experts(ops, spec, reader), is_small=bool(asked))

    monkeypatch.setattr(ReferenceOperations, "load_experts", load)
    numerics = []
    for fits in (True, False):
        monkeypatch.setattr(model_runner, "weights_fit", lambda *_: fits)  # noqa: B023
        numerics.append(ModelRunner(EngineConfig(tmp_path, num_blocks=64, device="cpu")).numerics)
        assert len(asked) == (not fits)
    # Their bits are others: such workers do not pair with those that have room.
    assert numerics[1] == f"{numerics[0]} small experts"


# How tokens are given to experts


def test_of_equal_scores_the_lower_number_is_chosen() -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0], [3.0, 1.0, 3.0, 3.0]])
    routes = route(logits, RoutingRule(num_experts=4, top_k=2))
    assert routes.experts.tolist() == [[1, 2], [0, 1], [0, 2]]


def test_groups_are_chosen_by_their_best_two_and_the_bias_is_for_choice_only() -> None:
    rule = RoutingRule(num_experts=6, top_k=2, scoring="sigmoid", num_groups=3, top_groups=1)
    logits = torch.tensor([[4.0, -9.0, 2.0, 2.0, 0.0, 0.0]])
    routes = route(logits, rule)
    assert routes.experts.tolist() == [[2, 3]]
    assert torch.equal(routes.weights, logits[:, 2:4].neg().exp().add(1).reciprocal())
    bias = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0, 1.5])
    chosen = route(logits, rule, bias)
    assert chosen.experts.tolist() == [[5, 4]] and chosen.weights.tolist() == [[0.5, 0.5]]
    scaled = route(logits, rule, bias, torch.arange(6.0))
    assert scaled.weights.tolist() == [[2.5, 2.0]]


def test_a_token_s_bits_do_not_depend_on_its_company(load: Load) -> None:
    ops = ReferenceOperations()
    layer = load(separate()).experts(SPEC)
    x, logits = rand(67, HIDDEN), rand(67, NUM_EXPERTS, seed=3)
    rule = RoutingRule(num_experts=NUM_EXPERTS, top_k=3, is_normalised=True)
    whole = ops.experts(x, ops.route(logits, rule), layer)
    for rows in (range(16), range(50, 67), range(66, 30, -1), [40] * 16, range(17)):
        own = torch.tensor(rows)
        part = ops.experts(x[own], ops.route(logits[own], rule), layer)
        assert torch.equal(part, whole[own])


def test_the_clamped_activation_is_that_of_gpt_oss() -> None:
    gate_up = rand(9, 64) * 6
    gate, up = gate_up.double().chunk(2, -1)
    gate, up = gate.clamp(max=5.0), up.clamp(-5.0, 5.0)
    expected = (up + 1) * gate * torch.sigmoid(gate * 1.5)
    got = reference_experts.gated(gate_up, ClampedSwiglu(1.5, 5.0))
    torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=1e-5)


# What is around them


def test_dummy_routers_spread_tokens_over_the_experts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a prompt in four layers: all experts have tokens, none has many times its share."""
    fields: dict[str, Any] = {
        "model_type": "qwen3_moe",
        "vocab_size": 512,
        "hidden_size": 256,
        "intermediate_size": 256,
        "moe_intermediate_size": 64,
        "num_experts": 16,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    }
    (tmp_path / "config.json").write_text(json.dumps(fields))
    counts: list[Tensor] = []
    original = ReferenceOperations.route

    def counted(*args: Any) -> Routes:
        routes = original(*args)
        counts.append(routes.experts.flatten().bincount(minlength=16))
        return routes

    monkeypatch.setattr(ReferenceOperations, "route", staticmethod(counted))
    runner = ModelRunner(EngineConfig(tmp_path, load_format="dummy", num_blocks=64, **ENGINE))
    tokens = torch.randint(0, 512, (400,), generator=torch.Generator().manual_seed(0)).tolist()
    runner.logits(Batch([BatchRow(tokens, 0, [list(range(25))], num_logits=400)]))
    assert len(counts) == 4
    for count in counts:
        assert int(count.min()) > 0 and int(count.max()) < 4 * 800 / 16


def test_a_lone_token_s_experts_are_all_that_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though its step has rows to spare: they are copies of it."""
    make_tiny(tmp_path, "qwen3_moe", TINY_MODELS["qwen3_moe"]["as they come"])
    runner = ModelRunner(EngineConfig(tmp_path, device="cpu", num_blocks=64))
    prompt, table = list(range(3, 40)), [list(range(4))]
    runner.logits(Batch([BatchRow(prompt, 0, table)]))
    chosen: list[Tensor] = []
    original = ReferenceOperations.route

    def noted(*args: Any) -> Routes:
        routes = original(*args)
        chosen.append(routes.experts)
        return routes

    monkeypatch.setattr(ReferenceOperations, "route", staticmethod(noted))
    runner.logits(Batch([BatchRow([77], 37, table)]))
    assert [each.shape for each in chosen] == [(16, 2)] * 2
    assert all(len(set(each.flatten().tolist())) == 2 for each in chosen)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "qwen2_moe", "gpt_oss"])
def test_bfloat16_is_near_with_the_same_experts(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To transformers in float32 with the same weights, bfloat16 numbers. What rounding tips in a
    router is another expert, and another answer: so it has float32's."""
    model = make_tiny(tmp_path, model_type, TINY_MODELS[model_type]["as they come"], std=0.1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))
        expected = model(torch.arange(40)[None]).logits[0]
    model.save_pretrained(tmp_path)

    def logits(dtype: str) -> Tensor:
        runner = ModelRunner(EngineConfig(tmp_path, "cpu", dtype, num_blocks=64))
        tables = [list(range(4 * index, 4 * index + 4)) for index in range(len(runner.groups))]
        return runner.logits(Batch([BatchRow(list(range(40)), 0, tables, num_logits=40)])).clone()

    routes: list[Routes] = []
    original = ReferenceOperations.route

    def noted(*args: Any) -> Routes:
        routes.append(original(*args))
        return routes[-1]

    monkeypatch.setattr(ReferenceOperations, "route", staticmethod(noted))
    torch.testing.assert_close(logits("float32"), expected, atol=1e-4, rtol=0)
    monkeypatch.setattr(ReferenceOperations, "route", staticmethod(lambda *_: routes.pop(0)))
    limit = 2e-2 * float(expected.abs().max())
    torch.testing.assert_close(logits("bfloat16"), expected, atol=limit, rtol=0)
    assert not routes
