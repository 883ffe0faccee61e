"""`baton up` with fake roles and the real embedded Valkey: `fake_stack JOURNAL`."""

from __future__ import annotations

import sys
from pathlib import Path
from unittest.mock import patch

from baton.services.launcher import stack, up
from baton.services.launcher.roles import GATEWAY, RoleCounts, RoleSpec, StackConfig

_ROLE = Path(__file__).with_name("fake_role.py")


def main() -> int:
    journal = sys.argv[1]

    def workers(config: StackConfig, redis_url: str, shm_dir: Path) -> list[RoleSpec]:
        names = [f"{role}-{index}" for role, count in config.counts for index in range(count)]
        return [RoleSpec(name, (str(_ROLE), "worker", name, journal)) for name in names]

    def gateways(
        config: StackConfig, redis_url: str, port: int, http_port: int | None
    ) -> list[RoleSpec]:
        return [RoleSpec(GATEWAY, (str(_ROLE), "gateway", GATEWAY, journal, str(port)))]

    config = StackConfig(model_dir=Path(), counts=RoleCounts(prefill=1, decode=1, both=0), port=0)
    with (
        patch.multiple(stack, worker_specs=workers, gateway_specs=gateways),
        patch.object(up, "check"),
    ):
        return up.run_up(config)


if __name__ == "__main__":
    sys.exit(main())
