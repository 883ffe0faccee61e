"""Layers that checkpoints ship to guess tokens ahead, against the formula in float32: their block
as transformers computes a layer of the same type, which drops them at loading; the rest as the
reports of their authors have it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.masking_utils import create_causal_mask

from baton.shared.engine.batch import Batch, BatchRow
from baton.shared.engine.model_runner import ModelRunner
from baton.shared.engine.models.mtp import find_layer
from baton.shared.model_files.fields import ModelError
from baton.shared.sampling import SamplingParams
from baton.shared.speculation import MTP
from tests.unit.engine.conftest import MakeRunner
from tests.unit.engine.test_logits_vs_transformers import DEMO, random_prompt
from tests.unit.engine.tiny_models import TINY_MODELS
from tests.unit.engine.tiny_mtp import make_tiny_mtp

CASES = [
    ("deepseek_v3", "as they come"),
    ("deepseek_v3", "two dense, one of three mixed"),
    ("kimi_k2", "as it comes"),
    ("glm4_moe", "groups, norms of heads"),
    ("glm4_moe_lite", next(iter(TINY_MODELS["glm4_moe_lite"]))),
    ("qwen3_next", "as they come"),
    ("qwen3_5_text", "uneven heads, tied"),
    ("qwen3_5_moe", "untied"),
]


def mtp_runner(make_runner: MakeRunner, model_dir: Path, num_drafts: int = 3) -> ModelRunner:
    return make_runner(model_dir, num_drafts=num_drafts, draft_model_dir=model_dir, draft_kind=MTP)


class Reference:
    """Everything in plain float32, all tokens at once."""

    def __init__(self, model: Any) -> None:
        self._model, self._own = model, model.own
        self._inner = model.get_decoder()
        self._eps = self._inner.config.rms_norm_eps

    @torch.no_grad()
    def run(self, tokens: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """What the model's head reads of each token; of each but the first what the layer makes of
        it, for the next guess, and the logits."""
        inner, ids = self._inner, torch.tensor([tokens])
        [*layers, ahead] = inner.layers
        inner.layers = inner.layers[: len(layers)]
        inner.config.num_hidden_layers = len(layers)
        read = inner(ids, use_cache=False).last_hidden_state
        own = torch.cat(
            (
                self._norm(inner.embed_tokens(ids[:, 1:]), "embedding"),
                self._norm(read[:, :-1], "hidden"),
            ),
            -1,
        )
        made = self._norm(self._layer(own @ self._own["projection"].T, ahead), "norm")
        return read[0], made[0], self._model.lm_head(made)[0]

    def _layer(self, hidden: Tensor, layer: Any) -> Tensor:
        positions = torch.arange(hidden.shape[1])[None]
        rope = self._inner.rotary_emb(hidden, position_ids=positions)
        mask = create_causal_mask(
            config=self._inner.config,
            inputs_embeds=hidden,
            attention_mask=None,
            past_key_values=None,
            position_ids=positions,
        )
        out = layer(hidden, attention_mask=mask, position_ids=positions, position_embeddings=rope)
        return out if isinstance(out, Tensor) else out[0]

    def _norm(self, hidden: Tensor, name: str) -> Tensor:
        scale = torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self._eps)
        weight: Tensor = self._own[name]
        return hidden * scale * weight


@pytest.mark.parametrize(("model_type", "case"), CASES)
def test_what_it_makes_of_tokens(
    make_runner: MakeRunner, tmp_path: Path, model_type: str, case: str
) -> None:
    model = make_tiny_mtp(tmp_path, model_type, TINY_MODELS[model_type][case])
    runner = mtp_runner(make_runner, tmp_path)
    draft = runner.draft
    assert draft is not None
    tokens = random_prompt(37, model.config.get_text_config().vocab_size)
    read, made, logits = Reference(model).run(tokens)
    greedy = SamplingParams(temperature=0.0)
    tables = [
        list(range(16 * i, 16 * i + 16)) if group.spec.grows else [0]
        for i, group in enumerate(runner.groups)
    ]
    step = runner.launch(Batch([BatchRow(tokens, 0, tables, greedy)]))
    step.result()
    states = step.taps(0)
    assert states is not None
    [features] = draft.fuse([[states]])
    torch.testing.assert_close(features, read, atol=1e-4, rtol=0)
    # In chunks: each finds those before it in the layer's own cache.
    for start, end in ((0, 1), (1, 20), (20, 36)):
        part = features[start:end]
        row = BatchRow(tokens[1 + start : 1 + end], start, [list(range(16))], greedy, features=part)
        step = draft.launch([row])
        [[drawn]] = step.result()
        own = step.taps(0)
        assert own is not None and drawn.token_id == int(logits[end - 1].argmax())
        torch.testing.assert_close(own, made[start:end], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        (
            {"num_nextn_predict_layers": 0},
            r"^speculate: .* has no layers that guess .*: num_nextn_predict_layers is 0$",
        ),
        (
            {"num_nextn_predict_layers": None},
            r"^speculate: .* has no layers that guess .*: its config.json has no num_nextn",
        ),
    ],
)
def test_a_model_without_one_says_so(
    make_runner: MakeRunner, tmp_path: Path, fields: dict[str, Any], problem: str
) -> None:
    make_tiny_mtp(tmp_path, "deepseek_v3", TINY_MODELS["deepseek_v3"]["as they come"])
    path = tmp_path / "config.json"
    config = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({name: each for name, each in config.items() if each is not None}))
    with pytest.raises(ModelError, match=problem):
        mtp_runner(make_runner, tmp_path)


@pytest.mark.parametrize(
    ("model_type", "begins"), [("qwen3_next", "mtp."), ("deepseek_v3", "model.layers.{}.")]
)
def test_files_without_one_say_so(
    make_runner: MakeRunner, tmp_path: Path, model_type: str, begins: str
) -> None:
    """As those of whoever saved a checkpoint anew; of half a layer the tensor is named."""
    model = make_tiny_mtp(tmp_path, model_type, TINY_MODELS[model_type]["as they come"])
    path, begins = tmp_path / "model.safetensors", begins.format(model.num_layers)
    weights = load_file(path)
    own = {name: weights.pop(name) for name in list(weights) if name.startswith(begins)}
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(ModelError, match=r"^speculate: .* ships no layer .* files have no "):
        mtp_runner(make_runner, tmp_path)
    [projection] = [name for name in own if name.endswith(("mtp.fc.weight", "eh_proj.weight"))]
    del own[projection]
    save_file({**weights, **own}, path, {"format": "pt"})
    with pytest.raises(ModelError, match=rf"^speculate: .*: {projection}: missing tensor$"):
        mtp_runner(make_runner, tmp_path)


def test_a_type_that_ships_none_is_named() -> None:
    with pytest.raises(ModelError, match=r"is a \"llama\", .* are of deepseek_v3, glm4_moe,"):
        find_layer(DEMO)
