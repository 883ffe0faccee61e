"""Matchers for constrained sequences, compiled beside the engine's thread and the streams'."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from baton.shared.constraints.compiler import Compiler
from baton.shared.constraints.matcher import AnswerMatcher
from baton.shared.constraints.tokens import TokenTable
from baton.shared.kv.sequence import Sequence
from baton.shared.model_files.fields import ModelError
from baton.shared.rpc.errors import NoTokenizer


class Grammars:
    """The tokenizer is read when the first constraint comes."""

    def __init__(self, model_dir: Path, vocab_size: int) -> None:
        self._model_dir = model_dir
        self._vocab_size = vocab_size
        self._compiler: Compiler | None = None
        self._thread = ThreadPoolExecutor(1, "grammars")

    async def matcher_for(self, sequence: Sequence) -> AnswerMatcher:
        """Raises InvalidField for a constraint that cannot be compiled, NoTokenizer."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._make, sequence)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _make(self, sequence: Sequence) -> AnswerMatcher:
        if self._compiler is None:
            try:
                tokens = TokenTable.load(self._model_dir, self._vocab_size)
            except ModelError as error:
                raise NoTokenizer(f"the worker's tokenizer cannot be used: {error}") from error
            if tokens is None:
                raise NoTokenizer("a constraint needs a tokenizer, and the worker has none")
            self._compiler = Compiler(tokens)
        compiled = self._compiler.compile(sequence.constraint)
        return AnswerMatcher(compiled, ignore_eos=sequence.params.ignore_eos)
