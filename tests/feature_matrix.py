"""README's tables of what is served and what goes with what: `make support-matrix`.

They are made of the code's own tables, and by asking small engines with random weights: a cell is
`yes` if one answers, and the answer shows that all that was asked for was at work. What is not
there and is meant to come is in ABSENT.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import re
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from baton.services.gateway.process import parse_args as gateway_args
from baton.services.worker import messages as msg
from baton.services.worker.process import parse_args as worker_args
from baton.services.worker.sequence_table import Recipient
from baton.services.worker.stepper import BatchLimits
from baton.shared.engine import device_choices
from baton.shared.engine.config import DEVICES, DTYPES, QUANTIZATIONS
from baton.shared.engine.model_runner import can_capture_prompts
from baton.shared.engine.models import quantization, registry
from baton.shared.engine.plain_loop import PlainLoop
from baton.shared.engine.quantised import gguf
from baton.shared.engine.weight_headers import FLOATS
from baton.shared.kv.sequence import AttemptKey, FinishReason, Sequence
from baton.shared.model_files.fields import ModelError
from baton.shared.sampling import SamplingParams
from baton.shared.token_masks import TokenMasks, num_mask_words
from baton.v1 import decode_service_pb2
from tests.unit.worker.conftest import CONFIGS, MakeRunner, runners
from tests.unit.worker.drafting import DraftingRunner, Planned
from tests.unit.worker.network import Clock
from tests.unit.worker.sim_worker import SimWorker
from tests.unit.worker.simulation import Cluster

KINDS: dict[str, dict[str, Any]] = {
    "full": {"kind": "full"},
    "windows": {"kind": "windowed"},
    "latents": {"kind": "latents"},
    "states": {"kind": "states", "state_checkpoints": 4},
    "transformers' code": {"kind": "full", "model_impl": "transformers"},
}
"""Kinds of layers, and whose code computes them: arguments of `make_runner`."""
PROMPT = (5, 9, 13, 7, 40, 5, 9, 13, 7, 40, 5, 9, 13, 7, 40, 5, 9)
LENGTH = 8
NUM_BLOCKS = 64
ALLOWED, BANNED = range(30, 61), range(46)
GUESS = 50
"""Of those that are allowed and not banned."""
DEVICE_NAMES = {
    "cpu": "a CPU, with torch",
    "cuda": "NVIDIA GPUs of compute capability {}.{} or newer, with Triton and CUDA graphs".format(
        *device_choices.MIN_CAPABILITY
    ),
}
ROLES = ("prefill", "decode")
PARAMS = SamplingParams(temperature=0.0, max_tokens=LENGTH, ignore_eos=True)


class OnlyAllowed:
    """Stands in for the matcher of a constraint."""

    num_taken = 0

    def take(self, token_ids: Seq[int]) -> None:
        self.num_taken += len(token_ids)

    def forced(self, most: int) -> tuple[int, ...]:
        return ()

    def num_allowed(self, token_ids: Seq[int]) -> int:
        return len(list(itertools.takewhile(ALLOWED.__contains__, token_ids)))

    def masks(self, draft_ids: Seq[int] = ()) -> TokenMasks:
        bits = np.zeros(32 * num_mask_words(CONFIGS["full"]["vocab_size"]), np.uint8)
        bits[list(ALLOWED)] = 1
        row = np.packbits(bits, bitorder="little").view(np.uint32)
        return np.tile(row, (1 + len(draft_ids), 1))


@dataclass
class Seen:
    """What came of one sequence."""

    sequence: Sequence
    token_ids: list[int] = field(default_factory=list)
    num_logprobs: int = 0
    num_prompt_logprobs: int = 0
    num_drafts: int = 0


@dataclass(frozen=True)
class Feature:
    """`asks`: fields of SamplingParams; `shows`: that it was at work."""

    asks: dict[str, Any]
    shows: Callable[[Seen], bool]
    is_constrained: bool = False
    guesses: bool = False


FEATURES = {
    "prefix cache": Feature({}, lambda seen: seen.sequence.num_cached_tokens > 0),
    "guesses": Feature({}, lambda seen: seen.num_drafts > 0, guesses=True),
    "structured output": Feature(
        {}, lambda seen: set(seen.token_ids) <= set(ALLOWED), is_constrained=True
    ),
    "penalties, bans": Feature(
        {"presence_penalty": 1.0, "logit_bias": tuple((token, -100.0) for token in BANNED)},
        lambda seen: not set(seen.token_ids) & set(BANNED),
    ),
    "logprobs": Feature({"logprobs": 2}, lambda seen: seen.num_logprobs == LENGTH),
    "prompt logprobs": Feature(
        {"prompt_logprobs": 2}, lambda seen: seen.num_prompt_logprobs == len(PROMPT) - 1
    ),
}
HAND_OFF, GPU, GRAPHS = "hand-off", "GPU kernels (Triton)", "CUDA graphs"
SMALL, SMALL_CACHE = "`--quantization`", "`--kv-cache-dtype fp8`"
EXACT = "[`exact`](docs/determinism.md) in float32 on a CPU"
ABSENT = {
    "one model on several GPUs": ("parallel", "rank"),
    "adapters": ("lora", "adapter"),
    "authentication and TLS": ("auth", "api-key", "tls", "ssl"),
}
"""What is planned, and what a flag for it would have in its name."""


class Engine:
    """One worker that computes and decodes; what its gateway hears."""

    def __init__(self, runner: Any) -> None:
        limits = BatchLimits(token_budget=32, max_num_seqs=4)
        self._worker = SimWorker("both", "ab" * 16, runner, self._hear, limits)
        self._seen: dict[int, Seen] = {}

    def run(self, params: SamplingParams, *, is_constrained: bool = False) -> Seen:
        number, num_drafts = len(self._seen), self._worker.counters["drafts"]
        matcher: Any = OnlyAllowed() if is_constrained else None
        sequence = Sequence(AttemptKey("r", number, 1), PROMPT, params, matcher=matcher)
        self._seen[number] = Seen(sequence)
        self._worker.inbox.put(msg.StartDecode(sequence, Recipient("g", number), None))
        self._worker.engine.run_once(may_wait=False)
        while self._worker.engine.num_sequences or self._worker.engine.is_busy:
            self._worker.engine.run_once(may_wait=False)
        self._seen[number].num_drafts = self._worker.counters["drafts"] - num_drafts
        return self._seen[number]

    def _hear(self, worker: SimWorker, mail: list[msg.Outgoing]) -> None:
        for message in mail:
            if not isinstance(message, msg.ToGateway):
                continue
            response: decode_service_pb2.DecodeResponse = message.message
            assert not response.HasField("failed"), response.failed.failure.message
            for slot, token_id in zip(response.step.slots, response.step.token_ids, strict=True):
                self._seen[slot].token_ids.append(token_id)
            for drawn in response.step.logprobs:
                self._seen[response.step.slots[drawn.column]].num_logprobs += 1
            if response.HasField("prompt_logprobs"):
                told = response.prompt_logprobs
                self._seen[told.slot].num_prompt_logprobs += len(told.logprobs.tokens)


def goes(make: MakeRunner, where: str, *features: Feature) -> bool:
    """Whether an engine over such layers does all of these at once."""
    guesses = any(each.guesses for each in features)
    try:
        runner: Any = make(NUM_BLOCKS, **KINDS[where], num_drafts=3 if guesses else 0)
    except ModelError:
        return False
    drafter = Planned(lambda sequence, most: (GUESS,) * most)
    engine = Engine(DraftingRunner(runner, drafter) if guesses else runner)
    plain = engine.run(PARAMS)
    assert not any(each.shows(plain) for each in features if not each.guesses)
    asked: dict[str, Any] = {}
    for each in features:
        asked |= each.asks
    is_constrained = any(each.is_constrained for each in features)
    seen = engine.run(replace(PARAMS, **asked), is_constrained=is_constrained)
    return len(seen.token_ids) == LENGTH and all(each.shows(seen) for each in features)


def is_handed_over(make: MakeRunner, where: str, *features: Feature) -> bool:
    """Whether an answer goes on on another worker, as it would have."""
    asked: dict[str, Any] = {}
    for each in features:
        asked |= each.asks
    pair = {role: make(NUM_BLOCKS + number, **KINDS[where]) for number, role in enumerate(ROLES)}
    params = replace(PARAMS, **asked)
    [expected] = PlainLoop(pair["decode"]).generate([PROMPT], [params])
    clock = Clock()
    modules = [f"baton.services.worker.{name}.time" for name in ("engine_loop", "handoff")]
    with mock.patch(modules[0], clock), mock.patch(modules[1], clock):
        cluster = Cluster(pair, clock)
        request = cluster.submit(PROMPT, params, expected)
        cluster.settle()
    pulled = cluster.network.workers["decode"].counters["pulled_blocks"]
    is_answered = request.outcome is FinishReason.LENGTH and request.token_ids == expected
    return is_answered and pulled > 0


def is_made_small(make: MakeRunner, where: str, **how: str) -> bool:
    try:
        runner = make(NUM_BLOCKS, **KINDS[where], **how)
    except ModelError:
        return False
    return len(Engine(runner).run(PARAMS).token_ids) == LENGTH


def by_layers(make: MakeRunner) -> dict[str, list[str]]:
    """Row → a cell for each of KINDS."""
    rows: dict[str, list[str]] = {}
    of = [(where, make(NUM_BLOCKS, **KINDS[where])) for where in KINDS]
    rows[GPU] = [
        cell(device_choices.why_not_with_triton(runner.model_config) is None)
        for where, runner in of
    ]
    rows[GRAPHS] = [in_graphs(runner) for _, runner in of]
    for name, how in ((SMALL, {"quantization": "int8"}), (SMALL_CACHE, {"kv_cache_dtype": "fp8"})):
        rows[name] = [cell(is_made_small(make, where, **how)) for where in KINDS]
    rows[HAND_OFF] = [cell(is_handed_over(make, where)) for where in KINDS]
    for name, feature in FEATURES.items():
        rows[name] = [cell(goes(make, where, feature)) for where in KINDS]
    # `make` refuses a runner of another class.
    rows[EXACT] = ["yes" for _ in KINDS]
    return rows


def in_graphs(runner: Any) -> str:
    """Which steps come from graphs."""
    if not runner._implementation.has_graphs:
        return "no"
    return "yes" if can_capture_prompts(runner.model_config) else "decode"


def by_pairs(make: MakeRunner) -> dict[str, list[str]]:
    """Row → a cell for each feature before it."""
    rows: dict[str, list[str]] = {}
    names = list(FEATURES)
    for later, earlier in itertools.product(names, names):
        if names.index(earlier) < names.index(later):
            both = goes(make, "full", FEATURES[later], FEATURES[earlier])
            rows.setdefault(later, []).append(cell(both))
    return rows


def cell(does: bool) -> str:
    return "yes" if does else "no"


@cache
def render() -> str:
    with tempfile.TemporaryDirectory() as folder:
        numbers = itertools.count()

        def new_directory(name: str) -> Path:
            path = Path(folder) / f"{name}-{next(numbers)}"
            path.mkdir()
            return path

        # One engine after the other has a pool in the same memory.
        make = cache(runners(new_directory))
        layers, pairs = by_layers(make), by_pairs(make)
    return "\n".join([*served(), "", *table("layers with", list(KINDS), layers), "", *both(pairs)])


def served() -> Iterator[str]:
    known = [each.name for each in registry.model_types()]
    # The text parts of types that see images stand beside these.
    names = ", ".join(
        each for each in known if each.removesuffix("_text") not in set(known) - {each}
    )
    methods = ", ".join([*quantization._METHODS, quantization._MXFP4])
    flags = flags_of_roles()
    absent = [name for name, parts in ABSENT.items() if not any(each in flags for each in parts)]
    for line in (
        f"- **model types**, with code of their own: {names}; others through transformers' code",
        "- **devices**: " + "; ".join(DEVICE_NAMES[each] for each in DEVICES[1:]),
        f"- **dtypes**: {', '.join(DTYPES[1:])}",
        f"- **weights**: safetensors of {', '.join(FLOATS)}, or quantised ({methods}); GGUF "
        f"({', '.join(gguf.KINDS)}); made small while loading: {', '.join(QUANTIZATIONS)}",
        f"- **planned**: {', '.join(absent)}. **No**: training; images, audio, video",
    ):
        yield from textwrap.wrap(line, 100, subsequent_indent="  ", break_on_hyphens=False)


def flags_of_roles() -> str:
    """The help of what starts a server."""
    told = io.StringIO()
    for parse in (gateway_args, worker_args):
        with contextlib.redirect_stdout(told), contextlib.suppress(SystemExit):
            parse(["--help"])
    return " ".join(re.findall(r"--[a-z-]+", told.getvalue()))


def table(corner: str, columns: Seq[str], rows: dict[str, list[str]]) -> Iterator[str]:
    yield f"| {corner} | {' | '.join(columns)} |"
    yield f"|{'---|' * (len(columns) + 1)}"
    for name, cells in rows.items():
        yield f"| {name} | {' | '.join([*cells, *[''] * (len(columns) - len(cells))])} |"


def both(pairs: dict[str, list[str]]) -> Iterator[str]:
    return table("together", list(FEATURES)[:-1], pairs)
