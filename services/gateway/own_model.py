"""What this gateway's own files say of its model: the digest over weights that it never loads."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from pathlib import Path

from baton.shared.directory.workers import WorkerRecord
from baton.shared.engine.model_digest import (
    files_stamp,
    identify_dummy,
    identify_model,
    weight_paths,
)
from baton.shared.model_files.fields import ModelError
from baton.shared.telemetry import log_event

logger = logging.getLogger(__name__)


class Interrupted(Exception):
    """The process is to stop."""


async def own_digest(
    model_dir: Path, load_format: str, workers: Sequence[WorkerRecord], stop: asyncio.Event
) -> str | None:
    """None without weights, which need not be there.

    Gigabytes are read only where no worker of this host has read the same files: `workers`.

    Raises Interrupted once `stop` is set.
    """
    if load_format == "dummy":
        return identify_dummy(model_dir).digest

    def progress(text: str) -> None:
        if stop.is_set():
            raise Interrupted
        log_event(logger, logging.INFO, text)

    try:
        files = weight_paths(model_dir)
    except ModelError as error:
        log_event(logger, logging.INFO, "no weights here to compare", message=error)
        return None
    try:
        stamp = files_stamp(model_dir, files)
        for worker in workers:
            if worker.model.files_stamp == stamp:
                return worker.capability.model_digest
        return (await asyncio.to_thread(identify_model, model_dir, files, progress)).digest
    except ModelError as error:
        log_event(logger, logging.WARNING, "the weights can't be compared", message=error)
        return None
