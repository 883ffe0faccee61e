"""Products whose inputs are small, too: the library's rate, and which way is fastest when.

    python -m benchmarks.gpu.scaled_tune [--parts library,tiles,layer,rows,few] [--budget SECONDS]
        [--output FILE] [--write-table]

Of llama-8b's products. `tiles` measures the configurations of kernels/scaled_linear.py beside
torch._scaled_mm, each product by itself. `layer` measures those of kernels/hopper_scaled.py in a
chain of layers without attention: what a product gains depends on what is in front of it and
behind it. `--write-table` makes kernels/scaled_table.json of both. `few` times a layer's four
products in a row with one row of x, as a decode step has them.
"""

# ruff: noqa: B023

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from baton.kernels.hopper_scaled import STEP, hopper_scaled, hopper_scaled_gated
from baton.kernels.quantised_rows import quantise_known, quantise_rows
from baton.kernels.reference_scaled import GROUP, InputScheme, QuantisedRows
from baton.kernels.scaled_linear import scaled_linear
from baton.kernels.scaled_table import ROWS, TABLE, HopperConfig, ScaledConfig, choose
from baton.kernels.skinny_linear import MAX_PARTIALS
from baton.kernels.small_linear import FewConfig, SmallWeight, pack_nibbles, small_linear
from baton.loadtest.environment import describe_environment
from benchmarks.gpu.ceilings import measure_ceilings
from benchmarks.gpu.gpu_timing import elapsed_us, num_sets_for, time_us
from benchmarks.gpu.results import result_path

_BF16 = torch.bfloat16
_FLOAT8 = torch.float8_e4m3fn
_SIZES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate, up": (28672, 4096), "down": (4096, 14336)}
_ROWS_OF_LIBRARY = (16, 64, 128, 256, 512, 1024, 2048, 8192)
_EPS = 1e-5
_IN_CHAIN = ("gate, up", "down", "qkv", "o")
"""In this order they are chosen."""
_LAYERS = 8
_TURNS = 5


@dataclass(frozen=True)
class Inputs:
    """Random inputs of a product."""

    x: QuantisedRows
    weights: list[SmallWeight]
    residual: Tensor


def _codes(*shape: int, dtype: torch.dtype = _FLOAT8) -> Tensor:
    numbers = torch.randn(shape, device="cuda", dtype=_BF16)
    return numbers.to(dtype) if dtype == _FLOAT8 else (numbers * 40).clamp(-127, 127).to(dtype)


def _weight(n: int, k: int, group: int, dtype: torch.dtype = _FLOAT8) -> SmallWeight:
    shape = (-(-n // GROUP), k // GROUP) if group else (n, 1)
    scale = torch.rand(shape, device="cuda") / 64
    return SmallWeight(_codes(n, k, dtype=dtype), scale, None, k, rows_per_scale=group or 1)


def _inputs(n: int, k: int, rows: int, group: int, dtype: torch.dtype = _FLOAT8) -> Inputs:
    num_sets = num_sets_for(n * k)
    scale = torch.rand(k // group if group else 1, rows, device="cuda").t()
    return Inputs(
        QuantisedRows(_codes(rows, k, dtype=dtype), scale),
        [_weight(n, k, group, dtype) for _ in range(num_sets)],
        torch.randn(rows, n, device="cuda", dtype=_BF16),
    )


def library(x: QuantisedRows, weight: SmallWeight, *, is_fast: bool = True) -> Tensor:
    if weight.rows_per_scale > 1:
        of_weight = weight.scale.t()
    else:
        of_weight = weight.scale.view(1, -1)
    return torch._scaled_mm(
        x.codes,
        weight.codes.t(),
        scale_a=x.scale,
        scale_b=of_weight,
        out_dtype=_BF16,
        use_fast_accum=is_fast,
    )


def _expected(x: QuantisedRows, weight: SmallWeight) -> Tensor:
    scale = weight.scale.double()
    if weight.rows_per_scale > 1:
        scale = scale.repeat_interleave(GROUP, 0)[: weight.num_out].repeat_interleave(GROUP, 1)
    return x.expand(torch.float64) @ (weight.codes.double() * scale).t()


def _error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).abs().max() / expected.abs().max())


Save = Callable[[str, dict[str, Any]], None]


def measure_library(save: Save, deadline: float) -> None:
    """Rates at all rows; how near float64 few of them are."""
    for rows in (8192, 16, 7, 128):
        for group in (0, GROUP):
            x = QuantisedRows(
                _codes(rows, 4096),
                torch.rand(4096 // group if group else 1, rows, device="cuda").t(),
            )
            weight = _weight(6144, 4096, group)
            for is_fast in (True, False):
                label = f"error {'blocks' if group else 'rows'} {rows} fast={is_fast}"
                try:
                    got = library(x, weight, is_fast=is_fast)
                    save(label, {"error": _error(got[:16], _expected(
                        QuantisedRows(x.codes[:16], x.scale[:16]), weight))})  # fmt: skip
                except Exception as error:
                    save(label, {"failed": repr(error)[:300]})
    for rows in _ROWS_OF_LIBRARY[::-1]:
        for name, (n, k) in _SIZES.items():
            for group in (0, GROUP):
                if time.monotonic() > deadline:
                    return
                given = _inputs(n, k, rows, group)
                for is_fast in (True, False) if not group else (False,):
                    label = f"library {name} {'blocks' if group else 'rows'} {rows} fast={is_fast}"

                    def call(i: int, given: Inputs = given, is_fast: bool = is_fast) -> object:
                        return library(given.x, given.weights[i], is_fast=is_fast)

                    try:
                        us = time_us(call, len(given.weights), replays=3)
                        save(label, {"us": us, "tflop_per_s": 2e-6 * rows * n * k / us})
                    except Exception as error:
                        save(label, {"failed": repr(error)[:300]})
                        torch.cuda.synchronize()


def candidates(n: int, rows: int, group: int) -> Iterator[ScaledConfig]:
    """Worth measuring for so many rows."""
    if rows <= 64:
        tiles = [(64, 128, 4, 6), (64, 256, 4, 4), (64, 128, 4, 4), (128, 128, 4, 4)]
        shapes = [(max(16, rows), *tile) for tile in tiles]
    else:
        shapes = [(64, 128, 128, 4, 4), (64, 64, 256, 4, 3), (64, 64, 128, 4, 6),
                  (128, 64, 128, 4, 4), (128, 64, 128, 4, 6), (128, 128, 128, 8, 4)]  # fmt: skip
        shapes += [] if rows < 256 else [(256, 128, 128, 8, 3), (256, 64, 128, 4, 4)]
    for block_m, block_n, block_k, warps, stages in shapes:
        if group and block_k > group:
            continue
        programs = -(-n // block_n) * -(-rows // block_m)
        splits = [s for s in (1, 2, 4) if 60 <= programs * s <= 560] or [1]
        for split in splits:
            for is_fast in (False, True) if rows >= 64 and not group else (False,):
                if split * programs * block_m * block_n <= 8 * 2**20:
                    yield ScaledConfig(
                        block_m, block_n, block_k, split, warps, stages, is_fast=is_fast
                    )
    if rows > 64 and not group:
        for block_m, block_n, warps, stages in ((64, 128, 4, 6), (128, 64, 4, 8), (128, 128, 8, 5),
                                                (256, 128, 8, 4)):  # fmt: skip
            if block_m <= rows:
                yield ScaledConfig(
                    block_m, block_n, 128, 1, warps, stages, is_fast=True, is_bulk=True
                )


def _compile_one(config: ScaledConfig, group: int) -> None:
    given = _inputs(512, 4096, config.block_m, group)
    try:
        scaled_linear(given.x, given.weights[0], config=config, residual=given.residual,
                      out=given.residual, pdl=True)  # fmt: skip
        scaled_linear(given.x, given.weights[0], config=config, pdl=True)
        torch.cuda.synchronize()
    except Exception:  # It is reported when it is timed.
        pass


def measure_tiles(
    save: Save, deadline: float, groups: Sequence[int], all_rows: Sequence[int]
) -> list[dict[str, Any]]:
    unique = {
        (config, group)
        for n, _ in _SIZES.values() for rows in all_rows for group in groups
        for config in candidates(n, rows, group)
    }  # fmt: skip
    started_s = time.monotonic()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(12, os.cpu_count() or 2), mp_context=context) as pool:
        futures = [pool.submit(_compile_one, *each) for each in unique]
        for future in as_completed(futures):
            future.result()
    print(f"compiled {len(unique)} in {time.monotonic() - started_s:.0f} s", flush=True)
    entries: list[dict[str, Any]] = []
    for rows in all_rows:
        for name, (n, k) in _SIZES.items():
            for group in groups:
                if time.monotonic() > deadline:
                    return entries
                entries.append(_measure_one(name, n, k, rows, group))
                label = f"tiles {name} {'blocks' if group else 'rows'} {rows}"
                save(label, entries[-1])
    return entries


def _measure_one(name: str, n: int, k: int, rows: int, group: int) -> dict[str, Any]:
    given = _inputs(n, k, rows, group)
    # As of the residual stream: the library adds it in a kernel of its own.
    has_residual = name in ("o", "down")
    residual = given.residual if has_residual else None
    num_sets = len(given.weights)

    def by_library(i: int) -> object:
        padded = given.x
        y = library(padded, given.weights[i], is_fast=not group)
        return given.residual.add_(y) if has_residual else y

    library_us = float("inf")
    try:
        library_us = time_us(by_library, num_sets, replays=3)
    except Exception as error:
        print(f"{name} {rows}: {repr(error)[:200]}", flush=True)
    some = SmallWeight(given.weights[0].codes[:512], given.weights[0].scale[: 4 if group else 512],
                       None, k, rows_per_scale=group or 1)  # fmt: skip
    expected = _expected(given.x, some)
    timed: list[tuple[float, ScaledConfig]] = []
    for config in candidates(n, rows, group):

        def call(i: int, config: ScaledConfig = config) -> object:
            return scaled_linear(given.x, given.weights[i], residual=residual, out=residual,
                                 config=config, pdl=True)  # fmt: skip

        try:
            off = _error(scaled_linear(given.x, some, config=config), expected)
            if off > 1e-2:
                print(f"WRONG {name} {rows} {group} {config}: {off}", flush=True)
                continue
            timed.append((time_us(call, num_sets, replays=3), config))
        except Exception as error:
            print(f"{name} {rows} {config}: {repr(error)[:120]}", flush=True)
    timed.sort(key=lambda each: each[0])
    us, best = timed[0] if timed else (float("inf"), None)
    wins = best is not None and us < library_us
    return {
        "form": name, "m": rows, "n": n, "k": k, "group": group, "us": round(us, 2),
        "library_us": round(library_us, 2), "floor_mb": round(n * k / 1e6, 1),
        "config": asdict(best) if best is not None and wins else None,
        "next": [[round(other, 2), list(asdict(each).values())] for other, each in timed[:4]],
    }  # fmt: skip


@dataclass(frozen=True)
class Chosen:
    """How a chain computes a product. None: as kernels/scaled_linear.py or the library do."""

    config: HopperConfig | None = None
    is_gated: bool = False
    """Gate and up give what is made of them."""


def hopper_candidates(n: int, k: int, rows: int, parts: int) -> Iterator[HopperConfig]:
    """Worth measuring, of a weight of `parts` times n rows."""
    if rows <= 64:
        shapes = [(rows, 64, 4), (rows, 128, 4)]
    else:
        shapes = [(128, 64, 4), (128, 128, 8), (256, 64, 4), (256, 128, 8)]
    for block_m, block_n, warps in shapes:
        if block_m > rows or block_m * block_n * parts > 128 * 32 * warps:
            continue
        tiles = -(-n // block_n) * -(-rows // block_m)
        step_bytes = STEP * (block_m + parts * block_n)
        for split in (1, 2, 4, 7):
            steps, rest = divmod(k // STEP, split)
            is_spread = split == 1 or 90 <= tiles * split <= 400
            if rest or not is_spread or split * tiles * block_m * block_n * parts > MAX_PARTIALS:
                continue
            # Of programs that run at once, this product's and those of the next.
            for room in (232_000, 114_000, 75_000, 56_000):
                places = min(steps, (room - 1024) // step_bytes)
                for run in (2, 4) if rows <= 64 and places >= 4 else (1,):
                    if places // run >= 2 and steps % run == 0:
                        yield HopperConfig(
                            block_m, block_n, places // run * run, run, split, warps, rows > 64
                        )


class Chain:
    """Layers without attention, one behind the other, with weights of their own."""

    def __init__(self, rows: int, num_layers: int = _LAYERS) -> None:
        self.rows = rows
        self._layers = [
            {name: _weight(*size, 0) for name, size in _SIZES.items()} for _ in range(num_layers)
        ]
        self._gain = torch.rand(4096, device="cuda", dtype=_BF16)
        self._given = torch.randn(rows, 4096, device="cuda", dtype=_BF16)
        self._x = self._given.clone()

    def step(self, chosen: dict[str, Chosen]) -> None:
        x, scheme = self._x, InputScheme()
        x.copy_(self._given)
        how: dict[str, Any] = {"pdl": True, "is_early": True}
        norm: dict[str, Any] = {"norm_weight": self._gain, "eps": _EPS, **how}
        for layer in self._layers:

            def product(
                name: str,
                rows: QuantisedRows,
                residual: Tensor | None = None,
                layer: dict[str, SmallWeight] = layer,
            ) -> Tensor:
                return _product(rows, layer[name], residual, chosen[name].config)

            qkv = product("qkv", quantise_rows(x, scheme, **norm))
            product("o", quantise_rows(qkv[:, :4096], scheme, **how), x)
            rows = quantise_rows(x, scheme, **norm)
            if chosen["gate, up"].is_gated:
                rows = _gated(rows, layer["gate, up"], chosen["gate, up"].config)
            else:
                both = product("gate, up", rows)
                rows = quantise_rows(both, scheme, activation="silu", **how)
            product("down", rows, x)

    def layer_us(self, all_chosen: Sequence[dict[str, Chosen]]) -> list[float]:
        """Each one's time of a layer, measured in turns; infinite: it fails."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        graphs: list[torch.cuda.CUDAGraph | None] = []
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for chosen in all_chosen:
                graph = torch.cuda.CUDAGraph()
                try:
                    self.step(chosen)
                    with torch.cuda.graph(graph, stream=stream):
                        self.step(chosen)
                except Exception as error:
                    print(f"{chosen}: {repr(error)[:200]}", flush=True)
                    graphs.append(None)
                    continue
                graph.replay()
                graphs.append(graph)
            times: list[list[float]] = [[] for _ in graphs]
            for _ in range(_TURNS):
                for each, own in zip(graphs, times, strict=True):
                    if each is not None:
                        own.append(elapsed_us(each.replay) / len(self._layers))
        torch.cuda.current_stream().wait_stream(stream)
        return [statistics.median(own) if own else float("inf") for own in times]


def _product(
    x: QuantisedRows, weight: SmallWeight, residual: Tensor | None, config: HopperConfig | None
) -> Tensor:
    if config is not None:
        return hopper_scaled(x, weight, residual=residual, out=residual, config=config, pdl=True)
    other = choose(x.num_rows, weight.num_out, weight.num_in, group=0)
    if other is not None:
        return scaled_linear(x, weight, residual=residual, out=residual, config=other, pdl=True)
    y = library(x, weight)
    return y if residual is None else residual.add_(y)


def _gated(x: QuantisedRows, weight: SmallWeight, config: HopperConfig | None) -> QuantisedRows:
    assert config is not None
    y, maxima = hopper_scaled_gated(x, weight, "silu", config=config, pdl=True)
    return quantise_known(y, maxima, InputScheme(), pdl=True)


def _choices(name: str, rows: int) -> list[Chosen]:
    """For a product, in a chain."""
    n, k = _SIZES[name]
    some = [Chosen(), *(Chosen(config) for config in hopper_candidates(n, k, rows, 1))]
    if name == "gate, up":
        some += [Chosen(config, True) for config in hopper_candidates(n // 2, k, rows, 2)]
    return list(dict.fromkeys(some))


def _compile_choice(name: str, rows: int, choices: Sequence[Chosen]) -> None:
    """And leaves out nothing: what is wrong is told when it is timed."""
    n, k = _SIZES[name]
    given = _inputs(n // 8, k, rows, 0)
    weight = given.weights[0]
    for choice in choices:
        try:
            if choice.is_gated:
                _gated(given.x, weight, choice.config)
            else:
                residual = given.residual if name in ("o", "down") else None
                _product(given.x, weight, residual, choice.config)
            torch.cuda.synchronize()
        except Exception as error:
            print(f"{name} {rows} {choice}: {repr(error)[:200]}", flush=True)


def measure_layer(save: Save, deadline: float, all_rows: Sequence[int]) -> list[dict[str, Any]]:
    """One product after the other gets what is fastest beside what the others have → what to add to
    the entries of a table."""
    started_s = time.monotonic()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(14, os.cpu_count() or 2), mp_context=context) as pool:
        futures = []
        for rows in all_rows:
            for name in _IN_CHAIN:
                choices = _choices(name, rows)
                parts = [choices[i : i + 6] for i in range(0, len(choices), 6)]
                futures += [pool.submit(_compile_choice, name, rows, part) for part in parts]
        for future in as_completed(futures):
            future.result()
    print(f"compiled in {time.monotonic() - started_s:.0f} s", flush=True)
    entries: list[dict[str, Any]] = []
    for rows in all_rows:
        chain = Chain(rows)
        chosen = {name: Chosen() for name in _SIZES}
        plain = Chosen()
        steps: dict[str, Any] = {}
        for name in _IN_CHAIN:
            if time.monotonic() > deadline:
                return entries
            choices = _right_ones(name, rows, _choices(name, rows))
            times = chain.layer_us([{**chosen, name: each} for each in choices])
            ranked = sorted(zip(times, choices, strict=True), key=lambda each: each[0])
            chosen[name] = ranked[0][1]
            if name == "gate, up":
                plain = next(each for _, each in ranked if not each.is_gated)
            steps[name] = {
                "others": round(times[0], 2),
                "first": [[round(us, 2), repr(each)] for us, each in ranked[:6]],
            }
        before, after = chain.layer_us([{name: Chosen() for name in _SIZES}, chosen])
        save(f"layer {rows}", {"before": before, "after": after, **steps})
        for name in _IN_CHAIN:
            n, k = _SIZES[name]
            choice = plain if name == "gate, up" else chosen[name]
            gated = chosen[name] if chosen[name].is_gated else Chosen()
            entries.append(
                {
                    "form": name,
                    "m": rows,
                    "n": n,
                    "k": k,
                    "group": 0,
                    "hopper": None if choice.config is None else asdict(choice.config),
                    "gated": None if gated.config is None else asdict(gated.config),
                }
            )
        del chain
        torch.cuda.empty_cache()
    return entries


def _right_ones(name: str, rows: int, choices: Sequence[Chosen]) -> list[Chosen]:
    """Those that are near float64, of some rows of a weight."""
    _, k = _SIZES[name]
    x = QuantisedRows(_codes(rows, k), torch.rand(1, rows, device="cuda").t())
    weight = _weight(512, k, 0)
    product = _expected(x, weight)
    gate, up = product.to(_BF16).double().chunk(2, 1)
    gated = torch.nn.functional.silu(gate) * up
    right = []
    for choice in choices:
        if choice.config is None:
            off = 0.0
        elif choice.is_gated:
            got, _ = hopper_scaled_gated(x, weight, "silu", config=choice.config)
            off = _error(got, gated)
        else:
            off = _error(hopper_scaled(x, weight, config=choice.config), product)
        if off < 1e-2:
            right.append(choice)
        else:
            print(f"WRONG {name} {rows} {choice}: {off}", flush=True)
    return right


def _write_table(entries: Sequence[dict[str, Any]], environment: Any) -> None:
    """What was measured now takes the place of what was before."""
    names = ("m", "n", "k", "group")
    known = json.loads(TABLE.read_text())["entries"] if TABLE.exists() else []
    by_shape: dict[tuple[Any, ...], dict[str, Any]] = {}
    for entry in [*known, *entries]:
        own = by_shape.setdefault(tuple(entry[name] for name in names), {})
        own |= {key: value for key, value in entry.items() if key != "next"}
    kept = [entry for _, entry in sorted(by_shape.items())]
    TABLE.write_text(json.dumps({"environment": environment, "entries": kept}, indent=1) + "\n")


def measure_rows(save: Save, deadline: float) -> None:
    """What makes activations small."""
    for rows in (1, 32, 256, 8192):
        for group in (0, GROUP):
            scheme = InputScheme(group=group)
            gain = torch.rand(4096, device="cuda", dtype=_BF16)
            num_sets = num_sets_for(rows * 8192)
            x = [torch.randn(rows, 4096, device="cuda", dtype=_BF16) for _ in range(num_sets)]
            forms: dict[str, Callable[[int], object]] = {
                "norm": lambda i: quantise_rows(x[i], scheme, norm_weight=gain, eps=_EPS, pdl=True),
                "plain": lambda i: quantise_rows(x[i], scheme, pdl=True),
            }
            for form, call in forms.items():
                us = time_us(call, num_sets)
                save(f"rows {form} {rows} group {group}",
                     {"us": us, "tb_per_s": rows * 4096 * 3e-6 / us})  # fmt: skip
            num_sets = num_sets_for(rows * 28672 * 2)
            wide = [torch.randn(rows, 28672, device="cuda", dtype=_BF16) for _ in range(num_sets)]
            us = time_us(
                lambda i: quantise_rows(wide[i], scheme, activation="silu", pdl=True), num_sets
            )
            save(f"rows gated {rows} group {group}",
                 {"us": us, "tb_per_s": rows * 14336 * 5e-6 / us})  # fmt: skip
            if time.monotonic() > deadline:
                return


_FEW = [
    FewConfig(4, 2048, 4),
    FewConfig(8, 2048, 4),
    FewConfig(8, 1024, 2),
    FewConfig(16, 1024, 2),
    FewConfig(4, 1024, 2),
    FewConfig(8, 4096, 8),
    FewConfig(16, 2048, 4),
    FewConfig(4, 2048, 4, num_stages=2),
    FewConfig(8, 2048, 4, num_stages=2),
]
_FORMS = ("fp8 both", "int4")


def _layer(form: str) -> dict[str, SmallWeight]:
    layer = {}
    for name, (n, k) in _SIZES.items():
        if form == "int4":
            codes = torch.randint(-8, 8, (n, k), dtype=torch.int8, device="cuda")
            scale = torch.rand(n, k // GROUP, device="cuda") / 64
            layer[name] = SmallWeight(pack_nibbles(codes), scale, None, k)
        else:
            layer[name] = _weight(n, k, GROUP if form == "blocks" else 0)
    return layer


def _few_calls(
    form: str, config: FewConfig, rows: int, layers: list[dict[str, SmallWeight]]
) -> dict[str, Callable[[int], object]]:
    """The products of a layer, by data set; the last is one behind the other."""
    inputs = None
    if form in ("fp8 both", "blocks"):
        inputs = InputScheme(group=GROUP if form == "blocks" else 0)
    x = torch.randn(rows, 4096, device="cuda", dtype=_BF16)
    wide = torch.randn(rows, 14336, device="cuda", dtype=_BF16)
    gain = torch.rand(4096, device="cuda", dtype=_BF16)
    common: dict[str, Any] = {"inputs": inputs, "config": config, "pdl": True}

    normed: dict[str, Any] = {"norm_weight": gain, "eps": _EPS, **common}
    calls: dict[str, Callable[[int], object]] = {
        "qkv": lambda i: small_linear(x, layers[i]["qkv"], **normed),
        "o": lambda i: small_linear(x, layers[i]["o"], residual=x, out=x, **common),
        "gate, up": lambda i: small_linear(
            x, layers[i]["gate, up"], activation="silu", out=wide, **normed
        ),
        "down": lambda i: small_linear(wide, layers[i]["down"], residual=x, out=x, **common),
    }
    parts = list(calls.values())
    return {**calls, "all": lambda i: [part(i) for part in parts]}


def _compile_few(form: str, rows: int, configs: Sequence[FewConfig]) -> None:
    layer = _layer(form)
    for config in configs:
        try:
            _few_calls(form, config, rows, [layer])["all"](0)
            torch.cuda.synchronize()
        except Exception:  # It is reported when it is timed.
            pass


def measure_few(save: Save, deadline: float) -> None:
    jobs = [(form, 1) for form in _FORMS]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(12, mp_context=context) as pool:
        futures = [pool.submit(_compile_few, *job, [config]) for job in jobs for config in _FEW]
        for future in as_completed(futures):
            future.result()
    for form, rows in jobs:
        layers = [_layer(form) for _ in range(13)]
        for config in _FEW:
            if time.monotonic() > deadline:
                return
            label = f"few {form} {rows} {list(asdict(config).values())}"
            try:
                calls = _few_calls(form, config, rows, layers)
                save(label, {name: round(time_us(call, len(layers), replays=3), 2)
                             for name, call in calls.items()})  # fmt: skip
            except Exception as error:
                save(label, {"failed": repr(error)[:200]})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--parts", default="library,tiles,layer,rows,few")
    parser.add_argument("--budget", type=float, default=600)
    parser.add_argument("--rows", default=",".join(map(str, ROWS)))
    parser.add_argument("--groups", default=f"0,{GROUP}")
    parser.add_argument("--output", type=Path, default=None)
    parser.add_argument("--write-table", action="store_true")
    args = parser.parse_args()
    output = result_path(args.output, "scaled_tune")
    deadline = time.monotonic() + args.budget
    ceilings = measure_ceilings(torch.device("cuda"))
    result: dict[str, Any] = {
        "environment": describe_environment(),
        "ceilings": vars(ceilings),
        "points": {},
    }

    def save(label: str, figures: dict[str, Any]) -> None:
        result["points"][label] = figures
        print(label, {key: round(value, 3) if isinstance(value, float) else value
                      for key, value in figures.items()}, flush=True)  # fmt: skip
        output.write_text(json.dumps(result, indent=1) + "\n")

    for part in args.parts.split(","):
        if part == "library":
            measure_library(save, deadline)
        elif part == "rows":
            measure_rows(save, deadline)
        elif part == "few":
            measure_few(save, deadline)
        else:
            groups = [int(each) for each in args.groups.split(",")]
            rows = [int(each) for each in args.rows.split(",")]
            if part == "layer":
                entries = measure_layer(save, deadline, rows)
            else:
                entries = measure_tiles(save, deadline, groups, rows)
            if args.write_table:
                _write_table(entries, result["environment"])


if __name__ == "__main__":
    main()
