"""Which configuration of skinny_linear is fastest: `python -m benchmarks.gpu.kernels --tune`.

Every shape and number of rows is measured as part of a layer (Form), without what precedes it
(fused=False) and with it (fused=True): of Llama-3.1-8B, or with `--shape` of the well-known models
that are named, as far as the table does not know their products yet; of those, at four numbers of
rows. A configuration gets into the table only if it beats the
library; where the norm is the question, if it beats a separate norm and the best way after it.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from baton.kernels.linear_table import M_BUCKETS, TABLE, Config, load_table
from benchmarks.gpu.gpu_timing import num_sets_for, time_us
from models.dummy_model import SHAPES

_EPS = 1e-5
_SMEM_BYTES = 227 * 1024
_NUM_FINALISTS = 6


@dataclass(frozen=True, slots=True)
class Form:
    """A product of a layer: its weight [n, k] and what is done before and after it."""

    name: str
    n: int
    k: int
    norm: bool = False
    silu: bool = False
    residual: bool = False

    @property
    def fused(self) -> bool:
        return self.norm or self.residual


Forms = tuple[Form, Form]
"""Of a weight: without what precedes it, and with that."""


def forms_of(shape: Mapping[str, Any]) -> list[Forms]:
    """Of the fields of a config.json. Experts' products have a table of their own."""
    hidden = shape["hidden_size"]
    head = _normed("head", shape["vocab_size"], hidden)
    if shape["model_type"] == "mamba2":
        return [*_mixer_forms(shape), head]
    forms = _latent_forms(shape) if "kv_lora_rank" in shape else _attention_forms(shape)
    if "linear_num_key_heads" in shape:
        forms = [*_delta_forms(shape), *forms]
    sizes = [shape["intermediate_size"]] if "num_experts_per_tok" not in shape else []
    if "n_shared_experts" in shape:
        sizes = [shape["n_shared_experts"] * shape["moe_intermediate_size"]]
    if "shared_expert_intermediate_size" in shape:
        sizes = [shape["shared_expert_intermediate_size"]]
    for size in sizes:
        forms.append(_normed("gate-up+silu", 2 * size, hidden, silu=True))
        forms.append(_added("down", hidden, size))
    return [*forms, head]


def _attention_forms(shape: Mapping[str, Any]) -> list[Forms]:
    hidden, head_dim = shape["hidden_size"], shape["head_dim"]
    heads, kv_heads = shape["num_attention_heads"], shape["num_key_value_heads"]
    qkv = _normed("qkv", (heads + 2 * kv_heads) * head_dim, hidden)
    return [qkv, _added("o", hidden, heads * head_dim)]


def _delta_forms(shape: Mapping[str, Any]) -> list[Forms]:
    """Of a gated delta rule, and the gate of the attention beside it."""
    hidden, value_heads = shape["hidden_size"], shape["linear_num_value_heads"]
    key_size = shape["linear_num_key_heads"] * shape["linear_key_head_dim"]
    value_size = value_heads * shape["linear_value_head_dim"]
    num_out = 2 * key_size + 2 * value_size + 2 * value_heads
    gate_size = shape["num_attention_heads"] * shape["head_dim"]
    return [
        _normed("delta", num_out, hidden),
        _added("delta-o", hidden, value_size),
        _normed("attention-gate", gate_size, hidden),
    ]


def _mixer_forms(shape: Mapping[str, Any]) -> list[Forms]:
    """Of a mixer of Mamba2, all that a layer has."""
    hidden, heads = shape["hidden_size"], shape["num_heads"]
    inner = heads * shape["head_dim"]
    num_out = 2 * inner + 2 * shape["n_groups"] * shape["state_size"] + heads
    return [_normed("mixer", num_out, hidden), _added("mixer-o", hidden, inner)]


def _latent_forms(shape: Mapping[str, Any]) -> list[Forms]:
    """Queries, or their latents, share a product with the latents."""
    hidden, heads, rope_dim = (
        shape[name] for name in ("hidden_size", "num_attention_heads", "qk_rope_head_dim")
    )
    latent = shape["kv_lora_rank"] + rope_dim
    queries, query_rank = heads * (shape["qk_nope_head_dim"] + rope_dim), shape["q_lora_rank"]
    forms = [_normed("latents", latent + (query_rank or queries), hidden)]
    if query_rank is not None:
        forms.append(_normed("queries", queries, query_rank))
    return [*forms, _added("o", hidden, heads * shape["v_head_dim"])]


def _normed(name: str, n: int, k: int, *, silu: bool = False) -> Forms:
    plain = Form(name, n, k, silu=silu)
    return plain, replace(plain, name=f"norm+{name}", norm=True)


def _added(name: str, n: int, k: int) -> Forms:
    plain = Form(name, n, k)
    return plain, replace(plain, name=f"{name}+residual", residual=True)


_FEW_BUCKETS = (1, 32, 128, 8)
"""Rows of well-known models beside the llama, most useful first."""


class Data:
    """Random inputs of a form, enough sets to defeat the cache; weights are shared by its M."""

    def __init__(self, form: Form, *, num_sets: int | None = None) -> None:
        self.form = form
        self.num_sets = num_sets or num_sets_for(form.n * form.k * 2)
        self.weights = [_random(form.n, form.k) * form.k**-0.5 for _ in range(self.num_sets)]
        self.norm_weight = _random(form.k)

    def skinny(self, form: Form, rows: int, config: Config) -> Callable[[int], object]:
        from baton.kernels.skinny_linear import skinny_linear

        x, out = self._buffers(form, rows)
        return lambda i: skinny_linear(
            x[i],
            self.weights[i],
            norm_weight=self.norm_weight if form.norm else None,
            eps=_EPS,
            residual=out[i] if form.residual else None,
            activation="silu" if form.silu else None,
            out=out[i],
            config=config,
            pdl=config.pdl,
        )

    def library(self, form: Form, rows: int) -> Callable[[int], object]:
        """cuBLAS between the separate kernels for norm and activation."""
        from baton.kernels.gated_mul import gated_mul
        from baton.kernels.rms_norm import rms_norm

        x, out = self._buffers(form, rows)
        y = torch.empty(rows, form.n, dtype=torch.bfloat16, device="cuda")

        def call(i: int) -> None:
            h = rms_norm(x[i], self.norm_weight, _EPS) if form.norm else x[i]
            if form.residual:
                out[i].addmm_(h, self.weights[i].t())
            else:
                torch.mm(h, self.weights[i].t(), out=y)
                if form.silu:
                    gated_mul(y, out=out[i])

        return call

    def is_right(self, form: Form, rows: int, config: Config) -> bool:
        """Whether a configuration's result on new data is that of torch in float32."""
        from baton.kernels.skinny_linear import skinny_linear

        x = _random(rows, form.k)
        weight = self.weights[0][:2048]
        out = _random(rows, weight.shape[0] // 2 if form.silu else weight.shape[0])
        wide = x.float()
        if form.norm:
            wide = torch.nn.functional.rms_norm(wide, (form.k,), self.norm_weight.float(), _EPS)
        expected = wide @ weight.float().t()
        if form.silu:
            gate, up = expected.chunk(2, -1)
            expected = torch.nn.functional.silu(gate) * up
        if form.residual:
            expected += out.float()
        skinny_linear(
            x,
            weight,
            norm_weight=self.norm_weight if form.norm else None,
            eps=_EPS,
            residual=out if form.residual else None,
            activation="silu" if form.silu else None,
            out=out,
            config=config,
        )
        error = (out.float() - expected).abs().max() / expected.abs().max()
        return bool(error < 2e-2)

    def norm(self, rows: int) -> Callable[[int], object]:
        from baton.kernels.rms_norm import rms_norm

        x, _ = self._buffers(self.form, rows)
        out = torch.empty_like(x[0])
        return lambda i: rms_norm(x[i], self.norm_weight, _EPS, out=out)

    def _buffers(self, form: Form, rows: int) -> tuple[list[Tensor], list[Tensor]]:
        columns = form.n // 2 if form.silu else form.n
        x = [_random(rows, form.k) for _ in range(self.num_sets)]
        return x, [_random(rows, columns) for _ in range(self.num_sets)]


def tune(budget_s: float, shapes: Sequence[str] = ()) -> dict[str, Any]:
    """Measures everything, most useful first, until the time is up → the table file's content.

    `shapes`: well-known models whose products are added to the table that there is; none: it is
    made anew, of the llama's.
    """
    known = load_table(TABLE) if shapes else []
    buckets = _FEW_BUCKETS if shapes else M_BUCKETS
    forms = [each for name in shapes or ("llama-8b",) for each in forms_of(SHAPES[name].fields)]
    sizes = {(entry["n"], entry["k"]) for entry in known}
    # Each size once, whatever it is in a model.
    forms = list({(plain.n, plain.k): (plain, fused) for plain, fused in forms
                  if (plain.n, plain.k) not in sizes}.values())  # fmt: skip
    entries = known + _measure(
        forms, buckets, budget_s, num_finalists=3 if shapes else _NUM_FINALISTS
    )
    return {"device": torch.cuda.get_device_name(), "entries": entries}


def _measure(
    forms: Sequence[Forms], buckets: Sequence[int], budget_s: float, *, num_finalists: int
) -> list[dict[str, Any]]:
    deadline = time.monotonic() + budget_s
    context = multiprocessing.get_context("spawn")
    workers = max(1, min(16, (os.cpu_count() or 2) - 1))
    entries: list[dict[str, Any]] = []
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        # Everything of the first stage is compiled before anything is timed: both need the CPU.
        jobs = [
            (plain, rows, config)
            for plain, _ in forms
            for rows in buckets
            for config in candidates(plain, rows)
        ]
        _compile(pool, jobs, deadline - 0.55 * budget_s)
        # All of the first number of rows before the next: who runs out of time has those.
        for rows in buckets:
            firsts, seconds = [], []
            for plain, _ in forms:
                data = Data(plain)
                first = _best(data, plain, rows, candidates(plain, rows), deadline)
                del data
                with_pdl = [replace(config, pdl=True) for _, config in first[:2]]
                firsts.append((first, with_pdl))
                finalists = [config for _, config in first[:num_finalists]] + with_pdl
                seconds.append(finalists)
            jobs = []
            for (plain, fused), (_, with_pdl), finalists in zip(
                forms, firsts, seconds, strict=True
            ):
                jobs += [(plain, rows, each) for each in with_pdl]
                jobs += [(fused, rows, each) for each in finalists]
            _compile(pool, jobs, deadline)
            for (plain, fused), (first, with_pdl), finalists in zip(
                forms, firsts, seconds, strict=True
            ):
                data = Data(plain)
                best = first + _best(data, plain, rows, with_pdl, deadline)
                found = _entries(data, plain, fused, rows, best, finalists, deadline)
                del data
                if time.monotonic() > deadline:
                    # What was cut short would say that the library is best.
                    print(f"out of time before {plain.name} {plain.n} x {plain.k} of {rows} rows")
                    return entries
                entries += found
    return entries


def candidates(form: Form, rows: int) -> list[Config]:
    """Configurations worth measuring for so many rows."""
    columns = form.n // 2 if form.silu else form.n
    halves = 2 if form.silu else 1
    found: list[Config] = []
    if rows <= 4:
        for block_n, block_k, num_warps, stages in [
            (4, 1024, 4, 1), (4, 1024, 4, 2), (8, 1024, 4, 1), (8, 1024, 4, 2), (16, 1024, 4, 1),
            (16, 1024, 4, 2), (8, 512, 2, 2), (4, 2048, 8, 2), (2, 1024, 4, 1), (2, 2048, 8, 1),
            (4, 512, 2, 1),
        ]:  # fmt: skip
            if halves * block_n * rows > 64:  # More accumulators than registers.
                continue
            found.append(Config("fma", block_n, block_k, num_warps=num_warps, num_stages=stages))
    if rows <= 64:
        tiles = [
            ("dot", 16, 256, 4, 4), ("dot", 32, 128, 4, 4), ("dot", 32, 256, 4, 3),
            ("dot", 64, 64, 4, 5), ("dot", 64, 128, 4, 3), ("dot", 64, 128, 4, 4),
            ("dot", 128, 64, 4, 4), ("tma", 64, 128, 4, 4), ("tma", 64, 256, 4, 3),
            ("tma", 128, 64, 4, 5), ("tma", 128, 128, 8, 3),
        ]  # fmt: skip
        blocks_m = [max(16, 1 << (rows - 1).bit_length())]
    else:
        tiles = [
            ("dot", 128, 64, 8, 4), ("tma", 128, 64, 8, 4), ("tma", 128, 64, 4, 4),
            ("tma", 64, 128, 4, 3), ("tma", 128, 128, 8, 3),
        ]  # fmt: skip
        blocks_m = [64, 128] if rows == 128 else [128, 256]
    for variant, block_n, block_k, num_warps, stages in tiles:
        for block_m in blocks_m:
            smem = (halves * block_n + block_m) * block_k * 2 * stages
            if smem > _SMEM_BYTES or (block_m == 256 and num_warps == 4):
                continue
            programs = -(-columns // block_n) * -(-rows // block_m)
            splits = [s for s in (1, 2, 4, 8) if 96 <= programs * s <= 640] or [1]
            found += [
                Config(variant, block_n, block_k, split, num_warps, stages, block_m)
                for split in splits
            ]
    return found


def _entries(
    data: Data,
    plain: Form,
    fused: Form,
    rows: int,
    best: list[tuple[float, Config]],
    fused_candidates: Sequence[Config],
    deadline: float,
) -> list[dict[str, Any]]:
    """Both entries of a weight and a number of rows."""
    library_us = time_us(data.library(plain, rows), data.num_sets)
    fused_library_us = time_us(data.library(fused, rows), data.num_sets)
    best = sorted(best, key=lambda each: each[0])
    without_us = min([library_us] + [us for us, _ in best[:1]])
    rival_us = fused_library_us
    if fused.norm:
        rival_us = min(rival_us, without_us + time_us(data.norm(rows), data.num_sets))
    fused_best = _best(data, fused, rows, fused_candidates, deadline)
    return [
        _entry(plain, rows, best, library_us, library_us),
        _entry(fused, rows, fused_best, rival_us, fused_library_us),
    ]


def _entry(
    form: Form,
    rows: int,
    best: list[tuple[float, Config]],
    rival_us: float,
    library_us: float,
) -> dict[str, Any]:
    us, config = best[0] if best else (float("inf"), None)
    wins = config is not None and us < rival_us
    print(f"{form.name:18} {form.n:6} x {form.k:5} {rows:4} {us:8.1f} µs, "
          f"rival {rival_us:8.1f}, library {library_us:8.1f}  {config if wins else '-'}",
          flush=True)  # fmt: skip
    return {
        "form": form.name,
        "m": rows,
        "n": form.n,
        "k": form.k,
        "fused": form.fused,
        "config": asdict(config) if wins and config is not None else None,
        "us": round(us, 2) if best else None,
        "rival_us": round(rival_us, 2),
        "library_us": round(library_us, 2),
    }


def _best(
    data: Data, form: Form, rows: int, configs: Iterable[Config], deadline: float
) -> list[tuple[float, Config]]:
    """Times of the configurations that run and are right, fastest first."""
    found: list[tuple[float, Config]] = []
    for config in configs:
        if time.monotonic() > deadline:
            break
        try:
            if not data.is_right(form, rows, config):
                print(f"WRONG: {form.name} {rows} {config}", flush=True)
                continue
            call = data.skinny(form, rows, config)
            us = time_us(call, data.num_sets, replays=3)
        except Exception as error:  # Too much shared memory, too many registers.
            print(f"{form.name} {rows} {config}: {repr(error)[:120]}")
            continue
        found.append((us, config))
    return sorted(found, key=lambda each: each[0])


def _compile(
    pool: ProcessPoolExecutor, jobs: Sequence[tuple[Form, int, Config]], until_s: float
) -> None:
    """Fills the compiler's cache in parallel, where the programs that are timed are found."""
    unique = {_key(*job): job for job in jobs}
    started_s = time.monotonic()
    futures = [pool.submit(_compile_one, *job) for job in unique.values()]
    try:
        for _ in as_completed(futures, timeout=max(1.0, until_s - started_s)):
            pass
    except TimeoutError:
        for future in futures:
            future.cancel()
    num_done = sum(future.done() and not future.cancelled() for future in futures)
    took_s = time.monotonic() - started_s
    print(f"compiled {num_done} of {len(futures)} programs in {took_s:.0f} s", flush=True)


def _key(form: Form, rows: int, config: Config) -> tuple[Any, ...]:
    block_m = rows if config.variant == "fma" else config.block_m
    columns = form.n // 2 if form.silu else form.n
    even = columns % config.block_n == 0, form.k % config.block_k == 0
    return form.norm, form.silu, form.residual, even, block_m, replace(config, block_m=0)


def _compile_one(form: Form, rows: int, config: Config) -> None:
    """In a process of its own: runs the program once, on a small weight of equal divisibility."""
    small = replace(form, n=512 + form.n % 512, k=4096 + form.k % 4096)
    try:
        Data(small, num_sets=1).skinny(small, rows, config)(0)
        torch.cuda.synchronize()
    except Exception:  # It is reported when it is timed.
        pass


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)
