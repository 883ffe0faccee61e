"""A model type for tests alone: a llama of which some layers keep a state, and no keys or values.

Such a layer sums its values up, each head with a decay of its own, and adds the values of the two
tokens before, which it keeps in 16 bits: as a recurrent layer and the short convolution before it.
All of it is done element by element, so that bits depend on nothing else in the step.

config.json: llama's fields, `layer_types` of full_attention and recurrent, `state_num_heads` and
`state_head_dim`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from baton.kernels.state_plan import StandingPlan, StatePlan
from baton.shared.engine.linear import LinearSpec, Split
from baton.shared.engine.model_loader import ModelLoader
from baton.shared.engine.models.blocks import GatedMlp, Names, Piece, load_norm, parts
from baton.shared.engine.models.decoder import Decoder
from baton.shared.engine.models.layers import PreNormLayer
from baton.shared.engine.models.llama import NAMES
from baton.shared.engine.models.model_config import (
    AttentionConfig,
    ModelConfig,
    read_decoder,
    read_heads,
)
from baton.shared.engine.models.model_type import ModelType
from baton.shared.engine.models.rope_fields import read_rope
from baton.shared.kv.cache_spec import CacheSpec, State, StateTensor
from baton.shared.model_files.fields import Fields
from tests import made_up_types

FULL, RECURRENT = "full_attention", "recurrent"
_NUM_BEFORE = 2
_WEIGHTS_BEFORE = (0.5, -0.75)
"""Of the token before, and of the one before that."""


def _decays(num_heads: int) -> Tensor:
    """[num_heads, 1]: some forget at once, others hardly."""
    return 1 - torch.tensor([[0.5 ** (2 * head + 1)] for head in range(num_heads)])


@dataclass(frozen=True, slots=True, kw_only=True)
class Config(ModelConfig):
    """What `layers` says of recurrent ones means nothing."""

    is_recurrent: tuple[bool, ...]
    num_state_heads: int
    state_head_dim: int

    @property
    def state_spec(self) -> State:
        shape = (self.state_head_dim,)
        return State(
            self.num_state_heads,
            (
                StateTensor("sum", shape, "float32"),
                StateTensor("before", (_NUM_BEFORE, *shape), "bfloat16"),
            ),
        )

    @property
    def cache_specs(self) -> list[CacheSpec | None]:
        return [
            self.state_spec if is_recurrent else layer.cache_spec
            for layer, is_recurrent in zip(self.attentions, self.is_recurrent, strict=True)
        ]


class RecurrentLayer:
    """h + recurrence(norm(h)), then h + mlp(norm(h))."""

    def __init__(self, config: Config, load: ModelLoader, names: Names, index: int) -> None:
        prefix, size = names["layer"].format(index), config.hidden_size
        head_dim = config.state_head_dim
        self._ops = load.ops
        self._heads, width = config.num_state_heads, config.num_state_heads * head_dim
        _, self._place = load.places[index]
        self._norm = load_norm(config, load, prefix + names["input_norm"])
        values = parts(names, prefix, Piece("v", width, unit=head_dim))
        self._values = load.linear(LinearSpec(size, values, Split.COLUMNS))
        output = parts(names, prefix, Piece("output", size))
        self._output = load.linear(LinearSpec(width, output, Split.ROWS, in_unit=head_dim))
        self._mlp_norm = load_norm(config, load, prefix + names["mlp_norm"])
        self._mlp = GatedMlp(config, load, names, prefix)

    def query(self, hidden: Tensor, rope: Any, kv: dict[str, Tensor], plan: StatePlan) -> Tensor:
        values = self._ops.norm_linear(hidden, self._norm, self._values)
        values = values.view(len(hidden), self._heads, -1)
        states = kv["sum"][:, :, self._place], kv["before"][:, :, self._place]
        return _mix(values, *states, plan)

    def finish(
        self, hidden: Tensor, query: Tensor, kv: Any, plan: Any, extra: Tensor | None = None
    ) -> Tensor:
        assert extra is None
        hidden = self._ops.linear(query.reshape(len(hidden), -1), self._output, hidden)
        return self._mlp(hidden, self._mlp_norm, hidden)


def _mix(values: Tensor, sums: Tensor, befores: Tensor, plan: StatePlan | StandingPlan) -> Tensor:
    def again(values: Tensor, plan: StandingPlan) -> Tensor:
        return _mix(values, sums, befores, plan)

    plan.note(again, values)
    decays, mixed = _decays(values.shape[1]), torch.zeros_like(values)
    for tokens, slot, is_first, stores in plan.rows():
        if is_first:
            sums[slot] = befores[slot] = 0
        total, wanted = sums[slot].clone(), {number for number, _ in stores}
        kept_sums: dict[int, Tensor] = {}
        for number, (token, value) in enumerate(zip(mixed[tokens], values[tokens], strict=True), 1):
            token.copy_(total.mul_(decays).add_(value))
            if number in wanted:
                kept_sums[number] = total.clone()
        kept = torch.cat((befores[slot].transpose(0, 1), values[tokens].to(befores.dtype)))
        for back, weight in enumerate(_WEIGHTS_BEFORE, 1):
            first = _NUM_BEFORE - back
            mixed[tokens] += kept[first : len(kept) - back].float() * weight
        for number, to in stores:
            sums[to] = kept_sums[number]
            befores[to] = kept[number : number + _NUM_BEFORE].transpose(0, 1)
    return mixed


def configure(fields: Fields) -> Config:
    common = read_decoder(fields)
    attention = AttentionConfig(
        **read_heads(fields, common["hidden_size"]),
        rope=read_rope(fields, common["max_position_embeddings"]),
    )
    types = fields.strings("layer_types") or []
    return Config(
        **common,
        layers=(attention,) * len(types),
        is_recurrent=tuple(each == RECURRENT for each in types),
        num_state_heads=fields.integer("state_num_heads"),
        state_head_dim=fields.integer("state_head_dim"),
    )


def build(config: Config, load: ModelLoader, names: Names) -> Decoder:
    def make_layer(index: int) -> Any:
        layer = RecurrentLayer if config.is_recurrent[index] else PreNormLayer
        return layer(config, load, names, index)

    return Decoder(config, load, names, make_layer)


TYPE = ModelType("test_recurrent", configure, build, (NAMES,))


known = partial(made_up_types.known, TYPE)


class _Recurrence(nn.Module):
    """What such a layer does to a whole sequence, as one product of matrices."""

    def __init__(self, hidden_size: int, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.v_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=False)
        self.num_heads = num_heads

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        num_tokens = hidden_states.shape[1]
        values = self.v_proj(hidden_states).unflatten(-1, (self.num_heads, -1))[0]
        back = torch.arange(num_tokens)[:, None] - torch.arange(num_tokens)
        # [heads, later token, earlier token]
        shares = torch.where(back >= 0, _decays(self.num_heads)[:, :, None] ** back.clamp(0), 0.0)
        mixed = torch.einsum("hts,shd->thd", shares, values)
        kept = values.bfloat16().float()
        for index, weight in enumerate(_WEIGHTS_BEFORE):
            mixed[index + 1 :] += weight * kept[: max(0, num_tokens - index - 1)]
        return self.o_proj(mixed.flatten(1))[None], None


def make_recurrent(model_dir: Path, fields: dict[str, Any], *, std: float = 0.35) -> Any:
    """Writes a random model of this type → the same in transformers, float32 and eager, which
    computes all anew for every token.

    Args:
        fields: of config.json.
    """
    fields = {**fields, "attn_implementation": "eager"}
    own = {name: fields.pop(name) for name in ("layer_types", "state_num_heads", "state_head_dim")}
    config: Any = LlamaConfig(**fields)
    torch.manual_seed(7)
    model: Any = LlamaForCausalLM(config)
    for index, each in enumerate(own["layer_types"]):
        if each == RECURRENT:
            sizes = own["state_num_heads"], own["state_head_dim"]
            model.model.layers[index].self_attn = _Recurrence(config.hidden_size, *sizes)
    model.eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            draw = nn.init.uniform_ if "norm" in name else nn.init.normal_
            draw(parameter, *((0.5, 1.5) if "norm" in name else (0.0, std)))
    model.generation_config.eos_token_id = None
    model.generation_config.use_cache = False
    model.save_pretrained(model_dir)
    path = model_dir / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": TYPE.name, **own}))
    return model
