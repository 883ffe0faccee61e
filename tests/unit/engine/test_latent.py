"""Models with latents in the cache: forms of checkpoints, ranks, memory, and what is refused. What
they compute is compared in test_model_types.py, as every type is."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from baton.kernels.reference import plan_attention
from baton.shared.engine import device_choices
from baton.shared.engine.batch import Batch, BatchRow
from baton.shared.engine.config import DeviceError, EngineConfig
from baton.shared.engine.linear import Ranks
from baton.shared.engine.model_loader import ModelLoader
from baton.shared.engine.model_runner import ModelRunner
from baton.shared.engine.models.deepseek import NAMES
from baton.shared.engine.models.latent_attention import LatentAttention
from baton.shared.engine.models.registry import load_model_config
from baton.shared.engine.operations import Norm
from baton.shared.engine.reference_operations import ReferenceOperations
from baton.shared.engine.weights import WeightFiles
from baton.shared.kv.cache_spec import cache_groups
from baton.shared.model_files.fields import ModelError
from tests.device import ENGINE
from tests.unit.engine.tiny_latents import TINY_LATENTS
from tests.unit.engine.tiny_models import make_tiny

TABLE = list(range(12))


def test_fp8_blocks_are_expanded(tmp_path: Path) -> None:
    """As deepseek_v3 is published: each matrix of linear layers and experts as 8-bit numbers with
    `weight_scale_inv` for blocks, of which rows of fused projections begin in the middle."""
    fields = TINY_LATENTS["deepseek_v3"]["as they come"]
    plain, packed = tmp_path / "plain", tmp_path / "packed"
    make_tiny(plain, "deepseek_v3", fields)
    size, tensors, expanded = 16, {}, {}
    for name, weight in load_file(plain / "model.safetensors").items():
        if weight.dim() != 2 or name.endswith(
            ("gate.weight", "embed_tokens.weight", "head.weight")
        ):
            tensors[name] = expanded[name] = weight
            continue
        scale = torch.rand(-(-weight.shape[0] // size), -(-weight.shape[1] // size)) + 0.5
        by_number = scale.repeat_interleave(size, 0).repeat_interleave(size, 1)
        by_number = by_number[: weight.shape[0], : weight.shape[1]]
        tensors[name] = (weight / by_number).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale
        expanded[name] = tensors[name].float() * by_number
    packed.mkdir()
    save_file(tensors, packed / "model.safetensors")
    save_file(expanded, plain / "model.safetensors")
    config = json.loads((plain / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [size, size],
    }
    (packed / "config.json").write_text(json.dumps(config))
    row = BatchRow(random.Random(3).choices(range(320), k=40), 0, [TABLE])
    both = [
        ModelRunner(EngineConfig(directory, num_blocks=16, **ENGINE)).logits(Batch([row]))
        for directory in (plain, packed)
    ]
    torch.testing.assert_close(*both, atol=1e-5 * float(both[0].abs().max()), rtol=0)


@pytest.mark.parametrize("query_rank", [48, None])
def test_ranks_share_heads_and_repeat_latents(query_rank: int | None, tmp_path: Path) -> None:
    """What two add up is what one computes, biases aside; both have the same latents."""
    fields = {**TINY_LATENTS["deepseek_v3"]["as they come"], "attention_bias": False}
    fields["q_lora_rank"] = query_rank
    make_tiny(tmp_path, "deepseek_v3", fields)
    _, config = load_model_config(tmp_path)
    own = config.attentions[0]
    assert own.latent is not None
    groups = cache_groups(config.cache_specs)
    hidden, norm = torch.randn(20, config.hidden_size), Norm(torch.ones(config.hidden_size), 1e-6)
    results = []
    for ranks in (Ranks(), Ranks(0, 2, lambda _: None), Ranks(1, 2, lambda _: None)):
        load = ModelLoader(
            ReferenceOperations(ranks),
            WeightFiles(tmp_path),
            dtype=torch.float32,
            device=torch.device("cpu"),
            num_positions=32,
            ropes_made_for=32,
            quantization=None,
            groups=groups,
        )
        attention = LatentAttention(config, own.latent, load, NAMES, "model.layers.0.", 0)
        kv = torch.zeros(3, *groups[0].block_shape(16))
        plan = plan_attention(
            np.array([0, 20]), np.array([20]), np.array([[0, 1]]), np.arange(20), kv,
            num_heads=own.num_heads // ranks.size, min_rows=1,
        )  # fmt: skip
        rope = load.ops.take_rope(load.rope(own.rope, own.head_dim), torch.arange(20))
        query = attention.query(hidden, norm, rope, kv, plan)
        results.append((attention.attend(query, kv, plan), kv))
    (whole, kept), (first, same), (second, same_too) = results
    torch.testing.assert_close(first + second, whole, atol=1e-4, rtol=0)
    assert torch.equal(same, kept) and torch.equal(same_too, kept)


def test_what_no_kernel_takes_is_refused_on_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By name, even where kernels are chosen by the engine: the reference would be slow."""
    fields = {"model_type": "kimi_k2", "kv_lora_rank": 640}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    _, config = load_model_config(tmp_path)
    monkeypatch.setattr(device_choices, "why_no_triton", lambda _: None)
    for asked in ("auto", "triton"):
        with pytest.raises(DeviceError, match="latents have 640 numbers, .* take 512"):
            device_choices.choose_kernels(asked, torch.device("cuda"), config)
    assert device_choices.choose_kernels("torch", torch.device("cuda"), config) == "torch"


def test_prompts_that_take_the_slower_form_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for rank, reason in ((512, ""), (38, "latents have 38 numbers")):
        fields = {"model_type": "kimi_k2", "kv_lora_rank": rank}
        (tmp_path / "config.json").write_text(json.dumps(fields))
        _, config = load_model_config(tmp_path)
        caplog.clear()
        device_choices.make_operations("triton", torch.device("cpu"), torch.bfloat16, config)
        warned = "slower form of latent attention" in caplog.text
        assert warned == bool(reason)
        assert device_choices.why_not_expanded(config).startswith(reason)


def test_blocks_that_are_not_whole_words_are_refused(tmp_path: Path) -> None:
    """An odd latent, one token a block, 16 bits: nothing else makes such blocks."""
    fields = {"model_type": "deepseek_v3", "num_hidden_layers": 1, "kv_lora_rank": 27}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    config = EngineConfig(tmp_path, "cpu", "bfloat16", block_size=1, load_format="dummy")
    with pytest.raises(ModelError, match="block_size: blocks of 1 have 182 bytes"):
        ModelRunner(config)
