"""Models that run through transformers: which ones do, at what class, and what is refused.

Their logits, tokens and bits are compared in test_model_types.py.
"""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig
from transformers.models.olmo2 import modeling_olmo2

from baton.kernels import reference
from baton.shared.engine.batch import Batch, BatchRow
from baton.shared.engine.config import EngineConfig
from baton.shared.engine.implementation import Place, find_implementation
from baton.shared.engine.model_runner import ModelRunner
from baton.shared.engine.reference_operations import ReferenceOperations
from baton.shared.engine.transformers_backend import library as library_module
from baton.shared.engine.transformers_backend import start_check
from baton.shared.engine.transformers_backend.attention import make_mask, read_arguments
from baton.shared.engine.transformers_backend.company import recording
from baton.shared.engine.transformers_backend.model import load
from baton.shared.engine.weights import WeightFiles
from baton.shared.model_files.fields import ModelError
from tests.unit.engine.tiny_models import SIZES, make_tiny

ROOT = Path(__file__).parents[3]
VERSION = f"transformers {transformers.__version__}"
EXPERTS = {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 1}
Fields = dict[str, Any]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def olmo2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model_dir = tmp_path_factory.mktemp("olmo2")
    make_tiny(model_dir, "olmo2", {})
    return model_dir


def start(model_dir: Path, **config: Any) -> ModelRunner:
    return ModelRunner(EngineConfig(model_dir, num_blocks=64, **{"device": "cpu", **config}))


def logits(runner: ModelRunner, num_tokens: int = 40) -> torch.Tensor:
    tokens = random.Random(3).choices(range(runner.model_config.vocab_size), k=num_tokens)
    tables = [list(range(8 * group, 8 * group + 8)) for group in range(len(runner.groups))]
    return runner.logits(Batch([BatchRow(tokens, 0, tables)]))[0]


def expected(model: Any, num_tokens: int = 40) -> torch.Tensor:
    vocab_size = model.config.get_text_config().vocab_size
    tokens = random.Random(3).choices(range(vocab_size), k=num_tokens)
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0, -1]  # type: ignore[no-any-return]


# Which models run, and how


@pytest.mark.parametrize(
    ("model_type", "fields", "determinism", "max_model_len"),
    [
        ("opt", {"ffn_dim": 112, "word_embed_proj_dim": 64}, "exact", 512),
        ("gpt2", {"initializer_range": 0.3}, "exact", 512),
        ("helium", {"head_dim": 16}, "exact", 512),
        # Experts are never exact; heads have sinks.
        (
            "gpt_oss",
            {**EXPERTS, "num_experts_per_tok": 2, "sliding_window": 21},
            "consistent",
            512,
        ),
        ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}, "consistent", 512),
        # Its code takes a token's place in the step for its position, where that begins to count.
        ("llama4_text", {**EXPERTS, "floor_scale": 80}, "consistent", 79),
        # Layers attend within chunks; within the first one that is a full layer.
        (
            "llama4_text",
            {**EXPERTS, "attention_chunk_size": 64, "attn_temperature_tuning": False},
            "consistent",
            64,
        ),
    ],
)
def test_models_run(
    model_type: str, fields: Fields, determinism: str, max_model_len: int, tmp_path: Path
) -> None:
    model = make_tiny(tmp_path, model_type, fields)
    small = {"token_budget": 32, "max_num_seqs": 8} if "floor_scale" in fields else {}
    runner = start(tmp_path, model_impl="transformers", **small)
    assert (runner.model_impl, runner.determinism) == (VERSION, determinism)
    assert runner.max_model_len == max_model_len
    torch.testing.assert_close(logits(runner), expected(model), atol=1e-4, rtol=0)


def test_a_type_with_a_file_here_runs_through_either(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    model = make_tiny(tmp_path, "qwen3", {"head_dim": 16, "rope_parameters": rope})
    own, foreign = start(tmp_path), start(tmp_path, model_impl="transformers")
    assert (own.model_impl, foreign.model_impl) == ("baton", VERSION)
    # Workers exchange no blocks that another's code made.
    assert own.numerics != foreign.numerics
    for runner in (own, foreign):
        torch.testing.assert_close(logits(runner), expected(model), atol=1e-4, rtol=0)


def test_a_rope_that_is_dynamic_is_taken_as_it_is_written(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "alpha": 1000.0, "factor": 1.0}
    model = make_tiny(tmp_path, "hunyuan_v1_dense", {"head_dim": 16, "rope_parameters": rope})
    runner = start(tmp_path)
    torch.testing.assert_close(logits(runner), expected(model), atol=1e-4, rtol=0)


LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0, "short_factor": [1.0] * 8}


@pytest.mark.parametrize(
    ("inside", "outside", "longest"),
    [
        ({"original_max_position_embeddings": 64}, {}, 64),
        ({"original_max_position_embeddings": 64.5}, {}, 64),
        ({}, {"original_max_position_embeddings": 64}, 64),
        ({}, {"original_max_position_embeddings": 64.0}, 64),
        ({"original_max_position_embeddings": 128}, {"original_max_position_embeddings": 64}, 64),
        ({}, {}, 512),
    ],
    ids=str,
)
def test_longrope_has_the_length_that_it_was_made_for(
    inside: Fields, outside: Fields, longest: int, olmo2: Path, tmp_path: Path
) -> None:
    copy(olmo2, tmp_path)
    rope = {**LONGROPE, "long_factor": [3.0] * 8, **inside}
    change_config(tmp_path, {"rope_parameters": rope, **outside})
    assert find_implementation(EngineConfig(tmp_path)).config.max_position_embeddings == longest


@pytest.mark.parametrize("length", ["64", True, float("inf"), [64]], ids=str)
def test_longrope_without_a_length_is_refused(length: Any, olmo2: Path, tmp_path: Path) -> None:
    copy(olmo2, tmp_path)
    rope = {**LONGROPE, "long_factor": [3.0] * 8, "original_max_position_embeddings": length}
    change_config(tmp_path, {"rope_parameters": rope})
    with pytest.raises(ModelError, match=r"config\.json: original_max_position_embeddings: "):
        find_implementation(EngineConfig(tmp_path))


@pytest.fixture(scope="module")
def llama4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model_dir = tmp_path_factory.mktemp("llama4")
    fields = {"floor_scale": 80, "no_rope_layers": [0, 0], "attn_scale": 5.0}
    make_tiny(model_dir, "llama4_text", {**EXPERTS, **fields})
    return model_dir


def test_where_a_step_is_counted_it_is_as_short_as_that_makes_no_difference(llama4: Path) -> None:
    why = r"token_budget: steps of 528 tokens, but of .*\.json the floor_scale lets them be of 79"
    with pytest.raises(ModelError, match=why):
        start(llama4)
    with pytest.raises(ModelError, match="token_budget: steps of 272 tokens"):
        start(llama4, token_budget=32)
    runner = start(llama4, token_budget=32, max_num_seqs=32)
    rows = [BatchRow([5] * 40, 0, [list(range(8 * n, 8 * n + 8))] * 1) for n in range(2)]
    with pytest.raises(RuntimeError, match="a step of 80 tokens, of 79 at most"):
        runner.logits(Batch(rows))


def test_what_a_step_may_be_is_told_by_the_type_not_by_a_field(
    olmo2: Path, llama4: Path, tmp_path: Path
) -> None:
    copy(olmo2, tmp_path)
    change_config(tmp_path, {"attn_temperature_tuning": True, "floor_scale": 80})
    assert find_implementation(EngineConfig(tmp_path)).config.max_position_embeddings == 512
    config_of(tmp_path, "minimax_m3_vl_text", {"num_local_experts": 4})
    change_config(tmp_path, {"attn_temperature_tuning": True, "floor_scale": 8192})
    with pytest.raises(ModelError, match="its attention counts or chooses tokens by itself"):
        find_implementation(EngineConfig(tmp_path))
    copy(llama4, tmp_path)
    change_config(tmp_path, {"floor_scale": 40})
    with pytest.raises(ModelError, match="floor_scale: steps may be of 39 tokens"):
        find_implementation(EngineConfig(tmp_path))


def test_of_a_multimodal_model_the_text_part_runs(tmp_path: Path) -> None:
    model = make_tiny(tmp_path, "mistral3", {"text_config": {"model_type": "mistral"}})
    runner = start(tmp_path, model_impl="transformers")
    torch.testing.assert_close(logits(runner), expected(model), atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_types_are_consistent(dtype: str, olmo2: Path) -> None:
    assert start(olmo2, dtype=dtype).determinism == "consistent"


def test_weights_may_be_made_up(olmo2: Path) -> None:
    first, second = start(olmo2, load_format="dummy"), start(olmo2, load_format="dummy")
    assert torch.equal(logits(first), logits(second))
    assert not torch.allclose(logits(first), logits(start(olmo2)))


def test_the_shortest_sequences(olmo2: Path) -> None:
    runner = start(olmo2, max_model_len=1)
    assert bool(logits(runner, 1).isfinite().all())


def test_bits_that_depend_on_company_are_not_exact(
    olmo2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = reference.linear

    def sum_of_halves(x: Any, weight: Any, bias: Any) -> torch.Tensor:
        return plain(x, weight, bias) * (1 + 2**-23 * (len(x) > 48))

    monkeypatch.setattr(reference, "linear", sum_of_halves)
    # What is measured of linear layers alone does not see it.
    monkeypatch.setattr(
        "baton.shared.engine.determinism.linear_is_stable", lambda shapes, ops: True
    )
    assert start(olmo2).determinism == "consistent"


@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh", "gelu_new", "gelu", "relu2"])
def test_what_fills_no_vector_has_the_bits_of_what_does(activation: str, tmp_path: Path) -> None:
    make_tiny(tmp_path, "olmo2", {"intermediate_size": 233, "hidden_act": activation})
    runner = start(tmp_path)
    assert runner.determinism == "exact"
    tokens = random.Random(4).choices(range(runner.model_config.vocab_size), k=480)
    tables = [list(range(30))]

    def part(begin: int, end: int) -> torch.Tensor:
        row = BatchRow(tokens[begin:end], begin, tables, num_logits=end - begin)
        return runner.logits(Batch([row])).clone()

    whole = part(0, 480)
    parts = [part(begin, begin + 48) for begin in range(0, 480, 48)]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("activation", ["sigmoid", "mish", "sqrtsoftplus", "quick_gelu"])
def test_operations_that_are_not_known_are_not_exact(activation: str, tmp_path: Path) -> None:
    model = make_tiny(tmp_path, "olmo2", {"hidden_act": activation})
    runner = start(tmp_path)
    assert runner.determinism == "consistent"
    torch.testing.assert_close(logits(runner), expected(model), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("compute", "unsure"),
    [
        (lambda x: x.sigmoid(), {"sigmoid"}),
        (lambda x: torch.nn.functional.silu(x), {"silu"}),
        (lambda x: x.softmax(-1), {"_softmax"}),
        (lambda x: torch.add(x, x, alpha=3), {"add"}),
        (lambda x: x.pow(0.3), {"pow"}),
        (lambda x: x.sum(0), {"sum"}),
        (lambda x: x.T.mean(-1), {"mean"}),
        (lambda x: x @ x.T, {"mm"}),
        (lambda x: x.clamp(-1, 1) * x.pow(2).mean(-1, keepdim=True).rsqrt().cos(), set()),
        (lambda x: torch.nn.functional.layer_norm(x, (24,)), set()),
    ],
)
def test_operations_are_known_or_said(
    compute: Callable[[torch.Tensor], torch.Tensor], unsure: set[str]
) -> None:
    with torch.inference_mode(), recording([]) as seen:
        compute(torch.ones(16, 24))
    assert seen.unsure == unsure


# What is refused


def config_of(model_dir: Path, model_type: str, changes: Fields) -> Path:
    """config.json alone."""
    sizes = {} if model_type == "musicgen" else SIZES
    config = AutoConfig.for_model(model_type, **{**sizes, **changes})
    config.save_pretrained(model_dir)
    return model_dir


MADE_BY_TRANSFORMERS: list[tuple[str, Fields, str]] = [
    ("falcon", {}, 'model_type: "falcon": its attention does not go through'),
    ("bloom", {}, 'model_type: "bloom": its code takes no position_ids'),
    ("diffllama", {}, 'model_type: "diffllama": layer 0 attends more than once'),
    (
        "gpt_neo",
        {"attention_types": [[["global", "local"], 1]]},
        'model_type: "gpt_neo": its attention does not',
    ),
    ("codegen", {"rotary_dim": 8}, 'model_type: "codegen": its attention does not go through'),
    ("gptj", {"rotary_dim": 8}, 'model_type: "gptj": its attention does not go through'),
    ("xglm", {}, 'model_type: "xglm": its attention does not go through'),
    ("jetmoe", {"kv_channels": 16}, 'model_type: "jetmoe": its code looks at numbers to know'),
    (
        "xmod",
        {"is_decoder": True, "default_language": "en_XX"},
        'model_type: "xmod": its code looks at numbers to know',
    ),
    ("doge", {}, 'model_type: "doge": layer 0 attends with a mask of its own'),
    (
        "minimax_m3_vl_text",
        {"num_local_experts": 4},
        'model_type: "minimax_m3_vl_text": its attention counts or chooses tokens by itself',
    ),
    ("musicgen", {}, 'model_type: "musicgen": transformers: Multiple valid text configs'),
    ("bert", {}, 'model_type: "bert": layer 0 has a mask that is neither causal nor a window'),
    (
        "deepseek_v3",
        {"v_head_dim": 24},
        'model_type: "deepseek_v3": layer 0 has values of another size than its queries and keys: '
        "24 and 192",
    ),
    ("mamba", {}, 'model_type: "mamba": it keeps a recurrent state'),
    (
        "lfm2",
        {"layer_types": ["conv", "full_attention"]},
        'layer_types: "conv": states that are no',
    ),
    ("bart", {}, "is_encoder_decoder: models with an encoder are not served"),
    ("clip_text_model", {}, 'model_type: "clip_text_model" is no causal language model'),
    ("gemma3n_text", {"num_hidden_layers": 30}, "num_kv_shared_layers: layers that read others'"),
]


@pytest.mark.parametrize(
    ("model_type", "changes", "reason"), MADE_BY_TRANSFORMERS, ids=lambda value: str(value)[:20]
)
def test_what_does_not_run_is_refused_by_name_before_weights_are_read(
    model_type: str, changes: Fields, reason: str, tmp_path: Path
) -> None:
    config_of(tmp_path, model_type, changes)
    with pytest.raises(ModelError) as refusal:
        start(tmp_path, model_impl="transformers")
    assert str(refusal.value).startswith(f"{tmp_path / 'config.json'}: {reason}")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "olmo99"}, 'model_type: "olmo99" is known neither to Baton nor to'),
        (
            {"model_type": "olmo99", "auto_map": {"AutoConfig": "code.Config"}},
            "auto_map: code of a model directory never runs here, and neither Baton nor",
        ),
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            "quantization_config: quantised weights are not read through transformers",
        ),
        ({"hidden_size": "large"}, 'model_type: "olmo2": transformers: '),
        ({"num_attention_heads": 7}, 'model_type: "olmo2": '),
        ({"num_hidden_layers": 20_000}, "num_hidden_layers: must be from 1 to 10000, not 20000"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: must be from 1 to 10000, not 0"),
        ({"rope_parameters": {"rope_type": "warp"}}, 'model_type: "olmo2": '),
        ({"max_position_embeddings": -1}, "max_position_embeddings: must be from 1"),
        ({"vocab_size": None}, "model_type: "),
    ],
    ids=str,
)
def test_bad_config(changes: Fields, reason: str, tmp_path: Path) -> None:
    config_of(tmp_path, "olmo2", {})
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ModelError) as refusal:
        find_implementation(EngineConfig(tmp_path))
    assert str(refusal.value).startswith(f"{path}: {reason}")
    assert "\n" not in str(refusal.value)


def test_code_of_the_directory_never_runs(
    olmo2: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy(olmo2, tmp_path)
    path = tmp_path / "config.json"
    code = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": code}))
    (tmp_path / "code.py").write_text("raise SystemExit('ran')")
    assert torch.equal(logits(start(tmp_path)), logits(start(olmo2)))
    assert "code of the model directory is not run" in caplog.text


def test_pickles_are_not_read(olmo2: Path, tmp_path: Path) -> None:
    copy(olmo2, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="model.safetensors"):
        start(tmp_path)


@pytest.fixture(scope="module")
def mistral3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model_dir = tmp_path_factory.mktemp("mistral3")
    make_tiny(model_dir, "mistral3", {"text_config": {"model_type": "mistral"}})
    return model_dir


def change_config(model_dir: Path, changes: Fields, part: str = "") -> Path:
    path = model_dir / "config.json"
    values = json.loads(path.read_text())
    (values[part] if part else values).update(changes)
    path.write_text(json.dumps(values))
    return path


@pytest.mark.parametrize("part", ["", "text_config"])
@pytest.mark.parametrize("name", ["adapter_model.bin", "other.safetensors"])
def test_no_other_weight_files_are_read(
    name: str, part: str, mistral3: Path, tmp_path: Path
) -> None:
    copy(mistral3, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    if name.endswith(".bin"):
        torch.save(weights, tmp_path / name)
    else:
        save_file(weights, tmp_path / name, {"format": "pt"})
    path = change_config(tmp_path, {"transformers_weights": name}, part)
    where = f"{part}." if part else ""
    with pytest.raises(ModelError) as refusal:
        start(tmp_path, model_impl="transformers")
    assert str(refusal.value).startswith(f"{path}: {where}transformers_weights: weights are model")
    # Nor if the name came by another way than the file.
    change_config(tmp_path, {"transformers_weights": None}, part)
    implementation: Any = find_implementation(EngineConfig(tmp_path, model_impl="transformers"))
    implementation.foreign.config.transformers_weights = name
    (tmp_path / name).write_bytes(b"not read")
    place = Place(ReferenceOperations(), torch.float32, torch.device("cpu"), 512, 512)
    loaded = load(implementation.foreign, tmp_path, WeightFiles(tmp_path), {0: (0, 0)}, place)
    assert loaded is not None


def test_a_quantised_text_part_is_refused(mistral3: Path, tmp_path: Path) -> None:
    copy(mistral3, tmp_path)
    quantised = {"quant_method": "compressed-tensors", "format": "dense", "config_groups": {}}
    path = change_config(tmp_path, {"quantization_config": quantised}, "text_config")
    with pytest.raises(ModelError, match=f"{path}: quantization_config: quantised weights are not"):
        start(tmp_path, model_impl="transformers")


@pytest.mark.parametrize(
    ("name", "is_refused"),
    [
        ("model.language_model.layers.0.self_attn.q_proj.bias", True),
        ("model.language_model.layers.2.self_attn.q_proj.weight", True),
        ("model.language_model.other.weight", True),
        ("lm_head.bias", True),
        ("model.layers.1.self_attn.q_proj.bias", True),
        ("model.vision_tower.other.weight", False),
        ("visual.blocks.0.weight", False),
    ],
)
def test_of_a_multimodal_model_only_what_is_not_of_the_text_is_ignored(
    name: str, is_refused: bool, mistral3: Path, tmp_path: Path
) -> None:
    copy(mistral3, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({**weights, name: torch.ones(64)}, tmp_path / "model.safetensors", {"format": "pt"})
    if not is_refused:
        assert torch.equal(
            *(logits(start(each, model_impl="transformers")) for each in (mistral3, tmp_path))
        )
        return
    with pytest.raises(ModelError, match=": unexpected tensor"):
        start(tmp_path, model_impl="transformers")


@pytest.mark.parametrize("model_impl", ["baton", "transformers"])
def test_layers_are_ahead_by_the_number_that_there_are(model_impl: str, tmp_path: Path) -> None:
    fields = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    make_tiny(
        tmp_path,
        "glm4_moe",
        {**fields, "head_dim": 16, "num_hidden_layers": 47, "first_k_dense_replace": 47},
    )
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    if model_impl == "baton":
        save_file(
            {**weights, "model.layers.47.other.weight": torch.ones(2)}, path, {"format": "pt"}
        )
        start(tmp_path, model_impl=model_impl)
    surplus = "model.layers.46.self_attn.q_proj.bias"
    save_file({**weights, surplus: torch.ones(64)}, path, {"format": "pt"})
    with pytest.raises(ModelError, match=f"{surplus}: unexpected tensor"):
        start(tmp_path, model_impl=model_impl)


def test_packing_keeps_no_weight_twice(olmo2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[int] = []
    seen: list[weakref.ref[Any]] = []
    pack = reference.pack_weight

    def packed(weight: torch.Tensor) -> Any:
        alive.append(sum(1 for each in seen if each() is not None))
        storage: Any = weight.untyped_storage()
        seen.append(weakref.ref(storage))
        return pack(weight)

    monkeypatch.setattr(reference, "pack_weight", packed)
    start(olmo2)
    assert len(alive) > 10 and max(alive) <= 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda weights: weights.pop("model.norm.weight"), "model.norm.weight: missing tensor"),
        (
            lambda weights: weights.update({"model.other.weight": torch.ones(2)}),
            "model.other.weight: unexpected tensor",
        ),
        (
            lambda weights: weights.update({"model.norm.weight": torch.ones(3)}),
            "model.norm.weight: shape [3] where config.json makes it [64]",
        ),
    ],
)
def test_weights_that_are_not_the_models(
    change: Callable[[dict[str, torch.Tensor]], object], reason: str, olmo2: Path, tmp_path: Path
) -> None:
    copy(olmo2, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    change(weights)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError) as refusal:
        start(tmp_path)
    assert str(refusal.value) == f"{tmp_path / 'model.safetensors'}: {reason}"


@pytest.mark.parametrize("model_type", ["roberta", "xlm-roberta", "data2vec-text", "camembert"])
def test_positions_that_begin_elsewhere_are_refused(model_type: str, tmp_path: Path) -> None:
    make_tiny(tmp_path, model_type, {"is_decoder": True, "pad_token_id": 1, "bos_token_id": 0})
    with pytest.raises(ModelError, match=f"{tmp_path}: model_impl: a whole sequence gives other"):
        start(tmp_path)


def test_in_a_narrow_type_the_refusal_says_what_helps(
    olmo2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(start_check._TOLERANCE, torch.bfloat16, 1e-5)
    how = "would be rounding; if it is rounding to bfloat16 after all, dtype float32 serves"
    with pytest.raises(ModelError, match=how):
        start(olmo2, dtype="bfloat16")
    assert start(olmo2, dtype="float32").determinism == "exact"


def test_rounding_adds_up_over_layers_and_gives_some_tokens_other_experts() -> None:
    def limit(num_layers: int, dtype: torch.dtype = torch.bfloat16, **more: bool) -> Any:
        return start_check.Limit.of(dtype, num_layers, **{"has_experts": False, **more})

    assert limit(2).share == limit(16).share == limit(64).share / 2
    assert limit(64, torch.float32, has_experts=True) == limit(2, torch.float32)
    expected = torch.ones(5, 8)
    found = expected.clone()
    found[1:3] = 2.0
    assert limit(2).difference(found, expected) == 1
    assert limit(2, has_experts=True).difference(found, expected) == 0
    found[4, 7] = float("nan")
    for each in (limit(2), limit(2, has_experts=True)):
        assert math.isnan(each.difference(found, expected))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_experts_are_served_in_narrow_types_and_other_attention_is_not(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_tiny(tmp_path, "olmoe", {"num_experts": 8, "num_experts_per_tok": 2})
    assert start(tmp_path, dtype=dtype).determinism == "consistent"
    plain = reference.paged_attention

    def scaled(query: Any, kv: Any, layer: Any, plan: Any, scale: float, *rest: Any) -> Any:
        return plain(query, kv, layer, plan, scale * 1.5, *rest)

    monkeypatch.setattr(ReferenceOperations, "paged_attention", staticmethod(scaled))
    with pytest.raises(ModelError, match="model_impl: a whole sequence gives other logits over"):
        start(tmp_path, dtype=dtype, kernels="torch")


def test_a_model_that_mixes_tokens_beside_attention_is_refused(
    olmo2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain: Any = modeling_olmo2.Olmo2MLP.forward

    def shifted(self: Any, x: torch.Tensor) -> Any:
        before = torch.nn.functional.pad(x, (0, 0, 1, -1))
        return plain(self, x + before)

    monkeypatch.setattr(modeling_olmo2.Olmo2MLP, "forward", shifted)
    with pytest.raises(
        ModelError, match=f"{olmo2}: model_impl: a sequence in parts and beside others gives"
    ):
        start(olmo2)


def test_attention_that_differs_is_refused(olmo2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = reference.paged_attention

    def scaled(query: Any, kv: Any, layer: Any, plan: Any, scale: float, *rest: Any) -> Any:
        return plain(query, kv, layer, plan, scale * 1.01, *rest)

    monkeypatch.setattr(ReferenceOperations, "paged_attention", staticmethod(scaled))
    with pytest.raises(ModelError, match="model_impl: a whole sequence gives other logits over"):
        start(olmo2)


@pytest.mark.parametrize("argument", ["position_bias", "head_mask", "alibi", "seq_idx"])
def test_arguments_of_attention_are_known_or_refused(argument: str) -> None:
    assert read_arguments({argument: None, "scaling": 0.5, "softcap": 30}).soft_cap == 30
    with pytest.raises(ModelError, match=f"the argument {argument} of its attention"):
        read_arguments({argument: torch.ones(1)})


def test_masks_say_what_they_were_made_of() -> None:
    def everything(*_: object) -> bool:
        return True

    mask: Any = make_mask(q_length=2, kv_length=3, device="meta", mask_function=everything)
    assert mask.shape == (1, 1, 2, 3)
    assert mask.baton_says is everything


# The library


@pytest.fixture
def fresh_library() -> Iterator[None]:
    library_module.library.cache_clear()
    yield
    library_module.library.cache_clear()


@pytest.mark.usefixtures("fresh_library")
def test_without_transformers_the_refusal_says_how_to_get_it(
    olmo2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    how = r"transformers is not installed; to install it: pip install '\.\[transformers\]'"
    with pytest.raises(ModelError, match=rf'"olmo2" is not supported; supported are .*, but {how}'):
        find_implementation(EngineConfig(olmo2))
    with pytest.raises(ModelError, match=f"model_impl: {how}"):
        find_implementation(EngineConfig(olmo2, model_impl="transformers"))
    with pytest.raises(ModelError, match='"olmo2" is not supported; supported are [^;]*$'):
        find_implementation(EngineConfig(olmo2, model_impl="baton"))


@pytest.mark.usefixtures("fresh_library")
def test_an_old_transformers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers, "__version__", "5.17.0")
    with pytest.raises(ModelError, match=r"transformers 5.17.0 is too old, 5.\d+ is needed: pip"):
        library_module.library()


def test_transformers_finds_no_package_kernels(tmp_path: Path) -> None:
    """Not ours, which stands at the top of a checkout, where that of Hugging Face is installed."""
    info = tmp_path / "kernels-0.18.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.2\n")
    program = """
import sys
from baton.shared.engine.transformers_backend.library import library
library()
from transformers.utils import is_kernels_available
assert not is_kernels_available()
assert sys.modules["kernels"] is None
import baton.kernels
"""
    run_in_process(program, tmp_path)


def test_nothing_comes_from_the_network_whatever_was_imported_before(tmp_path: Path) -> None:
    program = """
import os
for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "USE_HUB_KERNELS"):
    os.environ.pop(name, None)
import huggingface_hub, transformers
from transformers.integrations import hub_kernels
assert not huggingface_hub.is_offline_mode()
from baton.shared.engine.transformers_backend.library import library
library()
assert huggingface_hub.is_offline_mode() and not hub_kernels._kernels_enabled
assert (os.environ["HF_HUB_OFFLINE"], os.environ["USE_HUB_KERNELS"]) == ("1", "0")
"""
    run_in_process(program, tmp_path)


def run_in_process(program: str, tmp_path: Path) -> None:
    path = os.pathsep.join((str(ROOT), str(tmp_path)))
    environment = {**os.environ, "PYTHONPATH": path}
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, env=environment)


def copy(source: Path, target: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (target / name).write_bytes((source / name).read_bytes())
