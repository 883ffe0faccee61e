from baton_client.v1 import types_pb2 as _types_pb2
from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GenerateRequest(_message.Message):
    __slots__ = ("text", "token_ids", "messages", "sampling", "received_token_ids", "standalone_text", "clamp_max_tokens", "prediction", "n", "constraint", "received_samples")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    STANDALONE_TEXT_FIELD_NUMBER: _ClassVar[int]
    CLAMP_MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREDICTION_FIELD_NUMBER: _ClassVar[int]
    N_FIELD_NUMBER: _ClassVar[int]
    CONSTRAINT_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_SAMPLES_FIELD_NUMBER: _ClassVar[int]
    text: str
    token_ids: TokenIds
    messages: Messages
    sampling: _types_pb2.SamplingParams
    received_token_ids: _containers.RepeatedScalarFieldContainer[int]
    standalone_text: bool
    clamp_max_tokens: bool
    prediction: Prediction
    n: int
    constraint: _types_pb2.Constraint
    received_samples: _containers.RepeatedCompositeFieldContainer[TokenIds]
    def __init__(self, text: _Optional[str] = ..., token_ids: _Optional[_Union[TokenIds, _Mapping]] = ..., messages: _Optional[_Union[Messages, _Mapping]] = ..., sampling: _Optional[_Union[_types_pb2.SamplingParams, _Mapping]] = ..., received_token_ids: _Optional[_Iterable[int]] = ..., standalone_text: bool = ..., clamp_max_tokens: bool = ..., prediction: _Optional[_Union[Prediction, _Mapping]] = ..., n: _Optional[int] = ..., constraint: _Optional[_Union[_types_pb2.Constraint, _Mapping]] = ..., received_samples: _Optional[_Iterable[_Union[TokenIds, _Mapping]]] = ...) -> None: ...

class Prediction(_message.Message):
    __slots__ = ("text", "token_ids")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    text: str
    token_ids: TokenIds
    def __init__(self, text: _Optional[str] = ..., token_ids: _Optional[_Union[TokenIds, _Mapping]] = ...) -> None: ...

class TokenIds(_message.Message):
    __slots__ = ("token_ids",)
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class Messages(_message.Message):
    __slots__ = ("messages",)
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    messages: _containers.RepeatedCompositeFieldContainer[Message]
    def __init__(self, messages: _Optional[_Iterable[_Union[Message, _Mapping]]] = ...) -> None: ...

class Message(_message.Message):
    __slots__ = ("role", "content")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    role: str
    content: str
    def __init__(self, role: _Optional[str] = ..., content: _Optional[str] = ...) -> None: ...

class GenerateResponse(_message.Message):
    __slots__ = ("started", "chunk", "finished", "prompt_logprobs")
    STARTED_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    started: GenerateStarted
    chunk: GenerateChunk
    finished: GenerateFinished
    prompt_logprobs: _types_pb2.PromptLogprobs
    def __init__(self, started: _Optional[_Union[GenerateStarted, _Mapping]] = ..., chunk: _Optional[_Union[GenerateChunk, _Mapping]] = ..., finished: _Optional[_Union[GenerateFinished, _Mapping]] = ..., prompt_logprobs: _Optional[_Union[_types_pb2.PromptLogprobs, _Mapping]] = ...) -> None: ...

class GenerateStarted(_message.Message):
    __slots__ = ("request_id", "seed", "num_prompt_tokens", "model_digest")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    NUM_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    seed: int
    num_prompt_tokens: int
    model_digest: str
    def __init__(self, request_id: _Optional[str] = ..., seed: _Optional[int] = ..., num_prompt_tokens: _Optional[int] = ..., model_digest: _Optional[str] = ...) -> None: ...

class GenerateChunk(_message.Message):
    __slots__ = ("first_index", "token_ids", "text", "sample", "logprobs")
    FIRST_INDEX_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    first_index: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    text: str
    sample: int
    logprobs: _containers.RepeatedCompositeFieldContainer[_types_pb2.TokenLogprobs]
    def __init__(self, first_index: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., text: _Optional[str] = ..., sample: _Optional[int] = ..., logprobs: _Optional[_Iterable[_Union[_types_pb2.TokenLogprobs, _Mapping]]] = ...) -> None: ...

class GenerateFinished(_message.Message):
    __slots__ = ("finish_reason", "text", "usage", "timing", "prefill_worker_id", "decode_worker_id", "num_attempts", "sample", "stop")
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    TIMING_FIELD_NUMBER: _ClassVar[int]
    PREFILL_WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    DECODE_WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    NUM_ATTEMPTS_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    finish_reason: _types_pb2.FinishReason
    text: str
    usage: Usage
    timing: GenerateTiming
    prefill_worker_id: str
    decode_worker_id: str
    num_attempts: int
    sample: int
    stop: str
    def __init__(self, finish_reason: _Optional[_Union[_types_pb2.FinishReason, str]] = ..., text: _Optional[str] = ..., usage: _Optional[_Union[Usage, _Mapping]] = ..., timing: _Optional[_Union[GenerateTiming, _Mapping]] = ..., prefill_worker_id: _Optional[str] = ..., decode_worker_id: _Optional[str] = ..., num_attempts: _Optional[int] = ..., sample: _Optional[int] = ..., stop: _Optional[str] = ...) -> None: ...

class Usage(_message.Message):
    __slots__ = ("num_prompt_tokens", "num_completion_tokens", "num_cached_tokens", "num_accepted_prediction_tokens", "num_rejected_prediction_tokens")
    NUM_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_COMPLETION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_ACCEPTED_PREDICTION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_REJECTED_PREDICTION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    num_prompt_tokens: int
    num_completion_tokens: int
    num_cached_tokens: int
    num_accepted_prediction_tokens: int
    num_rejected_prediction_tokens: int
    def __init__(self, num_prompt_tokens: _Optional[int] = ..., num_completion_tokens: _Optional[int] = ..., num_cached_tokens: _Optional[int] = ..., num_accepted_prediction_tokens: _Optional[int] = ..., num_rejected_prediction_tokens: _Optional[int] = ...) -> None: ...

class GenerateTiming(_message.Message):
    __slots__ = ("ttft_time", "tpot_time", "e2e_time", "transfer_time")
    TTFT_TIME_FIELD_NUMBER: _ClassVar[int]
    TPOT_TIME_FIELD_NUMBER: _ClassVar[int]
    E2E_TIME_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_TIME_FIELD_NUMBER: _ClassVar[int]
    ttft_time: _duration_pb2.Duration
    tpot_time: _duration_pb2.Duration
    e2e_time: _duration_pb2.Duration
    transfer_time: _duration_pb2.Duration
    def __init__(self, ttft_time: _Optional[_Union[_duration_pb2.Duration, _Mapping]] = ..., tpot_time: _Optional[_Union[_duration_pb2.Duration, _Mapping]] = ..., e2e_time: _Optional[_Union[_duration_pb2.Duration, _Mapping]] = ..., transfer_time: _Optional[_Union[_duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class TokenizeRequest(_message.Message):
    __slots__ = ("text", "add_special_tokens")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    ADD_SPECIAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    text: str
    add_special_tokens: bool
    def __init__(self, text: _Optional[str] = ..., add_special_tokens: bool = ...) -> None: ...

class TokenizeResponse(_message.Message):
    __slots__ = ("token_ids",)
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class DetokenizeRequest(_message.Message):
    __slots__ = ("token_ids", "skip_special_tokens")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SKIP_SPECIAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    skip_special_tokens: bool
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ..., skip_special_tokens: bool = ...) -> None: ...

class DetokenizeResponse(_message.Message):
    __slots__ = ("text",)
    TEXT_FIELD_NUMBER: _ClassVar[int]
    text: str
    def __init__(self, text: _Optional[str] = ...) -> None: ...

class GetModelInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetModelInfoResponse(_message.Message):
    __slots__ = ("model_name", "model_type", "vocab_size", "max_model_len", "eos_token_ids", "has_tokenizer", "chat_template", "block_size")
    MODEL_NAME_FIELD_NUMBER: _ClassVar[int]
    MODEL_TYPE_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    EOS_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    HAS_TOKENIZER_FIELD_NUMBER: _ClassVar[int]
    CHAT_TEMPLATE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    model_name: str
    model_type: str
    vocab_size: int
    max_model_len: int
    eos_token_ids: _containers.RepeatedScalarFieldContainer[int]
    has_tokenizer: bool
    chat_template: str
    block_size: int
    def __init__(self, model_name: _Optional[str] = ..., model_type: _Optional[str] = ..., vocab_size: _Optional[int] = ..., max_model_len: _Optional[int] = ..., eos_token_ids: _Optional[_Iterable[int]] = ..., has_tokenizer: bool = ..., chat_template: _Optional[str] = ..., block_size: _Optional[int] = ...) -> None: ...

class GetServerInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetServerInfoResponse(_message.Message):
    __slots__ = ("version", "gateway_incarnation", "directory_reachable", "workers", "ledger", "num_prefix_entries", "counters", "default_sampling", "model_digest", "directory_problem")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    GATEWAY_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    DIRECTORY_REACHABLE_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    LEDGER_FIELD_NUMBER: _ClassVar[int]
    NUM_PREFIX_ENTRIES_FIELD_NUMBER: _ClassVar[int]
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_SAMPLING_FIELD_NUMBER: _ClassVar[int]
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    DIRECTORY_PROBLEM_FIELD_NUMBER: _ClassVar[int]
    version: str
    gateway_incarnation: str
    directory_reachable: bool
    workers: _containers.RepeatedCompositeFieldContainer[WorkerStatus]
    ledger: _containers.RepeatedCompositeFieldContainer[LedgerStageCount]
    num_prefix_entries: int
    counters: ServerCounters
    default_sampling: _types_pb2.SamplingParams
    model_digest: str
    directory_problem: str
    def __init__(self, version: _Optional[str] = ..., gateway_incarnation: _Optional[str] = ..., directory_reachable: bool = ..., workers: _Optional[_Iterable[_Union[WorkerStatus, _Mapping]]] = ..., ledger: _Optional[_Iterable[_Union[LedgerStageCount, _Mapping]]] = ..., num_prefix_entries: _Optional[int] = ..., counters: _Optional[_Union[ServerCounters, _Mapping]] = ..., default_sampling: _Optional[_Union[_types_pb2.SamplingParams, _Mapping]] = ..., model_digest: _Optional[str] = ..., directory_problem: _Optional[str] = ...) -> None: ...

class WorkerStatus(_message.Message):
    __slots__ = ("worker", "role", "healthy", "num_waiting", "num_running", "num_free_blocks", "num_blocks", "capability_hash", "determinism", "max_model_len", "model_impl", "num_checkpoints", "drafter")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    HEALTHY_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_FIELD_NUMBER: _ClassVar[int]
    NUM_RUNNING_FIELD_NUMBER: _ClassVar[int]
    NUM_FREE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    CAPABILITY_HASH_FIELD_NUMBER: _ClassVar[int]
    DETERMINISM_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    MODEL_IMPL_FIELD_NUMBER: _ClassVar[int]
    NUM_CHECKPOINTS_FIELD_NUMBER: _ClassVar[int]
    DRAFTER_FIELD_NUMBER: _ClassVar[int]
    worker: _types_pb2.WorkerAddress
    role: _types_pb2.WorkerRole
    healthy: bool
    num_waiting: int
    num_running: int
    num_free_blocks: int
    num_blocks: int
    capability_hash: str
    determinism: str
    max_model_len: int
    model_impl: str
    num_checkpoints: int
    drafter: str
    def __init__(self, worker: _Optional[_Union[_types_pb2.WorkerAddress, _Mapping]] = ..., role: _Optional[_Union[_types_pb2.WorkerRole, str]] = ..., healthy: bool = ..., num_waiting: _Optional[int] = ..., num_running: _Optional[int] = ..., num_free_blocks: _Optional[int] = ..., num_blocks: _Optional[int] = ..., capability_hash: _Optional[str] = ..., determinism: _Optional[str] = ..., max_model_len: _Optional[int] = ..., model_impl: _Optional[str] = ..., num_checkpoints: _Optional[int] = ..., drafter: _Optional[str] = ...) -> None: ...

class LedgerStageCount(_message.Message):
    __slots__ = ("stage", "num_entries")
    STAGE_FIELD_NUMBER: _ClassVar[int]
    NUM_ENTRIES_FIELD_NUMBER: _ClassVar[int]
    stage: str
    num_entries: int
    def __init__(self, stage: _Optional[str] = ..., num_entries: _Optional[int] = ...) -> None: ...

class ServerCounters(_message.Message):
    __slots__ = ("num_requests", "num_extra_attempts", "num_cancelled", "num_preemptions", "num_digest_mismatches", "num_computed_prompt_tokens", "num_cached_prompt_tokens", "num_pulled_blocks", "num_drafts", "num_drafted_tokens", "num_accepted_tokens", "num_accepted_by_position", "num_captured_prompt_steps", "num_launched_prompt_steps", "num_kept_states", "num_restored_states")
    NUM_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    NUM_EXTRA_ATTEMPTS_FIELD_NUMBER: _ClassVar[int]
    NUM_CANCELLED_FIELD_NUMBER: _ClassVar[int]
    NUM_PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    NUM_DIGEST_MISMATCHES_FIELD_NUMBER: _ClassVar[int]
    NUM_COMPUTED_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_CACHED_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_PULLED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_DRAFTS_FIELD_NUMBER: _ClassVar[int]
    NUM_DRAFTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_ACCEPTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_ACCEPTED_BY_POSITION_FIELD_NUMBER: _ClassVar[int]
    NUM_CAPTURED_PROMPT_STEPS_FIELD_NUMBER: _ClassVar[int]
    NUM_LAUNCHED_PROMPT_STEPS_FIELD_NUMBER: _ClassVar[int]
    NUM_KEPT_STATES_FIELD_NUMBER: _ClassVar[int]
    NUM_RESTORED_STATES_FIELD_NUMBER: _ClassVar[int]
    num_requests: int
    num_extra_attempts: int
    num_cancelled: int
    num_preemptions: int
    num_digest_mismatches: int
    num_computed_prompt_tokens: int
    num_cached_prompt_tokens: int
    num_pulled_blocks: int
    num_drafts: int
    num_drafted_tokens: int
    num_accepted_tokens: int
    num_accepted_by_position: _containers.RepeatedScalarFieldContainer[int]
    num_captured_prompt_steps: int
    num_launched_prompt_steps: int
    num_kept_states: int
    num_restored_states: int
    def __init__(self, num_requests: _Optional[int] = ..., num_extra_attempts: _Optional[int] = ..., num_cancelled: _Optional[int] = ..., num_preemptions: _Optional[int] = ..., num_digest_mismatches: _Optional[int] = ..., num_computed_prompt_tokens: _Optional[int] = ..., num_cached_prompt_tokens: _Optional[int] = ..., num_pulled_blocks: _Optional[int] = ..., num_drafts: _Optional[int] = ..., num_drafted_tokens: _Optional[int] = ..., num_accepted_tokens: _Optional[int] = ..., num_accepted_by_position: _Optional[_Iterable[int]] = ..., num_captured_prompt_steps: _Optional[int] = ..., num_launched_prompt_steps: _Optional[int] = ..., num_kept_states: _Optional[int] = ..., num_restored_states: _Optional[int] = ...) -> None: ...
