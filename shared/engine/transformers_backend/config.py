"""config.json as transformers reads it, and what our engine needs to know of such a model."""

from __future__ import annotations

import copy
import logging
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from baton.shared.engine.models.model_config import ModelConfig, read_dtype
from baton.shared.engine.transformers_backend import attention
from baton.shared.engine.transformers_backend.dry_run import DryRun, dry_run
from baton.shared.engine.transformers_backend.library import library
from baton.shared.model_files.fields import Fields, ModelError, read_json_object, shown
from baton.shared.model_files.info import read_model_info
from baton.shared.telemetry import log_event

logger = logging.getLogger(__name__)

_LAYER_TYPES = ("full_attention", "sliding_attention", "chunked_attention", "attention")
_OWN_CODE = ("auto_map", "custom_generate", "custom_pipelines")
_NOT_ITS_TO_SAY = (
    *("attn_implementation", "_attn_implementation", "_attn_implementation_internal"),
    *("experts_implementation", "_experts_implementation"),
)
"""How to compute."""
_FILES = "transformers_weights"
"""By this name a configuration, or a part of it, sends transformers to other files than those that
are hashed, in formats that run code when they are read, too."""
_MOST_LAYERS = 10_000
_SHORTEST_STEP = 64
"""Of what is compared at start would be left too little."""
_TUNED = "llama4_text"
"""Scales queries by how far on they are, floor_scale tokens at a time, and counts from a step's
beginning."""


@dataclass(frozen=True, slots=True)
class Foreign:
    """A model as transformers knows it."""

    config: Any
    """Its configuration; of a multimodal model that of its text part."""
    model_class: Any
    """Of the language model with its head."""
    is_part: bool
    """The checkpoint has more than the text part."""
    facts: DryRun
    most_of_a_step: int | None
    """Tokens of a step, padding included, beyond which it takes a token's place in the step for
    its position; None: it never does."""


def configure(fields: Fields) -> tuple[Foreign, ModelConfig]:
    """`fields` of config.json.

    Raises:
        ModelError: transformers is not there or does not know the type, or the model does not run
            on our cache; file and field are named.
    """
    transformers = library()
    attention.register()
    name = fields.string("model_type")
    whole = _read(transformers, fields, name)
    config = whole.get_text_config()
    _check_whole(fields, whole, config)
    model_class = _class_of(fields, config)
    _check_layers(fields, config)
    if config is not whole:
        # What stands around the text part counts.
        config.tie_word_embeddings = whole.tie_word_embeddings
    max_positions = _integer(fields, config, "max_position_embeddings")
    num_layers = _integer(fields, config, "num_hidden_layers", most=_MOST_LAYERS)
    limits = list(_limits(fields, config))
    on_paper = copy.deepcopy(config)
    for rope in _ropes(on_paper):
        if rope.get("rope_type") == "dynamic":
            # That asks for the longest sequence of a step, which is not known there.
            rope["rope_type"] = "default"
    try:
        facts = dry_run(
            # On paper no number decides which experts are taken.
            lambda: make_model(model_class, on_paper, torch.float32, experts="batched_mm"),
            num_layers,
            max_positions,
        )
    except ModelError as error:
        raise fields.error("model_type", f"{shown(name)}: {error}") from None
    if facts.counts and config.model_type != _TUNED:
        raise fields.error(
            "model_type",
            f"{shown(name)}: its attention counts or chooses tokens by itself, which may differ "
            "beyond what is compared at start",
        )
    info = read_model_info(fields)
    most_of_a_step = _most_of_a_step(fields, config)
    return Foreign(config, model_class, config is not whole, facts, most_of_a_step), ModelConfig(
        model_type=name,
        vocab_size=info.vocab_size,
        max_position_embeddings=_longest(fields, limits, facts, max_positions),
        eos_token_ids=info.eos_token_ids,
        bos_token_id=info.bos_token_id,
        hidden_size=_integer(fields, config, "hidden_size"),
        # What its own code reads for itself.
        intermediate_size=0,
        rms_norm_eps=0.0,
        tie_word_embeddings=bool(getattr(config, "tie_word_embeddings", False)),
        dtype=read_dtype(fields),
        quantization=None,
        layers=facts.layers,
    )


def make_model(
    model_class: Any, config: Any, dtype: torch.dtype, *, experts: str | None = None
) -> Any:
    """A model with random weights, or none where the device is `meta`; in evaluation mode."""
    config = copy.deepcopy(config)
    options = {} if experts is None else {"experts_implementation": experts}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = model_class._from_config(
            config, attn_implementation="eager", dtype=dtype, **options
        )
    return model.eval()


def _read(transformers: Any, fields: Fields, name: str) -> Any:
    """What transformers makes of the file."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    known: Any = CONFIG_MAPPING
    values = read_json_object(fields.path)
    own_code = [each for each in _OWN_CODE if values.get(each)]
    if name not in known:
        if own_code:
            raise fields.error(
                own_code[0],
                f"code of a model directory never runs here, and neither Baton nor transformers "
                f"{transformers.__version__} has its own for {shown(name)}",
            )
        raise fields.error(
            "model_type",
            f"{shown(name)} is known neither to Baton nor to transformers "
            f"{transformers.__version__}",
        )
    if own_code:
        log_event(
            logger,
            logging.WARNING,
            "code of the model directory is not run: the library's own is",
            file=str(fields.path),
            fields=" ".join(own_code),
        )
    _take_out(fields, values)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = known[name].from_dict(values)
            config.get_text_config()
            return config
    except Exception as error:
        reason = " ".join(str(error).split())
        raise fields.error("model_type", f"{shown(name)}: transformers: {reason}") from None


def _take_out(fields: Fields, value: Any, where: str = "") -> None:
    """Removes at every depth what config.json has no say in.

    Raises:
        ModelError: it names weight files.
    """
    if isinstance(value, list):
        for each in value:
            _take_out(fields, each, where)
    if not isinstance(value, dict):
        return
    if value.get(_FILES) is not None:
        raise fields.error(where + _FILES, "weights are model.safetensors, or what its index names")
    for name in (*_OWN_CODE, *_NOT_ITS_TO_SAY, _FILES):
        value.pop(name, None)
    for name, each in value.items():
        _take_out(fields, each, f"{where}{name}.")


def _check_whole(fields: Fields, whole: Any, config: Any) -> None:
    """Refuses what is told by a field, so that it is told by its name."""
    for name in ("quantization_config", "compression_config"):
        for part in (whole, config):
            if fields.get(name) is not None or getattr(part, name, None) is not None:
                raise fields.error(name, "quantised weights are not read through transformers")
    if getattr(config, "is_encoder_decoder", False):
        raise fields.error("is_encoder_decoder", "models with an encoder are not served")


def _check_layers(fields: Fields, config: Any) -> None:
    for name in ("layer_types", "layers_block_type", "block_types"):
        types = getattr(config, name, None)
        for each in types if isinstance(types, list | tuple) else ():
            if each not in _LAYER_TYPES:
                raise fields.error(
                    name, f"{shown(each)}: states that are no keys and values are not kept here"
                )
    if getattr(config, "num_kv_shared_layers", None):
        raise fields.error("num_kv_shared_layers", "layers that read others' keys and values")


def _class_of(fields: Fields, config: Any) -> Any:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    known: Any = MODEL_FOR_CAUSAL_LM_MAPPING
    try:
        model_class = known[type(config)]
    except (KeyError, ImportError, AttributeError):
        raise fields.error(
            "model_type", f"{shown(config.model_type)} is no causal language model in transformers"
        ) from None
    if isinstance(model_class, tuple):
        model_class = model_class[0]
    if model_class._is_stateful:
        raise fields.error(
            "model_type",
            f"{shown(config.model_type)}: it keeps a recurrent state, which is not kept here",
        )
    return model_class


def _longest(
    fields: Fields, limits: list[tuple[str, int]], facts: DryRun, max_positions: int
) -> int:
    """Of its code, some looks at how long a step is, or its longest sequence, where it ought to
    look at a token's position. Up to these lengths that is the same."""
    if facts.most_tokens is not None:
        limits = [*limits, ("attention_chunk_size", facts.most_tokens)]
    for name, limit in limits:
        if limit < 1:
            raise fields.error(name, f"sequences may be of {limit} tokens")
        if limit < max_positions:
            max_positions = limit
            log_event(
                logger,
                logging.WARNING,
                "sequences are not as long here as the model knows them",
                file=str(fields.path),
                field=name,
                max_model_len=limit,
            )
    return max_positions


def _limits(fields: Fields, config: Any) -> Iterator[tuple[str, int]]:
    # Its models look for the length where this puts it.
    config = copy.deepcopy(config)
    config.standardize_rope_params()
    for rope in _ropes(config):
        if rope.get("rope_type") == "longrope":
            # Beyond, it would take its long factors, for all tokens of a step.
            name = "original_max_position_embeddings"
            original = rope.get(name)
            if isinstance(original, bool) or not isinstance(original, int | float):
                raise fields.error(name, "longrope without the length that it was made for")
            if not math.isfinite(original):
                raise fields.error(name, f"must be finite, not {original}")
            yield name, math.floor(original)
    most = _most_of_a_step(fields, config)
    if most is not None:
        yield "floor_scale", most


def _most_of_a_step(fields: Fields, config: Any) -> int | None:
    if config.model_type != _TUNED or not config.attn_temperature_tuning:
        return None
    most = _integer(fields, config, "floor_scale") - 1
    if most < _SHORTEST_STEP:
        raise fields.error("floor_scale", f"steps may be of {most} tokens")
    return most


def _ropes(config: Any) -> list[dict[str, Any]]:
    """Of all layers, or by their kind."""
    parameters = getattr(config, "rope_parameters", None) or {}
    return [each for each in (parameters, *parameters.values()) if isinstance(each, dict)]


def _integer(fields: Fields, config: Any, name: str, *, most: int = 2**63 - 1) -> int:
    """A number that transformers has under that name, whatever the file calls it."""
    value = getattr(config, name, None)
    if not isinstance(value, int) or isinstance(value, bool):
        raise fields.error(name, "missing" if value is None else "must be an integer")
    if not 1 <= value <= most:
        raise fields.error(name, f"must be from 1 to {most}, not {value}")
    return value
