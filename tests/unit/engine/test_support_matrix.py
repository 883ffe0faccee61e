"""docs/models.md says what the registry serves, and what is compared with transformers; README what
goes with what."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoConfig

from baton.shared.engine.models import registry
from baton.shared.engine.models.registry import load_model_config
from baton.shared.model_files.type_defaults import TEXT_TYPES
from tests import feature_matrix
from tests.support_matrix import (
    COLUMNS,
    PAGE,
    README,
    ROPES,
    Row,
    between,
    features_of,
    page,
    rows,
)
from tests.unit.engine.tiny_latents import ALIASES
from tests.unit.engine.tiny_models import SIZES, TINY_MODELS, VISION, Fields, rename_alias

# Each rope and activation is compared with transformers in some type, and quantised weights in one;
# MXFP4 in test_experts.py.
COMPARED_ELSEWHERE = {*ROPES, "part of a head", "silu", "gelu_tanh", "yes", "MXFP4"}
# Of states of 16 bits transformers knows nothing; kernels/test_ssd.py does.
COMPARED_ELSEWHERE.add("states of 16 bits")
TESTED = {each for names in COLUMNS.values() for each in names} - COMPARED_ELSEWHERE


def test_the_page_is_what_is_generated() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert page(text) == text, "make support-matrix"


def test_the_readme_is_what_small_engines_do() -> None:
    text = README.read_text(encoding="utf-8")
    assert between(text, feature_matrix.render()) == text, "make support-matrix"


def test_every_type_has_a_row() -> None:
    assert [row.model_type for row in rows()] == [each.name for each in registry.model_types()]


@pytest.mark.parametrize("row", rows(), ids=lambda row: row.model_type)
def test_what_a_row_says_is_compared_with_transformers(row: Row, tmp_path: Path) -> None:
    compared: set[str] = set()
    # A multimodal type's text part is a type of its own, or compared by itself.
    others = (*TEXT_TYPES.get(row.model_type, ()), ALIASES.get(row.model_type, row.model_type))
    for model_type in dict.fromkeys((row.model_type, *others)):
        for number, fields in enumerate(TINY_MODELS.get(model_type, {}).values()):
            model_dir = tmp_path / f"{model_type}-{number}"
            save_config(model_dir, model_type, fields)
            features = features_of(load_model_config(model_dir)[1])
            assert features <= row.features
            assert row.always & TESTED <= features or model_type != row.model_type
            compared |= features
    assert row.features & TESTED <= compared


def save_config(model_dir: Path, model_type: str, fields: Fields) -> None:
    """As `make_tiny` has it, without a model."""
    if model_type not in VISION:
        known_as = ALIASES.get(model_type, model_type)
        AutoConfig.for_model(known_as, **{**SIZES, **fields}).save_pretrained(model_dir)
        rename_alias(model_dir, model_type)
        return
    fields = dict(fields)
    outer = {name: fields.pop(name) for name in ("tie_word_embeddings",) if name in fields}
    text = {**SIZES, **fields.pop("text_config", fields)}
    config = AutoConfig.for_model(
        model_type, text_config=text, vision_config=VISION[model_type], **outer
    )
    config.save_pretrained(model_dir)
