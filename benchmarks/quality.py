"""What small weights and caches cost: `python -m benchmarks.quality MODEL [--against MODEL]`.

A text in windows, each a prompt of its own: the perplexity of every form, how far its distributions
are from those of the reference (KL divergence, nats a token), and how often the first choice is the
same. The reference is the model that MODEL, or `--against`, is in float32, or in another form.

A form is a dtype, with `+` and a method of `--quantization` if one is to be taken, `+kv-fp8` if
keys and values are kept in 8 bits, and `+torch` for `--kernels torch`: bfloat16, float32+int4,
float32+kv-fp8. With `+activations` they are made small as GPUs make them, by torch on the CPU.
`--checkpoints` are of the same model, quantised by whoever; each is a row in float32.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from baton.loadtest.environment import describe_environment
from baton.shared.engine import device_choices
from baton.shared.engine.batch import Batch, BatchRow
from baton.shared.engine.config import DTYPES, QUANTIZATIONS, EngineConfig
from baton.shared.engine.model_runner import ModelRunner
from baton.shared.engine.reference_operations import ReferenceOperations
from baton.shared.model_files.fields import ModelError
from baton.shared.model_files.named import model_dir
from baton.shared.tokenizer.files import load_tokenizer
from benchmarks.checkout import RESULTS, ROOT

TEXT = ROOT / "benchmarks/texts/gateway.txt"
"""A page of docs/ as it was on 28 November 2026: figures can be had again."""
_BLOCK = 16
_SMALL_CACHE, _TORCH, _ACTIVATIONS = "kv-fp8", "torch", "activations"


@dataclass(frozen=True)
class Row:
    form: str
    perplexity: float
    kl_mean: float
    kl_largest: float
    same_first: float
    """Share of tokens whose likeliest one is the reference's."""
    num_tokens: int


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse_args(argv)
    torch.set_num_threads(args.threads)
    try:
        rows = list(_measure(args))
    except ModelError as error:
        print(f"quality: {error}", file=sys.stderr)
        return 1
    output = args.output or RESULTS / f"quality_{args.model.name}.json"
    result = {
        "environment": describe_environment(),
        "model": args.model.name,
        "against": args.against.name if args.against else None,
        "reference": args.reference,
        "text": args.text.name,
        "rows": [asdict(row) for row in rows],
    }
    output.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written to {output}")
    return 0


def _measure(args: argparse.Namespace) -> Iterator[Row]:
    windows = _windows(args)
    print(f"{'form':24} {'perplexity':>10} {'KL':>9} {'largest':>8} {'same first':>10}")
    against = args.against or args.model
    logits_of_reference = _logits(args, against, args.reference, windows)
    reference = [logits.log_softmax(-1) for logits in logits_of_reference]
    yield _row(f"reference, {args.reference}", windows, reference, reference)
    for form in args.forms:
        found = [logits.log_softmax(-1) for logits in _logits(args, args.model, form, windows)]
        yield _row(form, windows, found, reference)
    for directory in args.checkpoints:
        logits = _logits(args, directory, "float32", windows)
        found = [each.log_softmax(-1) for each in logits]
        yield _row(f"checkpoint {directory.name}", windows, found, reference)


def _row(form: str, windows: list[list[int]], found: list[Tensor], reference: list[Tensor]) -> Row:
    surprises, divergences, same = [], [], []
    for ids, ours, theirs in zip(windows, found, reference, strict=True):
        following = torch.tensor(ids[1:])
        surprises.append(-ours[:-1].gather(1, following[:, None]))
        divergences.append((theirs.exp() * (theirs - ours)).sum(-1))
        same.append(ours.argmax(-1) == theirs.argmax(-1))
    divergence = torch.cat(divergences)
    row = Row(
        form,
        float(torch.cat(surprises).mean().exp()),
        float(divergence.mean()),
        float(divergence.max()),
        float(torch.cat(same).float().mean()),
        len(divergence),
    )
    print(
        f"{row.form:24} {row.perplexity:10.3f} {row.kl_mean:9.5f} {row.kl_largest:8.4f} "
        f"{row.same_first:10.4f}",
        flush=True,
    )
    return row


def _logits(
    args: argparse.Namespace, directory: Path, form: str, windows: list[list[int]]
) -> Iterator[Tensor]:
    """float32 [tokens, vocab] of each window."""
    dtype, *small = form.split("+")
    kv_cache_dtype = "fp8" if _SMALL_CACHE in small else "auto"
    quantization = next((each for each in small if each in QUANTIZATIONS), None)
    num_blocks = -(-args.window // _BLOCK)
    makes_small = _ACTIVATIONS in small
    operations = partial(ReferenceOperations, quantises_inputs=makes_small)
    with patch.object(device_choices, "ReferenceOperations", operations):
        runner = ModelRunner(
            EngineConfig(
                directory,
                "cpu" if makes_small else args.device,
                dtype=dtype,
                block_size=_BLOCK,
                num_blocks=num_blocks,
                max_model_len=args.window,
                token_budget=args.window,
                quantization=quantization,  # type: ignore[arg-type]
                kv_cache_dtype=kv_cache_dtype,
                kernels="torch" if makes_small or _TORCH in small else "auto",
            )
        )
    for ids in windows:
        row = BatchRow(ids, 0, [list(range(num_blocks)) for _ in runner.groups])
        row.num_logits = len(ids)
        yield runner.logits(Batch([row])).cpu()


def _windows(args: argparse.Namespace) -> list[list[int]]:
    tokenizer = load_tokenizer(args.model)
    if tokenizer is None:
        raise ModelError(f"{args.model}: it has no tokenizer")
    ids = tokenizer.tokenizer.encode(args.text.read_text()).ids[: args.tokens]
    starts = range(0, len(ids) - 1, args.window)
    return [ids[start : start + args.window] for start in starts]


def _form(text: str) -> str:
    dtype, *small = text.split("+")
    others = (_SMALL_CACHE, _TORCH, _ACTIVATIONS)
    weights = [each for each in small if each not in others]
    is_known = len(weights) <= 1 and set(weights) <= set(QUANTIZATIONS)
    if dtype not in DTYPES[1:] or not is_known or len(small) > len(set(small)):
        methods = ", ".join(QUANTIZATIONS)
        known = f"{', '.join(DTYPES[1:])}, and + one of {methods}, +{', +'.join(others)}"
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {known}")
    return text


def _parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("model", type=model_dir, metavar="MODEL", help="directory, name or GGUF file")
    add("--against", type=model_dir, metavar="MODEL", help="default: MODEL itself")
    add("--reference", type=_form, default="float32", metavar="FORM", help="default: float32")
    add("--text", type=Path, default=TEXT, help="default: benchmarks/texts/gateway.txt")
    add("--forms", type=_form, nargs="*", default=["bfloat16"], help="default: bfloat16")
    add("--checkpoints", type=model_dir, nargs="+", default=[], metavar="MODEL")
    add("--tokens", type=int, default=2000)
    add("--window", type=int, default=500, help="tokens of a prompt")
    add("--device", default="cpu", choices=("cpu", "cuda"))
    add("--threads", type=int, default=1)
    add("--output", type=Path)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
