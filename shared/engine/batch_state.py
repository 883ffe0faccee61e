"""BatchState: what the GPU knows of every running sequence, and the host's changes to it.

All of it lies in one int32 tensor, so that a step's changes, whatever they are, are one list of
(offset, value) pairs: one copy and one small kernel. A step in which no sequence joined, left or
took a block changes nothing and sends nothing.

    streams        int64   [S]      random stream of each slot (sampler.draw_stream)
    token_ids      int32   [S]      the last drawn token: input of the slot's next row
    context_lens   int32   [S]      keys visible to the last token of the slot
    top_k          int32   [S]
    temperature, top_p, min_p  float32 [S]
    rows           int32   by padded batch size B: [B] slots of the decode rows, −1 = padding
    later_rows     int32   likewise, [C, B]: of the steps of a chain of guesses behind its first
    draft_ids      int32   [S, K]   guesses of the tokens behind the last drawn one
    num_drafts     int32   [S]      how many of them there are
    block_tables   int32   [G, S, max_blocks]   by cache group

What changes a slot's logits (shaping.py), where it asks for any of that:

    is_shaped      int32   [S]      whether it does
    presence, frequency, repetition  float32 [S]
    counts_from, may_end_at          int32 [S], positions
    num_biases     int32   [S];  bias_tokens int32 [S, 1024], biases float32 [S, 1024]
    num_bans       int32   [S];  bans int32 [S, NX], of the coming step
    marks          int32   [S, vocab]   what each token has been to the sequence
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from baton.kernels.logit_shaping import TOKEN_BITS, Counting, ShapingColumns
from baton.shared.engine.batch import RowHandle
from baton.shared.engine.sampler import draw_stream
from baton.shared.engine.shaping import Shaping
from baton.shared.kv.block_pool import NO_BLOCK
from baton.shared.model_files.fields import ModelError
from baton.shared.sampling import MOST_BAD_WORDS, MOST_BIASES

Int32s = npt.NDArray[np.int32]

_FLOATS = ("temperature", "top_p", "min_p")
_PENALTIES = ("presence", "frequency", "repetition")
MOST_BANS = 2 * MOST_BAD_WORDS
"""Of a step, behind each guess: a bad word has two spellings."""


class BatchState:
    def __init__(
        self,
        num_slots: int,
        max_blocks: int,
        batch_sizes: Sequence[int],
        device: torch.device,
        *,
        zero_blocks: Sequence[int] = (0,),
        num_drafts: int = 0,
        num_later: int = 0,
        vocab_size: int = 0,
    ) -> None:
        """`batch_sizes`: the padded sizes that decode batches come in. `zero_blocks`: by cache
        group, what holes in block tables read. `num_drafts`: K. `num_later`: C.

        ModelError when what it takes cannot be addressed.
        """
        num_groups = len(zero_blocks)
        row_sizes = {
            _rows_name(size, place): size for size in batch_sizes for place in range(1 + num_later)
        }
        sizes = {
            "streams": 2 * num_slots,
            "token_ids": num_slots,
            "context_lens": num_slots,
            "top_k": num_slots,
            "temperature": num_slots,
            "top_p": num_slots,
            "min_p": num_slots,
            **row_sizes,
            "draft_ids": num_slots * num_drafts,
            "num_drafts": num_slots,
            "block_tables": num_groups * num_slots * max_blocks,
            "is_shaped": num_slots,
            **dict.fromkeys(_PENALTIES, num_slots),
            "counts_from": num_slots,
            "may_end_at": num_slots,
            "num_biases": num_slots,
            "bias_tokens": num_slots * MOST_BIASES,
            "biases": num_slots * MOST_BIASES,
            "num_bans": num_slots,
            "bans": num_slots * MOST_BANS * (1 + num_drafts),
            "marks": num_slots * vocab_size,
        }
        self._starts: dict[str, int] = {}
        end = 0
        for name, size in sizes.items():
            self._starts[name] = end
            end += aligned(size)
        if end >= 2**31:
            limit = num_slots * 2**31 // end
            raise ModelError(
                f"max_num_seqs is {num_slots}, too many to count the tokens of a vocabulary of "
                f"{vocab_size} for each; limit: about {limit}"
            )
        self.arena = torch.zeros(end, dtype=torch.int32, device=device)

        def part(name: str) -> Tensor:
            return self.arena[self._starts[name] :][: sizes[name]]

        self.streams = part("streams").view(torch.int64)
        self.token_ids = part("token_ids")
        self.context_lens = part("context_lens")
        self.top_k = part("top_k")
        self.temperature = part("temperature").view(torch.float32)
        self.top_p = part("top_p").view(torch.float32)
        self.min_p = part("min_p").view(torch.float32)
        self.rows = {size: part(_rows_name(size)).fill_(-1) for size in batch_sizes}
        self.later_rows = {
            size: [part(_rows_name(size, place + 1)).fill_(-1) for place in range(num_later)]
            for size in batch_sizes
        }
        self.draft_ids = part("draft_ids").view(num_slots, num_drafts)
        self.num_drafts = part("num_drafts")
        self.block_tables = part("block_tables").view(num_groups, num_slots, max_blocks)
        self.shaping = ShapingColumns(
            Counting(
                part("marks").view(num_slots, vocab_size), part("is_shaped"), part("counts_from")
            ),
            presence=part("presence").view(torch.float32),
            frequency=part("frequency").view(torch.float32),
            repetition=part("repetition").view(torch.float32),
            may_end_at=part("may_end_at"),
            num_biases=part("num_biases"),
            bias_tokens=part("bias_tokens").view(num_slots, MOST_BIASES),
            biases=part("biases").view(torch.float32).view(num_slots, MOST_BIASES),
            num_bans=part("num_bans"),
            bans=part("bans").view(num_slots, MOST_BANS * (1 + num_drafts)),
        )
        self._zero_blocks = tuple(zero_blocks)
        self._sent_rows = {name: [-1] * size for name, size in row_sizes.items()}
        self._free_slots = list(range(num_slots - 1, -1, -1))
        self._offsets: list[int] = []
        self._values: list[int] = []
        self._runs: list[tuple[int, Int32s]] = []

    def open_slot(self) -> int:
        """ValueError when all are taken."""
        if not self._free_slots:
            raise ValueError("every slot of the batch state is taken")
        return self._free_slots.pop()

    def close_slot(self, slot: int) -> None:
        self._free_slots.append(slot)

    @property
    def num_free_slots(self) -> int:
        return len(self._free_slots)

    # Changes, sent by the next `take_updates`

    def send_sampling(self, handle: RowHandle) -> None:
        params, slot = handle.sampling, handle.slot
        stream = draw_stream(params.seed, handle.sample_index, handle.shift) & (2**64 - 1)
        self._set("streams", 2 * slot, _signed(stream & 0xFFFFFFFF))
        self._set("streams", 2 * slot + 1, _signed(stream >> 32))
        # The kernels count with int32; a k beyond any vocabulary means no limit all the same.
        self._set("top_k", slot, min(params.top_k, 2**31 - 1))
        self._set_floats(slot, _FLOATS, (params.temperature, params.top_p, params.min_p))
        self._set("is_shaped", slot, int(handle.shaping is not None))
        if handle.shaping is not None:
            self._send_shaping(slot, handle.shaping, handle.shift)

    def _send_shaping(self, slot: int, shaping: Shaping, shift: int) -> None:
        penalties = (shaping.presence, shaping.frequency, shaping.repetition)
        self._set_floats(slot, _PENALTIES, penalties)
        self._set("counts_from", slot, shaping.counts_from - shift)
        self._set("may_end_at", slot, shaping.may_end_at - shift)
        self._set("num_biases", slot, len(shaping.biases))
        if not shaping.needs_last_tokens:
            self._set("num_bans", slot, 0)
        if shaping.biases:
            tokens, biases = zip(*shaping.biases, strict=True)
            start = slot * MOST_BIASES
            self._runs.append((self._starts["bias_tokens"] + start, np.array(tokens, np.int32)))
            words = np.array(biases, np.float32).view(np.int32)
            self._runs.append((self._starts["biases"] + start, words))

    def send_marks(self, slot: int, marks: Int32s) -> None:
        self._runs.append((self._starts["marks"] + slot * len(marks), marks))

    def send_bans(self, slot: int, bans: Sequence[tuple[int, int]]) -> None:
        """(guesses before the row's token, token) of what is not drawn in the coming step."""
        entries = [num_before << TOKEN_BITS | token_id for num_before, token_id in bans]
        start = self._starts["bans"] + slot * self.shaping.bans.shape[1]
        self._offsets.extend(range(start, start + len(entries)))
        self._values.extend(entries)
        self._set("num_bans", slot, len(entries))

    def send_token(self, slot: int, token_id: int) -> None:
        self._set("token_ids", slot, token_id)

    def send_context_len(self, slot: int, context_len: int) -> None:
        self._set("context_lens", slot, context_len)

    def send_drafts(self, slot: int, draft_ids: Sequence[int]) -> None:
        start = self._starts["draft_ids"] + slot * self.draft_ids.shape[1]
        self._offsets.extend(range(start, start + len(draft_ids)))
        self._values.extend(draft_ids)
        self.send_num_drafts(slot, len(draft_ids))

    def send_num_drafts(self, slot: int, num_drafts: int) -> None:
        """Of drafts that come another way."""
        self._set("num_drafts", slot, num_drafts)

    def send_blocks(self, group: int, slot: int, first: int, block_ids: Sequence[int]) -> None:
        """Entries of the slot's block table in a group from index `first` on."""
        _, num_slots, max_blocks = self.block_tables.shape
        start = self._starts["block_tables"] + (group * num_slots + slot) * max_blocks + first
        if len(block_ids) == 1 and block_ids[0] != NO_BLOCK:
            self._offsets.append(start)
            self._values.append(block_ids[0])
        else:
            run = np.array(block_ids, np.int32)
            run[run == NO_BLOCK] = self._zero_blocks[group]
            self._runs.append((start, run))

    def send_rows(self, size: int, slots: list[int]) -> None:
        """Which slots decode; `slots` has at most `size` entries."""
        self._send_rows(_rows_name(size), slots)

    def send_later_rows(self, size: int, place: int, slots: list[int]) -> None:
        """The same of a chain's step `place`, from 1 on: −1 where a row takes no part."""
        self._send_rows(_rows_name(size, place), slots)

    def _send_rows(self, name: str, slots: list[int]) -> None:
        sent = self._sent_rows[name]
        wanted = slots + [-1] * (len(sent) - len(slots))
        if wanted == sent:
            return
        changed = [i for i in range(len(sent)) if wanted[i] != sent[i]]
        start = self._starts[name]
        self._offsets.extend(start + i for i in changed)
        self._values.extend(wanted[i] for i in changed)
        self._sent_rows[name] = wanted

    def forget(self) -> None:
        """A step did not come about: what it had to send is not sent, and what `rows` hold on the
        device may be anything."""
        self._offsets, self._values, self._runs = [], [], []
        for name, sent in self._sent_rows.items():
            self._sent_rows[name] = [-2] * len(sent)

    @property
    def num_updates(self) -> int:
        """That `take_updates` would give."""
        return len(self._offsets) + sum(len(run) for _, run in self._runs)

    def take_updates(self) -> Int32s | None:
        """[2, n]: offsets into `arena` and their new values; None when nothing changed."""
        if not self._offsets and not self._runs:
            return None
        offsets = [np.array(self._offsets, np.int32)]
        values = [np.array(self._values, np.int32)]
        for start, run in self._runs:
            offsets.append(np.arange(start, start + len(run), dtype=np.int32))
            values.append(run)
        self._offsets, self._values, self._runs = [], [], []
        return np.stack((np.concatenate(offsets), np.concatenate(values)))

    def _set_floats(self, slot: int, names: Sequence[str], values: Sequence[float]) -> None:
        words = np.array(values, np.float32).view(np.int32).tolist()
        for name, word in zip(names, words, strict=True):
            self._set(name, slot, word)

    def _set(self, name: str, index: int, value: int) -> None:
        self._offsets.append(self._starts[name] + index)
        self._values.append(value)


def _rows_name(size: int, place: int = 0) -> str:
    return f"rows{size} at {place}"


def _signed(word: int) -> int:
    return word - 2**32 if word >> 31 else word


def aligned(num_words: int) -> int:
    """So that what comes behind begins at 16 bytes: kernels are compiled for aligned pointers."""
    return -(-num_words // 4) * 4
