"""What of a role's lines is held back, and until when."""

from __future__ import annotations

import asyncio

import pytest

from baton.services.launcher import role_log
from baton.services.launcher.role_log import RoleLog

LAST_WORD = "baton worker: model.safetensors: truncated"


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(role_log, "_HOLD_S", 0.0)
    return []


@pytest.fixture
def log(said: list[str]) -> RoleLog:
    return RoleLog("p0", said.append)


async def held_back_no_longer() -> None:
    await asyncio.sleep(0.01)


async def test_a_last_word_waits_for_the_end_of_the_role(log: RoleLog, said: list[str]) -> None:
    log.write("loading")
    log.write(LAST_WORD)
    await held_back_no_longer()
    assert said == ["[p0] loading"]
    assert log.take_last_line() == LAST_WORD
    log.release()
    assert said == ["[p0] loading"], "the launcher says it"


async def test_a_last_word_of_a_role_that_is_started_again_is_said(
    log: RoleLog, said: list[str]
) -> None:
    log.write(LAST_WORD)
    await held_back_no_longer()
    log.release()
    assert said == [f"[p0] {LAST_WORD}"]


async def test_what_is_said_behind_it_shows_that_it_was_not_the_last(
    log: RoleLog, said: list[str]
) -> None:
    log.write(LAST_WORD)
    await held_back_no_longer()
    log.write("and on")
    await held_back_no_longer()
    assert said == [f"[p0] {LAST_WORD}", "[p0] and on"]
