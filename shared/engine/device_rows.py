"""What the device knows of a step's rows, and what it has to be told before the step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from baton.shared.engine.batch import BatchRow, ChainRow, RowHandle
from baton.shared.engine.batch_state import BatchState
from baton.shared.engine.coming_guesses import ComingGuesses
from baton.shared.engine.shaping import History, Shaping
from baton.shared.kv.block_pool import NO_BLOCK
from baton.shared.sampling import SamplingParams


class DeviceRows:
    def __init__(
        self,
        state: BatchState,
        *,
        num_blocks: Sequence[int],
        num_slot_groups: int,
        block_size: int,
        max_model_len: int,
        num_drafts: int,
        vocab_size: int,
        eos_token_ids: Sequence[int],
    ) -> None:
        """`num_blocks`: by cache group, how many there are; `num_slot_groups`: how many of the
        groups, the last ones, are of states."""
        self._state = state
        self._num_growing = len(num_blocks) - num_slot_groups
        self._num_blocks = num_blocks
        self._block_size = block_size
        self._max_model_len = max_model_len
        self._num_drafts = num_drafts
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids

    def open(
        self, sampling: SamplingParams, sample_index: int, history: History | None
    ) -> RowHandle:
        shaping = Shaping.of(sampling, history, self._eos_token_ids)
        handle = RowHandle(self._state.open_slot(), sampling, sample_index, shaping)
        handle.num_blocks = [0] * len(self._num_blocks)
        return handle

    def close(self, handles: Iterable[RowHandle]) -> None:
        for handle in handles:
            self._state.close_slot(handle.slot)

    @property
    def num_free(self) -> int:
        return self._state.num_free_slots

    def check(self, row: BatchRow, end: int | None = None) -> None:
        """Raises ValueError for what must not reach the device. `end`: up to which it is computed,
        where that is beyond its own tokens."""
        end = end or row.context_len
        if row.num_tokens < 1:
            raise ValueError("a batch needs rows and each row a token")
        if end > self._max_model_len:
            raise ValueError(f"a row of {end} tokens exceeds max_model_len")
        if row.draft_ids and (row.num_known != 1 or len(row.draft_ids) > self._num_drafts):
            raise ValueError(f"a row of one token may bring {self._num_drafts} drafts along")
        if len(row.block_tables) != len(self._num_blocks):
            raise ValueError(f"rows need {len(self._num_blocks)} block tables")
        handle = row.handle
        first_written = row.position // self._block_size
        for group, table in enumerate(row.block_tables):
            grows = group < self._num_growing
            if len(table) * self._block_size < end if grows else len(table) != 1:
                raise ValueError("a block table is shorter than its row's context")
            new = table if handle is None else table[handle.num_blocks[group] :]
            if not new:
                continue
            if min(new) < NO_BLOCK or max(new) >= self._num_blocks[group]:
                raise ValueError("a block table names a block that does not exist")
            if grows and min(new) == NO_BLOCK and NO_BLOCK in table[first_written:]:
                raise ValueError("a row's tokens have no block")
        if row.token_ids is None and (handle is None or handle.drawn_at != row.position):
            raise ValueError("a row without tokens, for which none was drawn")
        shaping = None if handle is None else handle.shaping
        if row.token_ids is None and shaping is not None and handle is not None:
            if shaping.needs_last_tokens or not handle.is_marked:
                raise ValueError("a row without tokens that have a say in what is drawn")

    def note(self, row: BatchRow, handle: RowHandle, *, has_drafts: bool) -> None:
        """`has_drafts`: the step's rows of one token may bring some along."""
        state, slot = self._state, handle.slot
        self._note_sequence(row, handle)
        if handle.shaping is not None and row.sampling is not None:
            # The token of a decode row is counted where the step begins.
            num_counted = row.num_known if row.is_chunk else 0
            self._note_shaping(row, handle, handle.shaping, num_counted)
        end = row.context_len
        if not row.is_chunk:
            # The step moves the length on by its tokens.
            if handle.context_len != row.position:
                state.send_context_len(slot, row.position)
            if handle.drawn_at != row.position:
                assert row.token_ids is not None
                state.send_token(slot, row.token_ids[0])
            if has_drafts and (row.draft_ids or handle.num_drafts):
                if isinstance(row.draft_ids, ComingGuesses):
                    state.send_num_drafts(slot, len(row.draft_ids))
                else:
                    state.send_drafts(slot, row.draft_ids)
                handle.num_drafts = len(row.draft_ids)
        else:
            state.send_context_len(slot, end)
        handle.context_len = end
        # A chunk in the middle of a prompt leaves no token behind.
        handle.drawn_at = end if row.sampling is not None else -1

    def note_chain(self, chain: ChainRow, handle: RowHandle) -> None:
        """Its known tokens go where drafts lie, but for the first: the chain begins with all of
        them."""
        state, slot, row = self._state, handle.slot, chain.row
        assert row.token_ids is not None
        first, *others = row.token_ids
        self._note_sequence(row, handle)
        if handle.shaping is not None:
            # Nothing counts them on the device.
            self._note_shaping(row, handle, handle.shaping, row.num_known)
        if handle.context_len != row.position:
            state.send_context_len(slot, row.position)
        state.send_token(slot, first)
        if others or handle.num_drafts:
            state.send_drafts(slot, others)
        handle.num_drafts = len(others)
        handle.context_len, handle.drawn_at = chain.end, -1

    def _note_sequence(self, row: BatchRow, handle: RowHandle) -> None:
        state, slot = self._state, handle.slot
        if not handle.is_sent:
            state.send_sampling(handle)
            handle.is_sent = True
        num_sent = handle.num_blocks
        for group, table in enumerate(row.block_tables):
            if len(table) > num_sent[group]:
                state.send_blocks(group, slot, num_sent[group], table[num_sent[group] :])
                num_sent[group] = len(table)

    def _note_shaping(
        self, row: BatchRow, handle: RowHandle, shaping: Shaping, num_counted: int
    ) -> None:
        """`num_counted`: of the row's tokens, those that the marks have."""
        position = row.position + handle.shift
        known_to = position + row.num_known
        if not handle.is_marked:
            end = position + num_counted
            self._state.send_marks(handle.slot, shaping.fresh_marks(self._vocab_size, end))
            handle.is_marked = True
        if shaping.needs_last_tokens:
            bans = [
                (num_before, token_id)
                for num_before in range(1 + len(row.draft_ids))
                for token_id in shaping.banned_behind(known_to, row.draft_ids[:num_before])
            ]
            if bans or handle.num_bans:
                self._state.send_bans(handle.slot, bans)
                handle.num_bans = len(bans)

    def distrust(self, handles: Iterable[RowHandle]) -> None:
        """What the device knows of these rows may be anything: all of it is sent again."""
        for handle in handles:
            handle.is_sent = handle.is_marked = False
            handle.context_len = handle.drawn_at = -1
            handle.num_blocks = [0] * len(self._num_blocks)
            # Not known: the next step with any sends how many there are.
            handle.num_drafts = handle.num_bans = -1
        self._state.forget()
