"""Which processes make up the stack, and their command lines. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from baton.shared.speculation import Speculation, why_not_together

GATEWAY = "gateway"
DEFAULT_HTTP_PORT = 8000


class UsageError(Exception):
    """The stack that was asked for cannot work. The message is one line."""


@dataclass(frozen=True)
class RoleCounts:
    prefill: int
    decode: int
    both: int

    @classmethod
    def of_flags(cls, prefill: int | None, decode: int | None, both: int | None) -> RoleCounts:
        """Without any flag: one prefill and one decode. With one, those not given are 0."""
        if prefill is None and decode is None and both is None:
            return cls(prefill=1, decode=1, both=0)
        return cls(prefill=prefill or 0, decode=decode or 0, both=both or 0)

    def __iter__(self) -> Iterator[tuple[str, int]]:
        return iter((("prefill", self.prefill), ("decode", self.decode), ("both", self.both)))

    @property
    def can_serve_alone(self) -> bool:
        """Whether these workers can answer without others."""
        return self.both > 0 or (self.prefill > 0 and self.decode > 0)


@dataclass(frozen=True)
class StackConfig:
    """What `baton up` was asked for. None: the role's own default."""

    model_dir: Path
    counts: RoleCounts
    host: str = "127.0.0.1"
    port: int = 50051
    http_port: int | None = None
    """Of the OpenAI endpoint; None is without."""
    num_gateways: int = 1
    """Behind the same ports."""
    cors_allow_origin: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    model_impl: str = "auto"
    """Whose code computes the model."""
    quantization: str | None = None
    """How plain weights are made small."""
    kv_cache_dtype: str = "auto"
    redis_url: str | None = None
    cluster: str = "default"
    num_blocks: int | None = None
    block_size: int = 16
    max_model_len: int | Literal["auto"] | None = None
    host_memory_mib: int | None = None
    """What each worker may take of the host's memory."""
    speculate: Speculation | None = None
    """Of the workers that decode."""
    draft_model_dir: Path | None = None
    """Who guesses for them, where a model does."""
    reflection: bool = False
    generation_config: str | None = None
    """`auto` or `none`: whether the model's sampling defaults count."""
    tool_format: str | None = None
    reasoning_format: str | None = None
    """How the model writes calls of tools, and its reasoning."""
    drain_s: float = 30.0
    model_name: str | None = None
    metrics_port: int | None = None
    """Of the first process; 0: each picks one; None: no metrics."""

    def check(self) -> None:
        """Raises UsageError when no request could ever succeed."""
        if self.num_gateways < 1:
            raise UsageError("--gateways must be at least 1")
        if problem := why_not_together(self.speculate, self.draft_model_dir):
            raise UsageError(problem)
        if self.redis_url is None and not self.counts.can_serve_alone:
            raise UsageError(
                "a request takes a worker of role prefill and one of role decode, or one of role"
                " both: give --prefill N --decode N, or --both N (or --redis-url, where workers"
                " elsewhere have the other role)"
            )


@dataclass(frozen=True)
class RoleSpec:
    """One process: `name` is its worker id, or "gateway"; `argv` follows the interpreter."""

    name: str
    argv: tuple[str, ...]


def worker_specs(config: StackConfig, redis_url: str, shm_dir: Path) -> list[RoleSpec]:
    specs = [
        RoleSpec(
            f"{role}-{index}", _worker_argv(config, role, f"{role}-{index}", redis_url, shm_dir)
        )
        for role, count in config.counts
        for index in range(count)
    ]
    return _with_metrics(specs, config.metrics_port, num_before=config.num_gateways)


def gateway_specs(
    config: StackConfig, redis_url: str, port: int, http_port: int | None
) -> list[RoleSpec]:
    """At least one. Several share the ports; only the first may be given 0, to pick one."""
    names = [f"{GATEWAY}-{index}" for index in range(config.num_gateways)]
    argv = _gateway_argv(config, redis_url, port, http_port)
    specs = [RoleSpec(name, argv) for name in (names if len(names) > 1 else [GATEWAY])]
    return _with_metrics(specs, config.metrics_port, num_before=0)


def _with_metrics(
    specs: list[RoleSpec], metrics_port: int | None, *, num_before: int
) -> list[RoleSpec]:
    """Each process has a port of its own: gateways come first, workers follow."""
    with_ports = []
    for index, spec in enumerate(specs, num_before):
        port = str(metrics_port + index) if metrics_port else str(metrics_port).lower()
        with_ports.append(RoleSpec(spec.name, (*spec.argv, "--metrics-port", port)))
    return with_ports


def _model_argv(config: StackConfig) -> list[str]:
    argv = ["--model", str(config.model_dir)]
    return argv if config.model_name is None else [*argv, "--model-name", config.model_name]


def _gateway_argv(
    config: StackConfig, redis_url: str, port: int, http_port: int | None
) -> tuple[str, ...]:
    argv = ["-m", "baton.services.gateway"]
    argv += [*_model_argv(config), "--redis-url", redis_url]
    argv += ["--cluster", config.cluster, "--host", config.host, "--port", str(port)]
    argv += ["--http-port", "none" if http_port is None else str(http_port)]
    argv += ["--drain-s", f"{config.drain_s:g}"]
    if config.cors_allow_origin is not None:
        argv += ["--cors-allow-origin", config.cors_allow_origin]
    if config.num_gateways > 1:
        argv.append("--reuse-port")
    if config.generation_config is not None:
        argv += ["--generation-config", config.generation_config]
    if config.tool_format is not None:
        argv += ["--tool-format", config.tool_format]
    if config.reasoning_format is not None:
        argv += ["--reasoning-format", config.reasoning_format]
    if config.reflection:
        argv.append("--reflection")
    return tuple(argv)


def _worker_argv(
    config: StackConfig, role: str, worker_id: str, redis_url: str, shm_dir: Path
) -> tuple[str, ...]:
    argv = ["-m", "baton.services.worker", "--role", role, "--worker-id", worker_id]
    argv += [*_model_argv(config), "--redis-url", redis_url]
    argv += ["--cluster", config.cluster, "--host", "127.0.0.1", "--port", "0"]
    argv += ["--device", config.device, "--dtype", config.dtype]
    if config.model_impl != "auto":
        argv += ["--model-impl", config.model_impl]
    if config.quantization is not None:
        argv += ["--quantization", config.quantization]
    if config.kv_cache_dtype != "auto":
        argv += ["--kv-cache-dtype", config.kv_cache_dtype]
    argv += ["--block-size", str(config.block_size), "--shm-dir", str(shm_dir)]
    if config.num_blocks is not None:
        argv += ["--num-blocks", str(config.num_blocks)]
    if config.max_model_len is not None:
        argv += ["--max-model-len", str(config.max_model_len)]
    if config.host_memory_mib is not None:
        argv += ["--host-memory-mib", str(config.host_memory_mib)]
    if config.speculate is not None and role != "prefill":
        argv += ["--speculate", str(config.speculate)]
        if config.draft_model_dir is not None:
            argv += ["--draft-model", str(config.draft_model_dir)]
    return tuple(argv)
