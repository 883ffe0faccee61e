"""Compiles what a layer of well-known models needs, for GPUs that need not be there.

    python -m tests.kernels.compile_models [--model NAME ...] [--capability N ...] [--rows N ...]
        [--ptx DIRECTORY]

Prints, as JSON, how many kernels there are, and which do not fit the GPU's shared memory or spill
registers. Tensors have no memory: products by the library cost nothing.

`--ptx` keeps what they were compiled to. Of two checkouts, `diff -r` then says whether a change of
the sources has changed any of a model's kernels.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from baton.kernels import (
    decode_attention,
    experts,
    float8_widen,
    hopper_prefill_attention,
    prefill_attention,
    skinny_linear,
    split_prefill_attention,
)
from baton.kernels.decode_plan import make_work, plan_decode
from baton.kernels.experts import ExpertWeights
from baton.kernels.prefill_attention import block_m_for
from baton.kernels.reference import Activation, HeadNorms
from baton.kernels.reference_experts import ExpertActivation, Routes
from baton.kernels.reference_float8 import codes_of
from baton.kernels.routing import ClampedSwiglu, RoutingRule
from baton.kernels.split_prefill_attention import item_config, make_item_work
from baton.shared.engine.config import KV_CACHE_DTYPES
from baton.shared.engine.device_columns import WIDE_TOKENS
from baton.shared.engine.device_plan import ChunkItems, DevicePlan, Rope, WidenedChunks
from baton.shared.engine.experts import Experts
from baton.shared.engine.linear import Linear
from baton.shared.engine.operations import Norm
from baton.shared.engine.triton_operations import TritonOperations
from tests.kernels.compiled import SHARED_BYTES, Compiled, on_gpu, recording

_META = torch.device("meta")
_CHUNKS = (16, 48, 512)
"""Tokens of a prompt's chunk, one for each size of tiles."""


@dataclass(frozen=True)
class Shape:
    hidden: int
    mlp: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab: int
    window: int = 0
    soft_cap: float = 0.0
    logits_cap: float = 0.0
    activation: Activation = "silu"
    has_head_norms: bool = False
    has_value_norm: bool = False
    has_post_norms: bool = False
    norm_dtype: torch.dtype | None = None
    """None: the activations'."""
    scale: float = 1.0
    has_query_scale: bool = False
    has_sinks: bool = False
    routing: RoutingRule | None = None
    """Of the model's mixtures, whose experts have `mlp` numbers between their products."""
    expert_activation: ExpertActivation = "silu"
    has_expert_bias: bool = False


_GEMMA: dict[str, Any] = {
    "activation": "gelu_tanh",
    "has_post_norms": True,
    "norm_dtype": torch.float32,
}
MODELS = {
    "llama-3.1-8b": Shape(4096, 14336, 32, 8, 128, 128256),
    "smollm2-135m": Shape(576, 1536, 9, 3, 64, 49152),
    "mistral-7b": Shape(4096, 14336, 32, 8, 128, 32000, window=4096),
    "ministral3-8b": Shape(4096, 14336, 32, 8, 128, 131072, has_query_scale=True),
    "qwen3-8b": Shape(4096, 12288, 32, 8, 128, 151936, has_head_norms=True),
    "granite-3.3-8b": Shape(4096, 12800, 32, 8, 128, 49159, scale=0.22),
    "gemma2-9b": Shape(
        3584, 14336, 16, 8, 256, 256000, window=4096, soft_cap=50.0, logits_cap=30.0, **_GEMMA
    ),
    "gemma3-12b": Shape(
        3840, 15360, 16, 8, 256, 262208, window=1024, has_head_norms=True, **_GEMMA
    ),
    "qwen3-30b-a3b": Shape(
        2048, 768, 32, 4, 128, 151936, has_head_norms=True,
        routing=RoutingRule(num_experts=128, top_k=8, is_normalised=True),
    ),
    "glm-4.5-air": Shape(
        4096, 1408, 96, 8, 128, 151552,
        routing=RoutingRule(
            num_experts=128, top_k=8, scoring="sigmoid", is_normalised=True, floor=1e-20,
        ),
    ),
    "gpt-oss-20b": Shape(
        2880, 2880, 64, 8, 64, 201088, window=128, has_sinks=True, norm_dtype=torch.float32,
        routing=RoutingRule(num_experts=32, top_k=4, scoring="softmax_of_chosen"),
        expert_activation=ClampedSwiglu(1.702, 7.0), has_expert_bias=True,
    ),
    "gemma4-full": Shape(
        5376, 21504, 32, 4, 512, 262144, logits_cap=30.0, has_head_norms=True,
        has_value_norm=True, **_GEMMA,
    ),
}  # fmt: skip


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return on_gpu(torch.empty(shape, dtype=dtype, device=_META))


def compile_layer(
    shape: Shape,
    capability: int,
    rows: tuple[int, ...],
    dtype: torch.dtype,
    *,
    is_float8: bool = False,
) -> list[Compiled]:
    """What a layer and the head need, for decode steps of so many rows and chunks of all sizes."""
    limit = SHARED_BYTES[capability]
    for module in (decode_attention, prefill_attention, skinny_linear, split_prefill_attention):
        module.shared_bytes = lambda _: limit  # type: ignore[attr-defined]
    hopper_prefill_attention._processors = lambda _: 132 if capability == 90 else 0  # type: ignore[assignment]
    split_prefill_attention._num_programs = lambda _: 264  # type: ignore[assignment]
    float8_widen._num_programs = lambda _: 1056  # type: ignore[assignment]
    decode_attention.casts_codes = lambda _: capability >= 89  # type: ignore[assignment, attr-defined]
    experts._capability = lambda _: capability // 10  # type: ignore[assignment]
    ops = TritonOperations(overlaps=capability >= 90)
    with recording(capability) as kernels:
        for num_rows in rows:
            _step(ops, shape, num_rows, dtype, chunk=0, is_float8=is_float8)
        for num_tokens in _CHUNKS:
            _step(ops, shape, num_tokens, dtype, chunk=num_tokens, is_float8=is_float8)
    return kernels


def _pool(shape: Shape, dtype: torch.dtype, *, is_float8: bool) -> Tensor:
    heads = (9, shape.num_kv_heads)
    if not is_float8:
        return empty(*heads, 4, 2, 16, shape.head_dim, dtype=dtype)
    num_bytes = 4 * 2 * 16 * (shape.head_dim + 1)
    memory = torch.empty(*heads, num_bytes, dtype=torch.uint8, device=_META)
    return on_gpu(codes_of(memory, 16, shape.head_dim))


def _step(
    ops: TritonOperations,
    shape: Shape,
    num_tokens: int,
    dtype: torch.dtype,
    *,
    chunk: int,
    is_float8: bool,
) -> None:
    heads, kv_heads, head_dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
    norm = Norm(empty(shape.hidden, dtype=shape.norm_dtype or dtype), 1e-6)
    hidden = empty(num_tokens, shape.hidden, dtype=dtype)
    kv = _pool(shape, dtype, is_float8=is_float8)
    plan = _plan(shape, num_tokens, chunk, dtype, is_float8=is_float8)

    def linear(num_out: int, num_in: int) -> Linear:
        return Linear(empty(num_out, num_in, dtype=dtype), None, num_out, num_in, scale=shape.scale)

    angles = empty(64, head_dim // 2, dtype=torch.float32)
    scales = empty(64, dtype=torch.float32) if shape.has_query_scale else None
    rope = Rope(angles, angles, scales, empty(num_tokens, dtype=torch.int32))
    head_norm = empty(head_dim, dtype=norm.weight.dtype) if shape.has_head_norms else None
    norms = HeadNorms(1e-6, head_norm, head_norm, shape.has_value_norm)

    qkv = ops.norm_linear(hidden, norm, linear((heads + 2 * kv_heads) * head_dim, shape.hidden))
    qkv = on_gpu(qkv.view(num_tokens, -1, head_dim))
    query = on_gpu(ops.rope_and_store(qkv, rope, kv, 3, plan, heads, norms))
    if shape.has_value_norm:
        ops.rope_query(query, rope, norms)
    sinks = empty(heads, dtype=torch.float32) if shape.has_sinks else None
    attended = ops.paged_attention(query, kv, 3, plan, head_dim**-0.5, shape.soft_cap, sinks)
    if shape.routing is not None:
        _mixture(ops, shape, shape.routing, hidden)
    for x, layer in (
        (attended.view(num_tokens, -1), linear(shape.hidden, heads * head_dim)),
        (None, linear(shape.hidden, shape.mlp)),
    ):
        if x is None:
            gate_up = linear(2 * shape.mlp, shape.hidden)
            x = ops.norm_gate_up(hidden, norm, gate_up, shape.activation)
        if shape.has_post_norms:
            ops.norm_add(on_gpu(ops.linear(on_gpu(x), layer)), norm, hidden)
        else:
            ops.linear(on_gpu(x), layer, hidden)
    if not chunk:
        logits = ops.norm_linear(hidden, norm, linear(shape.vocab, shape.hidden))
        if shape.logits_cap:
            ops.soft_cap(on_gpu(logits), shape.logits_cap)


def _mixture(ops: TritonOperations, shape: Shape, rule: RoutingRule, hidden: Tensor) -> None:
    def weight(*sizes: int) -> Tensor:
        return empty(rule.num_experts, *sizes, dtype=hidden.dtype)

    hidden_size, size = shape.hidden, shape.mlp
    biases = (weight(2 * size), weight(hidden_size)) if shape.has_expert_bias else (None, None)
    weights = ExpertWeights(weight(2 * size, hidden_size), weight(hidden_size, size), *biases)
    logits = empty(len(hidden), rule.num_experts, dtype=torch.float32)
    choice_bias = empty(rule.num_experts, dtype=torch.float32)
    norm = Norm(empty(hidden_size, dtype=hidden.dtype), 1e-6)
    router = empty(rule.num_experts, hidden_size, dtype=torch.float32)
    ops.norm_scores(hidden, norm, Linear(router, None, *router.shape))
    routes = ops.route(on_gpu(logits), rule, choice_bias if rule.scoring == "sigmoid" else None)
    layer = Experts(weights, shape.expert_activation, 0)
    ops.experts(hidden, Routes(*map(on_gpu, routes)), layer, hidden)
    ops.gated_add(hidden, on_gpu(logits[:, :1]), hidden)


def _plan(
    shape: Shape, num_tokens: int, chunk: int, dtype: torch.dtype, *, is_float8: bool
) -> DevicePlan:
    def ints(*sizes: int) -> Tensor:
        return empty(*sizes, dtype=torch.int32)

    block_m = block_m_for(max(chunk, 1), shape.head_dim, dtype.itemsize)
    rows = work = None
    if not chunk:
        rows = ints(num_tokens)
        heads = (shape.num_kv_heads, shape.num_heads)
        itemsize = 1 if is_float8 else dtype.itemsize
        work = make_work(num_tokens, *heads, shape.head_dim, _META, itemsize=itemsize)
        plan_decode(rows, ints(64), work, window=shape.window)
    return DevicePlan(
        slots=empty(num_tokens, dtype=torch.int64),
        context_lens=ints(64),
        block_tables=ints(64, 32),
        rows=rows,
        work=work,
        tiles=ints(-(-chunk // block_m), 4) if chunk else None,
        block_m=block_m,
        window=shape.window,
        items=_items(shape, dtype, is_float8=is_float8) if chunk else None,
        widened=_widened(shape, dtype) if is_float8 and block_m == WIDE_TOKENS else (),
    )


def _widened(shape: Shape, dtype: torch.dtype) -> tuple[WidenedChunks]:
    """As of a step from a graph."""
    kv = empty(16, shape.num_kv_heads, 1, 2, 16, shape.head_dim, dtype=dtype)
    tables, stretches, tiles, *counts = (
        empty(*sizes, dtype=torch.int32) for sizes in ((16, 16), (2, 4), (4, 4), (1,), (1,))
    )
    items = _items(shape, dtype, is_float8=False)
    return (WidenedChunks(kv, tables, stretches, counts[0], tiles, counts[1], items),)


def _items(shape: Shape, dtype: torch.dtype, *, is_float8: bool) -> ChunkItems:
    """Of chunks whose keys are cut, too; as if there were both in a step."""
    heads, kv_heads, head_dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
    config = item_config(heads, kv_heads, head_dim, dtype.itemsize, _META, is_float8=is_float8)
    work = make_item_work(config, heads, head_dim, _META)
    partial, weight, arrived = map(on_gpu, (work.partial, work.weight, work.arrived))
    work = replace(work, partial=partial, weight=weight, arrived=arrived)
    return ChunkItems(empty(40, 9, dtype=torch.int32), empty(1, dtype=torch.int32), work)


def problems(kernels: list[Compiled]) -> Iterator[str]:
    for each in kernels:
        most = SHARED_BYTES[each.capability]
        if each.shared > most:
            yield f"{each.name} takes {each.shared} bytes of shared memory, and there are {most}"
        if each.spilled_bytes:
            yield f"{each.name} spills {each.spilled_bytes} bytes of registers"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="compiles the kernels of models")
    parser.add_argument("--model", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--capability", nargs="+", type=int, default=[90], choices=SHARED_BYTES)
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 2, 8, 16, 32, 64, 128])
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--kv-cache-dtype", default="auto", choices=KV_CACHE_DTYPES)
    parser.add_argument("--ptx", type=Path, metavar="DIRECTORY")
    args = parser.parse_args(argv)
    report = {}
    for name in args.model:
        for capability in args.capability:
            dtype = getattr(torch, args.dtype)
            kernels = compile_layer(
                MODELS[name],
                capability,
                tuple(args.rows),
                dtype,
                is_float8=args.kv_cache_dtype == "fp8",
            )
            found = {"kernels": len(kernels), "problems": list(problems(kernels))}
            report[f"{name} sm_{capability}"] = found
            if args.ptx is not None:
                _keep(kernels, args.ptx / f"{name} sm_{capability}")
    sys.stdout.write(json.dumps(report, indent=1) + "\n")


def _keep(kernels: list[Compiled], directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for number, each in enumerate(kernels):
        (directory / f"{number:03} {each.name}.ptx").write_text(each.ptx)


if __name__ == "__main__":
    main()
