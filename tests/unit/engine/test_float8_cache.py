"""Keys and values in 8 bits in the engine's cache: what a block holds, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from baton.kernels import reference_float8
from baton.shared.engine.batch import Batch, BatchRow
from baton.shared.engine.config import EngineConfig
from baton.shared.engine.kv_cache import KvCache
from baton.shared.engine.model_runner import ModelRunner
from baton.shared.kv.arrangement import Arrangement
from baton.shared.kv.cache_spec import Full, Sliding, cache_groups, in_float8
from baton.shared.kv.digest import block_sums
from baton.shared.model_files.fields import ModelError
from tests import recurrent
from tests.unit.engine.conftest import MakeLlama, MakeRunner
from tests.unit.engine.tiny_latents import TINY_LATENTS
from tests.unit.engine.tiny_models import make_tiny


def test_a_block_is_codes_and_a_byte_of_scale_for_each_token_and_head() -> None:
    for spec in (Full(8, 128), Sliding(8, 128, 512)):
        assert in_float8(spec).block_bytes(32, 16, 2) == 32 * 2 * 8 * 16 * 129
        assert spec.block_bytes(32, 16, 2) == 32 * 2 * 8 * 16 * 256
        assert in_float8(spec).of_rank(1, 2).block_bytes(1, 16, 2) == 2 * 4 * 16 * 129


def test_digests_cover_codes_and_scales(make_llama: MakeLlama, make_runner: MakeRunner) -> None:
    """Whichever byte of a block changes, the sum of its head does, and no other's."""
    model_dir, _ = make_llama(num_hidden_layers=1, head_dim=6)
    runner = make_runner(model_dir, num_blocks=4, block_size=4, kv_cache_dtype="fp8")
    runner.logits(Batch([BatchRow([5, 6, 7, 8], 0, [[2]])]))
    cache = runner.kv_cache
    before = block_sums(cache.block_words([2]))[0]
    block = cache.tensors[0][2]
    assert block.shape == (2, 2 * 4 * 7) and bool(block[:, 48:].all()), "scales are behind"
    for head, bytes_of_head in enumerate(block.flatten(1)):
        for place in range(len(bytes_of_head)):
            bytes_of_head[place] ^= 0x10
            changed = block_sums(cache.block_words([2]))[0] != before
            assert changed.tolist() == [number == head for number in range(2)], place
            bytes_of_head[place] ^= 0x10


def test_what_is_kept_in_8_bits_is_another_cache(
    make_llama: MakeLlama, make_runner: MakeRunner
) -> None:
    """No worker reads the other's blocks; and answers are near, but others."""
    model_dir, _ = make_llama()
    plain, small = make_runner(model_dir), make_runner(model_dir, kv_cache_dtype="fp8")
    assert plain.cache_dtype == plain.dtype and small.cache_dtype == torch.float8_e4m3fn
    assert small.dtype == torch.float32 and small.determinism == "exact"
    assert plain.kv_cache.layout() != small.kv_cache.layout()
    batch = Batch([BatchRow(list(range(3, 90)), 0, [list(range(6))])])
    expected, found = plain.logits(batch), small.logits(batch)
    assert 1e-3 < float((found - expected).norm() / expected.norm()) < 0.2


def test_another_order_within_a_block_is_another_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where bytes are as many, and their axes the same: blocks that one version has written are not
    read by one that takes scales from elsewhere."""
    groups = cache_groups([in_float8(Full(2, 6))] * 3)
    arrangement = Arrangement(groups, (0,), (groups[0].block_bytes(4, 4),), 0.0)

    def layout() -> tuple[str, ...]:
        return KvCache(arrangement, [4], 4, torch.float32).layout()

    before = layout()
    assert layout() == before
    codes_of, exponents_of = reference_float8.codes_of, reference_float8.exponents_of
    for name, other in (
        ("exponents_of", lambda codes: exponents_of(codes).transpose(-3, -2)),
        ("exponents_of", lambda codes: exponents_of(codes)[..., 1:, :]),
        ("codes_of", lambda *given: codes_of(*given).transpose(-2, -1)),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(reference_float8, name, other)
            assert layout() != before


def test_activations_of_16_bits(make_llama: MakeLlama, make_runner: MakeRunner) -> None:
    model_dir, _ = make_llama(std=0.1)
    batch = Batch([BatchRow(list(range(3, 40)), 0, [[4, 2, 0]])])
    expected = make_runner(model_dir, kv_cache_dtype="fp8").logits(batch)
    found = make_runner(model_dir, dtype="bfloat16", kv_cache_dtype="fp8").logits(batch)
    # A number that is rounded otherwise may have another code.
    assert float((found - expected).norm() / expected.norm()) < 0.1


def test_vectors_that_are_not_finite_are_not_made_so(
    make_llama: MakeLlama, make_runner: MakeRunner
) -> None:
    model_dir, _ = make_llama()
    runner = make_runner(model_dir, kv_cache_dtype="fp8")
    rows = [BatchRow([3, 4, 5], 0, [[0]]), BatchRow([3, 4, 5], 0, [[1]])]
    runner.logits(Batch(rows))
    codes, exponents = runner.kv_cache.typed(0)
    codes[0, 0, 0, 0, 1], exponents[0, 0, 0, 0, 1] = 0, 0xFF
    ahead = [BatchRow([6], 3, [[0]]), BatchRow([6], 3, [[1]])]
    spoiled, sound = runner.logits(Batch(ahead))
    assert bool(spoiled.isnan().all()) and bool(sound.isfinite().all())


def test_refusals(tmp_path: Path, make_llama: MakeLlama) -> None:
    def refusal(model_dir: Path, **how: object) -> str:
        with pytest.raises(ModelError) as caught:
            ModelRunner(EngineConfig(model_dir, "cpu", kv_cache_dtype="fp8", num_blocks=8, **how))  # type: ignore[arg-type]
        return str(caught.value)

    llama, _ = make_llama()
    with pytest.raises(ModelError, match="kv_cache_dtype: must be one of auto, fp8, not 'int8'"):
        EngineConfig(llama, kv_cache_dtype="int8")
    assert "block_size: must be at least 2 where kv_cache_dtype is fp8, not 1" in refusal(
        llama, block_size=1
    )
    assert "kv_cache_dtype: fp8 was asked for, and transformers' code" in refusal(
        llama, model_impl="transformers"
    )
    latents = tmp_path / "latents"
    make_tiny(latents, "deepseek_v3", TINY_LATENTS["deepseek_v3"]["as they come"])
    assert "fp8 is for keys and values, and deepseek_v3 caches latents" in refusal(latents)


@recurrent.known()
def test_a_model_without_keys_and_values_is_refused(tmp_path: Path) -> None:
    fields = {
        "model_type": recurrent.TYPE.name, "vocab_size": 61, "hidden_size": 32,
        "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "rms_norm_eps": 1e-6,
        "max_position_embeddings": 256, "rope_theta": 10000.0, "tie_word_embeddings": True,
        "hidden_act": "silu", "state_num_heads": 3, "state_head_dim": 5,
        "layer_types": ["recurrent"],
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(fields))
    config = EngineConfig(tmp_path, "cpu", kv_cache_dtype="fp8", load_format="dummy")
    with pytest.raises(ModelError, match="caches none: leave it at auto"):
        ModelRunner(config)
