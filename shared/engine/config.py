"""How to run a model: what the engine is told beside the model's own files. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from baton.shared.model_files.fields import ModelError
from baton.shared.speculation import DRAFT_MODEL, MAX_DRAFTS


class DeviceError(ModelError):
    """The device asked for is not there."""


MAX_BLOCK_SIZE = 128
MOST_NUM_SEQS = 256
"""Rows of a step, where nothing else is said."""
_SHARE_OF_CHECKPOINTS = 4
"""One checkpoint for so many rows: free rows' slots hold checkpoints, too."""
HOST_TOKEN_BUDGET = 512
"""Tokens of a step on a CPU, where nothing else is said."""
DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("auto", "float32", "bfloat16", "float16")
KV_CACHE_DTYPES = ("auto", "fp8")
KV_CACHE_DTYPE_HELP = (
    "of cached keys and values; fp8: 8-bit floats with a scale for each token and head, in half "
    "the memory; auto: as activations"
)
KERNELS = ("auto", "triton", "torch")
LOAD_FORMATS = ("auto", "dummy")
QUANTIZATIONS = ("fp8", "fp8-blocks", "int8", "int4")
QUANTIZATION_HELP = (
    "makes plain weights of linear layers small while they are loaded: fp8 and int8 with a scale "
    "for each row, fp8-blocks for each block of 128 x 128, int4 for each run of 128 (or 64, or 32) "
    "numbers of one; on a GPU fp8 and fp8-blocks make activations small likewise"
)
MODEL_IMPLS = ("auto", "baton", "transformers")
MODEL_IMPL_HELP = (
    "whose code computes the model; auto: Baton's own, and transformers' for types without it, "
    "which is slower"
)
AUTO: Literal["auto"] = "auto"


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How to run a model.

    `token_budget` is the most tokens of one step, `max_num_seqs` the most rows, each with a slot
    where layers keep states; `state_checkpoints` are slots beside those, for states that later
    prompts may begin with (0: none are kept). None lets the engine choose: `num_blocks` from
    memory, `token_budget` by measurement on a GPU, `max_num_seqs` 256 or, with states, as many as
    there is memory for, `state_checkpoints` a quarter of them; for `max_model_len` it means the
    model's own limit, and auto the longest up to it for which the block pools have room.

    `kernels`: torch is the reference on any device, triton needs a GPU, auto takes triton there,
    and on a CPU in bfloat16 what a C compiler makes.
    `model_impl`: whose code computes the model, baton's or, over our cache, that of the library
    transformers; auto takes the latter for types that baton has none for.
    `quantization`: how plain weights are made small while they are loaded.
    `kv_cache_dtype`: how keys and values are kept; auto: in the dtype of activations.
    `load_format`: dummy draws random weights of the shapes that config.json makes; no files needed.
    `gpu_memory_utilization`: share of the GPU's memory that this engine may take, weights included.
    `host_memory_mib`: what this process may take of the host's memory on a CPU, weights and pool
    included; None: what is free.
    `cuda_graphs`: steps are captured once and replayed; `prompt_graphs`: those with chunks of
    prompts, too.
    `num_drafts`: the most drafts (guesses of the next tokens) that a step checks for a sequence.
    `draft_model_dir`: the model that makes them; None: no model does. `draft_kind`: a smaller
    model, or a head that reads the model's hidden states (shared/speculation.py).

    Raises:
        ModelError: a value is out of range.
    """

    model_dir: Path
    device: str = "auto"
    dtype: str = "auto"
    block_size: int = 16
    num_blocks: int | None = None
    max_model_len: int | Literal["auto"] | None = None
    token_budget: int | None = None
    max_num_seqs: int | None = None
    state_checkpoints: int | None = 0
    kernels: str = "auto"
    model_impl: str = "auto"
    quantization: Literal["fp8", "fp8-blocks", "int8", "int4"] | None = None
    kv_cache_dtype: str = "auto"
    load_format: str = "auto"
    gpu_memory_utilization: float = 0.9
    host_memory_mib: int | None = None
    cuda_graphs: bool = True
    prompt_graphs: bool = True
    num_drafts: int = 0
    draft_model_dir: Path | None = None
    draft_kind: str = DRAFT_MODEL

    def __post_init__(self) -> None:
        for name, choices in (
            ("device", DEVICES),
            ("dtype", DTYPES),
            ("kv_cache_dtype", KV_CACHE_DTYPES),
            ("kernels", KERNELS),
            ("model_impl", MODEL_IMPLS),
            ("load_format", LOAD_FORMATS),
        ):
            value = getattr(self, name)
            if value not in choices:
                raise ModelError(f"{name}: must be one of {', '.join(choices)}, not {value!r}")
        if self.quantization is not None and self.quantization not in QUANTIZATIONS:
            raise ModelError(
                f"quantization: must be one of {', '.join(QUANTIZATIONS)}, "
                f"not {self.quantization!r}"
            )
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ModelError(
                f"gpu_memory_utilization: must be above 0 and at most 1, "
                f"not {self.gpu_memory_utilization}"
            )
        # A block must not straddle the fixed key tiles of the reference attention.
        if self.block_size < 1 or MAX_BLOCK_SIZE % self.block_size:
            raise ModelError(
                f"block_size: must be a power of two from 1 to {MAX_BLOCK_SIZE}, "
                f"not {self.block_size}"
            )
        # Digests are of 32-bit words of one head's share of a block.
        if self.kv_cache_dtype == "fp8" and self.block_size < 2:
            raise ModelError("block_size: must be at least 2 where kv_cache_dtype is fp8, not 1")
        if self.state_checkpoints is not None and self.state_checkpoints < 0:
            raise ModelError(f"state_checkpoints: must be at least 0, not {self.state_checkpoints}")
        if not 0 <= self.num_drafts <= MAX_DRAFTS:
            raise ModelError(f"num_drafts: must be from 0 to {MAX_DRAFTS}, not {self.num_drafts}")
        for name in (
            *("num_blocks", "max_model_len", "token_budget", "max_num_seqs"),
            "host_memory_mib",
        ):
            value = getattr(self, name)
            if value is not None and value != AUTO and value < 1:
                raise ModelError(f"{name}: must be at least 1, not {value}")


def most_num_seqs(config: EngineConfig) -> int:
    """Rows of a step, unless memory has no room for their states."""
    return MOST_NUM_SEQS if config.max_num_seqs is None else config.max_num_seqs


def most_checkpoints(config: EngineConfig) -> int:
    """Slots for states that are kept, unless memory has no room for them."""
    if config.state_checkpoints is not None:
        return config.state_checkpoints
    return -(-most_num_seqs(config) // _SHARE_OF_CHECKPOINTS)


def most_model_len(config: EngineConfig, max_position_embeddings: int) -> int:
    """The longest sequence, prompt and output together, that the engine is made for. With auto the
    one that it takes may be shorter, and nothing else differs: workers that have room for more or
    less go together.

    Raises:
        ModelError: the configured length is beyond what the model's positions were made for.
    """
    limit = max_position_embeddings
    if config.max_model_len is None or config.max_model_len == AUTO:
        return limit
    if config.max_model_len > limit:
        raise ModelError(
            f"max_model_len: {config.max_model_len} exceeds max_position_embeddings {limit} "
            f"of {config.model_dir / 'config.json'}"
        )
    return config.max_model_len
