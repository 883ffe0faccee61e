"""Makes the demo model: prepare the text, train on a GPU, export, evaluate, sample.

python -m models.train_demo prepare --text-root ROOT --data DIR
python -m models.train_demo train --data DIR --out RUN
python -m models.train_demo export --data DIR --run RUN --out models/demo
python -m models.train_demo evaluate --data DIR --model models/demo [--transformers]
python -m models.train_demo sample --model models/demo --prompt TEXT
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from models.demo_llama import DemoLlama, LlamaShape, hf_config, load_model, save_weights

log = logging.getLogger("demo_model")

# Share of each source in the training tokens: prose counts above its size, chats teach the format.
MIX = {"kjv": 0.28, "pydocs": 0.36, "stdlib": 0.28, "chat": 0.08}
HELD_OUT = ("kjv", "pydocs", "stdlib")


@dataclass(frozen=True)
class Recipe:
    """How long, how large, how fast. Contexts are short first, then of full length."""

    num_tokens: int = 600_000_000
    time_limit_s: float = 360.0
    tokens_per_step: int = 65_536
    short_context: int = 1024
    long_context: int = 4096
    long_share: float = 0.25
    peak_lr: float = 3e-3
    final_lr_share: float = 0.02
    warmup_share: float = 0.03
    weight_decay: float = 0.1
    dropout: float = 0.15
    num_evals: int = 10
    seed: int = 20260


def load_stream(data: Path, name: str, device: str) -> Tensor:
    """Token ids, [num_tokens] int32."""
    stream = np.load(data / f"{name}.npy", allow_pickle=False)
    return torch.from_numpy(stream.astype(np.int32)).to(device)


class Sampler:
    """Draws windows at random places of the sources, in the proportions of MIX."""

    def __init__(self, streams: dict[str, Tensor], seed: int) -> None:
        self.streams = [streams[source] for source in MIX]
        self.shares = np.array(list(MIX.values()))
        self.rng = np.random.default_rng(seed)

    def draw(self, num_windows: int, context: int) -> Tensor:
        """[num_windows, context + 1] int64."""
        counts = self.rng.multinomial(num_windows, self.shares / self.shares.sum())
        rows = []
        for stream, count in zip(self.streams, counts, strict=True):
            starts = self.rng.integers(0, len(stream) - context, size=(int(count), 1))
            places = torch.from_numpy(starts + np.arange(context + 1))
            rows.append(stream[places.to(stream.device)])
        return torch.cat(rows).long()


def token_losses(
    model: torch.nn.Module, stream: Tensor, context: int, *, batch_size: int = 8
) -> Iterator[Tensor]:
    """Losses in nats of every token of `stream` but the first, in order, as [windows, context].

    Windows do not overlap, so a token sees up to `context` - 1 tokens before it. The last window
    is shorter and comes alone.
    """
    num_full = (len(stream) - 1) // context
    batches = [
        stream[i * context : min(i + batch_size, num_full) * context + 1]
        for i in range(0, num_full, batch_size)
    ]
    for piece in [*batches, stream[num_full * context :]]:
        width = min(context, len(piece) - 1)
        if width == 0:
            continue
        inputs, targets = piece[:-1].long().view(-1, width), piece[1:].long().view(-1, width)
        with torch.no_grad():
            output = model(inputs)
            logits = output if isinstance(output, Tensor) else output.logits
        losses = functional.cross_entropy(
            logits.float().flatten(0, 1), targets.flatten(), reduction="none"
        )
        yield losses.view_as(targets)


def bits_per_byte(model: torch.nn.Module, stream: Tensor, num_bytes: int, context: int) -> float:
    """Bits for all tokens of `stream`, marks of documents included, over the text's UTF-8 bytes."""
    nats = sum(float(losses.double().sum()) for losses in token_losses(model, stream, context))
    return nats / math.log(2) / num_bytes


def parameter_groups(model: DemoLlama, recipe: Recipe) -> list[dict[str, object]]:
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    return [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]


def learning_rate(progress: float, recipe: Recipe) -> float:
    """Linear warm-up, then cosine; `progress` runs from 0 to 1."""
    if progress < recipe.warmup_share:
        return recipe.peak_lr * progress / recipe.warmup_share
    rest = (progress - recipe.warmup_share) / (1 - recipe.warmup_share)
    low = recipe.final_lr_share
    return recipe.peak_lr * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(rest, 1.0))))


def train(data: Path, out: Path, recipe: Recipe, device: str, *, compiled: bool) -> None:
    """Writes model.safetensors, shape.json and log.jsonl to `out`."""
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(recipe.seed)
    torch.set_float32_matmul_precision("high")
    meta = json.loads((data / "meta.json").read_text())
    streams = {source: load_stream(data, f"train_{source}", device) for source in MIX}
    held_out = {source: load_stream(data, f"heldout_{source}", device) for source in HELD_OUT}
    shape = LlamaShape()
    model = DemoLlama(shape, recipe.dropout).to(device)
    num_parameters = sum(p.numel() for p in model.parameters())
    log.info("%d parameters, torch %s, %s", num_parameters, torch.__version__, device)

    def next_token_loss(windows: Tensor) -> Tensor:
        logits = model(windows[:, :-1]).float()
        return functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())

    loss_of = torch.compile(next_token_loss, dynamic=False) if compiled else next_token_loss
    fused = device == "cuda"
    optimizer = torch.optim.AdamW(parameter_groups(model, recipe), betas=(0.9, 0.95), fused=fused)
    sampler = Sampler(streams, recipe.seed)
    autocast = torch.autocast(device, torch.bfloat16)

    def evaluate(context: int) -> dict[str, float]:
        model.eval()
        with autocast:
            result = {
                source: bits_per_byte(model, stream, meta[f"heldout_{source}"]["bytes"], context)
                for source, stream in held_out.items()
            }
        model.train()
        return result

    started = time.monotonic()
    tokens, step, next_eval, progress = 0, 0, 1, 0.0
    with (out / "log.jsonl").open("w") as journal:
        while progress < 1:
            long = progress >= 1 - recipe.long_share
            context = recipe.long_context if long else recipe.short_context
            windows = sampler.draw(recipe.tokens_per_step // context, context)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(progress, recipe)
            with autocast:
                loss = loss_of(windows)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            tokens, step = tokens + recipe.tokens_per_step, step + 1
            if step == 1:
                loss.item()
                log.info("first step done after %.0f s", time.monotonic() - started)
            elapsed_s = time.monotonic() - started
            progress = max(tokens / recipe.num_tokens, elapsed_s / recipe.time_limit_s)
            if progress * recipe.num_evals >= next_eval or progress >= 1:
                next_eval += 1
                entry = {
                    "step": step,
                    "tokens": tokens,
                    "elapsed_s": round(elapsed_s, 1),
                    "context": context,
                    "train_nats": round(loss.item(), 4),
                    "heldout_bits_per_byte": {k: round(v, 4) for k, v in evaluate(context).items()},
                }
                journal.write(json.dumps(entry) + "\n")
                journal.flush()
                log.info("%3.0f %%  %s", 100 * progress, json.dumps(entry))
    save_weights(model, out / "model.safetensors")
    facts = {"shape": asdict(shape), "recipe": asdict(recipe), "mix": MIX, "tokens": tokens}
    facts |= {"steps": step, "elapsed_s": round(elapsed_s, 1), "torch": torch.__version__}
    facts["device"] = torch.cuda.get_device_name() if device == "cuda" else device
    (out / "run.json").write_text(json.dumps(facts, indent=1) + "\n")
    log.info("done: %d steps, %d tokens, %.0f s", step, tokens, elapsed_s)


def export(data: Path, run: Path, out: Path) -> None:
    """Makes the Hugging Face directory `out` from `run` (weights) and `data` (tokenizer)."""
    from tokenizers import Tokenizer

    from models.demo_text import BOS, CHAT_TEMPLATE, END, EOS

    out.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer.from_file(str(data / "tokenizer.json"))
    bos_id, eos_id, end_id = tokenizer.encode(BOS + EOS + END, add_special_tokens=False).ids
    shape = LlamaShape(**json.loads((run / "run.json").read_text())["shape"])
    contents = {
        "config.json": hf_config(shape, bos_token_id=bos_id, eos_token_ids=[eos_id, end_id]),
        "generation_config.json": {
            "bos_token_id": bos_id,
            "eos_token_id": [eos_id, end_id],
            "pad_token_id": eos_id,
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": EOS,
            "pad_token": EOS,
            "clean_up_tokenization_spaces": False,
            "model_max_length": shape.max_position_embeddings,
            "chat_template": CHAT_TEMPLATE,
        },
    }
    for name, content in contents.items():
        (out / name).write_text(json.dumps(content, indent=2) + "\n")
    shutil.copyfile(data / "tokenizer.json", out / "tokenizer.json")
    shutil.copyfile(run / "model.safetensors", out / "model.safetensors")
    log.info("wrote %s", out)


def evaluate(data: Path, model_dir: Path, *, transformers: bool) -> None:
    """Logs held-out bits per byte in float32, early and late positions apart."""
    meta = json.loads((data / "meta.json").read_text())
    model = load_model(model_dir)
    context = LlamaShape().max_position_embeddings
    reference: torch.nn.Module | None = None
    if transformers:
        from transformers import LlamaForCausalLM

        reference = LlamaForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    for source in HELD_OUT:
        stream = load_stream(data, f"heldout_{source}", "cpu")
        counts = meta[f"heldout_{source}"]
        losses = list(token_losses(model, stream, context, batch_size=1))
        bits = torch.cat([piece.flatten() for piece in losses]).double() / math.log(2)
        full = torch.cat(losses[:-1]).double() / math.log(2)
        per_token = counts["tokens"] / counts["bytes"]
        log.info(
            "%-7s %d bytes: %.4f bits per byte (positions 0-1023: %.3f, 3072-4095: %.3f)",
            source,
            counts["bytes"],
            bits.sum() / counts["bytes"],
            full[:, :1024].mean() * per_token,
            full[:, 3072:].mean() * per_token,
        )
        if reference is not None:
            log.info(
                "%-7s transformers: %.4f bits per byte",
                source,
                bits_per_byte(reference, stream, counts["bytes"], context),
            )
            ids = stream[None, :context].long()
            with torch.no_grad():
                gap = (model(ids) - reference(ids).logits).abs().max()
            log.info("%-7s largest logit difference over %d tokens: %.1e", source, context, gap)


def sample(model_dir: Path, prompt: str, *, num_tokens: int, temperature: float, seed: int) -> str:
    """The continuation of `prompt`; without a cache, for looking at the model only."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    eos_ids = json.loads((model_dir / "config.json").read_text())["eos_token_id"]
    model = load_model(model_dir)
    prompt_ids = tokenizer.encode(prompt).ids
    ids = list(prompt_ids)
    generator = torch.Generator().manual_seed(seed)
    while len(ids) - len(prompt_ids) < num_tokens:
        with torch.no_grad():
            logits = model(torch.tensor([ids]))[0, -1]
        if temperature == 0:
            token = int(logits.argmax())
        else:
            chances = torch.softmax(logits / temperature, dim=-1)
            token = int(torch.multinomial(chances, 1, generator=generator))
        if token in eos_ids:
            break
        ids.append(token)
    text: str = tokenizer.decode(ids[len(prompt_ids) :])
    return text


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m models.train_demo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            help=text,
            description=text,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )

    step = command("prepare", "gather the text, train the tokenizer, write token streams")
    step.add_argument("--text-root", type=Path, required=True, help="unpacked Debian packages")
    step.add_argument("--data", type=Path, required=True, help="folder to write")
    step.add_argument("--seed", type=int, default=Recipe.seed, help="draws the chats")

    step = command("train", "train on the token streams; needs torch, numpy and safetensors only")
    step.add_argument("--data", type=Path, required=True, help="folder that prepare wrote")
    step.add_argument("--out", type=Path, required=True, help="folder for weights and log")
    step.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="where to train")
    step.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    for name, default in asdict(Recipe()).items():
        flag = "--" + name.replace("_", "-")
        step.add_argument(flag, type=type(default), default=default, help="of the recipe")

    step = command("export", "write the Hugging Face directory")
    step.add_argument("--data", type=Path, required=True, help="folder that prepare wrote")
    step.add_argument("--run", type=Path, required=True, help="folder that train wrote")
    step.add_argument("--out", type=Path, required=True, help="model directory")

    step = command("evaluate", "held-out bits per byte on the CPU")
    step.add_argument("--data", type=Path, required=True, help="folder that prepare wrote")
    step.add_argument("--model", type=Path, required=True, help="model directory")
    step.add_argument("--transformers", action="store_true", help="compare with transformers too")

    step = command("sample", "continue a prompt")
    step.add_argument("--model", type=Path, required=True, help="model directory")
    step.add_argument("--prompt", required=True, help="text to continue")
    step.add_argument("--num-tokens", type=int, default=120, help="most tokens to draw")
    step.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    step.add_argument("--seed", type=int, default=0, help="of the draws")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    if args.command == "prepare":
        from models.demo_text import write_streams

        write_streams(args.text_root, args.data, args.seed)
    elif args.command == "train":
        recipe = Recipe(**{name: getattr(args, name) for name in asdict(Recipe())})
        train(args.data, args.out, recipe, args.device, compiled=not args.no_compile)
    elif args.command == "export":
        export(args.data, args.run, args.out)
    elif args.command == "evaluate":
        evaluate(args.data, args.model, transformers=args.transformers)
    else:
        text = sample(
            args.model,
            args.prompt,
            num_tokens=args.num_tokens,
            temperature=args.temperature,
            seed=args.seed,
        )
        sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
