"""What `python -m benchmarks.gpu.kernels` measures: every kernel at a few shapes of Llama-3.1-8B.

Each function yields points: a call of ours, the bytes and operations it cannot do without, and the
best that a library offers for it. Kernels are imported where they are used, so that one that
cannot be imported stops only its own points. A point is measured before the next one is made.
"""

# ruff: noqa: B023

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from baton.kernels.linear_table import choose
from benchmarks.gpu.attention_points import (
    decode_attention,
    prefill_attention,
    rope_and_store,
    split_prefill_attention,
)
from benchmarks.gpu.expert_points import experts_around, experts_product, small_experts_product
from benchmarks.gpu.gpu_timing import Call, Point, num_sets_for
from benchmarks.gpu.latent_points import latent_decode, latent_heads, latent_prefill
from benchmarks.gpu.linear_tune import Data, forms_of
from benchmarks.gpu.recurrent_points import delta_mixer
from benchmarks.gpu.shaping_points import shaping
from benchmarks.gpu.small_points import small_linear_points
from models.dummy_model import SHAPES

HIDDEN, FFN, VOCAB = 4096, 14336, 128256
_BF16 = torch.bfloat16


def linear() -> Iterator[Point]:
    for plain, fused in forms_of(SHAPES["llama-8b"].fields):
        data = Data(plain)
        for rows in (1, 8, 32, 64, 128, 256):
            for form in (plain, fused):
                config = choose(rows, form.n, form.k, _BF16, fused=form.fused)
                library = data.library(form, rows)
                yield Point(
                    f"{form.name} {rows}",
                    library if config is None else data.skinny(form, rows, config),
                    num_bytes=2 * (form.n * form.k + rows * (form.n + form.k)),
                    flop=2 * rows * form.n * form.k,
                    num_sets=data.num_sets,
                    library={"cuBLAS": library},
                    note="cuBLAS" if config is None else f"{config.variant} /{config.split_k}",
                )
        del data


def rms_norm() -> Iterator[Point]:
    from baton.kernels.rms_norm import rms_norm

    weight = torch.randn(HIDDEN, dtype=_BF16, device="cuda")
    for rows in (1, 32, 256, 2048, 8192):
        num_sets = num_sets_for(2 * rows * HIDDEN * 4)
        x = [torch.randn(rows, HIDDEN, dtype=_BF16, device="cuda") for _ in range(num_sets)]
        residual = [torch.randn_like(each) for each in x]
        out = torch.empty_like(x[0])

        def ours(i: int) -> None:
            rms_norm(x[i], weight, 1e-5, residual=residual[i], out=out)

        def torch_ops(i: int) -> None:
            functional.rms_norm(residual[i].add_(x[i]), (HIDDEN,), weight, 1e-5)

        yield Point(
            f"{rows} + residual",
            ours,
            num_bytes=2 * rows * HIDDEN * 4,
            num_sets=num_sets,
            library={"torch": torch_ops},
        )


def gated_mul() -> Iterator[Point]:
    from baton.kernels.gated_mul import gated_mul

    for rows in (1, 32, 256, 2048, 8192):
        num_sets = num_sets_for(2 * rows * FFN * 3)
        x = [torch.randn(rows, 2 * FFN, dtype=_BF16, device="cuda") for _ in range(num_sets)]
        out = torch.empty(rows, FFN, dtype=_BF16, device="cuda")

        def ours(i: int) -> None:
            gated_mul(x[i], out=out)

        def torch_ops(i: int) -> None:
            torch.mul(functional.silu(x[i][:, :FFN]), x[i][:, FFN:], out=out)

        yield Point(
            str(rows),
            ours,
            num_bytes=2 * rows * FFN * 3,
            num_sets=num_sets,
            library={"torch": torch_ops},
        )


def block_digest() -> Iterator[Point]:
    from baton.kernels.block_digest import block_sums

    num_words = 65536  # 2 MiB in 8 heads
    words = torch.randint(-(2**31), 2**31 - 1, (1024, 8, num_words), device="cuda").to(torch.int32)
    for count in (1, 16, 64, 512):
        num_sets = min(num_sets_for(count * 2**21), 1024 // count)
        ids = torch.randperm(1024, device="cuda", dtype=torch.int32)
        out = torch.empty(count, 8, dtype=torch.int64, device="cuda")

        def ours(i: int) -> None:
            block_sums(words, ids[i * count : (i + 1) * count], out=out)

        def torch_sum(i: int) -> None:
            torch.sum(words[i * count : (i + 1) * count], -1, out=out)

        yield Point(
            f"{count} × 2 MiB",
            ours,
            num_bytes=count * 2**21,
            num_sets=num_sets,
            library={"torch.sum": torch_sum},
        )


def sampling() -> Iterator[Point]:
    from baton.kernels.sampling import draw, make_sampling_scratch

    kinds: Sequence[tuple[str, float, int, float]] = [
        ("greedy", 0.0, 0, 1.0),
        ("temperature", 1.0, 0, 1.0),
        ("top-k 50, top-p 0.9", 1.0, 50, 0.9),
        ("top-p 0.9", 1.0, 0, 0.9),
    ]
    for count in (1, 32, 128, 256):
        num_sets = num_sets_for(2 * count * VOCAB)
        logits = [
            torch.randn(count, VOCAB, dtype=_BF16, device="cuda") * 3 for _ in range(num_sets)
        ]
        rows = torch.arange(count, dtype=torch.int32, device="cuda")
        context_lens = torch.full_like(rows, 100)
        stream = torch.randint(2**62, (count,), device="cuda")
        token_ids, out = torch.zeros_like(rows), torch.zeros_like(rows)
        work = make_sampling_scratch(count, VOCAB, torch.device("cuda"))
        for name, temperature, top_k, top_p in kinds:
            heat = torch.full((count,), temperature, device="cuda")
            keep = torch.full((count,), top_k, dtype=torch.int32, device="cuda")
            mass, least = torch.full_like(heat, top_p), torch.zeros_like(heat)

            def ours(i: int) -> None:
                draw(
                    logits[i], rows, context_lens, heat, keep, mass, least, stream, token_ids,
                    out=out, work=work,
                )  # fmt: skip

            def greedy(i: int) -> Tensor:
                return logits[i].argmax(-1)

            def race(i: int) -> Tensor:
                weights = logits[i].float().softmax(-1)
                return (weights / torch.empty_like(weights).exponential_()).argmax(-1)

            def sort(i: int) -> Tensor:
                return logits[i].sort(-1, descending=True).values

            libraries: dict[str, dict[str, Call]] = {
                "greedy": {"argmax": greedy},
                "temperature": {"torch": race},
            }
            yield Point(
                f"{count} {name}",
                ours,
                num_bytes=2 * count * VOCAB,
                num_sets=num_sets,
                library=libraries.get(name, {"sort only": sort}),
            )


def begin_step() -> Iterator[Point]:
    from baton.kernels.batch_state import begin_step

    for count in (1, 256):
        rows = torch.arange(count, dtype=torch.int32, device="cuda")
        tables = torch.zeros(1, count, 4096, dtype=torch.int32, device="cuda")
        context_lens = torch.zeros_like(rows)
        token_ids, inputs, positions = (torch.zeros_like(rows) for _ in range(3))
        slots = torch.zeros(1, count, dtype=torch.int64, device="cuda")

        def ours(_: int) -> None:
            begin_step(
                rows, token_ids, context_lens, tables, inputs, positions, slots, block_size=16
            )

        yield Point(str(count), ours, num_bytes=40 * count)


POINTS: dict[str, Callable[[], Iterator[Point]]] = {
    each.__name__: each
    for each in (
        linear, decode_attention, prefill_attention, split_prefill_attention, rope_and_store,
        rms_norm, gated_mul, block_digest, sampling, shaping, begin_step,
        experts_product, small_experts_product, experts_around,
        latent_decode, latent_heads, latent_prefill, delta_mixer,
    )
} | {"small_linear": small_linear_points}  # fmt: skip
