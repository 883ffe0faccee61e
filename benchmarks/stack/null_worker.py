"""A worker without an engine, to measure what is in front of it.

    python -m benchmarks.stack.null_worker --model DIR --redis-url URL [--step-ms 0]

Of role `both`, in the directory like any other. Every sequence gets a token each step, and steps
come every `--step-ms`, or as fast as the gateway's stream takes them. Tokens count through the
vocabulary, so that the gateway has text to make.
"""

from __future__ import annotations

import argparse
import asyncio
import secrets
import sys
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import uvloop

from baton.services.decode.server import DecodeEvents, DecodeServicer
from baton.services.worker.directory_sync import DirectorySync
from baton.shared.directory.workers import ModelFacts, WorkerLoad, WorkerRecord
from baton.shared.engine.model_digest import identify_model, weight_paths
from baton.shared.kv.capability import Capability
from baton.shared.kv.capacity import Capacity, GroupShare
from baton.shared.kv.sequence import AttemptKey, FinishReason, Sequence
from baton.shared.model_files.fields import ModelError
from baton.shared.model_files.info import load_model_info
from baton.shared.rpc.convert import FINISH_REASON_TO_PB
from baton.shared.rpc.serve import INTERNAL_MESSAGE_BYTES, Endpoint, stop_event
from baton.v1 import decode_service_pb2, decode_service_pb2_grpc, types_pb2

_NUM_BLOCKS = 1 << 20
_BLOCK_SIZE = 16
_FIRST_TOKEN = 256
_MAX_MODEL_LEN = 131_072
"""Of a model whose files do not say."""
_MAX_UNSENT = 2
"""Messages to a gateway that may wait for its stream: beyond it the engine waits."""


@dataclass(slots=True)
class _Running:
    key: AttemptKey
    number: int
    next_index: int
    end: int


class NullEngine:
    """What DecodeServicer needs of a worker."""

    def __init__(self, capability_hash: str, vocab_size: int, step_s: float) -> None:
        self.capability_hash = capability_hash
        self.num_steps = 0
        self.num_running = 0
        self._vocab_size = vocab_size
        self._step_s = step_s
        self._names = count(1)
        self._streams: dict[str, DecodeEvents] = {}
        self._running: dict[str, list[_Running]] = {}

    def attach_gateway(self, incarnation: str) -> tuple[str, DecodeEvents]:
        name = f"{incarnation}/{next(self._names)}"
        self._streams[name] = asyncio.Queue()
        self._running[name] = []
        return name, self._streams[name]

    def detach_gateway(self, gateway: str) -> None:
        del self._streams[gateway], self._running[gateway]

    def start_decode(
        self,
        sequence: Sequence,
        gateway: str,
        number: int,
        source: types_pb2.WorkerAddress | None,
    ) -> None:
        first, end = sequence.first_index, sequence.params.max_tokens
        self._running[gateway].append(_Running(sequence.key, number, first, end))
        joined = decode_service_pb2.SequenceJoined(slot=number)
        self._streams[gateway].put_nowait(decode_service_pb2.DecodeResponse(joined=joined))

    def cancel(self, key: AttemptKey) -> None:
        for running in self._running.values():
            running[:] = [each for each in running if each.key != key]

    def tick(self) -> types_pb2.Tick:
        return types_pb2.Tick(step=self.num_steps, busy=self.num_running > 0)

    async def run(self) -> None:
        """Steps, until cancelled."""
        while True:
            await asyncio.sleep(self._step_s)
            self.num_running = sum(map(len, self._running.values()))
            self.num_steps += self.num_running > 0
            for gateway, running in self._running.items():
                if running and self._streams[gateway].qsize() < _MAX_UNSENT:
                    self._streams[gateway].put_nowait(self._draw(running))

    def _draw(self, running: list[_Running]) -> decode_service_pb2.DecodeResponse:
        response = decode_service_pb2.DecodeResponse()
        step = response.step
        step.step = self.num_steps
        going_on = []
        for each in running:
            index, each.next_index = each.next_index, each.next_index + 1
            is_last = each.next_index >= each.end
            step.slots.append(each.number)
            step.indices.append(index)
            step.token_ids.append(_FIRST_TOKEN + index % (self._vocab_size - _FIRST_TOKEN))
            reason = FinishReason.LENGTH if is_last else None
            step.finish_reasons.append(FINISH_REASON_TO_PB[reason])
            if not is_last:
                going_on.append(each)
        running[:] = going_on
        return response


async def serve(args: argparse.Namespace) -> int:
    stop = stop_event()
    model = load_model_info(args.model)
    incarnation = secrets.token_hex(16)
    digest = _digest(args.model)
    capability = Capability(digest, "none", "none", _BLOCK_SIZE, (), "consistent (no engine)")
    engine = NullEngine(capability.hash(), model.vocab_size, args.step_ms / 1e3)
    endpoint = Endpoint(max_message_bytes=INTERNAL_MESSAGE_BYTES)
    decode_service_pb2_grpc.add_DecodeServiceServicer_to_server(
        DecodeServicer(engine), endpoint.server
    )
    await endpoint.start("127.0.0.1", 0, ["baton.v1.DecodeService"])

    async def record() -> WorkerRecord:
        return WorkerRecord(
            worker_id="null-0",
            incarnation=incarnation,
            role="both",
            address=endpoint.address,
            capability=capability,
            model=ModelFacts(
                model_name=args.model.resolve().name,
                model_type=model.model_type,
                vocab_size=model.vocab_size,
                eos_token_ids=tuple(model.eos_token_ids),
            ),
            capacity=Capacity(
                _BLOCK_SIZE,
                (_NUM_BLOCKS,),
                (GroupShare(0),),
                max_model_len=model.max_position_embeddings or _MAX_MODEL_LEN,
            ),
            load=WorkerLoad(0, engine.num_running, (_NUM_BLOCKS,), {}),
        )

    directory = DirectorySync(
        args.redis_url, args.cluster, worker_id="null-0", incarnation=incarnation
    )
    await directory.connect()
    tasks = [asyncio.create_task(directory.run(record)), asyncio.create_task(engine.run())]
    await endpoint.set_ready(is_ready=True)
    print(f"READY grpc={endpoint.address}", flush=True)
    await stop.wait()
    await directory.retire()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await directory.close()
    await endpoint.stop(0.5)
    return 0


def _digest(model_dir: Path) -> str:
    """As the gateway has it, which would use no worker of another model."""
    try:
        files = weight_paths(model_dir)
    except ModelError:
        return "null"
    return identify_model(model_dir, files, lambda _: None).digest


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.stack.null_worker", description=__doc__
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--redis-url", required=True)
    parser.add_argument("--cluster", default="default")
    parser.add_argument("--step-ms", type=float, default=0.0)
    return uvloop.run(serve(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
