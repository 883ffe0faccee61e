"""Our attention in transformers' place for it: its models call a function that they find by name.

While a step runs, that function stores keys and values in our blocks and attends over them, by the
plan of the layer's cache group. In a dry run (dry_run.py) it only writes down how it is called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from baton.shared.engine.operations import Operations
from baton.shared.model_files.fields import ModelError

PAGED = "baton_paged"
"""No mask is registered for it, so that transformers makes none: ours is in the plan."""
DRY = "baton_dry_run"
_CAN = ("scaling", "softcap", "sliding_window", "s_aux")
_SAYS_NOTHING = frozenset(
    """
    cache_position dropout layer_idx logits_to_keep output_attentions output_hidden_states
    output_router_logits position_ids return_dict use_cache
    """.split()
)
"""Arguments that change nothing of what is attended to."""


@dataclass(frozen=True, slots=True)
class Step:
    """Where the layers of a step store and read, and with which kernels."""

    ops: Operations
    caches: Sequence[Any]
    plans: Sequence[Any]
    places: Mapping[int, tuple[int, int]]
    """By layer: its cache group, and its place among the layers of a block."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, how: How) -> Tensor:
        """query, key, value [1, heads, T, head_dim] → [1, T, heads, head_dim]."""
        group, place = self.places[layer]
        kv, plan = self.caches[group], self.plans[group]
        queries, keys, values = (_by_token(each) for each in (query, key, value))
        self.ops.store_kv(keys, values, kv, place, plan)
        scale = query.shape[-1] ** -0.5 if how.scale is None else how.scale
        attended = self.ops.paged_attention(
            queries, kv, place, plan, scale, how.soft_cap, how.sinks
        )
        return attended[None]


class NoStep:
    """Layers attend to nothing."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, how: How) -> Tensor:
        """As `Step.attend`."""
        return query.transpose(1, 2)


@dataclass(frozen=True, slots=True)
class How:
    """What a call asks for beside queries, keys and values."""

    scale: float | None
    """None: 1 / √head_dim."""
    soft_cap: float
    sinks: Tensor | None
    """[num_heads]: what each head's softmax counts beside its keys."""


Attend = Callable[..., tuple[Tensor, None]]
_step: ContextVar[Step | NoStep | None] = ContextVar("step", default=None)
_dry_run: ContextVar[Attend | None] = ContextVar("dry_run", default=None)


def _by_token(x: Tensor) -> Tensor:
    """[1, heads, T, head_dim] → [T, heads, head_dim], the numbers of a head side by side."""
    x = x[0].transpose(0, 1)
    return x if x.stride(2) == 1 else x.contiguous()


def register() -> None:
    """Once or often."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as MASKS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as FUNCTIONS

    functions: Any = FUNCTIONS
    masks: Any = MASKS
    functions.register(PAGED, _attend)
    functions.register(DRY, _attend_dry)
    masks.register(DRY, make_mask)


@contextmanager
def running(step: Step | NoStep) -> Iterator[None]:
    token = _step.set(step)
    try:
        yield
    finally:
        _step.reset(token)


@contextmanager
def dry_running(attend: Attend) -> Iterator[None]:
    token = _dry_run.set(attend)
    try:
        yield
    finally:
        _dry_run.reset(token)


def make_mask(
    *, q_length: int, kv_length: int, device: Any, mask_function: Any, **_: Any
) -> Tensor:
    """As transformers asks for masks: [1, 1, q_length, kv_length], which carries the function that
    says what is visible."""
    mask: Any = torch.zeros(1, 1, q_length, kv_length, dtype=torch.bool, device=device)
    mask.baton_says = mask_function
    return mask  # type: ignore[no-any-return]


def read_arguments(arguments: Mapping[str, Any]) -> How:
    """What a call of attention asks for.

    Raises:
        ModelError: an argument that is not computed here, by name.
    """
    for name, value in arguments.items():
        if value is None or name in _CAN or name in _SAYS_NOTHING:
            continue
        if name == "is_causal" and value is True:
            continue
        raise ModelError(f"the argument {name} of its attention is not computed here")
    numbers = {}
    for name in ("scaling", "softcap"):
        value = arguments.get(name)
        if value is not None and not isinstance(value, int | float):
            raise ModelError(f"the argument {name} of its attention is not a number")
        numbers[name] = None if value is None else float(value)
    sinks = arguments.get("s_aux")
    if sinks is not None and not (isinstance(sinks, Tensor) and sinks.dim() == 1):
        raise ModelError("the argument s_aux of its attention is not a number for each head")
    return How(
        numbers["scaling"], numbers["softcap"] or 0.0, None if sinks is None else sinks.float()
    )


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **arguments: Any,
) -> tuple[Tensor, None]:
    step = _step.get()
    if step is None:
        raise RuntimeError("attention was called outside of a step")
    return step.attend(module.layer_idx, query, key, value, read_arguments(arguments)), None


def _attend_dry(*args: Any, **arguments: Any) -> tuple[Tensor, None]:
    attend = _dry_run.get()
    if attend is None:
        raise RuntimeError("attention was called outside of a dry run")
    return attend(*args, **arguments)
