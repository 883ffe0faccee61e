"""Answers with guesses against those without, on a GPU, of a model that says something.

    python -m benchmarks.gpu.guessed_answers [--model DIR] [--draft-model DIR] [--drafts 4]
        [--batches 1,8,32] [--prompts 64] [--tokens 128]

equal    the same prompts with and without guesses, greedy and drawn. Rows that verify meet other
         kernels than rows of one token, so their logits differ in the last bits, and where two
         tokens are as good as tied another one may win. Of each first difference: how far apart the
         scores of the two tokens are (logits over the temperature, less what the race of that draw
         adds to either), in units of the last place of the logits (bfloat16's 8 bits), and which
         share of all draws is as near to a tie. Where top-p keeps tokens, one of the two may be out
         instead: how far it is from the edge, in units of what such a last place makes of shares.
         Every guess is checked.
speed    tokens a second over those without guesses, of guesses by the smaller model, beside
         E / (ratio + k · c): E tokens of a sequence in a step, as counted; ratio a step that
         verifies guesses that fall over one without; c a step of the smaller model by itself over
         one of the model's.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from baton.kernels.reference_sampling import _exponential
from baton.loadtest.environment import describe_environment
from baton.services.decode.drafters import Drafter, NgramDrafter
from baton.services.decode.model_drafter import ModelDrafter
from baton.services.worker.drafting import Drafting
from baton.shared.engine.batch import Batch
from baton.shared.engine.config import EngineConfig
from baton.shared.engine.model_runner import ModelRunner
from baton.shared.engine.sampler import draw_key
from baton.shared.kv.sequence import Sequence as Answer
from baton.shared.model_files.named import model_dir
from baton.shared.sampling import SamplingParams
from baton.shared.tokenizer.files import load_tokenizer
from benchmarks.checkout import DEMO_MODEL, ROOT
from benchmarks.every_guess import EveryGuess
from benchmarks.gpu.measured_engine import list_of
from benchmarks.gpu.results import result_path, results_name
from benchmarks.gpu.speculation import Oracle
from benchmarks.in_process import InProcessEngine

_OPENING = "And it came to pass"
_PROMPT_TOKENS = 24
"""Of a prompt, drawn by the model itself behind the opening."""
_HOW = {
    "greedy": SamplingParams(temperature=0.0),
    "drawn": SamplingParams(temperature=1.0, seed=7),
    "drawn, top-p 0.9": SamplingParams(temperature=0.7, top_p=0.9, seed=7),
}
_LAST_PLACE = 2.0**-8
_NUM_BLOCKS = 4096


@dataclass
class Difference:
    index: int
    """Of the answer's tokens, the first that differ."""
    token_ids: tuple[int, int]
    """Without and with guesses."""
    margin: float
    last_places: float


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse_args(argv)
    output = result_path(args.output, results_name("guessed_answers"))
    tokenizer = load_tokenizer(args.model)
    assert tokenizer is not None
    runner = _runner(args, args.model, num_drafts=args.drafts, draft_model_dir=args.draft_model)
    opening = tokenizer.tokenizer.encode(_OPENING).ids
    prompts = _prompts(runner, opening, args.prompts)
    rows: list[dict[str, Any]] = []
    result = {
        "environment": describe_environment(),
        "model": args.model.name,
        "draft_model": args.draft_model.name,
        "dtype": str(runner.dtype),
        "drafts": args.drafts,
        "tokens": args.tokens,
        "rows": rows,
    }
    for row in (*_compare(args, runner, prompts), *_rates(args, runner, prompts)):
        rows.append(row)
        print(json.dumps(row), flush=True)
        output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {output}")
    return 0


def _runner(args: argparse.Namespace, model: Path, **more: Any) -> ModelRunner:
    return ModelRunner(
        EngineConfig(
            model,
            args.device,
            dtype="bfloat16" if args.device == "cuda" else "float32",
            max_num_seqs=max(16, args.prompts, *args.batches),
            prompt_graphs=False,
            num_blocks=_NUM_BLOCKS,
            **more,
        )
    )


def _engine(runner: ModelRunner, drafter: Drafter | None, max_num_seqs: int) -> InProcessEngine:
    drafting = None
    if drafter is not None:
        drafting = Drafting(drafter, EveryGuess(runner.num_drafts), runner.num_drafts)
    budget = max(runner.token_budget, max_num_seqs * (1 + runner.num_drafts))
    return InProcessEngine(
        runner, max_num_seqs=max_num_seqs, token_budget=budget, drafting=drafting
    )


def _prompts(runner: ModelRunner, opening: Sequence[int], count: int) -> list[list[int]]:
    engine = _engine(runner, None, count)
    drawn = [
        engine.submit(opening, _PROMPT_TOKENS, SamplingParams(temperature=1.0, seed=seed))
        for seed in range(count)
    ]
    engine.run_until_idle()
    return [[*opening, *each.output_token_ids] for each in drawn]


def _answers(
    runner: ModelRunner,
    drafter: Drafter | None,
    prompts: Sequence[Sequence[int]],
    num_tokens: int,
    how: SamplingParams,
) -> list[Answer]:
    engine = _engine(runner, drafter, len(prompts))
    answers = [engine.submit(prompt, num_tokens, how) for prompt in prompts]
    engine.run_until_idle()
    return answers


def _compare(
    args: argparse.Namespace, runner: ModelRunner, prompts: Sequence[Sequence[int]]
) -> Iterable[dict[str, Any]]:
    for said, how in _HOW.items():
        plain = _answers(runner, None, prompts, args.tokens, how)
        again = _answers(runner, None, prompts, args.tokens, how)
        near = _margins(runner, plain[:8])
        assert runner.draft is not None
        for name, drafter in (("ngram", NgramDrafter()), ("model", ModelDrafter(runner.draft))):
            guessed = _answers(runner, drafter, prompts, args.tokens, how)
            found = [
                _difference(runner, *pair)
                for pair in zip(plain, guessed, strict=True)
                if pair[0].output_token_ids != pair[1].output_token_ids
            ]
            widest = max((each.last_places for each in found), default=0.0)
            yield {
                "what": "equal",
                "how": said,
                "guesses": name,
                "answers": len(plain),
                "equal": 1 - len(found) / len(plain),
                "equal_without_guesses": _share_equal(plain, again),
                "widest_last_places": widest,
                "share_of_draws_as_near": sum(each <= widest for each in near) / len(near),
                "median_last_places_of_draws": median(near),
                "differences": [asdict(each) for each in found],
            }


def _share_equal(first: Sequence[Answer], second: Sequence[Answer]) -> float:
    pairs = zip(first, second, strict=True)
    return sum(a.output_token_ids == b.output_token_ids for a, b in pairs) / len(first)


def _difference(runner: ModelRunner, plain: Answer, guessed: Answer) -> Difference:
    pairs = enumerate(zip(plain.output_token_ids, guessed.output_token_ids, strict=True))
    index, tokens = next((i, pair) for i, pair in pairs if pair[0] != pair[1])
    end = plain.num_prompt_tokens + index
    [scores], [place], [logits] = _scores(runner, plain, end, 1)
    margin = abs(float(scores[tokens[0]] - scores[tokens[1]]))
    top_p, found = plain.params.top_p, [margin / float(place)]
    if top_p < 1:
        chances = (logits / plain.params.temperature).softmax(-1)
        for token in tokens:
            # The likelier ones' share says whether it is kept.
            share = float(chances[chances > chances[token]].sum())
            found.append(abs(share - top_p) / (float(place) * top_p * (1 - top_p)))
    return Difference(index, tokens, margin, min(found))


def _margins(runner: ModelRunner, answers: Sequence[Answer]) -> list[float]:
    """Of every draw, how many last places the winner was ahead of the next."""
    found: list[float] = []
    for answer in answers:
        num_drawn = len(answer.output_token_ids)
        scores, places, _ = _scores(runner, answer, answer.num_tokens - 1, num_drawn)
        best = scores.topk(2, -1).values
        found += ((best[:, 0] - best[:, 1]) / places).tolist()
    return found


def _scores(
    runner: ModelRunner, answer: Answer, end: int, count: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of the draws behind the last `count` tokens up to `end`: float64 [count, vocab], the last
    place of the highest logit, in units of the score, [count], and the logits."""
    row = runner._trial.prompt(end)
    row.token_ids, row.num_logits = answer.token_slice(0, end), count
    logits = runner.logits(Batch([row])).double()
    places = logits.amax(-1).abs() * _LAST_PLACE
    params = answer.params
    if params.temperature == 0:
        return logits, places, logits
    keys = [
        draw_key(params.seed, answer.key.sample, position)
        for position in range(end - count + 1, end + 1)
    ]
    key = torch.tensor(keys, device=logits.device)
    head_start = _exponential(key, logits.shape[1]).double().log()
    return logits / params.temperature - head_start, places / params.temperature, logits


def _rates(
    args: argparse.Namespace, runner: ModelRunner, prompts: Sequence[Sequence[int]]
) -> Iterable[dict[str, Any]]:
    draft_alone = _runner(args, args.draft_model)
    k = args.drafts
    assert runner.draft is not None
    for batch in args.batches:
        few = (list(prompts) * -(-batch // len(prompts)))[:batch]
        for said in ("greedy", "drawn"):
            how = _HOW[said]
            plain_ms, _ = _step(runner, None, few, how, args.rounds)
            # No text has the last token of the vocabulary.
            wrong = Oracle(runner.model_config.vocab_size - 1, 1.0)
            verified_ms, _ = _step(runner, wrong, few, how, args.rounds)
            draft_ms, _ = _step(draft_alone, None, few, how, args.rounds)
            model_ms, per_step = _step(runner, ModelDrafter(runner.draft), few, how, args.rounds)
            ratio, c = verified_ms / plain_ms, draft_ms / plain_ms
            speed_up = per_step * plain_ms / model_ms
            expected = per_step / (ratio + k * c)
            yield {
                "what": "speed",
                "how": said,
                "batch": batch,
                "plain_ms": plain_ms,
                "ratio": ratio,
                "c": c,
                "step_ms": model_ms,
                "tokens_per_step": per_step,
                "speed_up": speed_up,
                "expected": expected,
                "of_expected": speed_up / expected,
            }


def _step(
    runner: ModelRunner,
    drafter: Drafter | None,
    prompts: Sequence[Sequence[int]],
    how: SamplingParams,
    num_rounds: int,
) -> tuple[float, float]:
    """ms of a step in which all sequences had tokens, and tokens of a sequence in it."""
    engine = _engine(runner, drafter, len(prompts))
    seconds, num_tokens, num_steps = 0.0, 0, 0
    for turn in range(num_rounds + 1):
        started_s = time.monotonic()
        for prompt in prompts:
            engine.submit(prompt, 192, replace(how, seed=turn))
        steps = engine.run_until_idle()
        full = [i for i, num in enumerate(steps.num_streams) if num == len(prompts)][4:]
        if turn == 0 or len(full) < 2:
            continue
        seconds += steps.at_s[full[-1]] - steps.at_s[full[0]]
        # Some steps between may have lacked a sequence: they took time and made tokens, too.
        num_tokens += sum(steps.num_tokens[full[0] + 1 : full[-1] + 1])
        num_steps += full[-1] - full[0]
        if time.monotonic() - started_s > 20:
            break
    return seconds / num_steps * 1e3, num_tokens / num_steps / len(prompts)


def _parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.guessed_answers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", type=model_dir, default=DEMO_MODEL)
    add("--draft-model", type=model_dir, default=ROOT / "models/demo-draft")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: for trials")
    add("--drafts", type=int, default=4, help="k")
    add("--batches", type=list_of(int), default=[1, 8, 32], help="whose speed is measured")
    add("--prompts", type=int, default=64, help="whose answers are compared")
    add("--tokens", type=int, default=128, help="of each answer that is compared")
    add("--rounds", type=int, default=4, help="of each speed")
    add("--output", type=Path, help="a file, or a directory for it")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
