"""gated_delta against float64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from baton.kernels import reference_delta
from baton.kernels.gated_delta import gated_delta, why_no_delta
from baton.kernels.reference_delta import UNIT_EPS, DeltaGates
from baton.kernels.state_plan import DeviceStatePlan, StatePlan, state_tiles
from baton.shared.engine.config import DeviceError, EngineConfig
from baton.shared.engine.model_runner import ModelRunner
from tests.kernels.state_cases import CASES, Case, Row, poisoned_state, ways_to_compute
from tests.unit.engine.tiny_deltas import TINY_DELTAS
from tests.unit.engine.tiny_models import make_tiny

# Where exp(−x) overflows, the result is zero.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")
Check = Callable[[Tensor, Tensor], None]
Poisoned = Callable[..., Tensor]
STATE_TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def in_float64(
    qkv: Tensor, strength: Tensor, decay: Tensor, gates: DeltaGates, s: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Of one sequence; s: [num_key_heads, value heads of each, key_dim, value_dim]. What comes out,
    and the state behind each token."""
    num_key_heads, num_each, key_dim, value_dim = s.shape
    key_size = num_key_heads * key_dim
    sizes = [key_size, key_size, num_key_heads * num_each * value_dim]
    q, k, v = torch.split(qkv.double(), sizes, 1)
    q, k = q.view(-1, num_key_heads, 1, key_dim), k.view(-1, num_key_heads, 1, key_dim)
    q, k = (x / (x.square().sum(-1, keepdim=True) + UNIT_EPS).sqrt() for x in (q, k))
    v = v.view(-1, num_key_heads, num_each, value_dim)
    heads = (-1, num_key_heads, num_each, 1)
    beta = strength.double().sigmoid().view(heads)
    log = torch.nn.functional.softplus(decay.double() + gates.bias.double())
    forget = (-gates.rate.double() * log).exp().view(*heads, 1)
    s, out, states = s.double(), [], []
    for token in range(len(qkv)):
        s = s * forget[token]
        change = beta[token] * (
            v[token] - torch.einsum("gjkv,gjk->gjv", s, k[token].expand(-1, num_each, -1))
        )
        s = s + k[token][..., None] * change[..., None, :]
        out.append(torch.einsum("gjkv,gjk->gjv", s, q[token].expand(-1, num_each, -1)))
        states.append(s)
    return torch.stack(out).flatten(1, 2) * key_dim**-0.5, states


def draw(
    case: Case, state: Tensor, dtype: torch.dtype, device: torch.device, same_keys: bool = False
) -> tuple[Tensor, Tensor, Tensor, DeltaGates]:
    """Inputs whose rows are strided. Heads forget at once, or hardly."""
    _, num_key_heads, _, num_each, key_dim, value_dim = state.shape
    num_heads = num_key_heads * num_each
    size = 2 * num_key_heads * key_dim + num_heads * value_dim
    x = torch.randn(case.num_tokens, size + 2 * num_heads + 8, device=device)
    if same_keys:
        x[:, num_key_heads * key_dim :][:, : num_key_heads * key_dim] = 1.0
        x[:, size : size + num_heads] = 20.0
    x = x.to(dtype)
    qkv, strength, decay, _ = torch.split(x, [size, num_heads, num_heads, 8], 1)
    rates = torch.logspace(-3, 1, num_heads, device=device)
    return qkv, strength, decay, DeltaGates(rates, torch.randn(num_heads, device=device))


def check_state(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    error = (actual.double() - expected).abs().max()
    limit = STATE_TOLERANCE[dtype] * float(expected.abs().max())
    assert float(error) <= limit, f"state: max |error| {float(error):.3g} exceeds {limit:.3g}"


def check(
    case: Case,
    state: Tensor,
    dtype: torch.dtype,
    device: torch.device,
    out: Tensor | None,
    assert_close: Check,
    *,
    same_keys: bool = False,
) -> None:
    """`out`: None where the step is of a graph."""
    qkv, strength, decay, gates = draw(case, state, dtype, device, same_keys)
    layer, before, of_reference = 1, state.clone(), state.clone()
    expected = reference_delta.gated_delta(
        qkv, strength, decay, gates, of_reference, layer, case.plan()
    )
    of_graph = out is None
    plan = case.device_plan(device, of_graph=of_graph)
    given = gated_delta(qkv, strength, decay, gates, state, layer, plan, out=out)
    assert given is (plan.make_out(qkv, *given.shape[1:]) if out is None else out)
    first, written = 0, torch.zeros(len(state), dtype=torch.bool)
    for row in case.rows:
        tokens = slice(first, first + row.num_tokens)
        s = before[row.slot, :, layer]
        if not row.position or row.slot < 0:
            s = torch.zeros_like(s)
        wanted, states = in_float64(qkv[tokens], strength[tokens], decay[tokens], gates, s)
        assert_close(expected[tokens], wanted)
        if of_graph and row.is_padding:
            wanted = torch.zeros_like(wanted)
        assert_close(given[tokens], wanted)
        stores = [*row.keeps, *([(row.num_tokens, row.slot)] if row.slot >= 0 else [])]
        for num_tokens, slot in stores:
            check_state(state[slot, :, layer], states[num_tokens - 1], dtype)
            check_state(of_reference[slot, :, layer], states[num_tokens - 1], torch.float32)
            written[slot] = True
        first += row.num_tokens
    assert not given[first:].any(), "padding is zeros"
    untouched = state.clone()
    untouched[written, :, layer] = before[written, :, layer]
    assert torch.equal(untouched.view(torch.int32), before.view(torch.int32)), "what is not its own"


# In a graph rows are others, not sizes.
@pytest.mark.parametrize(
    ("num_key_heads", "num_each", "key_dim", "value_dim", "of_graph"),
    [(2, 2, 16, 16, False), (1, 3, 20, 12, False), (1, 3, 20, 12, True)],
)
@pytest.mark.parametrize("name", CASES)
def test_gated_delta(
    name: str,
    of_graph: bool,
    num_key_heads: int,
    num_each: int,
    key_dim: int,
    value_dim: int,
    device: torch.device,
    dtype: torch.dtype,
    poisoned: Poisoned,
    assert_close: Check,
) -> None:
    """What comes out and the states, kept ones too, of the kernels and of the reference. Nothing
    else is written."""
    case, shape = CASES[name], (num_key_heads, 2, num_each, key_dim, value_dim)
    state = poisoned_state(case, *shape, dtype=torch.float32, device=device)
    out = poisoned(case.num_tokens, num_key_heads * num_each, value_dim, dtype=dtype)
    check(case, state, dtype, device, None if of_graph else out, assert_close)


def test_keys_that_repeat(device: torch.device, poisoned: Poisoned, assert_close: Check) -> None:
    """At full strength: powers of the matrix that is inverted would have numbers of 18 digits."""
    dtype = torch.float32
    case = Case([Row(128, 0, 0)], 1)
    state = poisoned_state(case, 1, 2, 2, 32, 16, dtype=torch.float32, device=device)
    out = poisoned(128, 2, 16, dtype=dtype)
    check(case, state, dtype, device, out, assert_close, same_keys=True)


def test_32k_tokens_do_not_drift(device: torch.device) -> None:
    """Over 32,768 tokens kernels are as near to float64 as the reference in float32 is, in either
    form; in the interpreter over as many as there is time for."""
    steps, in_tiles = (32768, 32768) if device.type == "cuda" else (150, 2048)
    cpu, num_tokens = torch.device("cpu"), max(steps, in_tiles)
    state = torch.zeros(2, 1, 1, 1, 16, 16)
    qkv, strength, decay, gates = draw(Case([Row(num_tokens, 0, 0)], 1), state, torch.float32, cpu)
    # Hardly anything is forgotten.
    gates = DeltaGates(gates.rate * 1e-3, gates.bias)
    truth, states = in_float64(qkv, strength, decay, gates, state[0, :, 0])
    of_reference = state.clone()
    plan = StatePlan(np.array([0, num_tokens]), np.array([0]), np.array([0]))
    given = reference_delta.gated_delta(qkv, strength, decay, gates, of_reference, 0, plan)
    own = float((given - truth).abs().max())
    own_state = float((of_reference[0, :, 0] - states[-1]).abs().max())
    assert own < 1e-5 * float(truth.abs().max())

    qkv, strength, decay = qkv.to(device), strength.to(device), decay.to(device)
    gates = DeltaGates(gates.rate.to(device), gates.bias.to(device))
    in_steps, in_chunks = state.clone().to(device), state.clone().to(device)
    slots = torch.zeros(1, dtype=torch.int64, device=device)
    positions = torch.arange(steps, dtype=torch.int32, device=device)

    def run(tokens: slice, end: Tensor, plan: DeviceStatePlan) -> Tensor:
        return gated_delta(qkv[tokens], strength[tokens], decay[tokens], gates, end, 0, plan)

    out = [
        run(slice(i, i + 1), in_steps, DeviceStatePlan(slots, positions[i:], 1))
        for i in range(steps)
    ]
    rows, tiles = (torch.from_numpy(x).to(device) for x in state_tiles([0, in_tiles], [0], [0]))
    in_one = DeviceStatePlan(slots, positions[:0], 0, rows, tiles)
    whole = run(slice(in_tiles), in_chunks, in_one)
    for actual, end in ((torch.cat(out), in_steps), (whole, in_chunks)):
        error = (actual.cpu() - truth[: len(actual)]).abs().max()
        assert float(error) <= 4 * own
        error = (end[0, :, 0].cpu() - states[len(actual) - 1]).abs().max()
        assert float(error) <= 4 * own_state


@pytest.mark.parametrize("heads", [(2, 2, 16, 16), (1, 3, 20, 12), (2, 1, 128, 130), (1, 1, 5, 1)])
def test_bits_of_the_reference_are_those_of_a_row_alone(heads: tuple[int, int, int, int]) -> None:
    num_rows, num_tokens, (num_key_heads, num_each, *dims) = 6, 3, heads
    state = torch.zeros(num_rows + 1, num_key_heads, 2, num_each, *dims)
    case, cpu = Case([Row(num_rows * num_tokens, 0, 0)], 1), torch.device("cpu")
    qkv, strength, decay, gates = draw(case, state, torch.float32, cpu)
    results = []
    for steps in ways_to_compute(num_rows, num_tokens).values():
        own = torch.full_like(state, torch.nan)
        out = torch.full((num_rows * num_tokens, num_key_heads * num_each, dims[1]), torch.nan)
        for tokens, plan in steps:
            parts = qkv[tokens], strength[tokens], decay[tokens]
            out[tokens] = reference_delta.gated_delta(*parts, gates, own, 1, plan)
        assert bool(own[:, :, 0].isnan().all()) and not bool(own[:-1, :, 1].isnan().any())
        results.append(torch.cat((out.flatten(), own[:-1, :, 1].flatten())))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_heads_that_are_too_large_are_refused_by_size(tmp_path: Path) -> None:
    assert why_no_delta(256, 256) is None
    changes = {**TINY_DELTAS["qwen3_5_text"]["all linear"], "linear_value_head_dim": 257}
    make_tiny(tmp_path, "qwen3_5_text", changes)
    with pytest.raises(DeviceError, match="heads of 257, and its kernels take 256 at most"):
        ModelRunner(EngineConfig(tmp_path, kernels="triton"))
