"""Content of messages and predictions: text, or parts that are text."""

from __future__ import annotations

from baton.services.gateway.openai.errors import InvalidParam
from baton.services.gateway.openai.schema import ContentPart, Prediction
from baton.v1 import inference_service_pb2 as pb

PREDICTION = {"prediction.text": "prediction.content"}
"""What HTTP calls the field of GenerateRequest."""


def text_of(part: ContentPart, path: str) -> str:
    """Raises InvalidParam for a part that is no text."""
    if part.type != "text":
        problem = f"{part.type[:40]!r} is not supported; only 'text' is"
        raise InvalidParam(f"{path}.type", problem, code="unsupported_parameter")
    if part.text is None:
        raise InvalidParam(f"{path}.text", "is missing")
    return part.text


def prediction_of(prediction: Prediction | None) -> pb.Prediction | None:
    """Raises InvalidParam."""
    if prediction is None:
        return None
    if prediction.type != "content":
        problem = f"{prediction.type[:40]!r} is not supported; only 'content' is"
        raise InvalidParam("prediction.type", problem, code="unsupported_parameter")
    content = prediction.content
    if isinstance(content, str):
        return pb.Prediction(text=content)
    texts = [text_of(part, f"prediction.content[{i}]") for i, part in enumerate(content)]
    return pb.Prediction(text="".join(texts))
