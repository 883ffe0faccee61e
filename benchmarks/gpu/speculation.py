"""What a step that verifies guesses costs, and what guesses bring that are right so often.

    python -m benchmarks.gpu.speculation [--shape llama-8b] [--drafts 4] [--batches 1,8,32,128]
        [--right 0.6,0.8,0.9] [--draft-shape llama-1b | --head 32000]

The engine loop, as in benchmarks.gpu.engine, every guess checked, over random weights but for the
last norm's, which are zero: all logits are alike, and every draw is the same token. So an oracle
guesses it, or another one, with the chance that is asked for; n-grams, and with --draft-shape a
smaller model, with --head an EAGLE-3 head of so many tokens, always guess right: those rows say
what guessing costs, not how good guesses are.

verified      a step with guesses that all fall over one without, and the ratio of their floors
              (models/roofline.py)
oracle        tokens a second over those without guesses, and of E / ratio,
              E = (1 − p^(k+1)) / (1 − p)
ngram, model  the same of guesses that are made; `c` is what a guess of the model's takes of a step
              without guesses
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch

from baton.loadtest.environment import describe_environment
from baton.services.decode.drafters import Draft, Drafter, NgramDrafter
from baton.services.decode.head_drafter import HeadDrafter
from baton.services.decode.model_drafter import ModelDrafter
from baton.services.worker.drafting import Drafting
from baton.shared.engine.draft_model import DraftModel
from baton.shared.engine.model_runner import ModelRunner
from baton.shared.kv.sequence import Sequence as Answer
from baton.shared.speculation import EAGLE3
from benchmarks.every_guess import EveryGuess
from benchmarks.gpu.ceilings import Ceilings, measure_ceilings
from benchmarks.gpu.measured_engine import add_engine_flags, list_of, make_runner
from benchmarks.gpu.results import result_path, results_name
from benchmarks.gpu.step_profile import table
from benchmarks.in_process import InProcessEngine
from models.dummy_model import SHAPES, given_or_dummy
from models.roofline import decode_floor_s

_FEWEST_SEQS = 16
_FEWEST_CHAINS = 256
"""That are measured."""
_PROFILED_TOKENS = 9
"""Of each answer; of them the first comes of the prompt."""


class Oracle:
    """Guesses the token that is always drawn, or the one behind it."""

    needs_known = False

    def __init__(self, token_id: int, chance: float) -> None:
        """`chance`: that a guess is right."""
        self._token_id = token_id
        self._chance = chance
        self._random = random.Random(1)

    def is_behind(self, sequence: Answer) -> bool:
        return False

    def catch_up(self, sequences: Sequence[Answer], *, others_wait: bool) -> bool:
        return False

    def drafts(self, wanted: Sequence[tuple[Answer, int]]) -> list[Draft]:
        return [Draft(tuple(self._guess() for _ in range(most))) for _, most in wanted]

    def forget(self, sequence: Answer) -> None:
        pass

    def _guess(self) -> int:
        return self._token_id + int(self._random.random() >= self._chance)


@dataclass
class Rate:
    """Of a batch, over steps in which all its sequences had tokens."""

    step_ms: float
    """Of the median step."""
    tokens_per_step: float
    """Of a sequence."""

    @property
    def per_s(self) -> float:
        return self.tokens_per_step / self.step_ms * 1e3


class Bench:
    def __init__(self, runner: ModelRunner, batch: int, context: int, num_steps: int) -> None:
        self._runner = runner
        self._batch = batch
        self._context = context
        # Of few sequences more, so that it is known how often guesses were right.
        self._num_steps = max(num_steps, _FEWEST_CHAINS // batch)
        self._most_per_step = 1 + runner.num_drafts

    def rate(self, drafter: Drafter | None, per_step: float) -> Rate:
        """`per_step`: tokens of a sequence that are expected."""
        engine = self._engine(drafter)
        # Each engine has a prefix cache of its own.
        prompts = engine.cached_prompts(self._batch, self._context)
        # The first time everything is a little slower.
        self._rate(engine, prompts, 4, self._most_per_step)
        return self._rate(engine, prompts, self._num_steps, per_step)

    def profile(self, drafter: Drafter | None, title: str) -> str:
        """Where the GPU's time goes in steps of all sequences, prompts' last blocks among them."""
        engine = self._engine(drafter)
        prompts = engine.cached_prompts(self._batch, self._context)

        def run() -> None:
            for prompt in prompts:
                engine.submit(prompt, _PROFILED_TOKENS)
            engine.run_until_idle()

        run()
        return table(title, run)

    def _rate(
        self,
        engine: InProcessEngine,
        prompts: Sequence[Sequence[int]],
        num_steps: int,
        per_step: float,
    ) -> Rate:
        # A draft model sees the prompts while the first steps go on.
        num_before = 8 if self._runner.draft is None else 8 + self._batch * self._context // 512
        num_starting = 2 * (self._batch * 16 // self._runner.token_budget + 8) + num_before
        num_tokens = self._most_per_step * num_starting + int(1.2 * per_step * num_steps)
        for prompt in prompts:
            engine.submit(prompt, num_tokens)
        steps = engine.run_until_idle()
        full = steps.full(self._batch, num_steps, num_before)
        # The median: the host, whose cores others may have, holds up single ones.
        seconds = median(steps.at_s[b] - steps.at_s[a] for a, b in pairwise(full))
        num_tokens = sum(steps.num_tokens[i] for i in full[1:])
        return Rate(seconds * 1e3, num_tokens / num_steps / self._batch)

    def _engine(self, drafter: Drafter | None) -> InProcessEngine:
        drafting = None
        if drafter is not None:
            num_drafts = self._runner.num_drafts
            drafting = Drafting(drafter, EveryGuess(num_drafts), num_drafts)
        # However many are guessed, all of them are checked.
        budget = max(self._runner.token_budget, self._batch * self._most_per_step)
        return InProcessEngine(
            self._runner, max_num_seqs=self._batch, token_budget=budget, drafting=drafting
        )


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse_args(argv)
    output = result_path(args.output, results_name("speculation"))
    device = torch.device(args.device)
    ceilings = measure_ceilings(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    started_s = time.monotonic()
    runner = make_guessing_runner(args)
    print(f"{args.shape}: ready after {time.monotonic() - started_s:.1f} s", flush=True)
    if args.compile_only:
        return 0
    token_id = make_all_alike(runner)
    rows: list[dict[str, Any]] = []
    result = {
        "environment": describe_environment(),
        "ceilings": vars(ceilings),
        "shape": args.shape,
        "draft_shape": args.draft_shape,
        "head": args.head,
        "drafts": args.drafts,
        "context": args.context,
        "steps": args.steps,
        "rows": rows,
    }
    for batch in args.batches:
        for row in _measure(args, runner, ceilings, batch, token_id):
            rows.append(row)
            print("  ".join(f"{name} {_shown(value)}" for name, value in row.items()), flush=True)
            output.write_text(json.dumps(result, indent=1) + "\n")
    if args.profile:
        text = "\n\n".join(_profiles(args, runner, token_id)) + "\n"
        output.with_suffix(".txt").write_text(text)
    print(f"\nwritten to {output}")
    return 0


def make_guessing_runner(args: argparse.Namespace) -> ModelRunner:
    """With who guesses, where the flags of `add_guessing_flags` ask for a model or a head."""
    with ExitStack() as stack:
        more: dict[str, Any] = {"num_drafts": args.drafts, "prompt_graphs": False}
        if args.draft_shape is not None:
            dummy = given_or_dummy(None, args.draft_shape, has_tokenizer=False)
            more["draft_model_dir"] = stack.enter_context(dummy)
        if args.head is not None:
            head = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            _write_head(head, args.shape, args.head)
            more |= {"draft_model_dir": head, "draft_kind": EAGLE3}
        return make_runner(args, args.shape, max(_FEWEST_SEQS, *args.batches), **more)


def model_drafter(model: DraftModel) -> Drafter:
    return ModelDrafter(model) if model.tapped is None else HeadDrafter(model)


def _measure(
    args: argparse.Namespace, runner: ModelRunner, ceilings: Ceilings, batch: int, token_id: int
) -> Iterable[dict[str, Any]]:
    bench, k = Bench(runner, batch, args.context, args.steps), args.drafts
    plain, verified = bench.rate(None, 1), bench.rate(Oracle(token_id, 0.0), 1)
    ratio = verified.step_ms / plain.step_ms
    yield {
        "batch": batch,
        "guesses": "verified",
        "step_ms": plain.step_ms,
        "verified_ms": verified.step_ms,
        "tokens_per_step": verified.tokens_per_step,
        "ratio": ratio,
        "floors": _floors(runner, ceilings, batch, args.context, k),
    }
    for chance in args.right:
        expected = (1 - chance ** (k + 1)) / (1 - chance)
        rate = bench.rate(Oracle(token_id, chance), expected)
        speed_up = rate.per_s / plain.per_s
        yield {
            "batch": batch,
            "guesses": f"oracle {chance:g}",
            "step_ms": rate.step_ms,
            "tokens_per_step": rate.tokens_per_step,
            "expected": expected,
            "speed_up": speed_up,
            "of_expected": speed_up / (expected / ratio),
        }
    made: list[tuple[str, Drafter]] = [("ngram", NgramDrafter())]
    if runner.draft is not None:
        made.append(("model", model_drafter(runner.draft)))
    for name, drafter in made:
        rate = bench.rate(drafter, 1 + k)
        row = {
            "batch": batch,
            "guesses": name,
            "step_ms": rate.step_ms,
            "tokens_per_step": rate.tokens_per_step,
            "speed_up": rate.per_s / plain.per_s,
        }
        if name == "model":
            row["c"] = (rate.step_ms - verified.step_ms) / k / plain.step_ms
        yield row


def _profiles(args: argparse.Namespace, runner: ModelRunner, token_id: int) -> Iterable[str]:
    for batch in args.batches:
        bench = Bench(runner, batch, args.context, args.steps)
        shape = f"{batch} sequences of {args.context:,} tokens, {_PROFILED_TOKENS - 1} steps"
        yield bench.profile(None, f"{shape} without guesses")
        yield bench.profile(Oracle(token_id, 0.0), f"{shape} with {args.drafts} guesses that fall")


def _write_head(head_dir: Path, shape: str, num_tokens: int) -> None:
    """config.json of an EAGLE-3 head for a model of that shape."""
    fields = dict(SHAPES[shape].fields) | {"model_type": "llama", "num_hidden_layers": 1}
    config = {
        "speculators_model_type": EAGLE3,
        "draft_vocab_size": num_tokens,
        "transformer_layer_config": {**fields, "tie_word_embeddings": False},
    }
    (head_dir / "config.json").write_text(json.dumps(config))


def _floors(
    runner: ModelRunner, ceilings: Ceilings, batch: int, context: int, num_drafts: int
) -> float:
    """Keys and values are read once for all tokens of a row."""
    model, rates = runner.model_config, ceilings.rates
    plain_s = decode_floor_s(model, batch, context, rates)
    keys_s = plain_s - decode_floor_s(model, batch, 0, rates)
    return (decode_floor_s(model, batch * (1 + num_drafts), 0, rates) + keys_s) / plain_s


def make_all_alike(runner: ModelRunner, *, guesses_too: bool = True) -> int:
    """All logits are zero from now on → the token that is always drawn.

    `guesses_too`: those of who guesses as well; otherwise its guesses are anything else.
    """
    models: list[Any] = [runner._model]
    if guesses_too and runner.draft is not None:
        models.append(runner.draft._model)
    with torch.inference_mode():
        for model in models:
            model._norm.weight.zero_()
    engine = InProcessEngine(runner, max_num_seqs=1)
    [prompt] = engine.cached_prompts(1, 64)
    sequence = engine.submit(prompt, 8)
    engine.run_until_idle()
    drawn = set(sequence.output_token_ids)
    if len(drawn) != 1:
        raise RuntimeError(f"draws differ: {drawn}")
    return drawn.pop()


def _shown(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.speculation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add_guessing_flags(parser)
    add("--right", type=list_of(float), default=[0.6, 0.8, 0.9], help="chances of the oracle's")
    add("--steps", type=int, default=48)
    add("--profile", action="store_true", help="also: where the time goes, kernel by kernel")
    return parser.parse_args(argv)


def add_guessing_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="llama-8b")
    add("--draft-shape", choices=SHAPES, help="of a smaller model that guesses, too")
    add("--head", type=int, help="tokens of an EAGLE-3 head that guesses, too")
    add("--drafts", type=int, default=4, help="k")
    add("--batches", type=list_of(int), default=[1, 8, 32, 128])
    add("--context", type=int, default=1024)
    add("--compile-only", action="store_true", help="so that what follows starts sooner")
    add("--output", type=Path, help="a file, or a directory for it")
    add_engine_flags(parser)


if __name__ == "__main__":
    sys.exit(main())
