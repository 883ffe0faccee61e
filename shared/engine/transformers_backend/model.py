"""A model of transformers behind the engine's protocol for models."""

from __future__ import annotations

import copy
import inspect
import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from baton.kernels import reference
from baton.shared.engine.determinism import MIN_LINEAR_ROWS
from baton.shared.engine.executor import Wanted
from baton.shared.engine.implementation import Place
from baton.shared.engine.linear import Linear
from baton.shared.engine.operations import Operations
from baton.shared.engine.reference_operations import ReferenceOperations
from baton.shared.engine.transformers_backend.attention import PAGED, NoStep, Step, running
from baton.shared.engine.transformers_backend.company import recording
from baton.shared.engine.transformers_backend.config import Foreign, make_model
from baton.shared.engine.transformers_backend.dry_run import without_cache
from baton.shared.engine.weights import DummyWeights, WeightFiles
from baton.shared.model_files.fields import ModelError
from baton.shared.telemetry import log_event

logger = logging.getLogger(__name__)

_TEXT_PARTS = {
    r"^model\.language_model\.": "model.",
    r"^language_model\.model\.": "model.",
    r"^language_model\.lm_head\.": "lm_head.",
}
"""Where multimodal checkpoints have the language model's tensors → its own names."""


class TransformersModel:
    """The forward pass; all state is the caller's KV cache.

    A step's tokens go through as one row, each with its position: who attends to whom is in the
    plans. What `hidden_states` returns are logits already, for their scales and caps are the
    model's own.
    """

    def __init__(
        self,
        model: Any,
        ops: Operations,
        places: Mapping[int, tuple[int, int]],
        most_of_a_step: int | None = None,
    ) -> None:
        """`most_of_a_step`: see `Foreign`."""
        self._model = model
        self._ops = ops
        self._multiple = MIN_LINEAR_ROWS if _keeps_company_apart(ops) else 1
        self._most_of_a_step = most_of_a_step
        self._places = places
        self._arguments = without_cache(model)
        self._can_choose = "logits_to_keep" in inspect.signature(model.forward).parameters
        model.config._attn_implementation = PAGED

    def hidden_states(
        self,
        input_ids: Tensor,
        positions: Tensor,
        caches: Sequence[Any],
        plans: Sequence[Any],
        wanted: Wanted | None = None,
    ) -> Tensor:
        """As `Decoder.hidden_states`, but → [T or R, vocab]."""
        num_tokens = len(input_ids)
        if self._most_of_a_step is not None and num_tokens > self._most_of_a_step:
            raise RuntimeError(f"a step of {num_tokens} tokens, of {self._most_of_a_step} at most")
        tokens = None if wanted is None else wanted[0]
        arguments = dict(self._arguments)
        if self._can_choose and tokens is not None:
            arguments["logits_to_keep"] = tokens
        with running(Step(self._ops, caches, plans, self._places)):
            logits: Tensor = self._model(
                input_ids=_padded(input_ids, self._multiple)[None],
                position_ids=_padded(positions, self._multiple)[None],
                **arguments,
            ).logits[0]
        if tokens is None:
            return logits[:num_tokens]
        return logits if self._can_choose else logits.index_select(0, tokens)

    def keeps_bits(self) -> bool:
        """Whether all that transformers' code computes is known to give a token the same bits
        whatever shares its step; in float32, on a CPU."""
        if self._model.dtype != torch.float32 or self._model.device.type != "cpu":
            return False
        ids = torch.zeros(1, MIN_LINEAR_ROWS, dtype=torch.int64)
        positions = torch.arange(MIN_LINEAR_ROWS)[None]
        ours = [each for each in self._model.modules() if isinstance(each, _OURS)]
        with running(NoStep()), recording(ours) as seen:
            self._model(input_ids=ids, position_ids=positions, **self._arguments)
        if seen.unsure:
            log_event(
                logger,
                logging.INFO,
                "operations of the model may depend on what shares a step: it is not exact",
                operations=" ".join(sorted(seen.unsure)),
            )
        return not seen.unsure

    @property
    def pad_token_id(self) -> int | None:
        """Which some types do not count where they number tokens."""
        found = getattr(self._model.config, "pad_token_id", None)
        return found if isinstance(found, int) else None

    def logits(self, hidden: Tensor) -> Tensor:
        """A copy: who draws changes logits where they are, and may ask for them once more."""
        return hidden.clone()

    @contextmanager
    def eager(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """Its own attention and positions: of token ids [T], a sequence's first → [T, vocab]."""
        config = self._model.config
        config._attn_implementation = "eager"

        def run(input_ids: Tensor) -> Tensor:
            logits: Tensor = self._model(input_ids=input_ids[None], **self._arguments).logits[0]
            return logits

        try:
            yield run
        finally:
            config._attn_implementation = PAGED


def _keeps_company_apart(ops: Operations) -> bool:
    """Whether a token's bits may be the same in any step. The other table has plans of just the
    step's tokens, and transformers' own activations are one kernel where ours would be several."""
    return isinstance(ops, ReferenceOperations)


def _padded(column: Tensor, multiple: int) -> Tensor:
    """int [T] → at a multiple of so many.

    On a CPU, loops over single numbers have a rest that is computed by other instructions, if
    numbers do not fill the last vector; and which tokens that meets must not depend on how many
    there are.
    """
    num_missing = -len(column) % multiple
    return nn.functional.pad(column, (0, num_missing)) if num_missing else column


def load(
    foreign: Foreign,
    model_dir: Path,
    weights: WeightFiles | DummyWeights,
    places: Mapping[int, tuple[int, int]],
    place: Place,
) -> TransformersModel:
    """Reads the weights, of the safetensors in that directory that `find_weight_files` finds only.

    Raises:
        ModelError: a tensor is missing, superfluous or of another shape.
    """
    if isinstance(weights, DummyWeights):
        with place.device:
            model = make_model(foreign.model_class, foreign.config, place.dtype)
        for name, parameter in model.named_parameters():
            shape = tuple(parameter.shape)
            parameter.data.copy_(weights.read(name, shape, parameter.device, place.dtype))
    else:
        model = _read(foreign, model_dir, weights, place.dtype)
    model.requires_grad_(False)
    # One tensor after another: transformers reads to a device only with another library's help.
    model.to(place.device)
    _replace_modules(model, place.ops)
    return TransformersModel(model, place.ops, places, foreign.most_of_a_step)


def _read(foreign: Foreign, model_dir: Path, weights: WeightFiles, dtype: torch.dtype) -> Any:
    adapter = model_dir / "adapter_config.json"
    if adapter.exists():
        # It may name another directory as the model's.
        raise ModelError(f"{adapter}: adapters are not read through transformers")
    config = copy.deepcopy(foreign.config)
    # Whatever became of the file's fields: this one would name other weight files.
    config.transformers_weights = None
    try:
        with (
            warnings.catch_warnings(),
            _ignoring_no_layers(foreign.model_class, len(foreign.facts.layers)),
        ):
            warnings.simplefilter("ignore")
            model, found = foreign.model_class.from_pretrained(
                str(model_dir),
                config=config,
                dtype=dtype,
                attn_implementation="eager",
                key_mapping=_TEXT_PARTS if foreign.is_part else None,
                use_safetensors=True,
                # They are told below.
                ignore_mismatched_sizes=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"{model_dir}: transformers cannot load it: {reason}") from None
    for name in sorted(found["missing_keys"]):
        raise ModelError(f"{weights.where(name)}: {name}: missing tensor")
    for name, *shapes in sorted(found["mismatched_keys"]):
        stored, made = (list(shape) for shape in shapes)
        raise ModelError(
            f"{weights.where(name)}: {name}: shape {stored} where config.json makes it {made}"
        )
    unexpected = set(found["unexpected_keys"])
    if foreign.is_part:
        unexpected &= _names_of_text(weights, model)
    for name in sorted(unexpected):
        raise ModelError(f"{weights.where(name)}: {name}: unexpected tensor")
    for reason in found["error_msgs"]:
        raise ModelError(f"{model_dir}: transformers: {' '.join(reason.split())}")
    return model.eval()


def _names_of_text(weights: WeightFiles, model: Any) -> set[str]:
    """Of a multimodal checkpoint: what tensors of its language model are called in that."""
    inner = model.base_model_prefix
    parts = [f"{name}." for name, _ in model.named_children() if name != inner]
    parts += [f"{inner}.{name}." for name, _ in getattr(model, inner).named_children()]
    names = {name for name in weights.names if name.startswith(tuple(parts))}
    for part, own in _TEXT_PARTS.items():
        names |= {re.sub(part, own, name) for name in weights.names if re.match(part, name)}
    return names


@contextmanager
def _ignoring_no_layers(model_class: Any, num_layers: int) -> Iterator[None]:
    """What a class ignores, by number, as layers that guess ahead may be layers of this model."""
    names = [f"model.layers.{index}." for index in range(num_layers)]
    field = "_keys_to_ignore_on_load_unexpected"
    family = vars(sys.modules[model_class.__module__]).values()
    before = [
        (kind, vars(kind)[field]) for kind in family if field in getattr(kind, "__dict__", ())
    ]
    try:
        for kind, patterns in before:
            kept = [each for each in patterns or () if not any(re.search(each, n) for n in names)]
            setattr(kind, field, kept)
        yield
    finally:
        for kind, patterns in before:
            setattr(kind, field, patterns)


class _PackedLinear(nn.Module):
    """In place of a linear layer: the products of our own models, whose rows keep their bits on a
    CPU."""

    def __init__(self, ops: Operations, layer: Linear) -> None:
        super().__init__()
        self._ops = ops
        self._layer = layer

    def forward(self, x: Tensor) -> Tensor:
        rows = self._ops.linear(x.reshape(-1, x.shape[-1]), self._layer)
        return rows.view(*x.shape[:-1], self._layer.num_out)


class _Activation(nn.Module):
    """In place of one of transformers': the same function, of which a number has the same bits
    wherever it stands."""

    def __init__(self, name: reference.Activation) -> None:
        super().__init__()
        self._name = name

    def forward(self, x: Tensor) -> Tensor:
        return reference.activate(x, self._name)


class _Gelu(nn.Module):
    """As `_Activation`, by the error function."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 0.5 * (1 + torch.erf(x * 0.5**0.5))


_OURS = (_PackedLinear, _Activation)


def _replace_modules(model: Any, ops: Operations) -> None:
    from transformers.pytorch_utils import Conv1D

    kinds = (nn.Linear, Conv1D)

    def activation_for(child: nn.Module) -> nn.Module | None:
        return _activation_for(child) if _keeps_company_apart(ops) else None

    def is_replaced(child: nn.Module) -> bool:
        return type(child) in kinds or activation_for(child) is not None

    parents = [
        module
        for module in model.modules()
        if any(is_replaced(child) for child in module.children())
    ]
    for parent in parents:
        for name in [name for name, child in parent.named_children() if is_replaced(child)]:
            new = activation_for(getattr(parent, name))
            setattr(parent, name, _packed(getattr(parent, name), ops) if new is None else new)


def _activation_for(module: nn.Module) -> nn.Module | None:
    """What computes the same; None: nothing does here."""
    from transformers import activations

    kind = type(module)
    if kind in (nn.SiLU, activations.SiLUActivation):
        return _Activation("silu")
    if kind in (activations.GELUTanh, activations.NewGELUActivation):
        return _Activation("gelu_tanh")
    if kind is nn.GELU:
        return _Gelu() if module.approximate == "none" else _Activation("gelu_tanh")
    return _Gelu() if kind is activations.GELUActivation else None


def _packed(layer: Any, ops: Operations) -> _PackedLinear:
    """Nobody holds `layer` afterwards, or there would be all weights twice."""
    weight = layer.weight if type(layer) is nn.Linear else layer.weight.T.contiguous()
    bias = None if layer.bias is None else layer.bias.detach()
    return _PackedLinear(ops, ops.pack_linear(weight.detach(), bias))
