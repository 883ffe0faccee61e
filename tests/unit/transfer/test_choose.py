from __future__ import annotations

import itertools

import pytest

from baton.shared.transfer.choose import Choice, TransportUnavailable, choose_transport

BROKEN = "NIXL is not installed"


def choose(
    role: str, device: str, transport: str, has_cuda: bool, problem: str | None = None
) -> Choice:
    return choose_transport(
        role=role,
        device=device,
        transport=transport,
        has_cuda=has_cuda,
        why_no_nixl=lambda device: problem,
    )


@pytest.mark.parametrize("role", ["prefill", "decode", "both"])
def test_cpu_pools_take_shm_unless_told_otherwise(role: str) -> None:
    for device, has_cuda in (("cpu", False), ("cpu", True), ("auto", False)):
        for transport in ("auto", "shm"):
            choice = choose_transport(
                role=role,
                device=device,
                transport=transport,
                has_cuda=has_cuda,
                why_no_nixl=lambda device: pytest.fail("nobody wants it"),
            )
            assert choice == Choice("cpu", "shm")
        assert choose(role, device, "nixl", has_cuda) == Choice("cpu", "nixl")


@pytest.mark.parametrize("role", ["prefill", "decode", "both"])
@pytest.mark.parametrize("device", ["auto", "cuda"])
@pytest.mark.parametrize("transport", ["auto", "nixl"])
def test_gpu_pools_take_nixl(role: str, device: str, transport: str) -> None:
    assert choose(role, device, transport, True) == Choice("cuda", "nixl")


@pytest.mark.parametrize("device", ["auto", "cuda"])
@pytest.mark.parametrize(("transport", "why"), [("auto", BROKEN), ("shm", "CPU pools only")])
def test_a_gpu_without_transport_serves_by_itself(device: str, transport: str, why: str) -> None:
    choice = choose("both", device, transport, True, BROKEN)
    assert (choice.device, choice.transport) == ("cuda", "shm")
    assert why in (choice.warning or "")


@pytest.mark.parametrize("role", ["prefill", "decode"])
@pytest.mark.parametrize(("transport", "why"), [("auto", BROKEN), ("shm", "CPU pools only")])
def test_who_hands_over_goes_where_it_can(role: str, transport: str, why: str) -> None:
    choice = choose(role, "auto", transport, True, BROKEN)
    assert (choice.device, choice.transport) == ("cpu", "shm")
    assert why in (choice.warning or "")
    with pytest.raises(TransportUnavailable, match=f"--device cuda.*--role {role}.*{why}"):
        choose(role, "cuda", transport, True, BROKEN)


def test_what_was_named_comes_or_fails() -> None:
    names = itertools.product(["prefill", "both"], ["auto", "cpu", "cuda"], [True, False])
    for role, device, has_cuda in names:
        with pytest.raises(TransportUnavailable, match=f"^--transport nixl: {BROKEN}$"):
            choose(role, device, "nixl", has_cuda, BROKEN)


def test_cuda_by_name_is_not_second_guessed() -> None:
    """That there is none is for the engine to say; NIXL, which would say more, is not asked."""
    assert choose("both", "cuda", "auto", False, BROKEN) == Choice("cuda", "shm")
