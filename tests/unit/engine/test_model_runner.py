"""The runner's pool, its limits, and the plain loop over it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from baton.shared.engine.batch import Batch, BatchRow
from baton.shared.engine.config import DeviceError, EngineConfig
from baton.shared.engine.kernels_fit import kernels_fit
from baton.shared.engine.kv_cache import KvCache
from baton.shared.engine.model_runner import ModelRunner
from baton.shared.engine.plain_loop import PlainLoop
from baton.shared.kv.arrangement import Arrangement
from baton.shared.kv.cache_spec import CacheGroup, CacheSpec, Full, Sliding, cache_groups
from baton.shared.model_files.fields import ModelError
from baton.shared.sampling import SamplingParams
from tests.device import DEVICE, ENGINE, ON_GPU
from tests.unit.engine.conftest import MakeLlama, MakeRunner


def test_layers_with_equal_specs_form_a_group() -> None:
    small, large = Full(2, 16), Full(4, 16)
    groups = cache_groups([small, large, small, small])
    assert groups == (CacheGroup(small, (0, 2, 3)), CacheGroup(large, (1,)))
    assert groups[0].block_shape(16) == (2, 3, 2, 16, 16)
    assert groups[0].block_bytes(16, 4) == 2 * 3 * 2 * 16 * 16 * 4


def pools_of_their_own(specs: Sequence[CacheSpec], itemsize: int = 4) -> Arrangement:
    groups = cache_groups(specs)
    sizes = tuple(group.block_bytes(8, itemsize) for group in groups)
    return Arrangement(groups, tuple(range(len(groups))), sizes, 0.0)


def test_the_pool_lives_in_the_memory_handed_in(
    make_llama: MakeLlama, make_runner: MakeRunner
) -> None:
    model_dir, _ = make_llama()
    asked = []

    def pool_memory(num_bytes: int) -> torch.Tensor:
        asked.append(torch.full((num_bytes + 64,), 255, dtype=torch.uint8, device=DEVICE))
        return asked[0]

    runner = make_runner(model_dir, num_blocks=8)
    config = EngineConfig(model_dir, num_blocks=8, **ENGINE)
    with_memory = ModelRunner(config, pool_memory=pool_memory)
    assert with_memory.num_blocks == (8,)
    assert with_memory.kv_cache.memory.data_ptr() == asked[0].data_ptr()
    assert tuple(with_memory.kv_cache.tensors[0].shape) == (8, 2, 2, 2, 16, 16)
    row = BatchRow([5, 6, 7], 0, [[3]])
    assert torch.equal(with_memory.logits(Batch([row])), runner.logits(Batch([row])))


def test_auto_takes_what_fits_and_changes_nothing_else(
    make_llama: MakeLlama, make_runner: MakeRunner
) -> None:
    """Workers with more and with less memory read each other's blocks: their ropes and layouts are
    those of the model's own length, on either side of which theirs may be."""
    scaling = {
        "rope_type": "longrope",
        "original_max_position_embeddings": 64,
        "short_factor": [1.0] * 8,
        "long_factor": [2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0],
    }
    model_dir, _ = make_llama(rope_scaling=scaling, max_position_embeddings=512)
    little, much, whole = (
        make_runner(model_dir, num_blocks=num_blocks, max_model_len=length)
        for num_blocks, length in ((2, "auto"), (20, "auto"), (40, None))
    )
    lengths = [runner.max_model_len for runner in (little, much, whole)]
    assert lengths == [32, 320, 512]
    assert little.capacity.longest == 32
    assert little.numerics == much.numerics == whole.numerics
    assert little.kv_cache.layout() == much.kv_cache.layout() == whole.kv_cache.layout()
    batch = Batch([BatchRow([5, 6, 7], 0, [[0]])])
    assert torch.equal(little.logits(batch), whole.logits(batch))
    with pytest.raises(ValueError, match="exceeds max_model_len"):
        little.logits(Batch([BatchRow([1] * 33, 0, [[0, 1, 1]])]))
    short = make_runner(model_dir, max_model_len=64)
    assert short.numerics != whole.numerics


def test_words_of_a_block_are_its_bytes_by_head() -> None:
    cache = KvCache(pools_of_their_own([Full(2, 4)] * 3, 2), [5], 8, torch.bfloat16)
    cache.tensors[0].copy_(torch.randn(cache.tensors[0].shape))
    words = cache.block_words([4, 1])
    assert words.dtype == torch.int32 and tuple(words.shape) == (2, 2, 3 * 2 * 8 * 4 // 2)
    assert torch.equal(words[0].view(torch.bfloat16).view(2, 3, 2, 8, 4), cache.tensors[0][4])


def test_memory_that_does_not_fit_is_refused() -> None:
    arrangement = pools_of_their_own([Full(2, 4)])
    needed = KvCache.required_bytes(arrangement, [5])
    with pytest.raises(ValueError, match="64-byte aligned"):
        KvCache(arrangement, [5], 8, torch.float32, torch.zeros(needed - 1, dtype=torch.uint8))


def test_pools_of_unequal_blocks_lie_one_after_another() -> None:
    """Nothing that is written to one group's blocks is seen in another's, and the zero blocks stay
    what they are."""
    arrangement = pools_of_their_own([Full(2, 4), Sliding(1, 12, 9), Full(2, 4)])
    memory = torch.full((KvCache.required_bytes(arrangement, [5, 3]),), 7, dtype=torch.uint8)
    cache = KvCache(arrangement, [5, 3], 8, torch.float32, memory)
    assert [tuple(tensor.shape) for tensor in cache.tensors] == [
        (5, 2, 2, 2, 8, 4),
        (3, 1, 1, 2, 8, 12),
    ]
    for value, tensor in enumerate(cache.tensors, 1):
        tensor.fill_(value)
    for value, (tensor, padded) in enumerate(
        zip(cache.tensors, cache.padded_tensors, strict=True), 1
    ):
        assert bool((tensor == value).all()) and not bool(padded[-1].any())
    for number in range(2):
        assert cache.pool_of(number).offset_bytes % 256 == 0
        words = cache.block_words([2], number)
        assert torch.equal(words[0].flatten(), cache.tensors[number][2].view(torch.int32).flatten())
    assert len(set(cache.layout())) == 2


def test_the_number_of_blocks_is_chosen(make_llama: MakeLlama, make_runner: MakeRunner) -> None:
    model_dir, _ = make_llama()
    share = 0.05
    limit = share * torch.cuda.mem_get_info()[1] if ON_GPU else 2**30
    runner = make_runner(model_dir, num_blocks=None, gpu_memory_utilization=share)
    [num_blocks] = runner.num_blocks
    assert num_blocks >= 4 * 512 // 16
    assert num_blocks * runner.arrangement.block_bytes[0] <= limit
    with pytest.raises(ModelError, match="num_blocks: 1000000000 blocks"):
        make_runner(model_dir, num_blocks=10**9)


def test_cuda_without_cuda(
    make_llama: MakeLlama, make_runner: MakeRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    model_dir, _ = make_llama()
    with pytest.raises(DeviceError, match="device: cuda"):
        make_runner(model_dir, device="cuda")


def test_triton_on_a_cpu(
    make_llama: MakeLlama, make_runner: MakeRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    model_dir, _ = make_llama()
    with pytest.raises(DeviceError, match="kernels: triton was asked for, but "):
        make_runner(model_dir, device="cpu", kernels="triton")


def test_a_model_that_is_too_wide_for_the_kernels(
    make_llama: MakeLlama, make_runner: MakeRunner
) -> None:
    model_dir, _ = make_llama(head_dim=514)
    with pytest.raises(DeviceError, match="head_dim is 514, and its kernels take 512 at most"):
        make_runner(model_dir, kernels="triton")
    assert make_runner(model_dir, kernels="auto").kernels == "torch"


def test_triton_on_a_gpu_that_is_too_old(
    make_llama: MakeLlama, make_runner: MakeRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "Turing")
    model_dir, _ = make_llama()
    with pytest.raises(DeviceError, match=r"Turing has compute capability 7\.5, 8\.0 is needed"):
        make_runner(model_dir, device="cuda", kernels="triton")


def test_a_kernel_that_is_too_large_for_a_gpu() -> None:
    """As Triton says it of one that is loaded, in words that help; other errors stay what they
    are."""
    from triton.runtime import errors

    cpu = torch.device("cpu")
    said = "in float32, one takes 131072 of shared memory, and the device has 101376; set dtype to"
    with pytest.raises(DeviceError, match=said), kernels_fit(cpu, torch.float32):
        raise errors.OutOfResources(131072, 101376, "shared memory")
    with pytest.raises(DeviceError, match="has 101376; set kernels to torch"):
        with kernels_fit(cpu, torch.bfloat16):
            raise errors.OutOfResources(131072, 101376, "shared memory")
    with pytest.raises(ZeroDivisionError), kernels_fit(cpu, torch.float32):
        raise ZeroDivisionError


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (BatchRow([], 0, [[0]]), "row a token"),
        (BatchRow([1] * 17, 0, [[0]]), "shorter than its row's context"),
        (BatchRow([1] * 513, 0, [list(range(40))]), "exceeds max_model_len"),
        (BatchRow([1], 0, [[128]]), "does not exist"),
        (BatchRow([1], 0, [[-1]]), "does not exist"),
        (BatchRow([1], 0, [[0], [0]]), "1 block tables"),
    ],
)
def test_rows_that_cannot_be_computed(
    row: BatchRow, message: str, make_llama: MakeLlama, make_runner: MakeRunner
) -> None:
    model_dir, _ = make_llama()
    with pytest.raises(ValueError, match=message):
        make_runner(model_dir).forward(Batch([row]))


def test_the_plain_loop_stops_where_it_should(
    make_llama: MakeLlama, make_runner: MakeRunner
) -> None:
    model_dir, _ = make_llama()
    loop = PlainLoop(make_runner(model_dir))
    prompt = [5, 6, 7]
    [free] = loop.generate([prompt], [SamplingParams(temperature=0, max_tokens=20)])
    assert len(free) == 20
    stop = free[4]
    params = SamplingParams(temperature=0, max_tokens=20, stop_token_ids=frozenset({stop}))
    [stopped] = loop.generate([prompt], [params])
    assert stopped == free[: free.index(stop) + 1]
    with pytest.raises(ValueError, match="blocks needed"):
        loop.generate([prompt], [SamplingParams(max_tokens=10**6)])


def test_float16_is_computed(make_llama: MakeLlama, make_runner: MakeRunner) -> None:
    """Also on a CPU that has no packed products of it."""
    model_dir, _ = make_llama(std=0.1)
    row = BatchRow(list(range(3, 40)), 0, [[0, 1, 2]], num_logits=37)
    exact = make_runner(model_dir, dtype="float32").logits(Batch([row]))
    near = make_runner(model_dir, dtype="float16").logits(Batch([row]))
    assert (near - exact).abs().max() <= 1e-2 * exact.abs().max()
