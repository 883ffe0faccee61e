"""Makes the demo models: prepare the text, train on a GPU, export, evaluate, sample.

python -m models.training prepare --text-root ROOT --data DIR
python -m models.training train --data DIR --out RUN
python -m models.training export --data DIR --run RUN --out models/demo
python -m models.training evaluate --data DIR --model models/demo [--transformers]
python -m models.training sample --model models/demo --prompt TEXT

The draft model learns from the demo:

python -m models.training train --data DIR --out RUN --teacher models/demo
python -m models.training agree --data DIR --model models/demo --draft models/demo-draft
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from models.training.llama import DRAFT_SHAPE, LlamaShape, hf_config, load_model
from models.training.loop import (
    HELD_OUT,
    Recipe,
    agreement,
    bits_per_byte,
    load_stream,
    token_losses,
    train,
)

log = logging.getLogger("demo_model")

RECIPE_HELP = {
    "num_tokens": "tokens to train on",
    "time_limit_s": "seconds after which training is over in any case",
    "tokens_per_step": "tokens of one optimizer step",
    "short_context": "window of the first phase, in tokens",
    "long_context": "window of the last phase, in tokens",
    "long_share": "share of the run that the last phase takes",
    "peak_lr": "learning rate after the warm-up",
    "final_lr_share": "learning rate at the end, as a share of the peak",
    "warmup_share": "share of the run that the warm-up takes",
    "weight_decay": "of AdamW, for matrices",
    "dropout": "after the embedding and after each attention and MLP",
    "num_evals": "how often the held-out text is measured during the run",
    "seed": "draws weights, windows and dropout",
}


def export(data: Path, run: Path, out: Path) -> None:
    """Makes the Hugging Face directory `out` from `run` (weights) and `data` (tokenizer)."""
    from tokenizers import Tokenizer

    from models.training.text import BOS, CHAT_TEMPLATE, END, EOS

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
        prog="python -m models.training",
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
    step.add_argument("--teacher", type=Path, help="make a draft model, which learns from this one")
    for name, default in asdict(Recipe()).items():
        flag = "--" + name.replace("_", "-")
        step.add_argument(flag, type=type(default), default=default, help=RECIPE_HELP[name])

    step = command("export", "write the Hugging Face directory")
    step.add_argument("--data", type=Path, required=True, help="folder that prepare wrote")
    step.add_argument("--run", type=Path, required=True, help="folder that train wrote")
    step.add_argument("--out", type=Path, required=True, help="model directory")

    step = command("evaluate", "held-out bits per byte on the CPU")
    step.add_argument("--data", type=Path, required=True, help="folder that prepare wrote")
    step.add_argument("--model", type=Path, required=True, help="model directory")
    step.add_argument("--transformers", action="store_true", help="compare with transformers too")

    step = command("agree", "how often drafts would be what the model draws, on held-out text")
    step.add_argument("--data", type=Path, required=True, help="folder that prepare wrote")
    step.add_argument("--model", type=Path, required=True, help="model directory")
    step.add_argument("--draft", type=Path, required=True, help="the draft model's directory")
    step.add_argument("--windows", type=int, default=8, help="of each source")
    step.add_argument("--context", type=int, default=1024, help="tokens of a window")

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
    try:
        run_command(args)
    except FileNotFoundError as error:
        sys.exit(str(error))


def run_command(args: argparse.Namespace) -> None:
    if args.command == "prepare":
        from models.training.text import write_streams

        write_streams(args.text_root, args.data, args.seed)
    elif args.command == "train":
        recipe = Recipe(**{name: getattr(args, name) for name in asdict(Recipe())})
        teacher = None
        if args.teacher is not None:
            teacher = load_model(args.teacher, device=args.device)
        train(
            args.data,
            args.out,
            recipe,
            args.device,
            compiled=not args.no_compile,
            shape=LlamaShape() if teacher is None else DRAFT_SHAPE,
            teacher=teacher,
        )
    elif args.command == "export":
        export(args.data, args.run, args.out)
    elif args.command == "evaluate":
        evaluate(args.data, args.model, transformers=args.transformers)
    elif args.command == "agree":
        model, draft = load_model(args.model), load_model(args.draft)
        for source in HELD_OUT:
            stream = load_stream(args.data, f"heldout_{source}", "cpu")
            shares = agreement(draft, model, stream, args.context, most=args.windows)
            log.info(
                "%-7s greedy: %.3f, temperature 1: %.3f", source, shares.greedy, shares.sampled
            )
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
