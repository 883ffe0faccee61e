"""What instructor, which cannot be installed beside the others, asks of a running server.

python ask_instructor.py http://127.0.0.1:8123
"""

from __future__ import annotations

import sys
from importlib.metadata import version

import instructor
import openai
from pydantic import BaseModel, Field


class Weather(BaseModel):
    """The weather at a place."""

    place: str = Field(max_length=12)
    degrees: int = Field(ge=-60, le=60)


def main() -> int:
    client = openai.OpenAI(base_url=f"{sys.argv[1]}/v1", api_key="none", max_retries=0)
    num_failed = 0
    for mode in (
        instructor.Mode.TOOLS,
        instructor.Mode.TOOLS_STRICT,
        instructor.Mode.JSON_SCHEMA,
        instructor.Mode.RESPONSES_TOOLS,
    ):
        is_response = mode is instructor.Mode.RESPONSES_TOOLS
        asking = instructor.from_openai(client, mode=mode)
        try:
            got = repr(
                asking.create(
                    model="demo",
                    messages=[{"role": "user", "content": "Who made the earth?"}],
                    response_model=Weather,
                    max_retries=0,
                    **{"max_output_tokens" if is_response else "max_tokens": 160},
                )
            )
        except Exception as error:
            num_failed += 1
            got = f"**{type(error).__name__}**: {error}"[:300].replace("\n", " ")
        print(f"| instructor {version('instructor')} | {mode} | {got} |", flush=True)
    return min(num_failed, 1)


if __name__ == "__main__":
    sys.exit(main())
