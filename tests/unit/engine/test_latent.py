"""Models with latents in the cache against transformers, and against themselves: float32 logits, 64
greedy tokens, and the class `exact`. One more goes through test_model_types.py, split, with a
worker that dies and has few blocks."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from baton.shared.engine.batch import Batch, BatchRow
from baton.shared.engine.config import EngineConfig
from baton.shared.engine.model_runner import ModelRunner
from baton.shared.engine.plain_loop import PlainLoop
from baton.shared.kv.cache_spec import Latent
from baton.shared.sampling import SamplingParams
from tests.device import ENGINE, ON_GPU
from tests.unit.engine.tiny_latents import TINY_LATENTS
from tests.unit.engine.tiny_models import ALONE, make_tiny

GREEDY = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
TABLE, OTHER = list(range(12)), list(range(12, 24))


@pytest.mark.exact
@pytest.mark.parametrize(("model_type", "case"), ALONE, ids=lambda each: each)
def test_latents(model_type: str, case: str, tmp_path: Path) -> None:
    fields = TINY_LATENTS[model_type][case]
    model = make_tiny(tmp_path, model_type, fields)
    runner = ModelRunner(EngineConfig(tmp_path, num_blocks=48, **ENGINE))
    [group] = runner.groups
    assert group.spec == Latent(fields["kv_lora_rank"], fields["qk_rope_head_dim"])
    prompts = [random.Random(length).choices(range(320), k=length) for length in (1, 17, 120)]
    answers = PlainLoop(runner).generate(prompts, [GREEDY] * len(prompts), chunk=48)
    for prompt, answer in zip(prompts, answers, strict=True):
        with torch.no_grad():
            expected = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        assert expected.argmax(-1).tolist() == answer
        assert expected[0].max() - expected[0].min() > 10
        whole = runner.logits(Batch([BatchRow(prompt, 0, [TABLE])]))[0].clone()
        limit = 1e-3 * float(expected[0].abs().max()) if ON_GPU else 1e-4
        torch.testing.assert_close(whole.cpu(), expected[0], atol=limit, rtol=0)
    if runner.determinism == "exact":
        check_chunks(runner, prompts[-1], whole)


def check_chunks(runner: ModelRunner, prompt: list[int], whole: torch.Tensor) -> None:
    """In other chunks, other blocks and company: the same bits."""
    start = 0
    for end in (17, 64, 65, len(prompt)):
        rows = [BatchRow(prompt[start:end], start, [OTHER]), BatchRow(prompt[:20], 0, [[24, 25]])]
        logits = runner.logits(Batch(rows))[0]
        start = end
    assert torch.equal(logits, whole)


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
