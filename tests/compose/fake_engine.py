"""An engine on paper: `docker` and `compose`, by the state in the file FAKE_ENGINE.

The file holds a list of containers: id, service, restarts_before `up` and restarts after it, ended
(when it last did, likewise), status, code, oom, health, labels, env, image, log. Each call becomes
a line of FAKE_ENGINE.calls, with what compose.yaml would have read from the environment.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

SEEN = ("MODEL", "MODEL_LINKS", "IMAGE", "BATON_TOKEN_BUDGET", "BATON_ROLE")


def main() -> int:
    path = Path(os.environ["FAKE_ENGINE"])
    program, arguments = Path(sys.argv[0]).name, sys.argv[1:]
    environment = {name: os.environ[name] for name in SEEN if name in os.environ}
    call = {"program": program, "arguments": arguments, "environment": environment}
    # Several run at once.
    with Path(f"{path}.calls").open("a") as calls:
        calls.write(json.dumps(call) + "\n")
    out = (compose if program == "compose" else docker)(arguments, json.loads(path.read_text()))
    sys.stdout.write(out)
    return 0


def compose(arguments: list[str], containers: list[dict[str, Any]]) -> str:
    while arguments[:1] == ["-f"]:
        arguments = arguments[2:]
    if arguments[0] == "ps":
        services = [word for word in arguments[1:] if not word.startswith("-")]
        return "".join(
            f"{each['id']}\n" for each in containers if not services or each["service"] in services
        )
    return "127.0.0.1:7000\n" if arguments[0] == "port" else ""


def docker(arguments: list[str], containers: list[dict[str, Any]]) -> str:
    by_id = {each["id"]: each for each in containers}
    if arguments[0] == "logs":
        return str(by_id[arguments[-1]]["log"])
    if arguments[0] != "inspect":
        return ""
    _, _, form, *ids = arguments
    return "".join(f"{rendered(form, by_id[each])}\n" for each in ids)


def is_up() -> bool:
    return '"up"' in Path(f"{os.environ['FAKE_ENGINE']}.calls").read_text()


def rendered(form: str, container: dict[str, Any]) -> str:
    if "range .Config.Env" in form:
        return "".join(f"{line}\n" for line in container["env"])
    values = {
        "{{.Id}}": container["id"],
        "{{.RestartCount}}": container["restarts" if is_up() else "restarts_before"],
        "{{.State.FinishedAt}}": container["ended" if is_up() else "ended_before"],
        "{{.State.Status}}": container["status"],
        "{{.State.ExitCode}}": container["code"],
        "{{.State.OOMKilled}}": str(container["oom"]).lower(),
        "{{.State.Health.Status}}": container["health"],
        "{{.Config.Image}}": container["image"],
        '{{index .Config.Labels "com.docker.compose.service"}}': container["service"],
    }
    for name in ("baton.model", "baton.model-links"):
        values[f'{{{{index .Config.Labels "{name}"}}}}'] = container["labels"].get(name, "")
    for field, value in values.items():
        form = form.replace(field, str(value))
    assert "{{" not in form, form
    return form


if __name__ == "__main__":
    sys.exit(main())
