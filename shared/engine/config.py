"""What is known of a model and of the engine before torch is loaded.

`load_model_config` reads a Hugging Face directory and normalises it once: both spellings of rope,
missing defaults, end-of-sequence ids from either file. A field that would change arithmetic and
that the engine does not implement is refused by name, so that no model answers with other numbers
than its authors meant. Nothing here imports torch: the gateway reads the same files.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class ModelError(Exception):
    """The model or the engine's configuration cannot be used; one line naming file and field."""


class DeviceError(ModelError):
    """The device asked for is not there."""


MAX_BLOCK_SIZE = 128
DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("auto", "float32", "bfloat16", "float16")
KERNELS = ("auto", "triton", "torch")
LOAD_FORMATS = ("auto", "dummy")

_HARMLESS = frozenset(
    """
    _attn_implementation_autoset _name_or_path architectures attention_dropout bad_words_ids
    begin_suppress_tokens chunk_size_feed_forward cross_attention_hidden_size
    decoder_start_token_id finetuning_task forced_bos_token_id forced_eos_token_id id2label
    initializer_range label2id length_penalty max_length min_length name_or_path num_labels
    output_attentions output_hidden_states pad_token_id prefix problem_type
    return_dict sep_token_id task_specific_params tokenizer_class torchscript
    transformers_version unsloth_fixed unsloth_version use_cache
    """.split()
)


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding; the four llama3 fields are meaningful for that type only."""

    theta: float
    rope_type: str
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 0


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A llama-shaped decoder, normalised."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    max_position_embeddings: int
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    dtype: str | None


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How to run a model.

    `token_budget` is the most tokens of one step, `max_num_seqs` the most rows. None lets the
    engine choose: `num_blocks` from memory, `token_budget` by measurement on a GPU; for
    `max_model_len` it means the model's own limit.

    `kernels`: torch is the reference on any device, triton needs a GPU, auto takes triton there.
    `load_format`: dummy draws random weights of the shapes that config.json makes; no files needed.
    `gpu_memory_utilization`: share of the GPU's memory that this engine may take, weights included.
    `host_memory_mib`: what this process may take of the host's memory on a CPU, weights and pool
    included; None: what is free.
    `cuda_graphs`: decode steps are captured once and replayed.
    `num_drafts`: the most drafts (guesses of the next tokens) that a step checks for a sequence.

    Raises:
        ModelError: a value is out of range.
    """

    model_dir: Path
    device: str = "auto"
    dtype: str = "auto"
    block_size: int = 16
    num_blocks: int | None = None
    max_model_len: int | None = None
    token_budget: int | None = None
    max_num_seqs: int = 256
    kernels: str = "auto"
    load_format: str = "auto"
    gpu_memory_utilization: float = 0.9
    host_memory_mib: int | None = None
    cuda_graphs: bool = True
    num_drafts: int = 0

    def __post_init__(self) -> None:
        for name, choices in (
            ("device", DEVICES),
            ("dtype", DTYPES),
            ("kernels", KERNELS),
            ("load_format", LOAD_FORMATS),
        ):
            value = getattr(self, name)
            if value not in choices:
                raise ModelError(f"{name}: must be one of {', '.join(choices)}, not {value!r}")
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
        if self.num_drafts < 0:
            raise ModelError(f"num_drafts: must not be negative, not {self.num_drafts}")
        for name in (
            *("num_blocks", "max_model_len", "token_budget", "max_num_seqs"),
            "host_memory_mib",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ModelError(f"{name}: must be at least 1, not {value}")


def resolve_max_model_len(config: EngineConfig, model: ModelConfig) -> int:
    """The longest sequence, prompt and output together, that the engine takes.

    Raises:
        ModelError: the configured length is beyond what the model's positions were made for.
    """
    limit = model.max_position_embeddings
    if config.max_model_len is None:
        return limit
    if config.max_model_len > limit:
        raise ModelError(
            f"max_model_len: {config.max_model_len} exceeds max_position_embeddings {limit} "
            f"of {config.model_dir / 'config.json'}"
        )
    return config.max_model_len


def served_name(model_dir: Path) -> str:
    """What a model is called by default: its directory as given, links not followed."""
    return Path(os.path.normpath(model_dir.absolute())).name


def load_model_config(model_dir: Path) -> ModelConfig:
    """Reads config.json and generation_config.json of a Hugging Face directory.

    Raises:
        ModelError: no such directory or file, bad JSON, a wrong type, or a field that the engine
            does not support.
    """
    if not model_dir.is_dir():
        raise ModelError(f"{model_dir}: no such model directory")
    path = model_dir / "config.json"
    fields = _Fields(path, _read_json(path))
    model_type = fields.string("model_type")
    if model_type != "llama":
        raise fields.error("model_type", f"only 'llama' is supported, not {model_type!r}")
    _refuse_other_arithmetic(fields)

    num_heads = fields.integer("num_attention_heads")
    hidden_size = fields.integer("hidden_size")
    num_kv_heads = fields.integer("num_key_value_heads", default=num_heads)
    if num_heads % num_kv_heads:
        raise fields.error(
            "num_key_value_heads", f"{num_kv_heads} does not divide {num_heads} attention heads"
        )
    if fields.get("head_dim") is None and hidden_size % num_heads:
        raise fields.error("hidden_size", f"{hidden_size} is not divisible by {num_heads} heads")
    head_dim = fields.integer("head_dim", default=hidden_size // num_heads)
    if head_dim % 2:
        raise fields.error("head_dim", f"rotary embedding needs an even size, not {head_dim}")

    vocab_size = fields.integer("vocab_size")
    max_position = fields.integer("max_position_embeddings", default=2048)
    config = ModelConfig(
        model_type=model_type,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=fields.integer("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=fields.number("rms_norm_eps", default=1e-6),
        rope=_rope(fields, max_position),
        tie_word_embeddings=fields.boolean("tie_word_embeddings"),
        attention_bias=fields.boolean("attention_bias"),
        mlp_bias=fields.boolean("mlp_bias"),
        max_position_embeddings=max_position,
        eos_token_ids=_eos_token_ids(fields, model_dir / "generation_config.json", vocab_size),
        bos_token_id=fields.token_id("bos_token_id", vocab_size),
        dtype=_dtype(fields),
    )
    fields.refuse_unknown(_HARMLESS)
    return config


class _Fields:
    """Typed access to one JSON object; remembers what was asked for, to refuse the rest."""

    def __init__(self, path: Path, values: dict[str, Any], prefix: str = "") -> None:
        self.path = path
        self._values = values
        self._prefix = prefix
        self._known: set[str] = set()

    def error(self, name: str, reason: str) -> ModelError:
        return ModelError(f"{self.path}: {self._prefix}{name}: {reason}")

    def get(self, name: str) -> Any:
        self._known.add(name)
        return self._values.get(name)

    def integer(self, name: str, *, default: int | None = None) -> int:
        value = self._value(name, default, "an integer", int)
        if value < 1:
            raise self.error(name, f"must be at least 1, not {value}")
        return int(value)

    def number(self, name: str, *, default: float | None = None) -> float:
        value = float(self._value(name, default, "a number", (int, float)))
        if not math.isfinite(value) or value <= 0:
            raise self.error(name, f"must be finite and positive, not {value}")
        return value

    def boolean(self, name: str) -> bool:
        value = self.get(name)
        if value is None:
            return False
        if not isinstance(value, bool):
            raise self.error(name, f"must be true or false, not {_shown(value)}")
        return value

    def string(self, name: str) -> str:
        return str(self._value(name, None, "a string", str))

    def token_id(self, name: str, vocab_size: int) -> int | None:
        value = self.get(name)
        return None if value is None else self._check_token_id(name, value, vocab_size)

    def token_ids(self, name: str, vocab_size: int) -> tuple[int, ...]:
        """One id or a list of them; none when the field is missing or null."""
        value = self.get(name)
        if value is None:
            return ()
        values = value if isinstance(value, list) else [value]
        return tuple(self._check_token_id(name, item, vocab_size) for item in values)

    def object(self, name: str) -> _Fields | None:
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.error(name, f"must be an object, not {_shown(value)}")
        return _Fields(self.path, value, f"{self._prefix}{name}.")

    def refuse_unknown(self, harmless: frozenset[str] = frozenset()) -> None:
        for name, value in self._values.items():
            if name in self._known or name in harmless or value is None or value is False:
                continue
            raise self.error(name, f"unknown field, value {_shown(value)}; it may change results")

    def _value(self, name: str, default: Any, what: str, types: Any) -> Any:
        value = self.get(name)
        if value is None:
            value = default
        if value is None:
            raise self.error(name, "missing")
        if not isinstance(value, types) or isinstance(value, bool):
            raise self.error(name, f"must be {what}, not {_shown(value)}")
        return value

    def _check_token_id(self, name: str, value: Any, vocab_size: int) -> int:
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.error(name, f"must be a token id, not {_shown(value)}")
        if not 0 <= value < vocab_size:
            raise self.error(name, f"token id {value} is outside the vocabulary of {vocab_size}")
        return value


def _refuse_other_arithmetic(fields: _Fields) -> None:
    if fields.get("quantization_config") is not None:
        raise fields.error("quantization_config", "quantised weights are not supported")
    tensor_parallel = fields.get("pretraining_tp")
    if tensor_parallel is not None and (isinstance(tensor_parallel, bool) or tensor_parallel != 1):
        raise fields.error("pretraining_tp", f"only 1 is supported, not {_shown(tensor_parallel)}")
    activation = fields.get("hidden_act")
    if activation not in (None, "silu"):
        raise fields.error("hidden_act", f"only 'silu' is supported, not {_shown(activation)}")


def _rope(fields: _Fields, max_position: int) -> RopeConfig:
    top_theta = fields.number("rope_theta") if fields.get("rope_theta") is not None else None
    old, new = fields.object("rope_scaling"), fields.object("rope_parameters")
    if old is not None and new is not None:
        raise fields.error("rope_scaling", "given together with rope_parameters")
    rope = new or old or _Fields(fields.path, {})

    theta = top_theta or 10000.0
    if rope.get("rope_theta") is not None:
        theta = rope.number("rope_theta")
        if top_theta is not None and top_theta != theta:
            raise rope.error("rope_theta", f"{theta} contradicts rope_theta {top_theta}")
    legacy_type = rope.get("type")
    rope_type = rope.get("rope_type") or legacy_type or "default"
    if rope.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise rope.error("partial_rotary_factor", "only 1.0 is supported")
    if rope_type == "llama3":
        result = RopeConfig(
            theta=theta,
            rope_type=rope_type,
            factor=rope.number("factor"),
            low_freq_factor=rope.number("low_freq_factor"),
            high_freq_factor=rope.number("high_freq_factor"),
            original_max_position=rope.integer(
                "original_max_position_embeddings", default=max_position
            ),
        )
        if result.high_freq_factor <= result.low_freq_factor:
            raise rope.error("high_freq_factor", "must be greater than low_freq_factor")
    elif rope_type == "default":
        result = RopeConfig(theta=theta, rope_type=rope_type)
    else:
        raise rope.error(
            "rope_type", f"only 'default' and 'llama3' are supported, not {_shown(rope_type)}"
        )
    rope.refuse_unknown()
    return result


def _eos_token_ids(fields: _Fields, generation_path: Path, vocab_size: int) -> tuple[int, ...]:
    own = fields.token_ids("eos_token_id", vocab_size)
    if not generation_path.exists():
        return own
    generation = _Fields(generation_path, _read_json(generation_path))
    return generation.token_ids("eos_token_id", vocab_size) or own


def _dtype(fields: _Fields) -> str | None:
    new, old = fields.get("dtype"), fields.get("torch_dtype")
    value = new if new is not None else old
    if value is not None and not isinstance(value, str):
        raise fields.error("dtype", f"must be a string, not {_shown(value)}")
    return value


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file") from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not valid JSON: {_one_line(str(error))}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: must hold a JSON object, not {_shown(value)}")
    return value


def _shown(value: Any) -> str:
    text = _one_line(json.dumps(value))
    return text if len(text) <= 60 else text[:57] + "..."


def _one_line(text: str) -> str:
    return " ".join(text.split())
