"""The training loop of the demo model; needs torch, numpy and safetensors only."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from models.training.llama import DemoLlama, LlamaShape, save_weights

log = logging.getLogger("demo_model")

# Share of each source in the training tokens: prose counts above its size, chats teach the format.
MIX = {"kjv": 0.28, "pydocs": 0.36, "stdlib": 0.28, "chat": 0.08}
HELD_OUT = ("kjv", "pydocs", "stdlib")


@dataclass(frozen=True)
class Recipe:
    """How long, how large, how fast. Contexts are short first, then of full length.

    The schedule follows tokens or time, whichever is further along; it repeats only where the
    time limit does not bind.
    """

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


@dataclass(frozen=True)
class Agreement:
    """Shares of tokens for which a draft of one model is what the other draws behind the same text,
    with the same noise."""

    greedy: float
    sampled: float
    """At temperature 1."""


def agreement(
    draft: torch.nn.Module, target: torch.nn.Module, stream: Tensor, context: int, *, most: int
) -> Agreement:
    """Over the first `most` windows of `stream`, one at a time."""
    greedy, sampled = [], []
    for start in range(0, min(most * context, len(stream) - context), context):
        window = stream[None, start : start + context].long()
        with torch.no_grad():
            guessed, drawn = draft(window)[0].float(), target(window)[0].float()
        greedy.append((guessed.argmax(-1) == drawn.argmax(-1)).double().mean())
        sampled.append(_chance_of_equal(guessed, drawn))
    return Agreement(*(round(float(torch.stack(each).mean()), 4) for each in (greedy, sampled)))


def _chance_of_equal(first: Tensor, second: Tensor) -> Tensor:
    """Mean over rows that races of exponential clocks, at the rates that softmax makes of two rows
    of logits [tokens, vocab], have one winner. The clocks are shared: each is one random number
    over its rate."""
    generator = torch.Generator(first.device).manual_seed(0)
    clocks = torch.empty_like(first).exponential_(generator=generator).log()
    return ((first - clocks).argmax(-1) == (second - clocks).argmax(-1)).double().mean()


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


def train(
    data: Path,
    out: Path,
    recipe: Recipe,
    device: str,
    *,
    compiled: bool,
    shape: LlamaShape | None = None,
    teacher: DemoLlama | None = None,
) -> None:
    """Writes model.safetensors, run.json and log.jsonl to `out`.

    With a teacher the model learns what that would say of each token's successor, instead of what
    came in the text.
    """
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(recipe.seed)
    torch.set_float32_matmul_precision("high")
    meta = json.loads((data / "meta.json").read_text())
    streams = {source: load_stream(data, f"train_{source}", device) for source in MIX}
    held_out = {source: load_stream(data, f"heldout_{source}", device) for source in HELD_OUT}
    shape = shape or LlamaShape()
    model = DemoLlama(shape, recipe.dropout).to(device)
    num_parameters = sum(p.numel() for p in model.parameters())
    log.info("%d parameters, torch %s, %s", num_parameters, torch.__version__, device)

    def next_token_loss(windows: Tensor) -> Tensor:
        logits = model(windows[:, :-1]).float()
        return functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())

    def teacher_loss(windows: Tensor) -> Tensor:
        assert teacher is not None
        with torch.no_grad():
            chances = torch.softmax(teacher(windows[:, :-1]).float(), -1)
        logits = model(windows[:, :-1]).float()
        return functional.cross_entropy(logits.flatten(0, 1), chances.flatten(0, 1))

    wanted = next_token_loss if teacher is None else teacher_loss
    # One graph per context: torch 2.11 failed to compile this with a symbolic length.
    loss_of = torch.compile(wanted, dynamic=False) if compiled else wanted
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
                if teacher is not None:
                    model.eval()
                    with autocast:
                        entry["accepted"] = {
                            source: asdict(agreement(model, teacher, stream, context, most=8))
                            for source, stream in held_out.items()
                        }
                    model.train()
                journal.write(json.dumps(entry) + "\n")
                journal.flush()
                log.info("%3.0f %%  %s", 100 * progress, json.dumps(entry))
    save_weights(model, out / "model.safetensors")
    facts = {"shape": asdict(shape), "recipe": asdict(recipe), "mix": MIX, "tokens": tokens}
    facts |= {"steps": step, "elapsed_s": round(elapsed_s, 1), "torch": torch.__version__}
    facts["device"] = torch.cuda.get_device_name() if device == "cuda" else device
    (out / "run.json").write_text(json.dumps(facts, indent=1) + "\n")
    log.info("done: %d steps, %d tokens, %.0f s", step, tokens, elapsed_s)
