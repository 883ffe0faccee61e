from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class FailureReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FAILURE_REASON_UNSPECIFIED: _ClassVar[FailureReason]
    FAILURE_REASON_BAD_FIELD: _ClassVar[FailureReason]
    FAILURE_REASON_NO_TOKENIZER: _ClassVar[FailureReason]
    FAILURE_REASON_DEADLINE: _ClassVar[FailureReason]
    FAILURE_REASON_DRAINING: _ClassVar[FailureReason]
    FAILURE_REASON_STALE_ATTEMPT: _ClassVar[FailureReason]
    FAILURE_REASON_CAPABILITY_MISMATCH: _ClassVar[FailureReason]
    FAILURE_REASON_PREEMPTED: _ClassVar[FailureReason]
    FAILURE_REASON_DIGEST_MISMATCH: _ClassVar[FailureReason]
    FAILURE_REASON_CLAIM_BROKEN: _ClassVar[FailureReason]
    FAILURE_REASON_SOURCE_LOST: _ClassVar[FailureReason]
    FAILURE_REASON_WORKER_LOST: _ClassVar[FailureReason]
    FAILURE_REASON_ENGINE: _ClassVar[FailureReason]
    FAILURE_REASON_CANCELLED: _ClassVar[FailureReason]
    FAILURE_REASON_TOO_MANY_ATTEMPTS: _ClassVar[FailureReason]
    FAILURE_REASON_NO_CHAT_TEMPLATE: _ClassVar[FailureReason]
    FAILURE_REASON_MODEL_REPLACED: _ClassVar[FailureReason]
    FAILURE_REASON_OVERLOADED: _ClassVar[FailureReason]
FAILURE_REASON_UNSPECIFIED: FailureReason
FAILURE_REASON_BAD_FIELD: FailureReason
FAILURE_REASON_NO_TOKENIZER: FailureReason
FAILURE_REASON_DEADLINE: FailureReason
FAILURE_REASON_DRAINING: FailureReason
FAILURE_REASON_STALE_ATTEMPT: FailureReason
FAILURE_REASON_CAPABILITY_MISMATCH: FailureReason
FAILURE_REASON_PREEMPTED: FailureReason
FAILURE_REASON_DIGEST_MISMATCH: FailureReason
FAILURE_REASON_CLAIM_BROKEN: FailureReason
FAILURE_REASON_SOURCE_LOST: FailureReason
FAILURE_REASON_WORKER_LOST: FailureReason
FAILURE_REASON_ENGINE: FailureReason
FAILURE_REASON_CANCELLED: FailureReason
FAILURE_REASON_TOO_MANY_ATTEMPTS: FailureReason
FAILURE_REASON_NO_CHAT_TEMPLATE: FailureReason
FAILURE_REASON_MODEL_REPLACED: FailureReason
FAILURE_REASON_OVERLOADED: FailureReason

class Failure(_message.Message):
    __slots__ = ("reason", "message", "field", "limit")
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    FIELD_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    reason: FailureReason
    message: str
    field: str
    limit: str
    def __init__(self, reason: _Optional[_Union[FailureReason, str]] = ..., message: _Optional[str] = ..., field: _Optional[str] = ..., limit: _Optional[str] = ...) -> None: ...
