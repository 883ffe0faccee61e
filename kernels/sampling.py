"""Drawing the next token of every row: see reference_sampling.sample for what is drawn.

No sort. A token's weight is its probability over that of the most likely one,
as an integer, so that sums do not depend on their order and any number of programs may share a row.
The kernels are in sampling_jit.py and sampling_limits.py.

1. `maxima`: the most likely token of every part of a row.
2. `limits` (sampling_limits): that of the row, which ends greedy rows; of rows with top-k or top-p,
   how many tokens are at least as likely as each of a few values.
3. `race`: the first arrival in every part of a row; the last program of a row finds the winner.
   Of a row with limits the tokens that may be kept are gathered instead. Where they are too many,
   those that are surely kept race where they are, and only the others are gathered.
4. `end_rows`: one program for each row with limits finds out which of the gathered tokens are kept,
   and races those: random bits are made for them alone. Where they were too many it reads the row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from baton.kernels.reference_sampling import NOTHING_LEFT
from baton.kernels.sampling_jit import end_rows, maxima, race
from baton.kernels.sampling_limits import limits

_MAX_SPLITS = 128
MAX_VOCAB = 1 << 20
_FINEST = 44  # bits of a weight
_MAX_WAYS = 32
_PROGRAMS = 8 * 132


class DrawConfig(NamedTuple):
    """Tokens at a time: of the launches, and of the end of a row's search.

    Attributes:
        count_unroll: blocks of the second launch that are read at once.
        ways: thresholds of the second launch, at most 32.
        room: tokens of a row that can be gathered.
        end_warps: of the fourth launch; 0: the last program of a row in the third ends it.
        count_registers, race_registers: at most, for each thread of the second and the third.
    """

    max_block: int
    count_block: int
    race_block: int
    search_block: int
    count_unroll: int = 4
    ways: int = 16
    room: int = 16384
    max_warps: int = 4
    race_warps: int = 4
    end_warps: int = 8
    end_block: int = 1024
    programs: int = _PROGRAMS
    count_registers: int | None = 80
    race_registers: int | None = 96


@dataclass(frozen=True)
class SamplingScratch:
    """Memory between the launches; what it holds before a draw does not matter.

    Attributes:
        part_value: float32 [rows, 128], part_token: int32 [rows, 128], the best of each part.
        row_value: float32 [rows, 2], the maximum and the lowest kept (+inf: nothing to draw).
        arrivals: int32 [rows, 2], tokens gathered; programs that are done, of the last launch.
        thresholds: float32 [rows, 32]; counts: int32 [rows, 32] and weights: int64 [rows, 34], sums
            of the tokens that have at least each, then of all, and of those surely kept.
        distances, tokens: int32 [rows, room], what is gathered.
        near: int32 [rows, c], distances among which the search ends.
    """

    part_value: Tensor
    part_token: Tensor
    row_value: Tensor
    arrivals: Tensor
    thresholds: Tensor
    counts: Tensor
    weights: Tensor
    distances: Tensor
    tokens: Tensor
    near: Tensor


def make_sampling_scratch(
    max_rows: int, vocab: int, device: torch.device, config: DrawConfig | None = None
) -> SamplingScratch:
    """Work for `draw` with at most so many rows and tokens."""
    config = config or _config(max_rows, vocab)

    def empty(columns: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(max_rows, columns, dtype=dtype, device=device)

    return SamplingScratch(
        part_value=empty(_MAX_SPLITS, torch.float32),
        part_token=empty(_MAX_SPLITS, torch.int32),
        row_value=empty(2, torch.float32),
        arrivals=empty(2, torch.int32),
        thresholds=empty(_MAX_WAYS, torch.float32),
        counts=empty(_MAX_WAYS, torch.int32),
        weights=empty(_MAX_WAYS + 2, torch.int64),
        distances=empty(config.room, torch.int32),
        tokens=empty(config.room, torch.int32),
        near=empty(config.search_block, torch.int32),
    )


def draw(
    logits: Tensor,
    rows: Tensor,
    context_lens: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    stream: Tensor,
    token_ids: Tensor,
    *,
    out: Tensor | None = None,
    work: SamplingScratch | None = None,
    config: DrawConfig | None = None,
    back: Tensor | None = None,
    changed: Tensor | None = None,
    is_changed: Tensor | None = None,
    pdl: bool = False,
) -> Tensor:
    """Draws one token per row, with the parameters of the row's slot → int32 [R].

    The same logits, parameters and position give the same token in any batch. The lowest token wins
    a tie. A row whose logits hold a NaN or +inf gets −1, one that has nothing but −inf gets
    NOTHING_LEFT; their slots keep the last token, which the next step can still look up. A row of
    padding gets −1.

    Args:
        logits: float32, bfloat16 or float16 [R, vocab]; tokens of a row adjacent.
        rows: int32 [R], each row's slot, distinct but where there is `back`; −1 is padding.
        context_lens: int32 [S], the position that the drawn token will have.
        temperature: float32 [S]; 0 takes the most likely token.
        top_k: int32 [S]; 0 keeps all.
        top_p, min_p: float32 [S]; 1 and 0 keep all.
        stream: int64 [S], random state before the position is mixed in.
        token_ids: int32 [S], gets the drawn tokens.
        out: int32 [R].
        work: of make_sampling_scratch, for no fewer rows and no fewer tokens.
        back: int32 [R], how far before its slot's position a row draws; of several rows of a slot
            any may win `token_ids`. None: nowhere.
        changed: float32 [≥ R, vocab], the logits of those rows whose slot says so in `is_changed`,
            int32 [S]; the others are as in `logits`.
        pdl: launched to overlap the end of the kernel before.
    """
    num_rows, vocab = logits.shape
    if vocab > MAX_VOCAB or logits.stride(1) != 1:
        raise ValueError(f"logits must have at most {MAX_VOCAB} adjacent tokens")
    if out is None:
        out = torch.empty(num_rows, dtype=torch.int32, device=logits.device)
    if num_rows == 0:
        return out
    config = config or _config(num_rows, vocab)
    work = work or make_sampling_scratch(num_rows, vocab, logits.device, config)
    options: dict[str, int | bool] = {"launch_pdl": True} if pdl else {}
    max_splits, blocks = _splits(num_rows, vocab, config.max_block, config.programs)
    parts = (work.part_value, work.part_token)
    sums = (work.thresholds, work.counts, work.weights)
    changed_stride = 0 if changed is None else changed.stride(0)
    of_changed = (changed, is_changed, changed_stride)
    shape = (vocab, logits.stride(0))
    maxima[(num_rows, max_splits)](
        logits,
        rows,
        *parts,
        work.arrivals,
        work.counts,
        work.weights,
        *shape,
        blocks,
        *of_changed,
        BLOCK=config.max_block,
        WAYS=config.ways,
        MAX_WAYS=_MAX_WAYS,
        MAX_SPLITS=_MAX_SPLITS,
        PDL=pdl,
        num_warps=config.max_warps,
        **options,
    )
    span = config.count_block * config.count_unroll
    splits, blocks = _splits(num_rows, vocab, span, config.programs)
    limits[(num_rows, splits)](
        logits,
        rows,
        temperature,
        top_k,
        top_p,
        min_p,
        *parts,
        work.row_value,
        *sums,
        token_ids,
        out,
        *shape,
        blocks,
        max_splits,
        *of_changed,
        BLOCK=config.count_block,
        UNROLL=config.count_unroll,
        SAMPLE=min(1024, triton.next_power_of_2(vocab)),
        WAYS=config.ways,
        ONE=largest_weight(vocab),
        MAX_WAYS=_MAX_WAYS,
        MAX_SPLITS=_MAX_SPLITS,
        NOTHING_LEFT=NOTHING_LEFT,
        PDL=pdl,
        num_warps=8,
        maxnreg=config.count_registers,
        **options,
    )
    splits, blocks = _splits(num_rows, vocab, config.race_block, config.programs)
    if config.race_registers:
        options["maxnreg"] = config.race_registers
    race[(num_rows, splits)](
        logits,
        rows,
        temperature,
        top_k,
        top_p,
        stream,
        context_lens,
        back,
        *parts,
        work.row_value,
        work.arrivals,
        *sums,
        work.distances,
        work.tokens,
        work.near,
        token_ids,
        out,
        *shape,
        blocks,
        work.distances.stride(0),
        work.near.stride(0),
        *of_changed,
        BLOCK=config.race_block,
        SEARCH=config.search_block,
        WAYS=config.ways,
        ONE=largest_weight(vocab),
        MAX_WAYS=_MAX_WAYS,
        MAX_SPLITS=_MAX_SPLITS,
        HAS_BACK=back is not None,
        ENDS_LIMITED=config.end_warps == 0,
        PDL=pdl,
        num_warps=config.race_warps,
        **options,
    )
    if config.end_warps:
        options.pop("maxnreg", None)
        end_rows[(num_rows,)](
            logits,
            rows,
            temperature,
            top_k,
            top_p,
            stream,
            context_lens,
            back,
            *parts,
            work.row_value,
            work.arrivals,
            *sums,
            work.distances,
            work.tokens,
            work.near,
            token_ids,
            out,
            *shape,
            splits,
            work.distances.stride(0),
            work.near.stride(0),
            *of_changed,
            BLOCK=config.end_block,
            SEARCH=config.search_block,
            WAYS=config.ways,
            ONE=largest_weight(vocab),
            MAX_WAYS=_MAX_WAYS,
            MAX_SPLITS=_MAX_SPLITS,
            HAS_BACK=back is not None,
            PDL=pdl,
            num_warps=config.end_warps,
            **options,
        )
    return out


def largest_weight(vocab: int) -> float:
    """That of the most likely token: as fine as 63 bits allow, in which all may be as likely."""
    return 2.0 ** min(_FINEST, 63 - vocab.bit_length())


def _config(num_rows: int, vocab: int) -> DrawConfig:
    """Of variants measured on an H200: few rows are spared a launch, more of them have programs
    that leave room for one another."""
    most = max(16, triton.next_power_of_2(vocab))
    is_few = num_rows <= 4
    return DrawConfig(
        max_block=min(most, 1024 if is_few else 2048),
        count_block=min(most, 256),
        count_unroll=4 if most >= 1024 else 1,
        race_block=min(most, 1024),
        search_block=min(most, 4096),
        room=min(most, 16384),
        max_warps=8 if is_few else 4,
        race_warps=8 if is_few else 4,
        end_warps=0 if is_few else 8,
        end_block=min(most, 1024),
        count_registers=None if is_few else 80,
        race_registers=128 if is_few else 80,
    )


def _splits(num_rows: int, vocab: int, block: int, programs: int) -> tuple[int, int]:
    """Into how many parts a row is split, and how many blocks each has."""
    blocks = triton.cdiv(vocab, block)
    wanted = max(1, min(_MAX_SPLITS, blocks, triton.cdiv(programs, num_rows)))
    each = triton.cdiv(blocks, wanted)
    return triton.cdiv(blocks, each), each
