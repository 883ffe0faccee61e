"""What is asked: prompts of made-up tokens, which begin alike where that is wanted. Pure."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from baton.loadtest.arrivals import arrivals
from baton.loadtest.lengths import Draw, lengths
from baton.loadtest.spec import Load, LoadError
from baton.loadtest.traces import Recorded, replay


@dataclass(frozen=True)
class Segment:
    """The first `num_tokens` tokens of the endless text that `key` names."""

    key: str
    num_tokens: int

    def token_ids(self, load: Load) -> list[int]:
        draw = random.Random(f"{load.seed}/{self.key}")
        return draw.choices(range(load.vocab_size), k=self.num_tokens)


@dataclass(frozen=True)
class Turn:
    """One prompt of a conversation: `segments` follow what was said before."""

    segments: tuple[Segment, ...]
    output_tokens: int

    @property
    def num_tokens(self) -> int:
        return sum(segment.num_tokens for segment in self.segments)

    def token_ids(self, load: Load) -> list[int]:
        return [token for segment in self.segments for token in segment.token_ids(load)]


Conversation = tuple[Turn, ...]


@dataclass(frozen=True)
class Workload:
    """All that a load asks. `conversation` makes the one of a number, from 0. `arrivals` are
    seconds from the start, one for each; None in a closed loop, which goes on as long as it may."""

    conversation: Callable[[int], Conversation]
    arrivals: list[float] | None
    notes: tuple[str, ...] = ()
    """In what it differs from what was asked for."""

    @property
    def num_conversations(self) -> int | None:
        return None if self.arrivals is None else len(self.arrivals)


def workload_of(load: Load) -> Workload:
    """A function of the load, however many processes share it. Raises LoadError."""
    load.check()
    if load.arrivals == "trace":
        return _of_trace(load)
    prompt = lengths(load.prompt_tokens, "--prompt-tokens")
    output = lengths(load.output_tokens, "--output-tokens")
    made = _capped(prompt, load.max_prompt), _capped(output, load.max_output)
    return Workload(
        lambda number: _conversation(load, number, *made),
        None if load.is_closed else arrivals(load),
    )


def longest(workload: Workload, load: Load, num_looked: int = 2000) -> int:
    """Tokens of the longest conversation, answers included, among the first `num_looked`."""
    if workload.num_conversations is not None:
        num_looked = workload.num_conversations
    elif load.num_requests is not None:
        num_looked = min(num_looked, load.num_requests)
    return max(
        (
            sum(turn.num_tokens + turn.output_tokens for turn in workload.conversation(number))
            for number in range(num_looked)
        ),
        default=0,
    )


def _conversation(load: Load, number: int, prompt: Draw, output: Draw) -> Conversation:
    draw = random.Random(f"{load.seed}/conversation/{number}")
    turns = []
    for index in range(load.num_turns):
        own = Segment(f"own/{number}/{index}", prompt(draw))
        segments: tuple[Segment, ...] = (own,)
        if load.num_prefixes and index == 0:
            segments = _with_prefix(own, draw.randrange(load.num_prefixes), load.prefix_tokens)
        turns.append(Turn(segments, output(draw)))
    return tuple(turns)


def _with_prefix(own: Segment, group: int, prefix_tokens: int) -> tuple[Segment, ...]:
    """A prompt of the same length; at least one token is its own."""
    shared = min(prefix_tokens, own.num_tokens - 1)
    if not shared:
        return (own,)
    return (Segment(f"prefix/{group}", shared), Segment(own.key, own.num_tokens - shared))


def _capped(draw: Draw, most: int | None) -> Draw:
    if most is None:
        return draw
    return lambda random_: min(most, draw(random_))


def _of_trace(load: Load) -> Workload:
    if load.num_turns > 1 or load.num_prefixes:
        raise LoadError("--turns and --prefixes: a trace has its own structure")
    found = replay(load)
    notes = [
        f"{count} of {len(found.requests)} {what} capped at {most} tokens"
        for count, what, most in (
            (found.num_capped_prompts, "prompts", load.max_prompt),
            (found.num_capped_outputs, "answers", load.max_output),
        )
        if count
    ]
    if load.length_scale != 1:
        notes.append(f"lengths times {load.length_scale:g}")
        if any(request.blocks for request in found.requests):
            notes[-1] += f": a block of the trace is {found.block_tokens} tokens"
    return Workload(
        lambda number: (_recorded_turn(number, found.requests[number], found.block_tokens),),
        [request.at_s for request in found.requests],
        tuple(notes),
    )


def _recorded_turn(number: int, request: Recorded, block_tokens: int) -> Turn:
    segments = []
    left = request.prompt_tokens
    for block in request.blocks:
        if left <= 0:
            break
        segments.append(Segment(f"block/{block}", min(left, block_tokens)))
        left -= block_tokens
    if left > 0:
        # Scaled blocks were rounded, or the trace has none.
        segments.append(Segment(f"own/{number}", left))
    return Turn(tuple(segments), request.output_tokens)
