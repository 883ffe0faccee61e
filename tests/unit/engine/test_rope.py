"""Tables of angles against the rotary modules of transformers, and heads whose pairs are moved."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    Gemma3TextConfig,
    Gemma4TextConfig,
    GlmConfig,
    LlamaConfig,
    Ministral3Config,
    Phi3Config,
)
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextRotaryEmbedding
from transformers.models.glm import modeling_glm as glm
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.ministral3.modeling_ministral3 import get_llama_4_attn_scale
from transformers.models.phi3 import modeling_phi3 as phi3
from transformers.models.qwen2_5_vl import configuration_qwen2_5_vl as qwen2_5_vl
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRotaryEmbedding
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLTextConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding

from baton.kernels import reference
from baton.shared.engine.linear import reordered
from baton.shared.engine.models.rope import rope_tables
from baton.shared.engine.models.rope_config import (
    NO_ROPE,
    RopeConfig,
    num_turning_pairs,
    rope_order,
)
from baton.shared.engine.models.rope_fields import RopeRules, read_rope, read_ropes
from baton.shared.model_files.fields import Fields

LONGEST = 16384
GLM = RopeRules(partial_rotary_factor=0.5, is_interleaved=True)
PHI3 = RopeRules(partial_rotary_factor=1.0, original_max_position=4096)


def make(config: Any, **fields: Any) -> Any:
    """Of fields of its own: configs change what they are given."""
    return config(**json.loads(json.dumps(fields)))


def fields_of(config: Any) -> Fields:
    """What transformers writes of a config."""
    return Fields(Path("config.json"), json.loads(config.to_json_string()))


def check(rope: RopeConfig, head_dim: int, longest: int, rotary: Any, *kind: str) -> None:
    """Frequencies within 1e-6, and so angles within 1e-6 of themselves, up to the last position."""
    tables = rope_tables(rope, head_dim, longest, longest)
    positions = torch.tensor([0, 1, 2, 3, 17, longest // 2, longest - 1])
    cos, sin = (each[0] for each in rotary(torch.zeros(1), positions[None], *kind))
    num_pairs = cos.shape[-1] // 2
    frequencies = getattr(rotary, "_".join((*kind, "inv_freq")))
    limit = 1e-6 * (1 + positions[:, None] * frequencies)
    for got, expected in ((tables.cos, cos), (tables.sin, sin)):
        assert got.shape == (longest, head_dim // 2) and got.dtype == torch.float32
        far = (got[positions, :num_pairs] - expected[:, :num_pairs]).abs() > limit
        assert not far.any()
    turning = num_turning_pairs(rope, head_dim)
    assert (tables.cos[:, turning:] == 1).all() and not tables.sin[:, turning:].any()
    got = torch.atan2(tables.sin, tables.cos)[1, :num_pairs]
    torch.testing.assert_close(got, frequencies, rtol=1e-6, atol=0)


def factors(num_pairs: int, slope: float) -> list[float]:
    return [1 + slope * place / num_pairs for place in range(num_pairs)]


def long(**fields: Any) -> dict[str, Any]:
    """For heads of 24."""
    short_factor, long_factor = factors(12, 0.7), factors(12, 40.0)
    return {"rope_type": "longrope"} | {
        "short_factor": short_factor,
        "long_factor": long_factor,
        **fields,
    }


LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
OF_LLAMA: list[dict[str, Any]] = [
    {"rope_type": "default"},
    {"rope_type": "default", "rope_theta": 5e6},
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "linear", "factor": 2.5, "rope_theta": 1e6},
    {"rope_type": "dynamic", "factor": 4.0},
    {"rope_type": "dynamic", "factor": 1.7, "rope_theta": 1e5},
    {**LLAMA3, "factor": 8.0, "original_max_position_embeddings": 2048, "rope_theta": 5e5},
    {**LLAMA3, "factor": 32.0, "original_max_position_embeddings": 8192},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096},
    {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 1000},
    {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6, "attention_factor": 0.8},
    {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 512,
        "beta_fast": 16.0,
        "beta_slow": 2,
        "mscale": 1.0,
        "mscale_all_dim": 0.7,
    },
    {
        "rope_type": "yarn",
        "factor": 32.0,
        "rope_theta": 150000.0,
        "original_max_position_embeddings": 512,
        "truncate": False,
    },
    {"rope_type": "yarn", "factor": 3.0, "mscale": 0.7, "mscale_all_dim": 0, "beta_slow": 0},
    # Ramps that end behind the last pair, and behind the last number.
    {"rope_type": "yarn", "factor": 2.0, "rope_theta": 100.0},
    {"rope_type": "yarn", "factor": 2.0, "rope_theta": 50.0, "beta_fast": 1000},
    # Ramps of no width.
    {"rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": 2},
    {"rope_type": "yarn", "factor": 3.0, "beta_fast": 4, "beta_slow": 4, "truncate": False},
    long(original_max_position_embeddings=4096),
    long(original_max_position_embeddings=LONGEST),
    long(original_max_position_embeddings=4096, factor=16.0),
    long(original_max_position_embeddings=4096, attention_factor=1.3),
    {"rope_type": "proportional", "partial_rotary_factor": 0.25},
    {"rope_type": "proportional", "partial_rotary_factor": 0.7, "factor": 4.0},
]


@pytest.mark.parametrize("parameters", OF_LLAMA)
def test_types_of_a_llama(parameters: dict[str, Any]) -> None:
    config = make(
        LlamaConfig, head_dim=24, max_position_embeddings=LONGEST, rope_parameters=parameters
    )
    rope = read_rope(fields_of(config), LONGEST)
    check(rope, 24, LONGEST, LlamaRotaryEmbedding(config))


@pytest.mark.parametrize("longest", [255, 256, 257])
def test_longrope_is_long_beyond_the_original_length(longest: int) -> None:
    """transformers has seen a sequence of the longest there may be."""
    config = make(
        LlamaConfig,
        head_dim=24,
        max_position_embeddings=1024,
        rope_parameters=long(original_max_position_embeddings=256),
    )
    rope = read_rope(fields_of(config), 1024)
    check(rope, 24, longest, LlamaRotaryEmbedding(config))
    assert rope.is_long(longest) == (longest > 256)


@pytest.mark.parametrize("partial", [None, 1.0, 0.75, 0.5, 0.3, 0.25])
def test_partial_rotary(partial: float | None) -> None:
    """0.3 of 24 is an odd number: transformers turns one more, at the speed of the odd one."""
    more = {} if partial is None else {"partial_rotary_factor": partial}
    sizes: dict[str, Any] = {"hidden_size": 96, "num_attention_heads": 4, "pad_token_id": 0}
    config = make(GlmConfig, head_dim=24, **sizes, **more)
    check(read_rope(fields_of(config), 4096, GLM), 24, 4096, glm.GlmRotaryEmbedding(config))
    config = make(Phi3Config, **sizes, **more)
    rope = read_rope(fields_of(config), 4096, PHI3)
    check(rope, 24, 4096, phi3.Phi3RotaryEmbedding(config))
    if partial == 0.3:
        return
    num_pairs = int(24 * (partial or 1)) // 2
    scaling = {"short_factor": factors(num_pairs, 2.0), "long_factor": factors(num_pairs, 30.0)}
    config = make(
        Phi3Config,
        **sizes,
        **more,
        max_position_embeddings=LONGEST,
        original_max_position_embeddings=1024,
        rope_scaling={"type": "longrope", **scaling},
    )
    rope = read_rope(fields_of(config), LONGEST, PHI3)
    check(rope, 24, LONGEST, phi3.Phi3RotaryEmbedding(config))
    assert rope.attention_factor == math.sqrt(1 + math.log(16) / math.log(1024))


def test_two_bases_by_kind_of_layer() -> None:
    rules = {"full_attention": RopeRules(theta=1e6), "sliding_attention": RopeRules()}
    sizes: dict[str, Any] = {"head_dim": 32, "max_position_embeddings": 4096}
    for more in (
        {},
        {"rope_theta": 2e5, "rope_local_base_freq": 3e4},
        {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "yarn", "factor": 4.0, "truncate": False},
                "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
            }
        },
    ):
        config = make(Gemma3TextConfig, **sizes, **more)
        rotary = Gemma3RotaryEmbedding(config)
        fields = Fields(Path("config.json"), more)
        for source in (fields, fields_of(config)):
            ropes = read_ropes(source, 4096, rules)
            for kind, rope in ropes.items():
                check(rope, 32, 4096, rotary, kind)


def test_proportional_full_layers() -> None:
    default: dict[str, Any] = {
        "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25},
        "sliding_attention": {"rope_type": "default"},
    }
    bases = {"full_attention": 1e6, "sliding_attention": 1e4}
    rules = {
        kind: RopeRules(theta=None, default={**rope, "rope_theta": bases[kind]})
        for kind, rope in default.items()
    }
    config = make(Gemma4TextConfig, head_dim=32, global_head_dim=64)
    rotary = Gemma4TextRotaryEmbedding(config)
    for source in (Fields(Path("config.json"), {}), fields_of(config)):
        ropes = read_ropes(source, 131072, rules)
        check(ropes["full_attention"], 64, 4096, rotary, "full_attention")
        check(ropes["sliding_attention"], 32, 4096, rotary, "sliding_attention")
    assert num_turning_pairs(ropes["full_attention"], 64) == 8
    assert rope_order(ropes["full_attention"], 64) is None


@pytest.mark.parametrize(
    ("config", "rotary", "theta"),
    [
        (qwen2_5_vl.Qwen2_5_VLTextConfig, Qwen2_5_VLRotaryEmbedding, 1e6),
        (Qwen3VLTextConfig, Qwen3VLTextRotaryEmbedding, 5e5),
    ],
)
def test_mrope_of_text(config: Any, rotary: Any, theta: float) -> None:
    mrope: dict[str, Any] = {"type": "mrope", "mrope_section": [16, 24, 24]}
    if config is Qwen3VLTextConfig:
        mrope |= {"type": "default", "mrope_interleaved": True}
    for more in ({}, {"rope_scaling": mrope}):
        made = make(config, hidden_size=512, num_attention_heads=4, **more)
        module = rotary(made)

        def of_text(x: Tensor, positions: Tensor, module: Any = module) -> Any:
            return (each[None, 0] for each in module(x, positions[None].expand(3, -1, -1)))

        of_text.inv_freq = module.inv_freq  # type: ignore[attr-defined]
        for source in (Fields(Path("config.json"), more), fields_of(made)):
            check(read_rope(source, 4096, RopeRules(theta=theta)), 128, 4096, of_text)
        given = Fields(Path("config.json"), more)
        read_rope(given, 4096, RopeRules(theta=theta))
        assert not given.unread()


def test_queries_grow_with_their_position() -> None:
    config = make(Ministral3Config, max_position_embeddings=LONGEST)
    config.rope_parameters["original_max_position_embeddings"] = 100
    rope = read_rope(fields_of(config), LONGEST, RopeRules(has_query_scale=True))
    scale = rope_tables(rope, 128, LONGEST, LONGEST).query_scale
    expected = get_llama_4_attn_scale(torch.arange(LONGEST)[None], 0.1, 100)
    assert scale is not None and torch.equal(scale, expected.flatten())
    assert (scale[:100] == 1).all() and scale[100] > 1.06
    assert rope_tables(read_rope(fields_of(config), LONGEST), 128, 8, 8).query_scale is None


def test_a_layer_without_rope_turns_nothing() -> None:
    cos, sin, scale = rope_tables(NO_ROPE, 64, 100, 100)
    assert (cos == 1).all() and not sin.any() and scale is None
    assert cos.shape == sin.shape == (100, 32)


# Pairs that are moved


@pytest.mark.parametrize("share", [1.0, 0.75, 0.5, 0.25, 0.3])
@pytest.mark.parametrize("of", ["glm", "phi3"])
def test_products_of_moved_heads_are_what_they_were(of: str, share: float) -> None:
    """Queries and keys turned as transformers does it, where the checkpoint has them, against
    rows moved first and turned as halves."""
    sizes: dict[str, Any] = {"hidden_size": 96, "num_attention_heads": 4, "pad_token_id": 0}
    rotary: Any
    apply: Any
    if of == "glm":
        config = make(GlmConfig, head_dim=24, **sizes, partial_rotary_factor=share)
        rotary, apply, rules = glm.GlmRotaryEmbedding(config), glm.apply_rotary_pos_emb, GLM
    else:
        config = make(Phi3Config, **sizes, partial_rotary_factor=share)
        rotary, apply, rules = phi3.Phi3RotaryEmbedding(config), phi3.apply_rotary_pos_emb, PHI3
    rope = read_rope(fields_of(config), 4096, rules)
    positions = torch.tensor([0, 1, 5, 100, 4095])
    generator = torch.Generator().manual_seed(1)
    query, key = torch.randn(2, len(positions), 4, 24, generator=generator)
    cos, sin = rotary(query, positions[None])
    plain = apply(query.transpose(0, 1)[None], key.transpose(0, 1)[None], cos, sin)
    expected = plain[0][0] @ plain[1][0].transpose(-1, -2)

    order = rope_order(rope, 24)
    assert (order is None) == (of == "phi3" and share == 1)
    tables = rope_tables(rope, 24, 4096, 4096)
    packed = reference.pack_rope(tables.cos, tables.sin, torch.float32)
    taken = reference.take_rope(packed, positions)
    turned = [
        reference.rotary(moved, taken.cos, taken.sin).transpose(0, 1)
        for each in (query, key)
        for moved in [reordered(each.reshape(-1), order).view(each.shape)]
    ]
    got = turned[0] @ turned[1].transpose(-1, -2)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_an_order_names_every_number_of_a_head_once() -> None:
    for interleaved in (False, True):
        for share in (0.1, 0.25, 0.3, 0.5, 1.0):
            rope = RopeConfig(
                1e4, "default", partial_rotary_factor=share, is_interleaved=interleaved
            )
            for head_dim in (8, 24, 64, 128):
                order = rope_order(rope, head_dim)
                assert order is None or sorted(order) == list(range(head_dim))
    quarter = RopeConfig(1e4, "default", partial_rotary_factor=0.5)
    assert rope_order(quarter, 8) == (0, 1, 4, 5, 2, 3, 6, 7)
    neighbours = RopeConfig(1e4, "default", partial_rotary_factor=0.5, is_interleaved=True)
    assert rope_order(neighbours, 8) == (0, 2, 4, 5, 1, 3, 6, 7)
    assert rope_order(NO_ROPE, 8) is None
