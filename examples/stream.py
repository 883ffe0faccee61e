"""Streams an answer to the terminal.

pip install ./clients/python
python examples/stream.py "In the beginning" --target 127.0.0.1:50051
"""

from __future__ import annotations

import argparse
import sys

from baton_client import BatonError, Client


def main() -> int:
    parser = argparse.ArgumentParser(description="Streams an answer to the terminal.")
    parser.add_argument("prompt")
    parser.add_argument("--target", default="127.0.0.1:50051", metavar="HOST:PORT")
    parser.add_argument("--max-tokens", type=int, default=64)
    arguments = parser.parse_args()
    with Client(arguments.target) as client:
        try:
            stream = client.generate(
                arguments.prompt, max_tokens=arguments.max_tokens, temperature=0, deadline_s=60
            )
            for chunk in stream:
                print(chunk.text, end="", flush=True)
            answer = stream.result()
        except BatonError as error:
            print(f"\n{error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            # Leaving the client's block cancels the answer.
            return 130
    print(f"\n[{answer.usage.num_completion_tokens} tokens, ended by {answer.finish_reason}]")
    return 0


if __name__ == "__main__":
    sys.exit(main())
