"""Which tokens may follow: the masks of one answer under a constraint.

    emitted so far ─► free text ─► begin_after ─► the grammar's text ─► the end
                      any token                    its tokens           end tokens

Free are not the tokens that would write the end of the free text and something behind it, which the
grammar would not see.

All of it is a function of the emitted tokens, whichever attempt drew them: a matcher that is told
all of them knows what the one before knew.

Where the grammar allows one text only, the tokens that the tokenizer would make of it are the only
ones that may follow (forced tokens). They are known before they are drawn, and so can be checked
together as drafts; the tokens are the same one by one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from baton.shared.constraints.compiler import CompiledConstraint, reaches_past
from baton.shared.rpc.errors import InvalidField
from baton.shared.token_masks import TokenMasks, num_mask_words

_NO_TOKEN = "NoExtensionBias"
"""How llguidance's error begins where no token may follow and the text is not complete."""


class TokenNotAllowed(ValueError):
    """An answer has a token that its constraint does not allow there."""


class AnswerMatcher:
    def __init__(self, compiled: CompiledConstraint, *, ignore_eos: bool = False) -> None:
        """`ignore_eos`: the answer ends only where the grammar has no other token."""
        self._compiled = compiled
        self._tokens = compiled.tokens
        self._begin_after = compiled.begin_after
        self._ignores_ends = ignore_eos
        self._may_end_free = compiled.accepts_empty and not ignore_eos
        self._num_words = num_mask_words(compiled.tokens.vocab_size)
        self._ends = _bits(compiled.tokens.end_ids, self._num_words)
        self._overhanging = _bits(compiled.overhanging, self._num_words)
        self._takes_guesses = True
        self._begin()

    def _begin(self) -> None:
        self._grammar = self._compiled.grammar.deep_copy()
        self._has_begun = self._begin_after is None
        self._tail: tuple[int, ...] | bytes = () if isinstance(self._begin_after, tuple) else b""
        """Of the free text, as much as may be a part of its end."""
        self._forced: deque[int] = deque()
        self.num_taken = 0
        """Tokens of the answer that are known here."""
        if self._has_begun:
            self._look_ahead()

    def restart(self) -> None:
        """After an error, which llguidance does not leave: knows no token, and takes no drafts any
        more."""
        self._takes_guesses = False
        self._begin()

    def take(self, token_ids: Sequence[int]) -> None:
        """The answer's next tokens. Raises TokenNotAllowed when they cannot be, and InvalidField
        when the grammar becomes too much work."""
        for token_id in token_ids:
            if not self._step(token_id):
                self._check()
                raise TokenNotAllowed(
                    f"have token {token_id}, which the constraint does not allow there"
                )
            self.num_taken += 1

    def forced(self, most: int) -> tuple[int, ...]:
        """The tokens that must follow, as far as they are known, at most so many."""
        return tuple(self._forced)[:most] if self._takes_guesses else ()

    def num_allowed(self, token_ids: Sequence[int]) -> int:
        """How many of these guesses may be drawn, one after the other. Raises nothing: where they
        are too much work none is, now and later."""
        if not self._takes_guesses:
            return 0
        if not self._has_begun:
            return len(token_ids)
        ends = self._tokens.end_ids
        first = next((i for i, each in enumerate(token_ids) if each in ends), len(token_ids))
        try:
            num_allowed: int = self._grammar.validate_tokens(list(token_ids[:first]))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:  # a panic of llguidance is no Exception
            self.restart()
            return 0
        if self._grammar.is_error():
            self.restart()
            return 0
        return num_allowed

    def masks(self, draft_ids: Sequence[int] = ()) -> TokenMasks:
        """Of the draw behind the known tokens, and behind each draft after it → [1 + drafts,
        words]. Raises InvalidField when the grammar becomes too much work."""
        masks = np.empty((1 + len(draft_ids), self._num_words), np.uint32)
        before = self._has_begun, self._tail, self._forced.copy()
        num_consumed = 0
        for index in range(len(masks)):
            self._fill(masks[index])
            if index == len(draft_ids):
                break
            has_begun = self._has_begun
            if not self._step(draft_ids[index]):
                # It is not drawn, so nothing is drawn behind it.
                masks[index + 1 :] = 0xFFFFFFFF
                break
            num_consumed += has_begun
        if num_consumed:
            self._grammar.rollback(num_consumed)
        if draft_ids:
            self._has_begun, self._tail, self._forced = before
        self._check()
        if not masks.any(axis=1).all():
            raise _not_writable()
        return masks

    def _fill(self, mask: TokenMasks) -> None:
        """`mask`: [words]."""
        if not self._has_begun:
            mask[:] = 0xFFFFFFFF
            if not self._may_end_free:
                mask &= ~self._ends
            if isinstance(self._begin_after, bytes):
                mask &= ~(self._overhanging | self._completing_too_much(self._begin_after))
            return
        if self._forced:
            mask[:] = _bits((self._forced[0],), self._num_words)
            return
        self._grammar.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        if self._ignores_ends:
            others = mask & ~self._ends
            if others.any():
                mask[:] = others

    def _completing_too_much(self, end: bytes) -> TokenMasks:
        """Tokens that write the rest of it, behind what the free text has, and then go on."""
        tail = self._tail
        assert isinstance(tail, bytes)
        found = [
            token_id
            for length in range(1, len(tail) + 1)
            if tail.endswith(end[:length])
            for token_id in self._tokens.beginning_with(end[length:])
            if self._tokens.token_bytes[token_id][len(end) - length :].strip()
        ]
        return _bits(found, self._num_words)

    def _step(self, token_id: int) -> bool:
        """Whether the token may follow; then it has. Otherwise nothing has changed."""
        if not self._has_begun:
            return self._step_free(token_id)
        if token_id in self._tokens.end_ids or self._grammar.validate_tokens([token_id]) != 1:
            return False
        if not self._grammar.consume_token(token_id):
            return False
        if self._forced and self._forced[0] == token_id:
            self._forced.popleft()
        else:
            # A client's own received tokens may be others than we draw.
            self._forced.clear()
        if not self._forced:
            self._look_ahead()
        return True

    def _step_free(self, token_id: int) -> bool:
        if token_id in self._tokens.end_ids:
            return False
        end = self._begin_after
        assert end is not None
        if isinstance(end, tuple):
            tail: tuple[int, ...] | bytes = (*self._tail, token_id)[-len(end) :]
            self._has_begun = tail == end
            self._tail = tail
        else:
            assert isinstance(self._tail, bytes)
            text = self._tail + self._tokens.token_bytes[token_id]
            if reaches_past(end, text):
                return False
            self._has_begun = end in text
            self._tail = text[1 - len(end) :] if len(end) > 1 else b""
        if self._has_begun:
            self._look_ahead()
        return True

    def _look_ahead(self) -> None:
        forced = self._grammar.compute_ff_tokens()
        # Special tokens written in a text are none.
        if forced and self._grammar.validate_tokens(forced) == len(forced):
            self._forced.extend(forced)

    def _check(self) -> None:
        if self._grammar.is_error():
            if (self._grammar.get_error() or "").startswith(_NO_TOKEN):
                raise _not_writable()
            reason = self._grammar.stop_reason()
            raise InvalidField(
                "constraint", f"becomes too much work ({reason})", limit="a simpler one"
            )


def _not_writable() -> InvalidField:
    """As with a vocabulary without bytes that lacks a character, or has it in an end token only."""
    return InvalidField(
        "constraint", "has no text that the model's tokens can write", limit="another one"
    )


def _bits(token_ids: Sequence[int], num_words: int) -> npt.NDArray[np.uint32]:
    bits = np.zeros(num_words, np.uint32)
    for token_id in token_ids:
        bits[token_id // 32] |= np.uint32(1 << token_id % 32)
    return bits
