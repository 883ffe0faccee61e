"""Which tokens a request rules out: its bad words as tokens, and whether any are left to draw."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from baton.shared.rpc.errors import InvalidField
from baton.shared.sampling import BANNING_BIAS, SamplingParams

Encode = Callable[[str], Awaitable[Sequence[int]]]
TokenSequences = tuple[tuple[int, ...], ...]


async def banned_sequences(
    bad_words: Sequence[str], vocab_size: int, encode: Encode
) -> TokenSequences:
    """What the tokenizer makes of each, at the beginning of a text and behind a space.

    Raises InvalidField for what gives no token.
    """
    found: dict[tuple[int, ...], None] = {}
    for index, word in enumerate(bad_words):
        token_ids = [tuple(await encode(text)) for text in _spellings(word)]
        if not all(token_ids):
            field = f"sampling.bad_words[{index}]"
            raise InvalidField(field, "gives no token", limit="texts that the tokenizer knows")
        found.update(dict.fromkeys(token_ids))
    # A token that the model lacks is never drawn anyway.
    return tuple(each for each in found if max(each) < vocab_size)


def _spellings(word: str) -> list[str]:
    bare = word.lstrip(" ")
    return [bare, f" {bare}"] if bare else [word]


def check_a_token_is_left(params: SamplingParams, banned: TokenSequences) -> None:
    """Raises InvalidField where not even the first token could be drawn.

    Without an allow-list only a tiny vocabulary can run out of tokens: the engine would say so.
    `params.stop_token_ids` has the model's end-of-sequence tokens, unless they are ignored.
    """
    allowed = params.allowed_token_ids
    if not allowed:
        return
    singles = {each[0] for each in banned if len(each) == 1}
    banning = {token_id for token_id, bias in params.logit_bias if bias == BANNING_BIAS}
    left = allowed - singles - banning
    if params.min_tokens > 0:
        left -= params.stop_token_ids
    if not left:
        problem = "has no token that logit_bias, bad_words and min_tokens leave to draw"
        raise InvalidField("sampling.allowed_token_ids", problem, limit="at least 1 such token")
