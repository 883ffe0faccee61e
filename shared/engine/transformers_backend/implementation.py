"""Models of transformers, as the engine takes them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from baton.shared.engine.config import EngineConfig, most_model_len
from baton.shared.engine.determinism import MIN_LINEAR_ROWS
from baton.shared.engine.executor import Model
from baton.shared.engine.gguf_weights import GgufWeights
from baton.shared.engine.implementation import MakeExecutor, Place, Weights
from baton.shared.engine.model_loader import ModelPlan
from baton.shared.engine.models.model_config import ModelConfig
from baton.shared.engine.operations import Operations
from baton.shared.engine.transformers_backend import start_check
from baton.shared.engine.transformers_backend.config import Foreign, configure
from baton.shared.engine.transformers_backend.library import library
from baton.shared.engine.transformers_backend.model import TransformersModel, load
from baton.shared.kv.cache_spec import CacheGroup, places_of_layers
from baton.shared.model_files.fields import Fields, ModelError
from baton.shared.telemetry import log_event

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TransformersImplementation:
    name: str
    config: ModelConfig
    model_dir: Path
    foreign: Foreign
    most_tokens: int
    """Of the longest sequence that it may be asked for."""
    has_graphs: bool = False

    @classmethod
    def of(cls, config: EngineConfig, fields: Fields) -> TransformersImplementation:
        """`fields` of config.json. ModelError: the model does not run over our cache."""
        foreign, model = configure(fields)
        name = f"transformers {library().__version__}"
        log_event(
            logger,
            logging.WARNING,
            "the model runs through transformers' code: slower than one of Baton's own",
            model_type=model.model_type,
            model_impl=name,
        )
        most_tokens = most_model_len(config, model.max_position_embeddings)
        return cls(name, model, config.model_dir, foreign, most_tokens)

    def check_steps(self, most_tokens: int) -> None:
        most = self.foreign.most_of_a_step
        longest = most_tokens + -most_tokens % MIN_LINEAR_ROWS
        if most is not None and longest > most:
            raise ModelError(
                f"token_budget: steps of {longest} tokens, but of "
                f"{self.model_dir / 'config.json'} the floor_scale lets them be of {most} at most: "
                "a smaller token_budget, or max_num_seqs, helps"
            )

    def plan(
        self,
        weights: Weights,
        groups: Sequence[CacheGroup],
        ops: Operations,
        dtype: torch.dtype,
    ) -> ModelPlan:
        """Names of tensors are transformers' business, which compares them as it loads."""
        _not_gguf(weights)
        facts = self.foreign.facts
        num_bytes = facts.num_numbers * dtype.itemsize
        return ModelPlan({}, facts.linear_shapes, num_bytes, num_reads=1)

    def load(
        self,
        weights: Weights,
        groups: Sequence[CacheGroup],
        place: Place,
        on_read: Callable[[], None],
    ) -> Model:
        places = places_of_layers(groups)
        assert not isinstance(weights, GgufWeights)
        model = load(self.foreign, self.model_dir, weights, places, place)
        on_read()
        return model

    def check(
        self,
        model: Model,
        make_executor: MakeExecutor,
        groups: Sequence[CacheGroup],
        block_size: int,
    ) -> bool:
        assert isinstance(model, TransformersModel)
        num_blocks = start_check.num_blocks_for(groups, block_size)
        executor = make_executor(num_blocks, start_check.num_rows())
        most_tokens = min(self.most_tokens, start_check.most_tokens(self.foreign.most_of_a_step))
        try:
            is_stable = start_check.check(
                model,
                executor,
                self.config.vocab_size,
                most_tokens,
                has_experts=self.foreign.facts.has_experts,
            )
        except ModelError as error:
            raise ModelError(f"{self.model_dir}: {error}") from None
        return is_stable and not self.foreign.facts.has_experts and model.keeps_bits()


def _not_gguf(weights: Weights) -> None:
    if isinstance(weights, GgufWeights):
        raise ModelError(f"{weights.files[0]}: GGUF files are not read through transformers")
