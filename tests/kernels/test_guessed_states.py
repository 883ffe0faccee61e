"""Rows of a token and guesses over layers that keep states: kernels against the reference, and an
engine over them against one token by token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from baton.kernels import (
    causal_conv,
    gated_delta,
    reference_conv,
    reference_delta,
    reference_ssd,
    ssd_scan,
)
from baton.kernels.reference_conv import Conv, conv_places
from baton.kernels.reference_delta import DeltaGates
from baton.kernels.reference_ssd import SsdWeights
from baton.kernels.state_plan import NO_SLOT, DeviceStatePlan, StatePlan, state_tiles
from baton.shared.engine.batch import Batch, BatchRow
from baton.shared.engine.config import EngineConfig
from baton.shared.engine.model_runner import ModelRunner
from baton.shared.engine.plain_loop import PlainLoop
from baton.shared.sampling import SamplingParams
from tests.unit.engine.tiny_deltas import FULL, LINEAR, TINY_DELTAS
from tests.unit.engine.tiny_models import make_tiny

pytestmark = [
    pytest.mark.usefixtures("few_programs"),
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered in cast:RuntimeWarning"),
]
WIDTH = 3
# Slot, position, guesses, and how many of a row's tokens stand.
ROWS = [(2, 5, 2, 3), (NO_SLOT, 0, 0, 0), (0, 0, 1, 2), (4, 9, 0, 1), (1, 3, 2, 1), (3, 64, 2, 2)]
CHUNK, CHUNK_SLOT, NUM_SLOTS, LAYERS, LAYER = 7, 5, 7, 2, 1
NUM_TOKENS = len(ROWS) * WIDTH
Operation = Callable[..., Tensor]


def conv_of(device: torch.device) -> tuple[tuple[int, ...], int, Operation, Operation]:
    """Shape of a head's state, the numbers of a token, the kernels and the reference."""
    weight, bias, places = torch.randn(4, 36), torch.randn(36), conv_places(2, (5, 13))
    conv = Conv(weight, bias, places)
    on_device = Conv(weight.to(device), bias.to(device), places.to(device))
    return (
        (2, LAYERS, 3, 18),
        36,
        lambda x, *rest: causal_conv.causal_conv(x, on_device, *rest),
        lambda x, *rest: reference_conv.causal_conv(x, conv, *rest),
    )


def delta_of(device: torch.device) -> tuple[tuple[int, ...], int, Operation, Operation]:
    gates = DeltaGates(torch.rand(4), torch.randn(4))
    on_device = DeltaGates(*(each.to(device) for each in gates))

    def operation(delta: Operation, gates: DeltaGates) -> Operation:
        def run(x: Tensor, *rest: Any) -> Tensor:
            qkv, strength, decay = torch.split(x, [2 * 2 * 20 + 4 * 12, 4, 4], 1)
            return delta(qkv, strength, decay, gates, *rest)

        return run

    own = operation(gated_delta.gated_delta, on_device)
    return (2, LAYERS, 2, 20, 12), 136, own, operation(reference_delta.gated_delta, gates)


def ssd_of(device: torch.device) -> tuple[tuple[int, ...], int, Operation, Operation]:
    a, d, bias = torch.randn(3, 4)
    weights = SsdWeights(-a.exp(), d, bias, 2)
    on_device = SsdWeights(weights.a.to(device), d.to(device), bias.to(device), 2)

    def operation(ssd: Operation, weights: SsdWeights) -> Operation:
        def run(x: Tensor, *rest: Any) -> Tensor:
            x, dt = torch.split(x, [4 * 6 + 2 * 2 * 10, 4], 1)
            return ssd(x, dt, weights, *rest)

        return run

    own = operation(ssd_scan.ssd, on_device)
    return (4, LAYERS, 6, 10), 68, own, operation(reference_ssd.ssd, weights)


@pytest.mark.parametrize(
    ("make", "state_dtype", "has_chunk"),
    [
        (conv_of, torch.float16, False),
        (conv_of, torch.float32, True),
        (delta_of, torch.float32, False),
        (delta_of, torch.float32, True),
        (ssd_of, torch.float16, False),
        (ssd_of, torch.float32, True),
    ],
)
def test_states_go_on_by_the_guesses_that_stand(
    make: Callable[..., Any], state_dtype: torch.dtype, has_chunk: bool, device: torch.device
) -> None:
    """What comes out behind every token, and what slots hold before and after it is known which
    guesses stand. Nothing else is written."""
    shape, size, operation, reference = make(device)
    num_tokens = NUM_TOKENS + CHUNK * has_chunk
    x = torch.randn(num_tokens, size, device=device)
    state = torch.randn(NUM_SLOTS + 1, *shape, device=device).to(state_dtype)
    before, of_reference = state.clone(), state.clone().cpu()
    live = [
        WIDTH * row + j for row, (slot, _, guesses, _) in enumerate(ROWS) if slot >= 0
        for j in range(1 + guesses)
    ]  # fmt: skip
    real = [row for row in ROWS if row[0] >= 0]
    slots, positions, guesses, standing = (list(each) for each in zip(*real, strict=True))
    lengths = [1 + count for count in guesses]
    if has_chunk:
        live += range(NUM_TOKENS, num_tokens)
        for column, value in ((slots, CHUNK_SLOT), (positions, 0), (guesses, 0), (standing, 1)):
            column.append(value)
        lengths.append(CHUNK)
    plan = StatePlan(
        np.cumsum([0, *lengths]), np.array(positions), np.array(slots), (), np.array(guesses)
    )
    of_tokens = torch.full((NUM_TOKENS,), NO_SLOT)
    first_positions = torch.zeros(NUM_TOKENS, dtype=torch.int32)
    for row, (slot, position, count, _) in enumerate(ROWS):
        of_tokens[WIDTH * row : WIDTH * row + 1 + count] = slot
        first_positions[WIDTH * row : WIDTH * row + WIDTH] = position + torch.arange(WIDTH)
        if slot < 0:
            first_positions[WIDTH * row : WIDTH * row + WIDTH] = 0
    rows: Tensor | None = None
    tiles: Tensor | None = None
    if has_chunk:
        cut = state_tiles([NUM_TOKENS, num_tokens], [0], [CHUNK_SLOT])
        rows, tiles = (torch.from_numpy(each).to(device) for each in cut)
    on_device = DeviceStatePlan(
        of_tokens.to(device), first_positions.to(device), NUM_TOKENS, rows, tiles, width=WIDTH
    )
    expected = reference(x[live].cpu(), of_reference, LAYER, plan)
    out = operation(x, state, LAYER, on_device)
    tolerance: dict[str, Any] = {
        "rtol": 1e-4,
        "atol": 1e-4 if state_dtype == torch.float32 else 2e-3,
    }
    torch.testing.assert_close(out[live].cpu(), expected, **tolerance)
    torch.testing.assert_close(state.cpu(), of_reference, **tolerance)
    # As in a step, whose buffers others take.
    if has_chunk:
        x.fill_(torch.nan)
    counts = torch.tensor([row[3] for row in ROWS], dtype=torch.int32, device=device)
    plan.settle(np.array(standing) - 1)
    on_device.settle(counts)
    torch.testing.assert_close(state.cpu(), of_reference, **tolerance)
    moved = [slot for slot, _, _, count in ROWS if count > 1]
    assert not torch.equal(state[moved, :, LAYER], before[moved, :, LAYER])
    state[[*slots], :, LAYER] = before[[*slots], :, LAYER]
    assert torch.equal(state, before) and not plan.noted and not on_device.noted


def test_an_engine_with_guesses_draws_what_it_draws_token_by_token(
    tmp_path: Path, device: torch.device
) -> None:
    """Beside a chunk and without, with steps launched ahead of what is known."""
    layers = {"num_hidden_layers": 2, "layer_types": [LINEAR, FULL], "vocab_size": 83}
    make_tiny(tmp_path, "qwen3_5_text", {**TINY_DELTAS["qwen3_5_text"]["all linear"], **layers})
    how: dict[str, Any] = {"num_blocks": 24, "max_num_seqs": 2, "dtype": "float32"}
    reference = ModelRunner(EngineConfig(tmp_path, "cpu", kernels="torch", **how))
    params = SamplingParams(temperature=0.8, top_p=0.9, seed=4, max_tokens=12, ignore_eos=True)
    prompts = [[3 + 7 * i % 80 for i in range(length)] for length in (9, 5)]
    first, second = (PlainLoop(reference).generate([each], [params])[0] for each in prompts)
    runner = ModelRunner(EngineConfig(tmp_path, device.type, kernels="triton", num_drafts=2, **how))
    tables = [
        [[4 * i, 4 * i + 1] if group.spec.grows else [i] for group in runner.groups]
        for i in range(2)
    ]
    handles = [runner.open_row(params, 0) for _ in prompts]

    def row(i: int, position: int, drafts: list[int], **how: Any) -> BatchRow:
        return BatchRow(None, position, tables[i], params, 0, handles[i], drafts, **how)

    def drawn(step: Any) -> list[list[int]]:
        return [[each.token_id for each in of_row] for of_row in step.result()]

    def wrong(token_id: int) -> int:
        return (token_id + 1) % 83

    chunk = BatchRow(prompts[0], 0, tables[0], params, 0, handles[0])
    assert drawn(runner.launch(Batch([chunk]))) == [first[:1]]
    # Beside a prompt: one of two stands.
    other = BatchRow(prompts[1], 0, tables[1], params, 0, handles[1])
    steps = [
        runner.launch(Batch([row(0, 9, [first[1], wrong(first[2])]), other])),
        # Alone, which begins one position further back than was launched: all stand.
        runner.launch(Batch([row(1, 5, second[1:3]), row(0, 12, [])])),
        runner.launch(Batch([row(0, 13, [wrong(first[4])]), row(1, 8, [second[4]])])),
    ]
    assert drawn(steps[0]) == [first[1:3], second[:1]]
    assert drawn(steps[1]) == [second[1:4], first[3:4]]
    assert drawn(steps[2]) == [first[4:5], second[4:6]]
    last = drawn(runner.launch(Batch([row(0, 13, []), row(1, 10, [])])))
    assert last == [first[5:6], second[6:7]]
