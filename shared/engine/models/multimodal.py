"""The text part of multimodal types: a language model whose fields and weights stand inside those
of a model that sees or hears too. What the rest is made of is not read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from baton.shared.engine.models.model_config import ModelConfig, read_dtype
from baton.shared.engine.models.model_type import ModelType
from baton.shared.engine.models.quantization import read_quantization
from baton.shared.model_files.fields import Fields, shown
from baton.shared.model_files.info import read_model_info
from baton.shared.model_files.type_defaults import TEXT_TYPES, text_part

if TYPE_CHECKING:
    from baton.shared.engine.models.blocks import Names

_PLACES = (
    ("model.language_model.", "lm_head"),
    ("language_model.model.", "language_model.lm_head"),
    ("model.", "lm_head"),
)
"""Where checkpoints have the language model's modules, and its head."""

_OTHER_FIELDS = """
    vision_config vision_feature_layer vision_start_token_id vision_end_token_id vision_token_id
    image_token_id image_token_index mm_tokens_per_image boi_token_id boi_token_index eoi_token_id
    eoi_token_index video_token_id audio_config audio_token_id boa_token_id eoa_token_id
    eoa_token_index projector_hidden_act multimodal_projector_bias spatial_merge_size
""".split()
"""Of what is not read; texts have nothing of it."""


def text_part_of(
    name: str,
    types: Sequence[ModelType],
    *,
    ignored_modules: Sequence[str],
    text_may_tie: bool = False,
    may_be_flat: bool = False,
) -> ModelType:
    """A type of which the language model alone is served.

    Args:
        types: what that may be, all built alike; see TEXT_TYPES in type_defaults.py.
        ignored_modules: what else a checkpoint has, at its top or within `model`.
        text_may_tie: `tie_word_embeddings` counts in the text part too, not only around it.
        may_be_flat: config.json may have all fields in one.
    """
    by_name = {each.name: each for each in types}

    def configure(fields: Fields) -> ModelConfig:
        text = text_part(fields)
        if text is fields and not may_be_flat:
            raise fields.error("text_config", "missing")
        text_type = types[0]
        if len(TEXT_TYPES[name]) > 1:
            found = text.string("model_type")
            if found not in by_name:
                known = " or ".join(shown(each) for each in by_name)
                raise text.error("model_type", f"only {known} is supported, not {shown(found)}")
            text_type = by_name[found]
        config = text_type.configure(text)
        for other in _OTHER_FIELDS:
            fields.get(other)
        is_tied = fields.boolean("tie_word_embeddings")
        return replace(
            config,
            **asdict(read_model_info(fields)),
            tie_word_embeddings=is_tied or (text_may_tie and config.tie_word_embeddings),
            dtype=read_dtype(fields) or config.dtype,
            quantization=read_quantization(fields) or config.quantization,
        )

    return ModelType(
        name,
        configure,
        types[0].build,
        tuple(_placed(types[0].names[0], *place) for place in _PLACES),
        types[0].ignored_tensors,
        ignored_modules=tuple(
            f"{within}{module}." for within in ("", "model.") for module in ignored_modules
        ),
    )


def _placed(names: Names, model: str, head: str) -> Names:
    """What a language model's modules are called within another model."""
    placed = {
        key: model + name.removeprefix("model.") if name.startswith("model.") else name
        for key, name in names.items()
    }
    return {**placed, "head": head}
