"""The plainest loop over a ModelRunner: the oracle of end-to-end tests, the baseline of benchmarks.

A fixed set of prompts, blocks handed out once, no prefix cache: prompts in chunks, one after
another, then one decode step after another until all have finished.
"""

from __future__ import annotations

from collections.abc import Sequence

from baton.shared.engine.batch import Batch, BatchRow
from baton.shared.engine.model_runner import ModelRunner
from baton.shared.kv.sequence import SamplingParams, num_blocks_for


class PlainLoop:
    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: Sequence[SamplingParams],
        *,
        chunk: int = 512,
    ) -> list[list[int]]:
        """Generates for all prompts together → generated token ids, a stop token included.

        Raises:
            ValueError: the pool cannot hold all prompts with their max_tokens at once.
        """
        tables = self._block_tables(prompts, params)
        outputs: list[list[int]] = []
        for prompt, table, sampling in zip(prompts, tables, params, strict=True):
            outputs.append([self._prefill(prompt, table, sampling, chunk)])
        while running := [
            i for i, each in enumerate(params) if not self._is_done(outputs[i], each)
        ]:
            rows = [
                BatchRow(
                    token_ids=outputs[i][-1:],
                    position=len(prompts[i]) + len(outputs[i]) - 1,
                    block_tables=[tables[i]],
                    sampling=params[i],
                )
                for i in running
            ]
            for i, token in zip(running, self._runner.forward(Batch(rows)), strict=True):
                assert token is not None
                outputs[i].append(token)
        return outputs

    def _prefill(
        self, prompt: Sequence[int], table: list[int], sampling: SamplingParams, chunk: int
    ) -> int:
        """Computes a prompt in chunks → its first generated token."""
        token = None
        for start in range(0, len(prompt), chunk):
            row = BatchRow(
                token_ids=prompt[start : start + chunk],
                position=start,
                block_tables=[table],
                sampling=sampling if start + chunk >= len(prompt) else None,
            )
            [token] = self._runner.forward(Batch([row]))
        assert token is not None
        return token

    def _is_done(self, output: list[int], params: SamplingParams) -> bool:
        is_eos = output[-1] in self._runner.model_config.eos_token_ids
        return (
            len(output) >= params.max_tokens
            or output[-1] in params.stop_token_ids
            or (is_eos and not params.ignore_eos)
        )

    def _block_tables(
        self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]
    ) -> list[list[int]]:
        block_size = self._runner.kv_cache.block_size
        tables: list[list[int]] = []
        next_block = 0
        for prompt, each in zip(prompts, params, strict=True):
            end = next_block + num_blocks_for(len(prompt) + each.max_tokens, block_size)
            tables.append(list(range(next_block, end)))
            next_block = end
        if next_block > self._runner.num_blocks:
            raise ValueError(f"{next_block} blocks needed, the pool has {self._runner.num_blocks}")
        return tables
