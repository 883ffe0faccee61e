"""Floors of well-known shapes, against numbers that were worked out by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from baton.shared.engine.models.model_config import ModelConfig
from baton.shared.engine.models.registry import load_model_config
from models import roofline
from models.dummy_model import SHAPES, write_dummy_model

# A byte, and an operation, a nanosecond.
RATES = roofline.Rates(1e9, 1e9, 1e9)
MiB = 2**20


def config_of(name: str, directory: Path) -> ModelConfig:
    write_dummy_model(directory, SHAPES[name], has_tokenizer=False)
    _, config = load_model_config(directory)
    return config


@pytest.mark.parametrize(
    ("name", "active", "head", "weight_bytes", "of_1024", "of_8192"),
    [
        # Layers of 4096 · (2 · 128 · 40 + 3 · 14336); 4 KiB a layer and token.
        ("llama-8b", 32 * 218_103_808, 525_336_576, 15_009_316_864, 128 * MiB, 1024 * MiB),
        # 4096 · (2 · 128 · 40 + 3 · 12288)
        ("qwen3-8b", 36 * 192_937_984, 622_329_856, 15_136_194_560, 144 * MiB, 1152 * MiB),
        # Half of 8,192 tokens are out of sight.
        ("mistral-7b", 32 * 218_103_808, 131_072_000, 14_220_787_712, 128 * MiB, 512 * MiB),
        # 3840 · (2 · 256 · 24 + 3 · 15360); 8 KiB; 40 of 48 layers see 1,024 tokens.
        ("gemma3-12b", 48 * 224_133_120, 1_006_878_720, 23_530_536_960, 384 * MiB, 832 * MiB),
        # 2048 · 2 · 128 · 36 + 8 · 3 · 2048 · 768 + 128 · 2048; 2 KiB; with all experts and
        # float32 routers.
        ("qwen3-30b-a3b", 48 * 56_885_248, 311_164_928, 60_466_659_328, 96 * MiB, 768 * MiB),
        # 2880 · 2 · 64 · 72 + 4 · 3 · 2880² + 32 · 2880; 2 KiB; half the layers see 128 tokens.
        ("gpt-oss-20b", 24 * 126_167_040, 579_133_440, 40_661_729_280, 27 * MiB, 195 * MiB),
        # 2048 · (16 · 192 + 576 + 16 · 128) + 512 · 16 · 256 of attention; one layer of 3 · 2048 ·
        # 10944, the others of 3 · 2048 · (2816 + 6 · 1408) + 64 · 2048; 1,152 bytes of latents.
        (
            "deepseek-v2-lite",
            27 * 13_762_560 + 67_239_936 + 26 * 69_337_088,
            209_715_200,
            31_000_100_864,
            27 * 1024 * 1152,
            27 * 8192 * 1152,
        ),
        # 2048 · (16 · 512 + 32 · 258) of a delta rule; 2048 · (2 · 256 · 18 + 16 · 256) of
        # attention; 3 · 2048 · 512 an expert, 9 of them, and 256 · 2048; 2 KiB, of 10 layers.
        (
            "qwen3.5-35b-a3b",
            30 * 33_685_504 + 10 * 27_262_976 + 40 * 28_835_840,
            508_559_360,
            68_343_562_240,
            20 * MiB,
            160 * MiB,
        ),
        # 2560 · (2 · 5120 + 256 + 80 + 5120): a mixer, and nothing else in a layer.
        ("mamba2-2.7b", 64 * 40_181_760, 128_737_280, 5_400_739_840, 0, 0),
    ],
)
def test_what_a_step_reads_and_multiplies(
    name: str,
    active: int,
    head: int,
    weight_bytes: int,
    of_1024: int,
    of_8192: int,
    tmp_path: Path,
) -> None:
    model = config_of(name, tmp_path)
    all_experts = None if model.mixture is None else model.mixture.routing.num_experts
    assert roofline.num_weights_of_a_token(model) == active
    assert roofline.num_head_weights(model) == head
    assert roofline.step_weight_bytes(model, 1, all_experts) == weight_bytes
    assert roofline.context_bytes(model, 1024) == of_1024
    assert roofline.context_bytes(model, 8192) == of_8192
    one = roofline.decode_floor_s(model, 1, 1024, RATES, experts_hit=all_experts)
    # Reading takes at least as long as multiplying: two bytes a weight, two operations.
    states = 2 * roofline.state_bytes(model)
    assert one == pytest.approx((weight_bytes + of_1024 + states) / 1e9)
    many = roofline.decode_floor_s(model, 10**4, 8192, RATES, experts_hit=all_experts)
    assert many == pytest.approx((2 * 10**4 * (active + head) + 10**4 * (of_8192 + states)) / 1e9)


def test_a_state_is_read_and_written(tmp_path: Path) -> None:
    """30 layers of 16 heads: 2 maps of 128 · 128, and 3 tokens of 512 channels, in float32."""
    model = config_of("qwen3.5-35b-a3b", tmp_path)
    assert roofline.state_bytes(model) == 30 * 16 * 4 * (2 * 128 * 128 + 3 * 512)


def test_a_mixture_reads_the_experts_that_are_hit(tmp_path: Path) -> None:
    model = config_of("qwen3-30b-a3b", tmp_path)
    # Attention, head, routers; an expert of every layer.
    others, expert = 2_484_600_832, 48 * 2 * 3 * 2048 * 768
    assert roofline.step_weight_bytes(model, 1) == pytest.approx(others + 8 * expert)
    assert roofline.step_weight_bytes(model, 32, 100.5) == others + 100.5 * expert


def test_expected_hits() -> None:
    assert roofline.expected_hits(128, 8, 1) == pytest.approx(8)
    # Of two tokens with half of the experts each, a quarter of them has neither.
    assert roofline.expected_hits(8, 4, 2) == pytest.approx(6)
    assert roofline.expected_hits(32, 4, 8192) == pytest.approx(32)


def test_pairs_of_a_prompt() -> None:
    assert roofline.num_pairs(3, None) == 1 + 2 + 3
    assert roofline.num_pairs(3, 5) == 1 + 2 + 3
    assert roofline.num_pairs(6, 3) == 1 + 2 + 3 + 3 + 3 + 3


def test_floor_of_a_prompt(tmp_path: Path) -> None:
    llama = config_of("llama-8b", tmp_path / "llama")
    products = 2 * (6_979_321_856 * 8192 + 525_336_576)
    attention = 32 * 4 * 32 * 128 * (8192 * 8193 // 2)
    rates = roofline.Rates(1e15, 1e9, 2e9)
    floor = roofline.prefill_floor_s(llama, 8192, rates)
    assert floor == pytest.approx(products / 1e9 + attention / 2e9)

    oss = config_of("gpt-oss-20b", tmp_path / "oss")
    pairs = 12 * (8192 * 8193 // 2) + 12 * (128 * 129 // 2 + 8064 * 128)
    assert roofline.attention_flop(oss, 8192) == 4 * 64 * 64 * pairs
    # A short prompt of a mixture still needs nearly all experts: it is reading that takes time.
    slow_memory = roofline.Rates(1e9, 1e15, 1e15)
    read = roofline.prefill_floor_s(oss, 512, slow_memory)
    assert read == pytest.approx(40_661_729_280 / 1e9, rel=1e-3)
