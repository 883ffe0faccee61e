"""Where a model computes, in which dtype, with which kernels; and why not with others."""

from __future__ import annotations

import logging
import os

import torch

from baton.shared.engine.config import DeviceError
from baton.shared.engine.models.mamba_config import HybridConfig
from baton.shared.engine.models.model_config import AttentionConfig, ModelConfig
from baton.shared.engine.native_operations import native_operations
from baton.shared.engine.operations import Operations
from baton.shared.engine.reference_operations import ReferenceOperations
from baton.shared.kv.cache_spec import Full, Latent, Sliding, State
from baton.shared.telemetry import log_event

logger = logging.getLogger(__name__)

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
MIN_CAPABILITY = (8, 0)
"""Compute capability that the Triton kernels need."""
_MOST_WITH_TRITON = {"vocab_size": 1 << 20, "hidden_size": 1 << 14, "head_dim": 512}
"""Of the model's fields, what kernels take: sampling.py, rms_norm.py, the attentions."""


def choose_device(name: str) -> torch.device:
    """DeviceError: there is no such device."""
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise DeviceError("device: cuda was asked for, but torch finds no CUDA device")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and available) else "cpu")


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """What `name` means there: auto is float32 on a CPU, else bfloat16."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return _DTYPES[name]


def choose_kernels(name: str, device: torch.device, model: ModelConfig) -> str:
    """'torch' or 'triton'. DeviceError when Triton was named and cannot be had."""
    if name == "torch" or (name == "auto" and device.type == "cpu"):
        return "torch"
    problem = why_no_triton(device) or why_not_with_triton(model)
    if problem is None:
        return "triton"
    if name == "triton":
        raise DeviceError(f"kernels: triton was asked for, but {problem}")
    if any(layer.latent is not None for layer in model.attentions):
        raise DeviceError(
            f"kernels: {problem}; set kernels to torch for the reference, which is slow on a GPU"
        )
    log_event(
        logger,
        logging.WARNING,
        "kernels are the torch reference, which is slow on a GPU",
        message=problem,
    )
    return "torch"


def why_no_triton(device: torch.device) -> str | None:
    """None: kernels run there."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"triton cannot be imported: {error}"
    if device.type == "cpu":
        # The interpreter computes on the CPU what the kernels would: for tests.
        is_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        return None if is_interpreted else "the device is a CPU"
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        return (
            f"{name} has compute capability {capability[0]}.{capability[1]}, "
            f"{MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]} is needed"
        )
    return None


def why_not_with_triton(model: ModelConfig) -> str | None:
    """None: kernels take the model."""
    for spec in model.cache_specs:
        if isinstance(spec, Latent):
            from baton.kernels.latent_attention import why_no_latents

            if (problem := why_no_latents(spec.rank, spec.rope_dim)) is not None:
                return problem
        elif isinstance(spec, State):
            from baton.kernels.gated_delta import why_no_delta

            for tensor in spec.tensors:
                if tensor.name == "delta" and (problem := why_no_delta(*tensor.shape[1:])):
                    return problem
        elif spec is not None and not isinstance(spec, Full | Sliding):
            return f"its kernels know no layers that cache {type(spec).__name__}"
    if isinstance(model, HybridConfig):
        from baton.kernels.gated_norm import why_no_gated_norm

        own = model.mamba
        if own.has_norm and (problem := why_no_gated_norm(own.inner_size // own.num_groups)):
            return problem
    for field, most in _MOST_WITH_TRITON.items():
        value = getattr(model, field)
        if value > most:
            return f"the model's {field} is {value}, and its kernels take {most} at most"
    return None


def make_operations(
    kernels: str,
    device: torch.device,
    dtype: torch.dtype,
    model: ModelConfig,
    *,
    may_be_native: bool = False,
) -> Operations:
    """What computes the model's layers; where faster kernels do not take it, that is logged.

    Args:
        kernels: of `choose_kernels`.
        may_be_native: on a CPU in bfloat16 it may be what a C compiler makes.
    """
    if kernels == "torch":
        is_small = device.type == "cpu" and dtype == torch.bfloat16
        if is_small and may_be_native:
            return native_operations()
        return ReferenceOperations(keeps_small=is_small)
    from baton.shared.engine.triton_operations import TritonOperations

    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    if capability == (9, 0) and (problem := _why_not_hopper(model)):
        log_event(
            logger,
            logging.WARNING,
            "long prompts are computed by the slower kernel of attention",
            message=problem,
        )
    if problem := why_not_expanded(model):
        log_event(
            logger,
            logging.WARNING,
            "long prompts are computed by the slower form of latent attention",
            message=problem,
        )
    return TritonOperations(
        overlaps=capability >= (9, 0),
        keeps_small=dtype != torch.float32,
        takes_float8=capability >= (8, 9),
        quantises_inputs=capability >= (9, 0) and dtype != torch.float32,
    )


def _why_not_hopper(model: ModelConfig) -> str:
    """What keeps layers from the faster kernel; empty: nothing."""
    from baton.kernels.prefill_attention import why_not_hopper

    kinds = {
        (_head_dim_of_prompts(layer), layer.window or 0, layer.soft_cap)
        for layer in model.attentions
    }
    has_sinks = model.style.has_sinks
    found = [why_not_hopper(*kind, has_sinks=has_sinks) for kind in kinds]
    reasons = {reason for reason in found if reason is not None}
    return "; ".join(sorted(reasons))


def why_not_expanded(model: ModelConfig) -> str:
    """What keeps layers with latents from it; empty: nothing."""
    from baton.kernels.latent_expand import why_never_expanded

    kinds = {(layer.latent, layer.head_dim) for layer in model.attentions}
    found = [
        why_never_expanded(latent.rank, rope_dim, latent.key_dim, latent.value_dim)
        for latent, rope_dim in kinds
        if latent is not None
    ]
    return "; ".join(sorted({reason for reason in found if reason is not None}))


def _head_dim_of_prompts(layer: AttentionConfig) -> int:
    """With latents, of expanded keys."""
    return layer.head_dim + (0 if layer.latent is None else layer.latent.key_dim)


def describe_numerics(device: torch.device, kernels: str) -> str:
    """What bits depend on, of the machine."""
    where = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else torch.backends.cpu.get_cpu_capability()
    )
    return f"torch {torch.__version__} {where} {kernels}"
