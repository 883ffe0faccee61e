"""DraftModel: a smaller model of the same vocabulary, which guesses for a larger one, or a head
that does so by that one's hidden states.

It has a cache of its own, of which no other worker knows: blocks that are handed over are the
larger model's alone, so workers that guess and workers that do not go together. What it computes
changes no token, so its rows are not padded to keep their bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor

from baton.shared.engine.batch import Batch, BatchRow, ChainRow
from baton.shared.engine.coming_guesses import DeviceChains
from baton.shared.engine.config import EngineConfig, most_num_seqs
from baton.shared.engine.executor import (
    ChainShape,
    Executor,
    HeadModel,
    Model,
    Step,
    Tapped,
)
from baton.shared.engine.host_executor import HostExecutor, fuses_attention
from baton.shared.engine.implementation import (
    Implementation,
    OwnImplementation,
    Place,
    find_implementation,
    find_weights,
)
from baton.shared.engine.kv_cache import KvCache
from baton.shared.engine.memory import check_draft_fits
from baton.shared.engine.model_digest import Progress, ProgressReport
from baton.shared.engine.models.decoder import Decoder
from baton.shared.engine.models.eagle3 import Eagle3Config, check_target, find_head
from baton.shared.engine.models.model_config import ModelConfig
from baton.shared.engine.models.mtp import MtpConfig, check_ships, find_layer
from baton.shared.engine.models.mtp_head import MtpHead
from baton.shared.engine.operations import Operations
from baton.shared.engine.token_budgets import SHORT_CHUNKS
from baton.shared.engine.trial_rows import TrialRows
from baton.shared.kv.arrangement import arrange
from baton.shared.kv.pool_sizes import NumBlocks, PoolSizes
from baton.shared.model_files.fields import ModelError
from baton.shared.speculation import EAGLE3, MTP
from baton.shared.tokenizer.compare import different_token

CHUNK = 512
"""Tokens that it computes at once, when it catches up."""
MOST_PENDING = 128
"""Tokens of a sequence whose hidden states are kept until a head computes them; of a chunk that is
longer all of it, while others have fewer."""
MOST_LOOSE = 8
"""Steps of a sequence whose hidden states lie there with those of the steps' other tokens."""


class DraftModel:
    """
    Attributes:
        config: the model's.
        executor: computes it; there once `take_memory` was called, as is `capacity`.
        capacity: what sequences take of its block pools.
        max_rows: of a step.
        makes_chains: whole chains of guesses are launched at once (`launch_chains`), for rows of
            `most_known` new tokens at most.
        most_guesses: of a chain: those that a step checks, behind one that a step in flight draws.
        tapped: of a head, which hidden states of the larger model it reads; else None.
    """

    def __init__(
        self,
        engine: EngineConfig,
        target: ModelConfig,
        *,
        max_model_len: int,
        device: torch.device,
        dtype: torch.dtype,
        kernels: str,
        target_bytes: int,
        make_operations: Callable[[ModelConfig], Operations],
    ) -> None:
        """Loads nothing yet.

        `engine`: how the larger model, `target`, is run, whose weights take `target_bytes`;
        `max_model_len`: the longest sequence that may be; `kernels`: torch or triton.

        Raises:
            ModelError: it cannot guess for that model, or does not fit beside it.
        """
        assert engine.draft_model_dir is not None
        own = replace(
            engine,
            model_dir=engine.draft_model_dir,
            draft_model_dir=None,
            num_drafts=0,
            model_impl="auto",
            quantization=None,
            kv_cache_dtype="auto",
        )
        self.tapped: Tapped | None = None
        self._own_taps: Tapped | None = None
        with _told_of(engine.draft_kind):
            self._implementation = _find(own, engine.draft_kind)
        self.config = self._implementation.config
        layers: tuple[int, ...] = ()
        if isinstance(self.config, Eagle3Config):
            check_target(self.config, own.model_dir, target, engine.model_dir)
            layers = self.config.taps_of(target.num_layers)
        elif isinstance(self.config, MtpConfig):
            layers = (target.num_layers,)
        else:
            _check_model(own, self.config, engine, target)
        if layers:
            # Layers have two caches, where some keep states.
            num_layers, specs = target.num_layers, target.cache_specs
            last = max(each % num_layers for each, spec in enumerate(specs) if spec is not None)
            self.tapped = Tapped(layers, target.hidden_size, dtype, to_the_end=max(layers) > last)
            self._own_taps = Tapped(
                (1,), self.config.hidden_size, dtype, to_the_end=True, takes_features=True
            )
        _check_positions(own, self.config, max_model_len)
        self._eos_token_ids = target.eos_token_ids
        self._engine = engine
        self._device, self._dtype, self._kernels = device, dtype, kernels
        self._max_model_len = max_model_len
        self.max_rows = most_num_seqs(engine)
        self.makes_chains = kernels == "triton"
        self.most_known = self.most_guesses = 1 + engine.num_drafts
        self._arrangement = arrange(
            self.config.cache_specs,
            block_size=engine.block_size,
            itemsize=dtype.itemsize,
            max_model_len=max_model_len,
            ahead_tokens=CHUNK,
        )
        self.groups = self._arrangement.groups
        self._sizes = PoolSizes(
            self._arrangement,
            engine.block_size,
            ahead_tokens=CHUNK,
            in_flight_tokens=1 + engine.num_drafts,
            max_num_seqs=self.max_rows,
        )
        self._ops = make_operations(self.config)
        with _told_of(engine.draft_kind):
            self._weights = find_weights(own, self.config)
            if isinstance(self._implementation, OwnImplementation) and engine.draft_kind == MTP:
                check_ships(self._implementation, self._weights, own.model_dir)
            self._plan = self._implementation.plan(self._weights, self.groups, self._ops, dtype)
        check_draft_fits(engine, self._plan.num_bytes, target_bytes, device)

    @property
    def weight_bytes(self) -> int:
        return self._plan.num_bytes

    @property
    def pending_bytes(self) -> int:
        """Of a head: what hidden states take that it has not computed yet."""
        if self.tapped is None:
            return 0
        num_tokens = self.max_rows * MOST_PENDING + MOST_LOOSE * self.most_decode_tokens
        return num_tokens * self._state_size * self.tapped.dtype.itemsize

    @property
    def _state_size(self) -> int:
        """Of a head: numbers of the larger model's hidden states that come with a token."""
        return 0 if self.tapped is None else len(self.tapped.layers) * self.tapped.hidden_size

    @property
    def most_decode_tokens(self) -> int:
        """Of a step of the larger model without chunks of prompts."""
        return self.max_rows * (1 + self._engine.num_drafts)

    def load(self, progress: Progress, target: Model) -> None:
        """Reads its weights. ModelError: a file cannot be read, or `target` cannot be guessed
        for."""
        num_reads = self._plan.num_reads
        report = ProgressReport(progress, "loading the draft model's weights", num_reads)
        most = self._max_model_len
        place = Place(self._ops, self._dtype, self._device, num_positions=most, ropes_made_for=most)
        with torch.inference_mode():
            self._model = self._implementation.load(
                self._weights, self.groups, place, on_read=lambda: report.advance(1)
            )
        self._weights.close()
        if isinstance(self._model, HeadModel):
            _complete(self._model, target, self._engine)

    def fuse(self, states: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """Of a head: by sequence the hidden states of some tokens, [n, taps · hidden] each → what
        comes with the tokens behind them, [all of them, hidden]."""
        if not states:
            return []
        assert isinstance(self._model, HeadModel)
        flat = list(chain.from_iterable(states))
        with torch.inference_mode(), self.executor.computing(flat):
            fused = self._model.fuse(torch.cat(flat))
        ends = list(accumulate(sum(map(len, each)) for each in states))
        return list(fused.tensor_split(ends[:-1]))

    def join(self, states: Sequence[Tensor]) -> Tensor:
        """Of a head: hidden states of some tokens, [n, taps · hidden] each, in memory of their
        own."""
        with torch.inference_mode(), self.executor.computing(states):
            return torch.cat(list(states))

    @property
    def longest_bytes(self) -> int:
        """Of its cache, for the longest sequence."""
        return self._sizes.bytes_of(self._sizes.blocks_for(self._max_model_len))

    def take_memory(self, num_longest: float) -> None:
        """Allocates its cache, for so many of the longest sequences."""
        need = self._sizes.blocks_for(self._max_model_len)
        num_blocks: NumBlocks = tuple(max(1, int(num_longest * count)) for count in need)
        self.capacity = self._sizes.capacity(num_blocks, self._max_model_len)
        self.executor = self.make_executor(num_blocks)

    def make_executor(self, num_blocks: NumBlocks | None = None) -> Executor:
        """Over a cache of its own, with so many blocks by pool; without, just enough of them."""
        cache = KvCache(
            self._arrangement,
            num_blocks or [1] * self._arrangement.num_pools,
            self._engine.block_size,
            self._dtype,
            device=self._device,
        )
        shape: dict[str, Any] = {
            "num_heads": self.config.num_heads,
            "vocab_size": self.config.vocab_size,
            "max_model_len": self._max_model_len,
        }
        if self._kernels == "torch":
            return HostExecutor(
                self._model,
                cache,
                self._device,
                **shape,
                min_rows=1,
                min_linear_rows=1,
                fuses_attention=fuses_attention(self.config, self._device, self._dtype),
                eos_token_ids=self._eos_token_ids,
                tapped=self._own_taps,
            )
        from baton.shared.engine.device_executor import DeviceExecutor

        return DeviceExecutor(
            self._model,
            cache,
            self._device,
            **shape,
            max_num_seqs=self.max_rows,
            eos_token_ids=self._eos_token_ids,
            tapped=self._own_taps,
            chains=ChainShape(self.most_guesses, self.most_known, self._state_size),
        )

    @torch.inference_mode()
    def launch(self, rows: Sequence[BatchRow]) -> Step:
        """Starts a step. Raises as `Executor.launch` does."""
        return self.executor.launch(Batch(rows))

    @torch.inference_mode()
    def launch_chains(self, chains: Sequence[ChainRow]) -> DeviceChains:
        """Starts chains. Raises as `Executor.launch` does."""
        from baton.shared.engine.device_executor import DeviceExecutor

        assert isinstance(self.executor, DeviceExecutor)
        return self.executor.launch_chains(chains)

    def check_device(self) -> None:
        """After a failure: raises when the device is in no state to go on."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def warm_up(self, progress: Progress) -> None:
        """On a GPU: compiles kernels and captures graphs."""
        if self._kernels != "triton" or self._device.type != "cuda":
            return
        from baton.shared.engine.device_executor import DeviceExecutor

        assert isinstance(self.executor, DeviceExecutor)
        has_graphs = self._engine.cuda_graphs and self._implementation.has_graphs
        capturing = " and capturing its chains" if has_graphs else ""
        progress(f"compiling the draft model's kernels{capturing}")
        with torch.inference_mode():
            self.executor.capture(graphs=has_graphs)
            most = min(CHUNK, self.capacity.longest)
            for num_tokens in (*SHORT_CHUNKS, CHUNK):
                self.executor.launch(Batch([self._prompt_row(min(num_tokens, most))])).result()

    def _prompt_row(self, num_tokens: int) -> BatchRow:
        block_size, vocab_size = self._engine.block_size, self.config.vocab_size
        row = TrialRows(self._arrangement, block_size, vocab_size).prompt(num_tokens)
        if self._own_taps is not None:
            row.features = self._own_taps.make_inputs(num_tokens, self._device)["features"]
        return row


@contextmanager
def _told_of(kind: str) -> Iterator[None]:
    """ModelErrors begin with the option that asks for what is wrong."""
    try:
        yield
    except ModelError as error:
        name = "speculate" if kind == MTP else "draft_model"
        raise ModelError(f"{name}: {error}") from error


def _find(own: EngineConfig, kind: str) -> Implementation:
    """ModelError: there is nothing that guesses, or nothing that is computed here."""
    if kind == EAGLE3:
        return find_head(own.model_dir)
    return find_layer(own.model_dir) if kind == MTP else find_implementation(own)


def _complete(head: HeadModel, target: Model, engine: EngineConfig) -> None:
    """Gives a head that has no embedding the model's. ModelError: that cannot be, or the model's
    hidden states are nobody's to read."""
    if not isinstance(target, Decoder):
        raise ModelError(
            f"draft_model: model_impl: the code that computes {engine.model_dir} does not tell its "
            f"hidden states, which {engine.draft_model_dir} reads"
        )
    if head.embedding is None:
        head.embedding = target.embedding
    own, [_, of_target] = head.hidden_size, target.embedding.shape
    if head.embedding.shape[1] != own:
        raise ModelError(
            f"draft_model: {engine.draft_model_dir} has no embedding, and its hidden size is "
            f"{own}, that of {engine.model_dir} {of_target}"
        )
    if isinstance(head, MtpHead):
        head.complete(target)


def _check_model(
    own: EngineConfig, config: ModelConfig, engine: EngineConfig, target: ModelConfig
) -> None:
    """Raises ModelError for a model that cannot guess for `target`."""
    draft_dir, model_dir = own.model_dir, engine.model_dir
    if config.vocab_size != target.vocab_size:
        raise ModelError(
            f"draft_model: {draft_dir} has a vocabulary of {config.vocab_size}, "
            f"{model_dir} one of {target.vocab_size}"
        )
    different = different_token(draft_dir, model_dir)
    if different is not None:
        token_id, of_draft, of_model = different
        raise ModelError(
            f"draft_model: token {token_id} is {of_draft} in {draft_dir}, {of_model} in {model_dir}"
        )
    if not all(spec is None or spec.grows for spec in config.cache_specs):
        raise ModelError(
            f"draft_model: layers of {draft_dir} keep a state, which guesses that fall would change"
        )


def _check_positions(own: EngineConfig, config: ModelConfig, max_model_len: int) -> None:
    """Raises ModelError for one that does not know all of a sequence's."""
    if config.max_position_embeddings < max_model_len:
        raise ModelError(
            f"draft_model: {own.model_dir} knows {config.max_position_embeddings} positions, "
            f"sequences may have {max_model_len}; set max_model_len to as many at most"
        )
