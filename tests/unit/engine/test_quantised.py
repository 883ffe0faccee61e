"""Forms of quantised weights: the numbers that others make of them, to the bit; what is refused."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from baton.shared.engine.batch import Batch, BatchRow
from baton.shared.engine.linear import LinearSpec, Part
from baton.shared.engine.model_loader import ModelLoader
from baton.shared.engine.models.quantization import read_quantization
from baton.shared.engine.operations import Operations
from baton.shared.engine.quantised import gguf
from baton.shared.engine.quantised.scheme import Inputs, Quantization
from baton.shared.engine.quantised.weight import QuantisedWeight
from baton.shared.engine.reference_operations import ReferenceOperations
from baton.shared.engine.triton_operations import TritonOperations
from baton.shared.engine.weight_headers import Header
from baton.shared.engine.weights import WeightFiles
from baton.shared.model_files.fields import Fields, ModelError
from tests.unit.engine.conftest import MakeLlama, MakeRunner

FILES = Path(__file__).parent / "quantised_files"
NUM_OUT, NUM_IN = 24, 64
Load = Callable[..., ModelLoader]


def config(quantization: dict[str, Any]) -> Quantization:
    read = read_quantization(Fields(Path("config.json"), {"quantization_config": quantization}))
    assert read is not None
    return read


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def whole(least: int, most: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(least, most + 1, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """A loader over the tensors given."""

    def load(
        tensors: dict[str, Tensor],
        quantization: dict[str, Any],
        dtype: torch.dtype = torch.bfloat16,
        device: str = "cpu",
        ops: Operations | None = None,
    ) -> ModelLoader:
        save_file(tensors, tmp_path / "model.safetensors")
        return ModelLoader(
            ops or TritonOperations(use_skinny=False),
            WeightFiles(tmp_path),
            dtype=dtype,
            device=torch.device(device),
            num_positions=8,
            ropes_made_for=8,
            quantization=config(quantization),
        )

    return load


def spec(num_out: int = NUM_OUT, num_in: int = NUM_IN, module: str = "a") -> LinearSpec:
    return LinearSpec(num_in, (Part(module, num_out),))


def check_plan(tensors: dict[str, Tensor], fields: dict[str, Any], load: Load) -> None:
    """A plan counts the bytes that a GPU keeps."""
    num_bytes = []
    for device in ("cpu", "meta"):
        ops = TritonOperations(use_skinny=False, keeps_small=True, takes_float8=True)
        loader = load(tensors, fields, device=device, ops=ops)
        loader.linear(spec())
        num_bytes.append(loader.num_bytes)
    assert num_bytes[0] == num_bytes[1]


# compressed-tensors


def compressed(weights: dict[str, Any], **fields: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}, **fields}


def cases() -> dict[str, dict[str, Any]]:
    with safe_open(FILES / "compressed_tensors.safetensors", "pt") as file:
        read: dict[str, dict[str, Any]] = json.loads(file.metadata()["cases"])
    return read


def stored(case: str) -> tuple[dict[str, Tensor], Tensor]:
    """The module's tensors, and the weight that the library expands them to."""
    tensors = load_file(FILES / "compressed_tensors.safetensors")
    own = {
        f"a.{name.removeprefix(f'{case}.')}": tensor
        for name, tensor in tensors.items()
        if name.startswith(f"{case}.")
    }
    return own, own.pop("a.expanded")


@pytest.mark.parametrize("case", cases())
def test_what_the_library_compressed_tensors_stores(case: str, load: Load) -> None:
    tensors, expanded = stored(case)
    loader = load(tensors, compressed(cases()[case]))
    assert torch.equal(loader.linear(spec()).weight, expanded)
    # Parts that are rows of it, on paper as well.
    parts = LinearSpec(NUM_IN, (Part("a", 8, first=8, module_out=24), Part("a", 8, module_out=24)))
    order = [*range(8, 16), *range(8)]
    assert torch.equal(loader.linear(parts).weight, expanded[order])
    paper = load(tensors, compressed(cases()[case]), device="meta").linear(parts)
    assert paper.weight.is_meta and paper.weight.shape == (16, NUM_IN)
    check_plan(tensors, compressed(cases()[case]), load)


@pytest.mark.parametrize("kind", gguf.KINDS)
def test_of_gguf_blocks_it_is_known_on_paper_what_they_hold(kind: str) -> None:
    class Stored:
        """One row of zeros."""

        quantises_inputs = False

        def __init__(self, device: str) -> None:
            self._device = device

        def header(self, name: str) -> Header:
            return Header(kind, (1, 256))

        def read(self, name: str, shape: tuple[int, ...], part: Any = ()) -> Tensor:
            blocks = gguf.KINDS[kind]
            num_bytes = 256 // blocks.size * blocks.num_bytes
            return torch.zeros(num_bytes, dtype=torch.uint8, device=self._device)

        read_known = read

        def error(self, name: str, reason: str) -> ModelError:
            raise AssertionError(reason)

    weight, paper = (gguf.read("a", (1, 256), Stored(device)) for device in ("cpu", "meta"))
    assert paper.is_meta and not weight.is_meta
    for name in ("codes", "scale", "offset"):
        ours, theirs = (getattr(each, name) for each in (paper, weight))
        assert ours is theirs is None or (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)


def int8_in_groups() -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors = {
        "a.weight": whole(-128, 127, NUM_OUT, NUM_IN).to(torch.int8),
        "a.weight_scale": rand(NUM_OUT, 4).abs(),
    }
    return tensors, {"num_bits": 8, "strategy": "group", "group_size": 16}


def test_whose_order_is_told_by_a_tensor(load: Load) -> None:
    """An order in which a weight was made needs none."""
    tensors, said = int8_in_groups()
    scale = tensors["a.weight_scale"].repeat_interleave(16, 1)
    expanded = (tensors["a.weight"] * scale).bfloat16()
    for order in (None, False, "weight", "static"):
        loader = load(tensors, compressed({**said, "actorder": order}))
        assert torch.equal(loader.linear(spec()).weight, expanded)
    columns = torch.randperm(NUM_IN, generator=torch.Generator().manual_seed(3))
    tensors["a.weight"] = tensors["a.weight"][:, columns].contiguous()
    tensors["a.weight_g_idx"] = (columns // 16).int()
    loader = load(tensors, compressed({**said, "actorder": "group"}))
    assert torch.equal(loader.linear(spec()).weight, expanded[:, columns])


def test_columns_of_a_weight_keep_their_groups() -> None:
    """Whatever ranks cut out."""
    codes = whole(-8, 7, 4, 24).to(torch.int8)
    weight = QuantisedWeight(codes, rand(4, 3), 4, zero=whole(-8, 7, 4, 3), offset=rand(4, 3))
    expanded = weight.expand(torch.float32)
    assert torch.equal(
        weight.part(slice(1, 3), slice(5, 20)).expand(torch.float32), expanded[1:3, 5:20]
    )
    index = torch.tensor([2, 0, 3])
    assert torch.equal(weight.take_rows(index).expand(torch.float32), expanded[index])


def test_groups_of_modules_have_schemes_of_their_own(load: Load) -> None:
    fields: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "format": "mixed-precision",
        "config_groups": {
            "first": {"targets": ["re:.*down_proj$"], "weights": {"num_bits": 8}},
            "second": {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 16}},
        },
        "ignore": ["lm_head", "re:.*gate$"],
    }
    read = config(fields)
    bits = {
        name: scheme.num_bits if (scheme := read.scheme(name)) else None
        for name in ("a.down_proj", "a.down_proj.b", "a.up_proj", "lm_head", "mlp.gate")
    }
    assert list(bits.values()) == [8, 4, 4, None, None]
    tensors, _ = stored("int4_group")
    renamed = {name.replace("a.", "lm_head.", 1): each for name, each in tensors.items()}
    with pytest.raises(ModelError, match="lm_head.weight_packed: dtype I32, but .* leaves it out"):
        load(renamed, fields).linear(spec(module="lm_head"))


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"type": "float", "dynamic": True, "strategy": "token"}, Inputs(kind="float")),
        # A scale of all tokens would let them change each other's answers.
        ({"type": "float", "dynamic": True, "strategy": "tensor"}, Inputs(kind="float")),
        ({"type": "int", "dynamic": False}, Inputs(kind="int", is_static=True)),
        (
            {"type": "float", "dynamic": True, "strategy": "group", "group_size": 128},
            Inputs(kind="float", group_size=128),
        ),
        ({"type": "float", "dynamic": False, "strategy": "channel"}, None),
        ({"type": "int", "dynamic": True, "symmetric": False}, None),
        ({"type": "float", "num_bits": 4}, None),
        (None, None),
    ],
)
def test_what_a_file_says_of_activations(
    said: dict[str, Any] | None, expected: Inputs | None
) -> None:
    """Of caches it changes nothing."""
    weights = {"num_bits": 8, "type": "float", "strategy": "tensor"}
    fields = compressed(weights, kv_cache_scheme={"num_bits": 8, "type": "float"})
    group = fields["config_groups"]["group_0"]
    group["input_activations"] = None if said is None else {"num_bits": 8, **said}
    read = config(fields)
    assert read is not None and read.rules[0].scheme.inputs == expected


def test_other_formats_say_it_in_their_way() -> None:
    blocks = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    for fields, expected in (
        (blocks, Inputs(kind="float", group_size=128)),
        ({"quant_method": "fp8", "activation_scheme": "dynamic"}, Inputs(kind="float")),
        (
            {"quant_method": "modelopt", "quant_algo": "FP8"},
            Inputs(kind="float", is_static=True),
        ),
    ):
        read = config(fields)
        assert read is not None and read.rules[0].scheme.inputs == expected


def static(*scales: float) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Of modules a, b and so on with these scales of activations, and what config.json says."""
    tensors = {}
    for module, scale in zip("abc", scales, strict=False):
        tensors[f"{module}.weight"] = rand(8, 64).to(torch.float8_e4m3fn)
        tensors[f"{module}.weight_scale"] = torch.tensor(0.5)
        tensors[f"{module}.input_scale"] = torch.tensor(scale)
    return tensors, {"quant_method": "modelopt", "quant_algo": "FP8"}


def test_scales_of_activations_that_are_given(load: Load) -> None:
    """Parts of a layer have the same inputs: the largest of their scales cuts none of them. Who
    does not quantise activations leaves them where they are."""
    tensors, fields = static(0.25, 0.75, 0.5)
    joined = LinearSpec(64, tuple(Part(module, 8) for module in "abc"))
    ops = ReferenceOperations(quantises_inputs=True)
    loader = load(tensors, fields, torch.float32, ops=ops)
    layer = loader.linear(joined)
    assert layer.inputs is not None and layer.inputs.scale is not None
    assert layer.inputs.scale.tolist() == [0.75] and loader.has_small_inputs
    x = rand(3, 64) * 100
    made = (x / 0.75).clamp(-448, 448).to(torch.float8_e4m3fn).float() * 0.75
    weight = torch.cat([tensors[f"{module}.weight"].float() / 2 for module in "abc"])
    torch.testing.assert_close(ops.linear(x, layer), made @ weight.t(), rtol=1e-5, atol=1e-3)
    loader = load(tensors, fields, torch.float32)
    assert loader.linear(joined).inputs is None and "a.input_scale" not in loader.taken


def test_scales_of_activations_as_transformers_calls_them(load: Load) -> None:
    tensors, _ = static(0.25)
    tensors["a.activation_scale"] = tensors.pop("a.input_scale")
    tensors["a.weight_scale_inv"] = tensors.pop("a.weight_scale")
    fields = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}
    loader = load(tensors, fields, ops=ReferenceOperations(quantises_inputs=True))
    layer = loader.linear(spec(8))
    assert layer.inputs is not None and layer.inputs.scale is not None
    assert layer.inputs.scale.tolist() == [0.25]


@pytest.mark.parametrize(
    ("scale", "reason"),
    [
        (torch.tensor(0.0), "0.0 is no scale"),
        (torch.tensor(float("nan")), "holds what is no number"),
        (torch.ones(3), r"shape \[3\] is not that of one number"),
        (None, "missing tensor, though config.json says that activations have a static scale"),
    ],
)
def test_scales_of_activations_that_are_none(scale: Tensor | None, reason: str, load: Load) -> None:
    tensors, fields = static(1.0)
    del tensors["a.input_scale"]
    if scale is not None:
        tensors["a.input_scale"] = scale
    loader = load(tensors, fields, ops=ReferenceOperations(quantises_inputs=True))
    with pytest.raises(ModelError, match=f"a.input_scale: {reason}"):
        loader.linear(spec(8))


# GPTQ and AWQ, from their documentation


def packed_words(numbers: list[int], bits: int) -> list[int]:
    """Lowest bits first, as signed words."""
    total = sum(number << (bits * place) for place, number in enumerate(numbers))
    words = [total >> (32 * place) & 0xFFFFFFFF for place in range(-(-len(numbers) * bits // 32))]
    return [word - 2**32 if word >= 2**31 else word for word in words]


def packed_rows(numbers: Tensor, bits: int) -> Tensor:
    return torch.tensor([packed_words(row.tolist(), bits) for row in numbers], dtype=torch.int32)


def gptq_fields(**fields: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": 4, "group_size": 16, "sym": True, **fields}


def gptq(
    bits: int = 4, *, zero: int | None = None, less: int = 1, shuffled: bool = False
) -> tuple[dict[str, Tensor], Tensor]:
    """A module's tensors and its weight. `zero`: every one; None: anywhere."""
    codes = whole(0, 2**bits - 1, NUM_OUT, NUM_IN)
    zeros = whole(1, 2**bits - 1, NUM_OUT, 4, seed=1)
    if 32 % bits == 0:
        zeros[::16, :2] = 0  # Less one it borrows from its neighbour.
    if zero is not None:
        zeros = torch.full_like(zeros, zero)
    scale = rand(NUM_OUT, 4, seed=2).abs().half()
    if zero is not None:
        scale[::2] *= -1  # As AutoRound writes it.
    g_idx = torch.arange(NUM_IN) // 16
    if shuffled:
        g_idx = g_idx[torch.randperm(NUM_IN, generator=torch.Generator().manual_seed(3))]
    tensors = {
        "a.qweight": packed_rows(codes, bits).t().contiguous(),
        "a.qzeros": packed_rows((zeros - less).t(), bits),
        "a.scales": scale.t().contiguous(),
        "a.g_idx": g_idx.int(),
    }
    return tensors, ((codes - zeros[:, g_idx]).half() * scale[:, g_idx])


@pytest.mark.parametrize(
    ("fields", "made"),
    [
        ({}, {"zero": 8}),
        # Which of both formats a file says it is does not count where the zeros tell.
        ({"checkpoint_format": "gptq"}, {"zero": 8, "less": 0}),
        ({"checkpoint_format": "gptq_v2"}, {"zero": 8, "less": 1}),
        ({"sym": False}, {}),
        ({"sym": False, "checkpoint_format": "gptq_v2"}, {"less": 0}),
        ({"desc_act": True}, {"zero": 8, "shuffled": True}),
        ({"bits": 8}, {"zero": 128, "bits": 8}),
        ({"bits": 3}, {"bits": 3, "zero": 4}),
        ({"bits": 3, "sym": False, "checkpoint_format": "gptq_v2"}, {"bits": 3, "less": 0}),
        ({"bits": 2, "sym": False}, {"bits": 2}),
    ],
)
def test_gptq(fields: dict[str, Any], made: dict[str, Any], load: Load) -> None:
    tensors, expanded = gptq(**made)
    loader = load(tensors, gptq_fields(**fields), torch.float16)
    assert torch.equal(loader.linear(spec()).weight, expanded)
    check_plan(tensors, gptq_fields(**fields), load)


def test_of_zeros_that_cannot_be_told_a_plan_says_so(load: Load) -> None:
    """Before anything big is read."""
    fields = gptq_fields(bits=3, sym=False)
    with pytest.raises(ModelError, match="of 3 bits and zeros anywhere tools disagree"):
        load(gptq(3)[0], fields, device="meta").linear(spec())


def test_zeros_of_3_bits_that_gptqmodel_writes(load: Load) -> None:
    """A module of 24 outputs has 3 words of them."""
    tensors, expanded = gptq(3, zero=4, less=0)
    less = torch.tensor([0x24924924, 0x92492492, 0x49249249])
    tensors["a.qzeros"] = (tensors["a.qzeros"] - less).int()
    loader = load(tensors, gptq_fields(bits=3), torch.float16)
    assert torch.equal(loader.linear(spec()).weight, expanded)


def test_awq(load: Load) -> None:
    codes, zeros = whole(0, 15, NUM_IN, NUM_OUT), whole(0, 15, 4, NUM_OUT, seed=1)
    scale = rand(4, NUM_OUT, seed=2).abs().half()

    def packed(numbers: Tensor) -> Tensor:
        # Eight outputs a word, the even ones first.
        order = [
            8 * word + place for word in range(NUM_OUT // 8) for place in (0, 2, 4, 6, 1, 3, 5, 7)
        ]
        return packed_rows(numbers[:, order], 4)

    tensors = {"a.qweight": packed(codes), "a.qzeros": packed(zeros), "a.scales": scale}
    fields: dict[str, Any] = {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm"}
    expanded = (codes - zeros.repeat_interleave(16, 0)).half() * scale.repeat_interleave(16, 0)
    fields["zero_point"] = True
    layer = load(tensors, fields, torch.float16).linear(spec())
    assert torch.equal(layer.weight, expanded.t())
    check_plan(tensors, fields, load)


# FP8


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float8_e8m0fnu])
def test_blocks_of_fp8(scale_dtype: torch.dtype, load: Load) -> None:
    """Sizes that are no multiples of a block; one scale, despite its name, multiplies."""
    weight = rand(40, 56).to(torch.float8_e4m3fn)
    scale = (2 ** whole(-3, 3, 3, 4).float()).to(scale_dtype)
    rows, columns = torch.arange(40) // 16, torch.arange(56) // 16
    expanded = weight.float() * scale.float()[rows][:, columns]
    fields = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 16]}
    tensors = {"a.weight": weight, "a.weight_scale_inv": scale}
    layer = load(tensors, fields, torch.float32).linear(spec(40, 56))
    assert torch.equal(layer.weight, expanded)


def test_a_scale_for_all_of_a_weight(load: Load) -> None:
    weight, scale = rand(NUM_OUT, NUM_IN).to(torch.float8_e4m3fn), torch.tensor(0.3)
    for fields in (
        {"quant_method": "fp8", "activation_scheme": "static"},
        {"quant_method": "modelopt", "quant_algo": "FP8"},
    ):
        tensors = {"a.weight": weight, "a.weight_scale": scale}
        layer = load(tensors, fields, torch.float32).linear(spec())
        assert torch.equal(layer.weight, weight.float() * scale)


def test_modelopts_nvfp4_is_that_of_others_under_other_names(load: Load) -> None:
    tensors, expanded = stored("nvfp4")
    renamed = {
        "a.weight": tensors["a.weight_packed"],
        "a.weight_scale": tensors["a.weight_scale"],
        "a.weight_scale_2": 1 / tensors["a.weight_global_scale"],
    }
    layer = load(renamed, {"quant_method": "modelopt", "quant_algo": "NVFP4"}).linear(spec())
    # The reciprocal was rounded.
    torch.testing.assert_close(layer.weight, expanded, rtol=2**-7, atol=0)


def test_modelopt_may_say_it_in_a_file_of_its_own(tmp_path: Path) -> None:
    fields = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(fields))
    read = read_quantization(Fields(tmp_path / "config.json", {}))
    assert read is not None and read == config({"quant_method": "modelopt", "quant_algo": "FP8"})
    fields["quantization"]["quant_algo"] = "W4A8"
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(fields))
    with pytest.raises(ModelError, match="hf_quant_config.json: quantization.quant_algo: only"):
        read_quantization(Fields(tmp_path / "config.json", {}))


# What is refused


INT4 = {"num_bits": 4, "strategy": "group", "group_size": 16}


def changed(case: str, **tensors: Tensor | None) -> dict[str, Tensor]:
    own, _ = stored(case)
    both = own | {f"a.{name}": each for name, each in tensors.items()}
    return {name: each for name, each in both.items() if each is not None}


@pytest.mark.parametrize(
    ("tensors", "fields", "reason"),
    [
        (
            stored("int4_group")[0],
            compressed({**INT4, "group_size": 32}),
            r"a.weight_scale: shape \[24, 4\] is not \[24, 2\]: group_size 32 of config.json",
        ),
        (
            stored("int4_group")[0],
            compressed({**INT4, "group_size": 48}),
            "a.weight_scale: group_size 48 does not divide rows of 64",
        ),
        (
            stored("int4_group")[0],
            compressed({**INT4, "num_bits": 8}),
            r"a.weight_packed: shape \[24, 8\] is not \[24, 16\]: .* of 8 bits",
        ),
        (
            stored("int4_group")[0],
            compressed({**INT4, "symmetric": False}),
            "a.weight_zero_point: missing tensor, though config.json says that zeros are anywhere",
        ),
        (
            stored("int4_group")[0],
            gptq_fields(),
            "a.weight_packed: is not of quant_method gptq, which config.json says",
        ),
        (
            changed("int4_group", weight_scale=torch.full((24, 4), float("nan"))),
            compressed(INT4),
            "a.weight_scale: holds what is no number",
        ),
        (
            changed("int4_group", weight_shape=torch.tensor([24, 65])),
            compressed(INT4),
            r"a.weight_shape: \[24, 65\] where config.json makes it \[24, 64\]",
        ),
        (
            changed("int4_group", weight_g_idx=torch.full((64,), 4, dtype=torch.int32)),
            compressed(INT4),
            "a.weight_g_idx: names a group beside the 4 of the scales",
        ),
        (
            stored("fp8_block")[0],
            compressed({"num_bits": 8, "type": "float", "block_structure": [16, 16]}),
            r"a.weight_scale: shape \[2, 3\] does not fit .* in blocks of 16 x 16",
        ),
        (
            changed("nvfp4", weight_global_scale=None),
            compressed(cases()["nvfp4"]),
            "a.weight_global_scale: missing tensor",
        ),
        (
            changed("nvfp4", weight_global_scale=torch.zeros(1)),
            compressed(cases()["nvfp4"]),
            "a.weight_global_scale: all scales are 0",
        ),
        (
            changed("mxfp4", weight_scale=torch.full((24, 2), 255, dtype=torch.uint8)),
            compressed(cases()["mxfp4"]),
            "a.weight_scale: holds what is no number",
        ),
        (
            stored("mxfp4")[0],
            compressed(INT4),
            "a.weight_packed: floats of 4 bits where config.json says int4",
        ),
        (
            gptq(zero=8)[0],
            gptq_fields(group_size=32),
            r"a.scales: shape \[4, 24\] is not \[2, 24\]: config.json says group_size 32",
        ),
        (
            {**gptq(zero=8)[0], "a.scales": torch.zeros(4, 24, dtype=torch.int32)},
            gptq_fields(),
            "a.scales: dtype I32",
        ),
        (
            stored("fp8_channel")[0],
            compressed(cases()["fp8_tensor"]),
            r"a.weight_scale: shape \[24, 1\] does not fit .* with one scale: strategy tensor",
        ),
        (
            stored("int4_channel")[0],
            compressed({"num_bits": 4, "strategy": "tensor"}),
            r"a.weight_scale: shape \[24, 1\] is not \[1\]: strategy tensor",
        ),
        (
            stored("fp8_tensor")[0],
            compressed(cases()["fp8_channel"]),
            r"a.weight_scale: shape \[1\] does not fit .* of which \[24, 1\] does: strategy chan",
        ),
        (
            stored("fp8_tensor")[0],
            compressed(cases()["fp8_block"]),
            r"a.weight_scale: shape \[1\] does not fit .* in blocks of 16 x 24",
        ),
        (
            stored("int8")[0],
            compressed({"num_bits": 8, "strategy": "group", "group_size": 16}),
            r"a.weight_scale: shape \[24, 1\] does not fit .* \[24, 4\] does: .* group_size 16",
        ),
        (
            stored("int4_group")[0],
            compressed(INT4, format="nvfp4-pack-quantized"),
            "a.weight_packed: dtype I32, where format nvfp4-pack-quantized .* has U8",
        ),
        (
            stored("nvfp4")[0],
            compressed(cases()["nvfp4"], format="mxfp4-pack-quantized"),
            "a.weight_packed: group_size 16 is not 32, as format mxfp4-pack-quantized has it",
        ),
        (
            changed("fp8_channel", weight_scale=-stored("fp8_channel")[0]["a.weight_scale"]),
            compressed(cases()["fp8_channel"]),
            "a.weight_scale: -0.00885.* where no scale may be below zero",
        ),
        (
            changed("nvfp4", weight_global_scale=torch.tensor([-2.0])),
            compressed(cases()["nvfp4"]),
            "a.weight_global_scale: -2 where no scale may be below zero",
        ),
        (
            changed("fp8_channel", weight_scale=torch.full((24, 1), 3e38)),
            compressed(cases()["fp8_channel"]),
            r"a.weight_scale: of codes of up to 448 a scale of 3e\+38 makes no number",
        ),
        (
            changed("int8_zeros", weight_zero_point=torch.full((24, 1), 0.5)),
            compressed(cases()["int8_zeros"]),
            "a.weight_zero_point: 0.5 to 0.5 are no zeros of int8",
        ),
        *[
            (
                stored("int4_group")[0],
                compressed({**INT4, "actorder": said}),
                "a.weight_g_idx: missing tensor, though config.json says "
                f"actorder {json.dumps(said)}",
            )
            for said in ("group", "Dynamic", True)
        ],
        (
            int8_in_groups()[0],
            compressed({**int8_in_groups()[1], "actorder": "group"}),
            "a.weight_g_idx: missing tensor, though config.json says actorder",
        ),
        (
            {name: each for name, each in gptq(zero=8)[0].items() if name != "a.g_idx"},
            gptq_fields(desc_act=True),
            "a.g_idx: missing tensor, though config.json says desc_act true",
        ),
        (
            {**gptq(zero=8)[0], "a.g_idx": torch.zeros(64, dtype=torch.int32)},
            gptq_fields(),
            "a.g_idx: group 0 has 64 columns, not 16",
        ),
        (
            gptq(3)[0],
            gptq_fields(bits=3, sym=False),
            "a.qzeros: of 3 bits and zeros anywhere tools disagree",
        ),
        (
            gptq()[0],
            gptq_fields(),
            "a.qzeros: zeros 0 to 15 are neither 8 nor 7: config.json says sym",
        ),
    ],
)
def test_what_contradicts_the_config(
    tensors: dict[str, Tensor], fields: dict[str, Any], reason: str, load: Load
) -> None:
    with pytest.raises(ModelError, match=f"model.safetensors: {reason}"):
        load(tensors, fields).linear(spec())


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, "quant_method: missing"),
        ({"quant_method": "bitsandbytes"}, "quant_method: must be one of compressed-tensors, fp8"),
        ({"quant_method": "gptq"}, "bits: missing"),
        (gptq_fields(bits=5), "bits: must be 2, 3, 4 or 8, not 5"),
        (gptq_fields(checkpoint_format="marlin"), 'checkpoint_format: only "gptq" or "gptq_v2"'),
        (gptq_fields(dynamic={"-:lm_head": {}}), "dynamic: only {} is supported"),
        (gptq_fields(format="gptq", checkpoint_format="gptq_v2"), 'format: "gptq", though chec'),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "version: only"),
        ({"quant_method": "awq", "bits": 3}, "bits: only 4"),
        ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, 'quant_algo: only "FP8"'),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "weight_block_size: must be two"),
        (compressed({**INT4, "actorder": "up"}), '.*actorder: "up" is none of group, dynamic'),
        (compressed({"num_bits": 9}), "config_groups.group_0.weights.num_bits: int9 is none of"),
        (compressed(INT4, format="marlin-24"), "format: only"),
        (
            compressed({**INT4, "strategy": "channel"}),
            "config_groups.group_0.weights.group_size: 16, though strategy is channel",
        ),
        (
            compressed({"num_bits": 4, "strategy": "group"}),
            "config_groups.group_0.weights.group_size: null, though strategy is group",
        ),
        (compressed(INT4, ignore=["re:("]), "ignore: .* is no regular expression"),
        (compressed(INT4, config_groups={}), "config_groups: names no weights"),
        (compressed(INT4, transform_config={"config_groups": {"a": {}}}), "transform_config: only"),
    ],
)
def test_what_is_not_served_is_named(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(ModelError, match=f"config.json: quantization_config.{reason}"):
        config(fields)


# Whole models


def test_a_gptq_checkpoint_as_tools_write_it(
    make_llama: MakeLlama,
    make_runner: MakeRunner,
    edit_config: Callable[..., None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """With biases of nothing but zeros, and scales for activations and caches."""
    caplog.set_level(logging.INFO)
    model_dir, _ = make_llama()
    path = model_dir / "model.safetensors"
    plain = load_file(path)
    tensors = dict(plain)
    for name in [name for name in plain if "proj" in name]:
        module, weight = name.removesuffix(".weight"), tensors.pop(name)
        scale = (weight.abs().amax(1, keepdim=True) / 7).half()
        codes = (weight / scale.float()).round().clamp(-8, 7).int() + 8
        plain[name] = ((codes - 8).half() * scale).float()
        zeros = torch.full((1, len(weight)), 7)
        tensors |= {
            f"{module}.qweight": packed_rows(codes, 4).t().contiguous(),
            f"{module}.qzeros": packed_rows(zeros, 4),
            f"{module}.scales": scale.t().contiguous(),
            f"{module}.bias": torch.zeros(len(weight)),
            f"{module}.input_scale": torch.ones(1),
        }
    save_file(plain, path)
    row = Batch([BatchRow(list(range(40)), 0, [[0, 1, 2]])])
    expected = make_runner(model_dir).logits(row)
    save_file(tensors, path)
    edit_config(model_dir, quantization_config=gptq_fields(group_size=-1))
    assert torch.equal(make_runner(model_dir).logits(row), expected)
    assert "scales of activations, keys and values are not used" in caplog.text
    tensors["model.layers.0.mlp.up_proj.bias"] += 1
    save_file(tensors, path)
    with pytest.raises(ModelError, match="up_proj.bias: unexpected tensor"):
        make_runner(model_dir)


def test_the_reference_table_takes_the_same_numbers(load: Load) -> None:
    tensors, expanded = stored("int4_group")
    loader = load(tensors, compressed(INT4), torch.float32)
    loader.ops = ReferenceOperations()
    x = rand(20, NUM_IN)
    torch.testing.assert_close(
        loader.ops.linear(x, loader.linear(spec())), x @ expanded.float().t(), atol=1e-4, rtol=1e-5
    )
