"""What all kinds of steps on the device share: the model, its caches, the sequences' state."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from baton.kernels.batch_state import begin_step
from baton.kernels.decode_attention import DecodeWork, make_work, plan_decode, takes_width
from baton.kernels.decode_plan import Scratch
from baton.kernels.drafts import begin_drafted_step
from baton.kernels.latent_attention import latent_decode_config
from baton.kernels.state_plan import NO_SLOT
from baton.shared.engine.batch_state import BatchState, aligned
from baton.shared.engine.device_draw import DeviceDraw
from baton.shared.engine.device_plan import DevicePlan, GroupPlan
from baton.shared.engine.device_step import DecodeBuffers
from baton.shared.engine.executor import ChainShape, Model, Tapped
from baton.shared.engine.host_buffers import HostBuffers
from baton.shared.engine.kv_cache import KvCache
from baton.shared.engine.widened_keys import make_widened_keys
from baton.shared.kv.cache_spec import Latent, window_of


def padded_sizes(max_num_seqs: int) -> list[int]:
    """The sizes that decode batches are padded to; a few per cent are wasted at most from 16 up."""
    sizes = [1, 2, 4, 8, 16, 24, 32, 48, 64, 80, 96, 112, 128]
    sizes += range(160, max(max_num_seqs, 160) + 32, 32)
    return [size for size in sizes if size < max_num_seqs] + [max_num_seqs]


def padded(num_rows: int, sizes: Sequence[int]) -> int:
    return sizes[bisect_left(sizes, num_rows)]


class DeviceContext:
    def __init__(
        self,
        model: Model,
        kv_cache: KvCache,
        device: torch.device,
        *,
        num_heads: int,
        vocab_size: int,
        max_model_len: int,
        max_num_seqs: int,
        num_drafts: int = 0,
        tapped: Tapped | None = None,
        chains: ChainShape | None = None,
    ) -> None:
        """`num_drafts`: the most that a row may bring along; `tapped`: hidden states that steps
        tell; `chains`: of a model that guesses."""
        self.model = model
        self.device = device
        self.num_heads = num_heads
        self.vocab_size = vocab_size
        self.block_size = kv_cache.block_size
        self.caches = kv_cache.caches
        self.dtype = kv_cache.dtype
        self.num_slot_groups = sum(not group.spec.grows for group in kv_cache.groups)
        self.num_growing = len(self.caches) - self.num_slot_groups
        """Groups that grow; those of states come behind them."""
        self.kv = [cache for cache in self.caches if isinstance(cache, Tensor)]
        """Of the groups that grow."""
        self.windows = [window_of(group.spec) or 0 for group in kv_cache.groups]
        self.specs = [group.spec for group in kv_cache.groups]
        self.are_latents = [isinstance(spec, Latent) for spec in self.specs]
        self.widened = make_widened_keys(
            self.kv, self.windows, self.dtype, longest=max_model_len, most_rows=max_num_seqs
        )
        """Room for what prompt chunks see of keys and values in 8 bits."""
        self.sizes = padded_sizes(max_num_seqs)
        """Of decode rows."""
        self.widths = [1, 1 + num_drafts] if num_drafts else [1]
        # Sequences beyond those of one step may be waiting for their turn.
        num_slots = 2 * max_num_seqs + 16
        self.state = BatchState(
            num_slots,
            # A slot is all that a sequence has of a group of states.
            -(-max_model_len // self.block_size) if self.kv else 1,
            self.sizes,
            device,
            zero_blocks=[
                len(tensor) if group.spec.grows else NO_SLOT
                for tensor, group in zip(kv_cache.tensors, kv_cache.groups, strict=True)
            ],
            # Those of a chain are known tokens.
            num_drafts=num_drafts if chains is None else chains.most_known - 1,
            num_later=0 if chains is None else chains.num_guesses - 1,
            vocab_size=vocab_size,
        )
        width = self.state.block_tables[0].shape[1]
        self.counting = torch.arange(width, dtype=torch.int32, device=device)
        # Decode rows of the widest step, padded, and as many chunks beside them as there are rows.
        max_wanted = max_num_seqs * (1 + self.widths[-1] if num_drafts else 1)
        self.drawn_sizes = padded_sizes(max_wanted)
        """Of rows of logits."""
        self.draw = DeviceDraw(self.state, max_wanted, vocab_size, device)
        self.host = HostBuffers(aligned(max_wanted) + max_num_seqs, device)
        self._scratch = Scratch()
        self.tapped = tapped
        most_tokens = self.widths[-1] if chains is None else chains.most_known
        self._decode_inputs = self.make_inputs(max_num_seqs * most_tokens)

    def make_inputs(self, num_tokens: int) -> dict[str, Any]:
        """What the model gets by name beside so many tokens, and fills."""
        return {} if self.tapped is None else self.tapped.make_inputs(num_tokens, self.device)

    def decode_inputs(self, num_tokens: int) -> dict[str, Any]:
        """As `make_inputs`, at addresses that all decode steps share."""
        inputs = dict(self._decode_inputs)
        if "taps" in inputs:
            taps = inputs["taps"]
            inputs["taps"] = taps._replace(out=taps.out[:num_tokens])
        if "features" in inputs:
            inputs["features"] = inputs["features"][:num_tokens]
        return inputs

    def make_results(self, num_tokens: int, num_rows: int) -> Tensor:
        """int32: drawn tokens, then, aligned, how many stand of each row."""
        num_words = aligned(num_tokens) + num_rows
        return torch.empty(num_words, dtype=torch.int32, device=self.device)

    def make_work(
        self, num_rows: int, width: int = 1, *, scratch: Scratch | None = None
    ) -> list[DecodeWork]:
        """Of rows of so many tokens, by cache group that grows; groups whose work is cut alike
        share it, for layers run one by one. Ask for the largest first, in whose scratch the others
        lie: in `scratch`, if it is given, what all groups leave there.

        Tokens of a row share a reading of its keys where their heads fit into one product; else
        each is a row of its own.
        """
        made: dict[tuple[int, ...], DecodeWork] = {}
        work = []
        for kv, window, spec in zip(self.kv, self.windows, self.specs, strict=False):
            _, num_kv_heads, _, _, _, head_dim = kv.shape
            config = None
            shape = (num_rows * width, 1)
            if isinstance(spec, Latent):
                head_dim = spec.rank
                config = latent_decode_config(num_rows * width, self.num_heads, kv)
            elif takes_width(width, num_kv_heads, self.num_heads):
                shape = (num_rows, width)
            key = (num_kv_heads, head_dim, window)
            if key not in made:
                made[key] = make_work(
                    shape[0],
                    num_kv_heads,
                    self.num_heads,
                    head_dim,
                    self.device,
                    width=shape[1],
                    config=config,
                    itemsize=kv.element_size(),
                    scratch=self._scratch if isinstance(spec, Latent) else scratch,
                )
            work.append(made[key])
        return work

    def plan_work(
        self,
        rows: Tensor,
        work: DecodeWork | None,
        back: Tensor | None,
        planned: Sequence[DevicePlan],
    ) -> None:
        """Lists the items of a group's decode attention, unless an earlier group has the same."""
        if work is None or any(plan.work is work for plan in planned):
            return
        window, state = self.windows[len(planned)], self.state
        if work.width > 1:
            rows = state.rows[work.num_rows]
            plan_decode(rows, state.context_lens, work, num_drafts=state.num_drafts, window=window)
        else:
            plan_decode(rows, state.context_lens, work, back=back, window=window)

    def begin_rows(
        self,
        input_ids: Tensor,
        buffers: DecodeBuffers,
        plans: Sequence[GroupPlan],
        *,
        counts: bool = True,
    ) -> None:
        """Fills in the decode rows' tokens and places, and moves their lengths on. `counts`: the
        tokens have not been counted yet, for sequences that ask what was before."""
        state, rows = self.state, buffers.rows
        counting = state.shaping.counting if counts else None
        if buffers.width == 1:
            begin_step(
                rows,
                state.token_ids,
                state.context_lens,
                state.block_tables,
                input_ids,
                buffers.positions,
                buffers.slots,
                block_size=self.block_size,
                num_slot_groups=self.num_slot_groups,
                counting=counting,
            )
        else:
            assert buffers.back is not None
            begin_drafted_step(
                rows,
                state.token_ids,
                state.context_lens,
                state.block_tables,
                state.draft_ids,
                state.num_drafts,
                input_ids,
                buffers.positions,
                buffers.slots,
                buffers.token_rows,
                buffers.back,
                block_size=self.block_size,
                num_slot_groups=self.num_slot_groups,
                counting=counting,
            )
        attention = [plan for plan in plans if isinstance(plan, DevicePlan)]
        for number, plan in enumerate(attention):
            self.plan_work(buffers.token_rows, plan.work, buffers.back, attention[:number])
