"""What a model of transformers attends to, layer by layer: it is run once on paper, on the device
`meta`, where nothing has values and nothing takes memory, and each call of attention is written
down. So a model that cannot run here is refused before its weights are read.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from baton.shared.engine.models.model_config import AttentionConfig
from baton.shared.engine.models.rope_config import NO_ROPE
from baton.shared.engine.transformers_backend.attention import DRY, dry_running, read_arguments
from baton.shared.model_files.fields import ModelError

_NUM_TOKENS = 16
_MOST_KEYS = 2**20
"""Masks are looked at up to here; what has windows that are wider has none."""
_COUNTING = ("torch.arange", "get_seq_length", "topk")
"""In the code of attention: what it computes may depend on a token's place in the step instead of
its position, or on some of the keys only; in short sequences that need not show."""
_ON_PAPER = torch.device("meta")


@dataclass(frozen=True, slots=True)
class DryRun:
    """
    Attributes:
        layers: what each layer attends to.
        linear_shapes: [out, in] of each linear layer.
        num_numbers: of all weights; those that are shared count once.
        most_tokens: of the longest sequence of which this is true; None: of all.
        has_experts: tokens choose what they are multiplied by.
        counts: attention looks at more than positions; see _COUNTING.
    """

    layers: tuple[AttentionConfig, ...]
    linear_shapes: frozenset[tuple[int, int]]
    num_numbers: int
    most_tokens: int | None
    has_experts: bool
    counts: bool


def dry_run(make_model: Callable[[], Any], num_layers: int, max_positions: int) -> DryRun:
    """Runs a model on paper.

    Args:
        make_model: what makes it, in evaluation mode; called under the device `meta`.
        max_positions: of the longest sequence.

    Raises:
        ModelError: how it attends, or keeps what it has seen, is not computed here.
    """
    seen = _Seen(min(max_positions, _MOST_KEYS))
    ids = torch.zeros(1, _NUM_TOKENS, dtype=torch.int64, device=_ON_PAPER)
    try:
        with _ON_PAPER:
            model = make_model()
        parameters = inspect.signature(model.forward).parameters
        for name in ("input_ids", "position_ids"):
            if name not in parameters:
                raise ModelError(f"its code takes no {name}")
        model.config._attn_implementation = DRY
        with torch.inference_mode(), dry_running(seen.attend):
            model(
                input_ids=ids,
                position_ids=torch.arange(_NUM_TOKENS, device=_ON_PAPER)[None],
                # With all of them it is not asked whether positions begin anew.
                attention_mask=torch.ones_like(ids),
                **without_cache(model),
            )
    except ModelError:
        raise
    except Exception as error:
        if isinstance(error, NotImplementedError) and "meta" in str(error):
            raise ModelError(
                "its code looks at numbers to know what to compute, which a dry run does not have"
            ) from None
        reason = f"{type(error).__name__}: {_line(error)}"
        raise ModelError(f"its code fails in a dry run: {reason}") from None
    return DryRun(
        seen.layers(num_layers),
        frozenset(
            (module.out_features, module.in_features)
            for module in model.modules()
            if isinstance(module, torch.nn.Linear)
        ),
        sum(parameter.numel() for parameter in model.parameters()),
        seen.most_tokens,
        has_experts(model),
        seen.counts,
    )


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def without_cache(model: Any) -> dict[str, Any]:
    """Arguments that keep a model from a cache of its own."""
    known = inspect.signature(model.forward).parameters
    return {"use_cache": False} if "use_cache" in known else {}


def has_experts(model: Any) -> bool:
    """By the names that transformers gives them."""
    return any(
        part in ("experts", "router") or "moe" in part
        for name, _ in model.named_modules()
        for part in name.lower().split(".")[-1:]
    )


@functools.cache
def _class_counts(kind: Any) -> bool:
    source = inspect.getsource(kind)
    return any(word in source for word in _COUNTING)


def _counts(attention: torch.nn.Module) -> bool:
    kinds: set[Any] = {type(part) for part in attention.modules()}
    foreign = [kind for kind in kinds if kind.__module__.startswith("transformers.models.")]
    return any(_class_counts(kind) for kind in foreign)


class _Seen:
    def __init__(self, num_keys: int) -> None:
        self.most_tokens: int | None = None
        self.counts = False
        self._num_keys = num_keys
        self._window_of: dict[int, int | None] = {}
        """By mask; these are kept, so that an id stays one mask's."""
        self._masks: list[Any] = []
        self._layers: dict[int, AttentionConfig] = {}

    def attend(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        **arguments: Any,
    ) -> tuple[Tensor, None]:
        how = read_arguments(arguments)
        layer = getattr(module, "layer_idx", None)
        if not isinstance(layer, int):
            raise ModelError("its attention does not say of which layer it is")
        if layer in self._layers:
            raise ModelError(f"layer {layer} attends more than once")
        self.counts = self.counts or _counts(module)
        _, num_heads, num_tokens, head_dim = query.shape
        if (num_tokens, key.shape[2]) != (_NUM_TOKENS, _NUM_TOKENS):
            raise ModelError(f"layer {layer} attends to other tokens than those of the step")
        if value.shape[3] != head_dim or key.shape[3] != head_dim:
            raise ModelError(
                f"layer {layer} has values of another size than its queries and keys: "
                f"{value.shape[3]} and {head_dim}"
            )
        if how.sinks is not None and len(how.sinks) != num_heads:
            raise ModelError(f"layer {layer} has {len(how.sinks)} sinks for {num_heads} heads")
        self._layers[layer] = AttentionConfig(
            num_heads=num_heads,
            num_kv_heads=key.shape[1],
            head_dim=head_dim,
            # Queries and keys come turned.
            rope=NO_ROPE,
            window=self._window(layer, attention_mask),
            scale=how.scale,
            soft_cap=how.soft_cap,
        )
        return query.new_zeros(1, num_tokens, num_heads, head_dim), None

    def layers(self, num_layers: int) -> tuple[AttentionConfig, ...]:
        missing = [layer for layer in range(num_layers) if layer not in self._layers]
        if len(missing) == num_layers:
            raise ModelError("its attention does not go through transformers' attention interface")
        if missing or len(self._layers) > num_layers:
            named = ", ".join(map(str, missing or sorted(self._layers)[num_layers:]))
            raise ModelError(
                f"layers {named} of {num_layers} do not attend once: recurrent states, and caches "
                "of their own, are not kept here"
            )
        layers = tuple(self._layers[layer] for layer in range(num_layers))
        if len({layer.num_heads for layer in layers}) > 1:
            raise ModelError("its layers have unequal numbers of query heads")
        return layers

    def _window(self, layer: int, mask: Any) -> int | None:
        """How many positions a token sees, its own among them; None: all before it."""
        says = getattr(mask, "baton_says", None)
        if says is None:
            kind = "no mask" if mask is None else "a mask of its own"
            raise ModelError(f"layer {layer} attends with {kind}")
        if id(mask) not in self._window_of:
            self._window_of[id(mask)] = self._read(layer, says)
            self._masks.append(mask)
        return self._window_of[id(mask)]

    def _read(self, layer: int, says: Any) -> int | None:
        for name, chunk in _numbers_in(says):
            if name == "chunk_size":
                # Within the first chunk it is as if there were none.
                self.most_tokens = min(self.most_tokens or chunk, chunk)
                return None
        last = self._num_keys - 1
        window = _num_visible(says, last, last)
        for query in sorted({0, max(0, min(window, last)), last // 2, last}):
            if _num_visible(says, query, last) != min(window, query + 1):
                raise ModelError(f"layer {layer} has a mask that is neither causal nor a window")
        return None if window == last + 1 else window


def _num_visible(says: Any, query: int, last: int) -> int:
    """Keys that a query sees, which must be the last ones up to it; −1 if they are not."""
    keys = torch.arange(last + 1)
    zero = torch.zeros((), dtype=torch.int64)
    try:
        visible = says(zero, zero, torch.tensor(query), keys)
    except Exception:
        return -1
    if visible.device == _ON_PAPER or visible.dtype != torch.bool:
        return -1
    visible = visible.expand(last + 1)
    count = int(visible.sum())
    return count if bool(visible[query + 1 - count : query + 1].all()) else -1


def _numbers_in(function: Any) -> Iterator[tuple[str, int]]:
    """Names and values of the whole numbers that a mask function, and those that it is made of,
    were made with."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        value = cell.cell_contents
        if isinstance(value, int):
            yield name, value
        for inner in value if isinstance(value, tuple) else (value,):
            if callable(inner) and hasattr(inner, "__code__"):
                yield from _numbers_in(inner)
