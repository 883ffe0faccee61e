"""Whether a real model answers as in transformers: `python -m benchmarks.stack.agreement`.

Twenty prompts, greedy, float32 on the CPU: by transformers' `generate`, and through `baton up` with
a prefill and a decode worker, one after the other and all at once. Chats go through the model's own
template, rendered by the gateway on one side and by transformers on the other; a model without a
template continues texts. Ends with 1 when a prompt's length, a token or a text differs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import uvloop
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from baton.loadtest.environment import describe_environment
from baton.shared.engine.gguf_weights import GgufWeights, expanded_weights
from baton.shared.interrupt import exit_code
from baton.shared.model_files.gguf.file import WEIGHTS
from baton.shared.model_files.named import missing_model, model_dir
from baton.shared.rpc.serve import internal_channel
from baton.v1 import inference_service_pb2 as pb
from baton.v1 import inference_service_pb2_grpc, types_pb2
from benchmarks.checkout import RESULTS
from benchmarks.stack.served import served

Chat = list[dict[str, str]]


def _asked(text: str) -> Chat:
    return [{"role": "user", "content": text}]


_CHATS: list[Chat] = [
    _asked("What is the capital of France?"),
    _asked("Why is the sky blue?"),
    _asked("Write a haiku about autumn."),
    _asked("Explain photosynthesis to a child."),
    _asked("What is 12 + 30? And 1234 * 2?"),
    _asked("List three primary colours."),
    _asked("Translate to French: The cat sleeps on the chair."),
    _asked("Who wrote Romeo and Juliet?"),
    _asked("Give me a recipe for pancakes, with amounts."),
    _asked("Write a Python function that reverses a string."),
    _asked("How many days are in a leap year?"),
    _asked("Summarise: The quick brown fox jumps over the lazy dog.  It does so daily."),
    _asked("What does the word 'serendipity' mean?"),
    _asked("Tell me a joke about computers 😀"),
    _asked("日本の首都はどこですか。"),
    _asked("Name the planets of the solar system in order."),
    _asked('Complete this JSON:\n\n{\n  "name": "Ada",\n  "born":   1815'),
    _asked("What is the difference between TCP and UDP?"),
    [
        {"role": "system", "content": "You answer like a pirate."},
        *_asked("How do I boil an egg?"),
    ],
    [
        *_asked("My favourite fruit is the mango."),
        {"role": "assistant", "content": "Mangoes are delicious!"},
        *_asked("Which fruit do I like best?"),
    ],
]


@dataclass
class Answer:
    prompt: Chat | str
    num_prompt_tokens: int
    token_ids: list[int]
    text: str
    same_alone: bool = False
    same_together: bool = False


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse_args(argv)
    if not args.model.is_dir():
        raise SystemExit(missing_model(args.model))
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    torch.set_num_threads(args.threads)
    environment = describe_environment()
    answers = by_transformers(args.model, args.new_tokens)
    with served(args.model, num_threads=args.threads) as addresses:
        uvloop.run(compare(addresses["grpc"], answers, args.new_tokens))
    result = {
        "model": args.model.name,
        "dtype": "float32",
        "new_tokens": args.new_tokens,
        "environment": environment,
        "num_same_alone": sum(answer.same_alone for answer in answers),
        "num_same_together": sum(answer.same_together for answer in answers),
        "answers": [asdict(answer) for answer in answers],
    }
    output = args.output or RESULTS / f"agreement_{args.model.name}.json"
    output.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    for name in ("model", "num_same_alone", "num_same_together"):
        print(f"{name:18} {result[name]}")
    print(f"of                 {len(answers)}\nwritten to {output}")
    return int(not all(answer.same_alone and answer.same_together for answer in answers))


def _model(model_dir: Path) -> Any:
    """Transformers' code; of a GGUF file with the numbers that it is expanded to."""
    make: Any = AutoModelForCausalLM
    if not (model_dir / WEIGHTS).exists():
        return make.from_pretrained(model_dir, dtype=torch.float32).eval()
    model = make.from_config(AutoConfig.from_pretrained(model_dir), dtype=torch.float32)
    found = model.load_state_dict(expanded_weights(GgufWeights(model_dir)), strict=False)
    assert not found.unexpected_keys and set(found.missing_keys) <= {"lm_head.weight"}, found
    return model.eval()


def by_transformers(model_dir: Path, new_tokens: int) -> list[Answer]:
    tokenizer: Any = AutoTokenizer.from_pretrained(model_dir)
    model = _model(model_dir)
    answers: list[Answer] = []
    for chat in _CHATS:
        prompt: Chat | str = chat if tokenizer.chat_template else chat[-1]["content"]
        ids = _prompt_ids(tokenizer, prompt)
        with torch.inference_mode():
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                top_k=None,
                top_p=None,
                temperature=None,
                max_new_tokens=new_tokens,
            )
        token_ids = output[0, ids.shape[1] :].tolist()
        text = tokenizer.decode(token_ids, skip_special_tokens=True)
        print(f"{len(answers) + 1:2} {text!r}", flush=True)
        answers.append(Answer(prompt, ids.shape[1], token_ids, text))
    return answers


def _prompt_ids(tokenizer: Any, prompt: Chat | str) -> torch.Tensor:
    if isinstance(prompt, str):
        ids = tokenizer(prompt)["input_ids"]
    else:
        text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return torch.tensor([ids])


async def compare(address: str, answers: Sequence[Answer], new_tokens: int) -> None:
    """Fills in what is the same."""
    async with internal_channel(address) as channel:
        await channel.channel_ready()
        stub = inference_service_pb2_grpc.InferenceServiceStub(channel)
        for answer in answers:
            answer.same_alone = await _is_same(stub, answer, new_tokens)
        together = [_is_same(stub, answer, new_tokens) for answer in answers]
        for answer, same in zip(answers, await asyncio.gather(*together), strict=True):
            answer.same_together = same


async def _is_same(
    stub: inference_service_pb2_grpc.InferenceServiceAsyncStub, answer: Answer, new_tokens: int
) -> bool:
    sampling = types_pb2.SamplingParams(temperature=0.0, max_tokens=new_tokens)
    request = pb.GenerateRequest(sampling=sampling)
    if isinstance(answer.prompt, str):
        request.text = answer.prompt
    else:
        request.messages.messages.extend(pb.Message(**each) for each in answer.prompt)
    token_ids: list[int] = []
    text, num_prompt_tokens = "", 0
    async for message in stub.Generate(request):
        num_prompt_tokens = message.started.num_prompt_tokens or num_prompt_tokens
        token_ids += message.chunk.token_ids
        text += message.chunk.text + message.finished.text
    same = (num_prompt_tokens, token_ids, text) == (
        answer.num_prompt_tokens,
        answer.token_ids,
        answer.text,
    )
    if not same:
        print(f"not the same: {answer.prompt!r}\n  {answer.text!r}\n  {text!r}", flush=True)
    return same


def _parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.stack.agreement", description=__doc__
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--model", type=model_dir, default="smollm2", help="directory, or a name; default: smollm2"
    )
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--output", type=Path, help="default: results/agreement_MODEL.json")
    args = parser.parse_args(argv)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    return args


if __name__ == "__main__":
    sys.exit(exit_code(main))
