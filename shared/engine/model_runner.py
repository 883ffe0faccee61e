"""ModelRunner: one step of a model over a batch. Knows nothing of RPC, Redis or scheduling."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from baton.shared.engine import determinism
from baton.shared.engine.batch import Batch, RowHandle, WantedLogprobs
from baton.shared.engine.block_sums import MOST_AT_ONCE, BlockSums, DeviceBlockSums, HostBlockSums
from baton.shared.engine.config import (
    AUTO,
    HOST_TOKEN_BUDGET,
    EngineConfig,
    most_checkpoints,
    most_model_len,
    most_num_seqs,
)
from baton.shared.engine.device_choices import (
    choose_device,
    choose_dtype,
    choose_kernels,
    describe_numerics,
    make_operations,
    why_not_expanded,
    why_not_with_triton,
)
from baton.shared.engine.draft_model import DraftModel
from baton.shared.engine.executor import BegunStep, Copied, Executor, Model, Step, StepCounts
from baton.shared.engine.host_executor import HostExecutor, fuses_attention
from baton.shared.engine.implementation import (
    Place,
    Weights,
    find_implementation,
    find_weights,
)
from baton.shared.engine.kernels_fit import kernels_fit
from baton.shared.engine.kv_cache import KvCache, SlotCopy
from baton.shared.engine.memory import PoolChoice, check_weights_fit, choose_pools, weights_fit
from baton.shared.engine.model_digest import (
    ModelIdentity,
    Progress,
    ProgressReport,
    identify_dummy,
    identify_model,
)
from baton.shared.engine.model_loader import ModelPlan
from baton.shared.engine.models.model_config import ModelConfig
from baton.shared.engine.models.rope_config import describe_choices
from baton.shared.engine.native_operations import NativeOperations
from baton.shared.engine.operations import Operations
from baton.shared.engine.shaping import History
from baton.shared.engine.token_budgets import (
    MEASURED_TOKENS,
    PACKED_TOKENS,
    SHORT_CHUNKS,
    TOKEN_BUDGETS,
    choose_budgets,
    long_steps,
    packed_steps,
)
from baton.shared.engine.trial_rows import TrialRows
from baton.shared.engine.weights import DummyWeights
from baton.shared.kv.arrangement import Arrangement, arrange
from baton.shared.kv.block_pool import NO_BLOCK
from baton.shared.kv.cache_spec import (
    CacheGroup,
    CacheSpec,
    Full,
    Latent,
    Sliding,
    in_float8,
)
from baton.shared.kv.drawn import Drawn
from baton.shared.kv.pool_sizes import PoolSizes
from baton.shared.model_files.fields import ModelError
from baton.shared.sampling import MOST_TOP_LOGPROBS, SamplingParams
from baton.shared.telemetry import log_event

logger = logging.getLogger(__name__)

_FLOAT8 = torch.float8_e4m3fn
_MOST_FORCED_ON_HOST = 16
MOST_CAPTURED_TOKENS = 2048
"""Of a step that comes from a graph; longer ones keep a GPU busy for as long as launching takes."""
_WORD_BYTES = 4


class ModelRunner:
    """A loaded model with its KV cache.

    Attributes:
        determinism: 'exact' when a token's bits do not depend on the rest of the step, the
            boundaries of chunks, or block ids; else 'consistent'.
        dtype: of activations, and of weights that have no form of their own.
        cache_dtype: of keys and values; of latents it is `dtype`, of states their own.
        numerics: what the bits depend on beside model and dtype; workers that differ here may draw
            different tokens although each is exact by itself.
        model_impl: whose code computes the model: `baton`, or the other library and its version;
            and that it is not replayed as CUDA graphs, where that would be.
        quantization: how plain weights were made small; None: they were not.
        kv_cache_dtype: how keys and values are kept; auto: in `dtype`.
        model_identity: tells models apart.
        kernels: 'torch' or 'triton'.
        token_budget: the most tokens of a usual step.
        backlog_budget: of one of prompts only, where they have queued up; at least as many.
        steps_ahead: how many steps may be launched before the result of the first is taken.
        num_drafts: the most drafts that a row of one token may have.
        most_forced: as `num_drafts`, of tokens that a constraint allows no others for.
        draft: the model that guesses, where one does.
        max_model_len: tokens of the longest sequence, prompt and answer together.
        max_num_seqs: the most rows of a step.
        keeps_checkpoints: states are kept for later prompts to begin with.
        capacity: what sequences take of the block pools.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        pool_memory: Callable[[int], Tensor] | None = None,
        progress: Progress = lambda _: None,
        on_identity: Callable[[ModelIdentity], None] = lambda _: None,
    ) -> None:
        """Loads the model, allocates its block pool, and compiles what has to be compiled.

        The number of threads must be set before; no global state of torch is changed.

        Args:
            pool_memory: given a number of bytes, returns uint8 memory for the pool.
            progress: told, once a second, how far hashing and loading are.
            on_identity: told which model it is before anything big is loaded; what it raises ends
                the start.

        Raises:
            ModelError: the model, its weights or the configuration cannot be used.
        """
        self._implementation = find_implementation(config)
        self.model_config = self._implementation.config
        # What cache and rope are made for, and until the pools are known the longest sequence.
        self._most_tokens = most_model_len(config, self.model_config.max_position_embeddings)
        self.max_model_len = self._most_tokens
        self.device = choose_device(config.device)
        self.dtype = choose_dtype(config.dtype, self.device)
        specs = _cache_specs(self.model_config, config.kv_cache_dtype)
        self.cache_dtype = _FLOAT8 if config.kv_cache_dtype == "fp8" else self.dtype
        self.kernels = choose_kernels(config.kernels, self.device, self.model_config)
        self.model_impl = self._implementation.name
        if self.device.type == "cuda" and not self._implementation.has_graphs:
            self.model_impl += " (eager steps)"
        self.steps_ahead = 1 if self.device.type == "cuda" and self.kernels == "triton" else 0
        self.num_drafts = config.num_drafts
        self.max_num_seqs = most_num_seqs(config)
        grow = all(spec.grows for spec in specs if spec is not None)
        if config.draft_model_dir is not None and not self.num_drafts:
            raise ModelError("draft_model: num_drafts is 0, so nothing is guessed")
        self.keeps_checkpoints = not grow and config.state_checkpoints != 0
        # The host computes rows of any length.
        takes_many = self.kernels == "torch"
        self.most_forced = _MOST_FORCED_ON_HOST if takes_many else self.num_drafts
        self.quantization = config.quantization
        self.kv_cache_dtype = config.kv_cache_dtype
        self._config = config
        self._implementation.check_steps(self._longest_step)
        self.arrangement: Arrangement = arrange(
            specs,
            block_size=config.block_size,
            itemsize=self.dtype.itemsize,
            max_model_len=self._most_tokens,
            # Whatever is guessed: blocks of workers that guess are those of workers that do not.
            ahead_tokens=(1 + self.steps_ahead) * self._most_tokens_of_a_step,
        )
        self.groups: tuple[CacheGroup, ...] = self.arrangement.groups
        _check_blocks(self.arrangement, config.block_size)
        self._trial = TrialRows(self.arrangement, config.block_size, self.model_config.vocab_size)
        self._ops = self._operations_of(self.model_config)

        weights = find_weights(config, self.model_config)
        plan = self._implementation.plan(weights, self.groups, self._ops, self.dtype)
        if not weights_fit(config, plan.num_bytes, self.device):
            # Slower on a CPU, and on a GPU nobody has measured it yet.
            self._ops.keep_experts_small()
            plan = self._implementation.plan(weights, self.groups, self._ops, self.dtype)
        self._has_small = plan.keeps_small
        self._has_small_inputs = plan.quantises_inputs
        self._has_small_experts = plan.keeps_experts_small
        check_weights_fit(config, plan.num_bytes, self.device)
        self.draft = self._plan_draft(plan.num_bytes)
        if self.device.type == "cpu":
            draft = self.draft
            draft_bytes = 0 if draft is None else draft.weight_bytes + draft.pending_bytes
            self._choose_pools(plan.num_bytes + draft_bytes, progress)
        self.model_identity = self._identify(weights, progress)
        on_identity(self.model_identity)
        self._model = self._load(weights, plan, progress)
        weights.close()
        if self.draft is not None:
            self.draft.load(progress, self._model)

        self.determinism, self._min_rows = self._measure_determinism(plan)
        with torch.inference_mode():
            is_stable = self._implementation.check(
                self._model, self._make_scratch_executor, self.groups, config.block_size
            )
        if not is_stable:
            self.determinism = "consistent"
        self.numerics = self._describe_numerics()
        self.token_budget = self.backlog_budget = config.token_budget or HOST_TOKEN_BUDGET
        if self.device.type == "cuda":
            self._choose_pools(self._measure_peak(progress), progress)
        num_bytes = KvCache.required_bytes(self.arrangement, self.num_blocks)
        self.kv_cache = KvCache(
            self.arrangement,
            self.num_blocks,
            config.block_size,
            self.dtype,
            memory=pool_memory(num_bytes) if pool_memory else None,
            device=self.device,
        )
        self._executor: Executor = self._make_executor(self.kv_cache)
        self._warm_up(progress)
        if self.draft is not None:
            self.draft.take_memory(self._num_longest)
            with kernels_fit(self.device, self.dtype):
                self.draft.warm_up(progress)

    def open_row(
        self, sampling: SamplingParams, sample_index: int, history: History | None = None
    ) -> RowHandle:
        """A place for a sequence in the state that steps go on from. `history`: its tokens, those
        that are yet to come included; where `sampling` asks for none it may be left out.

        Raises:
            ValueError: all places are taken (`num_free_rows`), or there is no history.
        """
        return self._executor.open_row(sampling, sample_index, history)

    def close_row(self, handle: RowHandle) -> None:
        self._executor.close_row(handle)

    @property
    def num_free_rows(self) -> int:
        return self._executor.num_free_rows

    @torch.inference_mode()
    def launch(self, batch: Batch) -> Step:
        """Starts a step. On a GPU it returns at once: take the result when the next is launched.

        Raises:
            ValueError: a row is empty, too long, or names blocks that do not exist.
            torch.OutOfMemoryError: the step needs more memory than there is; nothing was computed.
        """
        return self._executor.launch(batch)

    @torch.inference_mode()
    def begin(self, batch: Batch) -> BegunStep:
        """As `launch`, but for the draw, which comes when it is asked for: rows' masks may be made
        while the device computes."""
        return self._executor.begin(batch)

    @torch.inference_mode()
    def copy_slots(self, copies: Sequence[SlotCopy]) -> Copied:
        """Copies states, behind the steps that were launched and before those that are yet to be.
        Waits for nothing."""
        return self._executor.copy_slots(copies)

    def forward(self, batch: Batch) -> list[Sequence[Drawn]]:
        """`launch` and its result: by row, what was drawn behind its last token."""
        return self.launch(batch).result()

    @property
    def num_prompt_steps(self) -> StepCounts:
        """By kernels of a GPU; elsewhere none are counted."""
        return self._executor.num_prompt_steps

    def block_sums(self) -> BlockSums:
        """What sums the pool's blocks; one for each thread that asks."""
        if self.kernels == "triton" and self.device.type == "cuda":
            return DeviceBlockSums(self.kv_cache)
        return HostBlockSums(self.kv_cache)

    def check_device(self) -> None:
        """After a failure: raises when the device is in no state to go on.

        An error of a kernel stays with the process for good; nothing that it computes counts then.
        """
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @torch.inference_mode()
    def logits(self, batch: Batch) -> Tensor:
        """Computes a step → float32 [logits, vocab], the logits at each row's last `num_logits`
        tokens, row by row."""
        return self._executor.logits(batch)

    def _identify(self, weights: Weights, progress: Progress) -> ModelIdentity:
        model_dir = self._config.model_dir
        if isinstance(weights, DummyWeights):
            return identify_dummy(model_dir)
        return identify_model(model_dir, weights.files, progress)

    def _load(self, weights: Weights, plan: ModelPlan, progress: Progress) -> Model:
        report = ProgressReport(progress, "loading weights", plan.num_reads)
        with torch.inference_mode():
            return self._implementation.load(
                weights,
                self.groups,
                Place(
                    self._ops,
                    self.dtype,
                    self.device,
                    num_positions=self.max_model_len,
                    ropes_made_for=self._most_tokens,
                ),
                on_read=lambda: report.advance(1),
            )

    def _measure_determinism(self, plan: ModelPlan) -> tuple[str, int]:
        """The class, and the fewest rows of attention's products."""
        if self.device.type != "cpu" or self.dtype != torch.float32 or self.kernels != "torch":
            return "consistent", 1
        with torch.inference_mode():
            min_rows = determinism.min_attention_rows(self.model_config)
            if (
                min_rows is None
                or not determinism.linear_is_stable(plan.linear_shapes, self._ops)
                or not determinism.latents_are_stable(self.model_config)
                or not determinism.elementwise_is_stable()
                or not determinism.deltas_are_stable(self.model_config)
            ):
                return "consistent", determinism.MIN_LINEAR_ROWS
        return "exact", min_rows

    def _describe_numerics(self) -> str:
        ropes = [layer.rope for layer in self.model_config.attentions]
        choices = describe_choices(ropes, self._most_tokens)
        whose = "" if self.model_impl == "baton" else self._implementation.name
        small = "small weights" if self._has_small else ""
        if self._has_small_inputs:
            small += " and activations"
        # Those of another worker, which has room for them, may be expanded.
        experts = "small experts" if self._has_small_experts else ""
        made = self.quantization or ""
        kept = "" if self.kv_cache_dtype == AUTO else f"keys and values in {self.kv_cache_dtype}"
        native = self._ops.name if isinstance(self._ops, NativeOperations) else ""
        computed = describe_numerics(self.device, self.kernels)
        parts = (computed, native, whose, choices, small, experts, made, kept)
        return " ".join(part for part in parts if part)

    @property
    def _most_tokens_of_a_step(self) -> int:
        largest = TOKEN_BUDGETS[-1] if self.device.type == "cuda" else HOST_TOKEN_BUDGET
        return self._config.token_budget or largest

    @property
    def _longest_step(self) -> int:
        """Tokens of it, padding included."""
        most, max_num_seqs = self._most_tokens_of_a_step, self.max_num_seqs
        # Beside those that decode, prompts go on by a block at least.
        if self.kernels == "triton":
            return max_num_seqs * (1 + self.num_drafts) + max(most, self._config.block_size)
        return max(most, max_num_seqs) + self._config.block_size

    @property
    def _ahead_tokens(self) -> int:
        """Tokens that are computed, or may be, before a windowed group gives blocks back."""
        return (1 + self.steps_ahead) * max(self._most_tokens_of_a_step, 1 + self.num_drafts)

    def _plan_draft(self, target_bytes: int) -> DraftModel | None:
        """`target_bytes`: of this model's weights."""
        if self._config.draft_model_dir is None:
            return None
        return DraftModel(
            self._config,
            self.model_config,
            max_model_len=self._most_tokens,
            device=self.device,
            dtype=self.dtype,
            kernels=self.kernels,
            target_bytes=target_bytes,
            make_operations=self._draft_operations,
        )

    def _draft_operations(self, model: ModelConfig) -> Operations:
        problem = why_not_with_triton(model) if self.kernels == "triton" else None
        if problem is not None:
            raise ModelError(f"draft_model: {self._config.draft_model_dir}: {problem}")
        return self._operations_of(model)

    def _operations_of(self, model: ModelConfig) -> Operations:
        may_be_native = self._config.kernels == "auto"
        return make_operations(
            self.kernels, self.device, self.dtype, model, may_be_native=may_be_native
        )

    def _choose_pools(self, used_bytes: int, progress: Progress) -> None:
        sizes = PoolSizes(
            self.arrangement,
            self._config.block_size,
            ahead_tokens=self._ahead_tokens,
            in_flight_tokens=(1 + self.steps_ahead) * (1 + self.num_drafts),
            max_num_seqs=self.max_num_seqs,
            num_checkpoints=most_checkpoints(self._config),
        )
        longest_bytes = sizes.bytes_of(sizes.blocks_for(self._most_tokens))
        of_draft = 0 if self.draft is None else self.draft.longest_bytes
        choice = choose_pools(
            self._config,
            sizes,
            most_tokens=self._most_tokens,
            used_bytes=used_bytes,
            device=self.device,
            share=longest_bytes / (longest_bytes + of_draft),
        )
        self._num_longest = sizes.bytes_of(choice.num_blocks) / longest_bytes
        self.num_blocks, self.max_model_len = choice.num_blocks, choice.max_model_len
        self.capacity = sizes.capacity(self.num_blocks, self.max_model_len)
        num_slots = [self.num_blocks[pool] for pool in self.arrangement.slot_pools]
        if num_slots and num_slots[0] < sizes.most_slots:
            if self._config.max_num_seqs is None:
                num_asked = self._config.state_checkpoints or 0
                self.max_num_seqs = sizes.rows_of(num_slots[0], num_asked)
            log_event(
                logger,
                logging.WARNING,
                "there is no memory for more states: fewer sequences run at once, or fewer "
                "checkpoints are kept",
                max_num_seqs=self.max_num_seqs,
                num_checkpoints=num_slots[0] - self.max_num_seqs,
                slot_bytes=sizes.slot_bytes,
            )
        if self._config.max_model_len == AUTO:
            progress(_describe_length(choice, self._most_tokens))

    def _make_executor(self, kv_cache: KvCache, max_num_seqs: int | None = None) -> Executor:
        tapped = None if self.draft is None else self.draft.tapped
        if self.kernels == "torch":
            return HostExecutor(
                self._model,
                kv_cache,
                self.device,
                num_heads=self.model_config.num_heads,
                vocab_size=self.model_config.vocab_size,
                max_model_len=self.max_model_len,
                min_rows=self._min_rows,
                min_linear_rows=determinism.MIN_LINEAR_ROWS if self.dtype == torch.float32 else 1,
                fuses_attention=fuses_attention(self.model_config, self.device, self.dtype),
                eos_token_ids=self.model_config.eos_token_ids,
                tapped=tapped,
            )
        from baton.shared.engine.device_executor import DeviceExecutor

        return DeviceExecutor(
            self._model,
            kv_cache,
            self.device,
            num_heads=self.model_config.num_heads,
            vocab_size=self.model_config.vocab_size,
            max_model_len=self.max_model_len,
            max_num_seqs=max_num_seqs or self.max_num_seqs,
            num_drafts=self.num_drafts,
            eos_token_ids=self.model_config.eos_token_ids,
            tapped=tapped,
            captures_prompts=can_capture_prompts(self.model_config),
        )

    @property
    def _budgets(self) -> Sequence[int]:
        """Tokens of a step that may be usual here; larger ones than those that are captured are
        worth it only where launching takes long, and of layers with latents or states, which have
        too few programs in steps of one prompt: mamba2-2.7b took 8,192 tokens in 123 ms by 4,096,
        in 139 by 2,048."""
        if self._config.token_budget is not None:
            return [self._config.token_budget]
        attends = all(isinstance(group.spec, Full | Sliding) for group in self.groups)
        if self._captures_prompts and attends:
            return [budget for budget in TOKEN_BUDGETS if budget <= MOST_CAPTURED_TOKENS]
        return TOKEN_BUDGETS

    @property
    def _captures(self) -> bool:
        return self._config.cuda_graphs and self._implementation.has_graphs

    @property
    def _captures_prompts(self) -> bool:
        """Steps with prompt chunks."""
        return (
            self._captures and self._config.prompt_graphs and can_capture_prompts(self.model_config)
        )

    def _make_scratch_executor(self, num_blocks: int, num_rows: int) -> Executor:
        """Over a cache of its own, with so many blocks in each pool; for so many rows."""
        cache = KvCache(
            self.arrangement,
            [num_blocks] * self.arrangement.num_pools,
            self._config.block_size,
            self.dtype,
            device=self.device,
        )
        return self._make_executor(cache, num_rows)

    # On a GPU

    def _measure_peak(self, progress: Progress) -> int:
        """Bytes that weights and the largest step take, with a pool just large enough for it."""
        progress("measuring memory")
        num_tokens = min(self._budgets[-1], self.max_model_len)
        num_blocks = [0] * self.arrangement.num_pools
        for group, pool in zip(self.groups, self.arrangement.pools, strict=True):
            num_blocks[pool] += group.num_blocks_for(num_tokens, self._config.block_size)
        cache = KvCache(
            self.arrangement,
            num_blocks,
            self._config.block_size,
            self.dtype,
            device=self.device,
        )
        torch.cuda.reset_peak_memory_stats(self.device)
        with torch.inference_mode(), kernels_fit(self.device, self.dtype):
            executor = self._make_executor(cache)
            # What the draft model's keeps of rows; its steps are smaller, and not at once.
            beside = None if self.draft is None else self.draft.make_executor()
            resident = torch.cuda.memory_allocated(self.device)
            for lengths in self._largest_steps(num_tokens):
                prompts = [self._trial.prompt(length) for length in lengths]
                longest = prompts[0]
                assert longest.token_ids is not None
                # Logprobs take room, too.
                longest.prompt_logprobs = WantedLogprobs(0, longest.token_ids, MOST_TOP_LOGPROBS)
                executor.launch(Batch(prompts)).result()
            peak = torch.cuda.max_memory_allocated(self.device)
            noted = self._measure_guesses(executor)
        pool_bytes = cache.memory.numel()
        if self._captures_prompts:
            # What graphs compute in is theirs alone.
            peak += (peak - resident) * min(num_tokens, MOST_CAPTURED_TOKENS) // num_tokens
            peak += self._expanded_bytes()
        peak += noted + (0 if self.draft is None else self.draft.pending_bytes)
        peak -= pool_bytes
        del executor, cache, beside
        torch.cuda.empty_cache()
        return int(peak)

    def _expanded_bytes(self) -> int:
        """That keys and values made of latents take in graphs: there is room for more of them than
        a prompt of a step has."""
        from baton.kernels.latent_expand import expanded_bytes
        from baton.shared.engine.prompt_steps import EXPANDED_TOKENS

        itemsize = self.dtype.itemsize
        return max(
            (
                expanded_bytes(
                    EXPANDED_TOKENS, own.num_heads, own.latent.key_dim + own.head_dim, itemsize
                )
                for own in self.model_config.attentions
                if own.latent is not None
            ),
            default=0,
        )

    def _measure_guesses(self, executor: Executor) -> int:
        """Bytes that the largest step of guesses takes where layers keep states: what they are told
        of its tokens stays until it is known which stand, in memory that is graphs' alone."""
        if not self.num_drafts or all(group.spec.grows for group in self.groups):
            return 0
        guess = self._trial.guess(1 + self.num_drafts, self.num_drafts)
        resident = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        executor.launch(Batch([guess] * self.max_num_seqs)).result()
        return int(torch.cuda.max_memory_allocated(self.device)) - resident

    def _largest_steps(self, num_tokens: int) -> Iterator[list[int]]:
        """Lengths of the prompts of steps that take most memory. Layers with states compute tile by
        tile, and each prompt begins one: there are most where prompts are as many as may be."""
        yield [num_tokens]
        most = min(self.max_num_seqs, num_tokens // 2)
        if most > 1 and not all(group.spec.grows for group in self.groups):
            yield [num_tokens - 2 * (most - 1)] + [2] * (most - 1)

    def _warm_up(self, progress: Progress) -> None:
        """Compiles kernels and captures graphs; nobody's first request waits for that."""
        if self.kernels != "triton" or self.device.type != "cuda":
            return
        from baton.shared.engine.device_executor import DeviceExecutor

        assert isinstance(self._executor, DeviceExecutor)
        has_graphs = self._captures
        if not self._implementation.has_graphs:
            log_event(
                logger,
                logging.WARNING,
                "decode steps are launched kernel by kernel: a model that runs through other code "
                "is not recorded as CUDA graphs",
                model_impl=self.model_impl,
            )
        progress(f"compiling kernels{' and capturing graphs' if has_graphs else ''}")
        with torch.inference_mode(), kernels_fit(self.device, self.dtype):
            self._executor.capture(graphs=has_graphs)
            # As if no group had a window: the prompts of this have all their blocks.
            blocks_each = [
                num_blocks // self.arrangement.pools.count(pool)
                for pool, num_blocks in enumerate(self.num_blocks)
                if pool not in self.arrangement.slot_pools
            ]
            most = min(blocks_each, default=self.max_model_len) * self._config.block_size
            limit = min(self.max_model_len, most)
            budgets = self._budgets
            usable = [min(budget, limit) for budget in budgets]
            # The kernels of short chunks are others than those of long ones.
            for num_tokens in (*SHORT_CHUNKS, *usable):
                prompt = self._trial.prompt(min(num_tokens, limit))
                self._executor.launch(Batch([prompt])).result()
                # All tokens go through the last layers where those of a prompt are told of.
                assert prompt.token_ids is not None
                prompt.prompt_logprobs = WantedLogprobs(0, prompt.token_ids, 0)
                self._executor.launch(Batch([prompt])).result()
                if self.keeps_checkpoints and len(prompt.token_ids) > 1:
                    prompt.prompt_logprobs = None
                    # As if a state were kept of it, though in no slot.
                    prompt.keeps = [(1, [NO_BLOCK] * len(self.groups))]
                    self._executor.launch(Batch([prompt])).result()
            if self.model_config.mixture is not None:
                # Short prompts together make steps whose experts multiply in tiles of another size.
                for budget in budgets:
                    if budget > limit:
                        lengths = [limit] * (budget // limit) + [budget % limit][: budget % limit]
                        lengths = lengths[: self.max_num_seqs]
                        rows = [self._trial.prompt(length) for length in lengths]
                        self._executor.launch(Batch(rows)).result()
            # Those of few tokens behind a long prefix may be others again.
            long = self._trial.prompt(limit)
            assert long.token_ids is not None
            end = replace(long, token_ids=long.token_ids[-2:], position=max(0, limit - 2))
            self._executor.launch(Batch([end])).result()
            if self.num_drafts and self.max_num_seqs > 1:
                # Beside a chunk they are launched, and kernels of many rows may be others.
                prompt = self._trial.prompt(min(16, limit))
                guess = self._trial.guess(16, self.num_drafts)
                room = (max(usable) - 16) // (1 + self.num_drafts)
                for num_rows in {1, max(1, min(self.max_num_seqs - 1, room))}:
                    self._executor.launch(Batch([guess] * num_rows + [prompt])).result()
            if self._captures_prompts:
                # Behind the launched steps, whose memory is theirs by now.
                self._executor.capture_prompts(min(max(usable), MOST_CAPTURED_TOKENS))
            # All at the clock of a GPU that is warm: the first ones would be measured too fast.
            for budget in usable:
                self._sustained_rate(long_steps(min(MEASURED_TOKENS, limit), budget))
            rates = {
                budget: (
                    self._sustained_rate(long_steps(min(MEASURED_TOKENS, limit), budget)),
                    self._sustained_rate(
                        packed_steps(min(PACKED_TOKENS, limit), budget, self.max_num_seqs)
                    ),
                )
                for budget in usable
            }
            sums = self.block_sums()
            for group, pool in enumerate(self.arrangement.pools):
                for exponent in range(self.num_blocks[pool].bit_length()):
                    sums(range(min(2**exponent, MOST_AT_ONCE)), group)
            self._executor.num_prompt_steps = StepCounts()
        self.token_budget, self.backlog_budget = choose_budgets(rates)
        shown = ", ".join(f"{b}: {one:.0f} {packed:.0f}" for b, (one, packed) in rates.items())
        progress(
            f"token budget {self.token_budget}, {self.backlog_budget} for prompts that queue up "
            f"(prompt tokens/s by step, of one long prompt and of short ones: {shown})"
        )

    def _sustained_rate(self, steps: Sequence[Sequence[range]]) -> float:
        """Prompt tokens per second of steps, one launched ahead, that compute such stretches of
        prompts. Long enough that the GPU runs at the clock that its power allows."""
        batches = [Batch([self._trial.stretch(stretch) for stretch in step]) for step in steps]
        launched: list[Step] = []
        started_s = time.perf_counter()
        for batch in batches:
            launched.append(self._executor.launch(batch))
            if len(launched) > 1:
                launched.pop(0).result()
        launched.pop().result()
        num_tokens = sum(batch.num_tokens for batch in batches)
        return num_tokens / (time.perf_counter() - started_s)


def can_capture_prompts(model: ModelConfig) -> bool:
    """Latents must be such that keys and values can be made of them beforehand."""
    return not why_not_expanded(model)


def _check_blocks(arrangement: Arrangement, block_size: int) -> None:
    """ModelError: a block is not made of whole words, of which digests are."""
    for num_bytes in arrangement.block_bytes:
        if num_bytes % _WORD_BYTES:
            raise ModelError(
                f"block_size: blocks of {block_size} have {num_bytes} bytes, which is no multiple "
                f"of {_WORD_BYTES}; twice as many tokens make one"
            )


def _cache_specs(model: ModelConfig, kv_cache_dtype: str) -> list[CacheSpec | None]:
    """What layers cache, in the form asked for. ModelError: there is nothing to be kept in it."""
    specs = model.cache_specs
    if kv_cache_dtype == AUTO:
        return specs
    if any(isinstance(spec, Latent) for spec in specs):
        raise ModelError(
            f"kv_cache_dtype: {kv_cache_dtype} is for keys and values, and {model.model_type} "
            "caches latents, which are kept as they are: leave it at auto"
        )
    if not any(isinstance(spec, Full | Sliding) for spec in specs):
        raise ModelError(
            f"kv_cache_dtype: {kv_cache_dtype} is for keys and values, and {model.model_type} "
            "caches none: leave it at auto"
        )
    return [None if spec is None else in_float8(spec) for spec in specs]


def _describe_length(choice: PoolChoice, most_tokens: int) -> str:
    if choice.max_model_len == most_tokens:
        return f"max_model_len auto: {most_tokens} tokens, all that the model knows"
    return (
        f"max_model_len auto: {choice.max_model_len} of {most_tokens} tokens, "
        f"the longest sequence that the block pools hold: {choice.limit}"
    )
