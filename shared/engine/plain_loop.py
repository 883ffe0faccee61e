"""The plainest loop over a ModelRunner: the oracle of end-to-end tests, the baseline of benchmarks.

A fixed set of prompts, blocks handed out once, no prefix cache: prompts in chunks, one after
another, then one decode step after another until all have finished.
"""

from __future__ import annotations

from collections.abc import Sequence

from baton.shared.engine.batch import Batch, BatchRow
from baton.shared.engine.model_runner import ModelRunner
from baton.shared.engine.shaping import KnownTokens, shapes_logits
from baton.shared.kv.drawn import Drawn
from baton.shared.sampling import SamplingParams


class PlainLoop:
    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: Sequence[SamplingParams],
        *,
        chunk: int = 512,
        samples: Sequence[int] | None = None,
        banned_sequences: Sequence[tuple[int, ...]] = (),
    ) -> list[list[int]]:
        """Generates for all prompts together → generated token ids, a stop token included.

        samples: which sample of its prompt each is; None: the first.
        banned_sequences: what bad words are in tokens, for all prompts; see `Sequence`.

        Raises:
            ValueError: the pool cannot hold all prompts with their max_tokens at once.
        """
        tables = self._block_tables(prompts, params)
        samples = samples or [0] * len(prompts)
        outputs: list[list[int]] = []
        banned = tuple(banned_sequences)
        for prompt, table, sampling, sample in zip(prompts, tables, params, samples, strict=True):
            first = self._prefill(prompt, table, sampling, sample, chunk, banned)
            outputs.append([first])
        while running := [
            i for i, each in enumerate(params) if not self._is_done(outputs[i], each)
        ]:
            rows = [
                BatchRow(
                    token_ids=outputs[i][-1:],
                    position=len(prompts[i]) + len(outputs[i]) - 1,
                    block_tables=tables[i],
                    sampling=params[i],
                    history=_history(prompts[i], outputs[i], params[i], banned),
                    sample_index=samples[i],
                )
                for i in running
            ]
            for i, [drawn] in zip(running, self._runner.forward(Batch(rows)), strict=True):
                outputs[i].append(drawn.token_id)
        return outputs

    def _prefill(
        self,
        prompt: Sequence[int],
        tables: list[list[int]],
        sampling: SamplingParams,
        sample: int,
        chunk: int,
        banned: tuple[tuple[int, ...], ...],
    ) -> int:
        """Computes a prompt in chunks → its first generated token."""
        drawn: Sequence[Drawn] = ()
        for start in range(0, len(prompt), chunk):
            row = BatchRow(
                token_ids=prompt[start : start + chunk],
                position=start,
                block_tables=tables,
                sampling=sampling if start + chunk >= len(prompt) else None,
                history=_history(prompt, (), sampling, banned),
                sample_index=sample,
            )
            [drawn] = self._runner.forward(Batch([row]))
        return drawn[0].token_id

    def _is_done(self, output: list[int], params: SamplingParams) -> bool:
        is_eos = output[-1] in self._runner.model_config.eos_token_ids
        return (
            len(output) >= params.max_tokens
            or output[-1] in params.stop_token_ids
            or (is_eos and not params.ignore_eos)
        )

    def _block_tables(
        self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]
    ) -> list[list[list[int]]]:
        """By prompt and cache group; as if no group had a window."""
        block_size, pools = self._runner.kv_cache.block_size, self._runner.arrangement.pools
        groups = self._runner.groups
        next_block = [0] * self._runner.arrangement.num_pools
        tables: list[list[list[int]]] = []
        for prompt, each in zip(prompts, params, strict=True):
            tables.append([])
            for group, pool in zip(groups, pools, strict=True):
                count = group.num_blocks_for(len(prompt) + each.max_tokens, block_size)
                tables[-1].append(list(range(next_block[pool], next_block[pool] + count)))
                next_block[pool] += count
        for need, have in zip(next_block, self._runner.num_blocks, strict=True):
            if need > have:
                raise ValueError(f"{need} blocks needed, the pool has {have}")
        return tables


def _history(
    prompt: Sequence[int],
    output: Sequence[int],
    params: SamplingParams,
    banned: tuple[tuple[int, ...], ...],
) -> KnownTokens | None:
    if not shapes_logits(params) and not banned:
        return None
    return KnownTokens((*prompt, *output), len(prompt), banned)
