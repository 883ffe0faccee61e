"""Which worker holds which prefix: a hint, for the worker itself looks again when a prompt comes.

The hash at every multiple of `PREFIX_STRIDE_TOKENS` is listed, and covers all tokens before it. A
holder that does not publish a hash again is dropped after `PREFIX_TTL_S`.
"""

from __future__ import annotations

from collections.abc import Sequence

from baton.shared.directory.connection import Command, Connection, Script
from baton.shared.directory.keys import PREFIX_TTL_S, Keys, milliseconds

# Bounds the time that one script keeps others from the server.
_KEYS_A_SCRIPT = 64
_SCRIPTS_A_ROUND_TRIP = 32

# KEYS  up to 64 prefixes
# ARGV  1 worker id, 2 incarnation, 3 TTL in ms
# returns 1
ADD_HOLDER = Script("""
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local holder = string.format('%.0f:%s', now + ARGV[3], ARGV[2])
for _, key in ipairs(KEYS) do
  local holders = redis.call('HGETALL', key)
  for i = 1, #holders, 2 do
    local expires_at = tonumber(string.match(holders[i + 1], '^%d+'))
    if not expires_at or expires_at <= now then redis.call('HDEL', key, holders[i]) end
  end
  redis.call('HSET', key, ARGV[1], holder)
  redis.call('PEXPIRE', key, ARGV[3])
end
return 1
""")

# KEYS  up to 64 prefixes
# ARGV  1 worker id, 2 incarnation
# returns how many prefixes that incarnation no longer holds
REMOVE_HOLDER = Script("""
local removed = 0
for _, key in ipairs(KEYS) do
  local holder = redis.call('HGET', key, ARGV[1])
  if holder and string.match(holder, '^%d+:(.*)$') == ARGV[2] then
    removed = removed + redis.call('HDEL', key, ARGV[1])
  end
end
return removed
""")

# KEYS  up to 64 prefixes
# ARGV  none
# returns for each prefix its holders: worker id, incarnation, worker id, ...
LOOKUP = Script("""
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local answer = {}
for i, key in ipairs(KEYS) do
  local holders = redis.call('HGETALL', key)
  local live = {}
  for j = 1, #holders, 2 do
    local expires_at, incarnation = string.match(holders[j + 1], '^(%d+):(.*)$')
    if expires_at and tonumber(expires_at) > now then
      live[#live + 1] = holders[j]
      live[#live + 1] = incarnation
    end
  end
  answer[i] = live
end
return answer
""")

PREFIX_SCRIPTS = (ADD_HOLDER, REMOVE_HOLDER, LOOKUP)


class PrefixIndex:
    def __init__(self, connection: Connection, keys: Keys) -> None:
        self._connection = connection
        self._keys = keys

    async def publish(
        self,
        worker_id: str,
        incarnation: str,
        *,
        added: Sequence[bytes],
        removed: Sequence[bytes],
    ) -> None:
        """Lists `added`, what a worker holds now or still, and removes what it no longer holds.

        A hash that is in both stays listed. Only what this incarnation has listed is removed. The
        first round trip that fails ends it with `DirectoryUnavailable`; then publish again later.
        """
        commands = [
            REMOVE_HOLDER.call(keys, worker_id, incarnation) for keys in self._chunks(removed)
        ]
        commands += [
            ADD_HOLDER.call(keys, worker_id, incarnation, milliseconds(PREFIX_TTL_S))
            for keys in self._chunks(added)
        ]
        for start in range(0, len(commands), _SCRIPTS_A_ROUND_TRIP):
            await self._connection.execute(commands[start : start + _SCRIPTS_A_ROUND_TRIP])

    async def lookup(self, hashes: Sequence[bytes]) -> list[dict[str, str]]:
        """For each hash, worker id → incarnation of those who hold it; one round trip."""
        commands: list[Command] = [LOOKUP.call(keys) for keys in self._chunks(hashes)]
        replies = await self._connection.execute(commands)
        return [
            dict(zip(live[::2], live[1::2], strict=True)) for reply in replies for live in reply
        ]

    async def size(self) -> int:
        """How many hashes are listed. Walks all keys of the server: for operators."""
        return sum([len(page) async for page in self._connection.scan(self._keys.any_prefix)])

    def _chunks(self, hashes: Sequence[bytes]) -> list[list[str]]:
        keys = [self._keys.prefix(block_hash) for block_hash in hashes]
        return [keys[i : i + _KEYS_A_SCRIPT] for i in range(0, len(keys), _KEYS_A_SCRIPT)]
