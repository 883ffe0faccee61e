"""What kept states bring, and cost: `python -m benchmarks.simulated.prefix_reuse TRACE`.

Goes through a trace's prompts, one after another, with the engine's own admission, pools and prefix
cache, and no model. The trace is of Mooncake's form: it knows of prompts in blocks of 512 tokens,
so that is where their ends, and the branches between them, are taken to be; answers are not in it,
and nothing is kept of them, as in a prefill worker.

    blocks alone   a model whose layers all attend, with as many blocks: the most that there is
    no states      none are kept
    ends           at the end of each prompt
    branches       there, and where prompts were seen to branch: what the engine does
    every N        there, and behind every N tokens: what others do

A state that is kept is written once more, and one that is begun with is copied.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from baton.loadtest.environment import describe_environment
from baton.loadtest.traces import BLOCK_TOKENS, Recorded, read_trace
from baton.services.prefill.scheduler import Admission
from baton.services.worker import stops as engine_stops
from baton.services.worker.admission import Admitter
from baton.services.worker.sequence_table import SequenceTable
from baton.shared.engine.models import registry
from baton.shared.kv.block_hash import chain_hashes, root_hash
from baton.shared.kv.cache_spec import CacheGroup, cache_groups
from baton.shared.kv.capacity import Capacity, GroupShare
from baton.shared.kv.pools import Pools
from baton.shared.kv.sequence import AttemptKey
from baton.shared.kv.sequence import Sequence as Seq
from baton.shared.model_files.info import open_config
from baton.shared.sampling import SamplingParams
from benchmarks.checkout import RESULTS
from models.dummy_model import SHAPES, write_dummy_model

_CACHE_ITEMSIZE_BYTES = 2
_GIB = 1 << 30
_LONGEST_TOKENS = 1 << 20

Stops = Callable[[Seq], Sequence[int]]
Run = tuple[str, Sequence[CacheGroup], int, Stops]
"""Name of the policy, groups, slots, and where a prompt's states are kept."""


@dataclass(frozen=True, slots=True)
class Row:
    policy: str
    num_slots: int
    state_gib: float
    block_gib: float
    hit_share: float
    """Of all prompt tokens, those that were not computed."""
    kept_a_prompt: float
    """States that were kept, per prompt."""
    restored_a_prompt: float
    copied_mib_a_prompt: float
    states_only_share: float
    """Of all prompt tokens, those of which states were computed anew though their blocks were
    there."""


def main(argv: Sequence[str] | None = None) -> None:
    args = _parse_args(argv)
    # A block of the trace is 32 of the engine's: none is too few to keep a state for.
    engine_stops.LEAST_GAIN_BLOCKS = 1
    requests = [each for each in read_trace(args.trace) if each.blocks][: args.requests]
    groups = _groups(args.shape)
    growing = [group for group in groups if group.spec.grows]
    slot_bytes, token_bytes = _slot_bytes(groups), _token_bytes(groups)
    print(
        f"{args.shape}: {slot_bytes / 2**20:.1f} MiB a state, {token_bytes} bytes a token; "
        f"{len(requests)} prompts"
    )
    policies: dict[str, Stops] = {"ends": _ends, "branches": lambda sequence: sequence.stops}
    policies |= {f"every {every}": _every(every) for every in args.every}
    rows = []
    for block_gib in args.block_gib:
        num_blocks = int(block_gib * _GIB) // (token_bytes * BLOCK_TOKENS)
        runs: list[Run] = [
            ("blocks alone", growing, 0, _nowhere),
            ("no states", groups, 1, _nowhere),
        ]
        for num_slots in args.slots:
            runs += [(name, groups, num_slots, stops) for name, stops in policies.items()]
        for run in runs:
            rows.append(_run(requests, num_blocks, *run))
            _print(rows[-1])
    result = {
        "environment": describe_environment(),
        "trace": args.trace.name,
        "num_prompts": len(requests),
        "mean_prompt_tokens": sum(each.prompt_tokens for each in requests) / len(requests),
        "shape": args.shape,
        "slot_bytes": slot_bytes,
        "token_bytes": token_bytes,
        "rows": [asdict(row) for row in rows],
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written to {args.output}")


def _run(
    requests: Sequence[Recorded],
    num_blocks: int,
    policy: str,
    groups: Sequence[CacheGroup],
    num_slots: int,
    stops: Stops,
) -> Row:
    """All prompts, one by one. A token of the simulation is a block of the trace."""
    counts = [num_blocks if group.spec.grows else num_slots for group in groups]
    shares = [GroupShare(n, None if group.spec.grows else 1) for n, group in enumerate(groups)]
    pools = Pools(groups, Capacity(1, tuple(counts), tuple(shares), _LONGEST_TOKENS))
    table = SequenceTable()
    # Its sealer is asked of sequences alone that distrust what is cached.
    sealer: Any = None
    admitter = Admitter(pools, sealer, table, lambda _: None, keeps_states=bool(num_slots))
    num_tokens = num_hit = num_replayed = num_kept = num_restored = 0
    for number, request in enumerate(requests):
        sequence = _sequence(number, request)
        table.add(sequence, None)
        if admitter.try_admit(sequence, reads=False) is not Admission.ADMIT:
            raise SystemExit(f"a prompt of {request.prompt_tokens} tokens does not fit")
        sources = admitter.take_sources(sequence)
        for group, slot in sources.items():
            pools.of(group).release([slot])
        num_tokens += request.prompt_tokens
        num_hit += sequence.num_cached_tokens * BLOCK_TOKENS
        num_replayed += (sequence.num_stored_tokens - sequence.num_cached_tokens) * BLOCK_TOKENS
        num_restored += bool(sources)
        num_kept += _compute(pools, sequence, stops(sequence))
        table.remove(sequence.key)
        pools.release(sequence.block_tables)
        admitter.forget(sequence)
    num_prompts, slot_bytes = len(requests), _slot_bytes(groups)
    return Row(
        policy,
        num_slots,
        num_slots * slot_bytes / _GIB,
        num_blocks * _token_bytes(groups) * BLOCK_TOKENS / _GIB,
        num_hit / num_tokens,
        num_kept / num_prompts,
        num_restored / num_prompts,
        (num_kept + num_restored) * slot_bytes / 2**20 / num_prompts,
        num_replayed / num_tokens,
    )


def _sequence(number: int, request: Recorded) -> Seq:
    """Its last block of the trace is behind all others, so that these may be found."""
    token_ids = request.blocks
    if request.prompt_tokens % BLOCK_TOKENS == 0:
        # The last token of a prompt is always computed: so is what would be a block of it here.
        token_ids = (*token_ids, (1 << 31) + number)
    sequence = Seq(AttemptKey(str(number), 0, 1), token_ids, SamplingParams())
    sequence.block_hashes = chain_hashes(root_hash("a" * 64), token_ids[:-1], 1)
    return sequence


def _compute(pools: Pools, sequence: Seq, stops: Sequence[int]) -> int:
    """Seals its blocks, and keeps states where it stops → how many of those are found."""
    growing = [number for number, group in enumerate(pools.groups) if group.spec.grows]
    hashes, token_ids, num_kept = sequence.block_hashes, sequence.prompt_token_ids, 0
    is_found = False
    wanted = set(stops)
    for index in range(sequence.num_cached_tokens, len(hashes)):
        if index >= sequence.num_stored_tokens:
            for group in growing:
                block_id = sequence.block_tables[group][index]
                pools.prefix_cache.seal(group, block_id, hashes, index, token_ids[index:][:1], (0,))
        if (
            pools.slot_groups
            and index + 1 in wanted
            and all(pools.of(group).num_free for group in pools.slot_groups)
        ):
            for group in pools.slot_groups:
                [slot] = pools.of(group).allocate(1)
                tokens = token_ids[index : index + 1]
                is_found = pools.prefix_cache.seal(group, slot, hashes, index, tokens, (0,))
                pools.of(group).release([slot])
            num_kept += is_found
    return num_kept


def _ends(sequence: Seq) -> Sequence[int]:
    return (sequence.num_prompt_tokens - 1,)


def _nowhere(sequence: Seq) -> Sequence[int]:
    return ()


def _every(num_tokens: int) -> Stops:
    step = num_tokens // BLOCK_TOKENS
    return lambda sequence: [*range(step, sequence.num_prompt_tokens - 1, step), *_ends(sequence)]


def _groups(shape: str) -> tuple[CacheGroup, ...]:
    with tempfile.TemporaryDirectory() as directory:
        path = write_dummy_model(Path(directory), SHAPES[shape], has_tokenizer=False)
        _, config = registry.configure(open_config(path))
    groups = cache_groups(config.cache_specs)
    # As the engine has them: states last.
    return tuple(sorted(groups, key=lambda group: not group.spec.grows))


def _slot_bytes(groups: Sequence[CacheGroup]) -> int:
    return sum(group.constant_bytes for group in groups)


def _token_bytes(groups: Sequence[CacheGroup]) -> int:
    growing = [group for group in groups if group.spec.grows]
    return sum(group.block_bytes(1, _CACHE_ITEMSIZE_BYTES) for group in growing)


def _print(row: Row) -> None:
    print(
        f"{row.block_gib:6.0f} + {row.state_gib:5.1f} GiB  {row.policy:12} "
        f"{row.num_slots:5} slots  "
        f"hit {row.hit_share:6.1%}  states alone {row.states_only_share:6.1%}  "
        f"kept {row.kept_a_prompt:5.2f}, begun with {row.restored_a_prompt:4.2f}, "
        f"copied {row.copied_mib_a_prompt:6.1f} MiB a prompt",
        flush=True,
    )


def _parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.simulated.prefix_reuse",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("trace", type=Path, help="of Mooncake's form, with the prefixes that prompts share")
    add("--shape", choices=SHAPES, default="qwen3.5-35b-a3b")
    add("--block-gib", type=float, nargs="+", default=[32.0, 512.0], help="memory of blocks")
    add("--slots", type=int, nargs="+", default=[64, 256, 1024, 4096], help="of states")
    add("--every", type=int, nargs="*", default=[2048, 8192], help="tokens between states")
    add("--requests", type=int, help="the first so many; default: all")
    add("--output", type=Path, default=RESULTS / "prefix_reuse_states.json")
    return parser.parse_args(argv)


if __name__ == "__main__":
    started_s = time.perf_counter()
    main()
    print(f"{time.perf_counter() - started_s:.0f} s")
