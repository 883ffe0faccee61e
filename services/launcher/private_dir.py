"""A directory in shared memory that belongs to one launcher, for its workers' pools.

The launcher keeps a lock on the directory for as long as it lives; a directory that can be locked
is therefore a dead launcher's, and the next launcher removes it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PREFIX = "baton-up-"
_SHARED_MEMORY = Path("/dev/shm")


def shared_memory_root() -> Path:
    """/dev/shm where it can be written, else the directory for temporary files."""
    if _SHARED_MEMORY.is_dir() and os.access(_SHARED_MEMORY, os.W_OK | os.X_OK):
        return _SHARED_MEMORY
    return Path(tempfile.gettempdir())


@contextmanager
def private_dir(root: Path) -> Iterator[Path]:
    """Sweeps `root`, then yields a new locked directory in it, of mode 0700, and removes it at the
    end."""
    sweep_stale(root)
    # Under a name that no sweep looks at, so that it is not found before it is locked.
    unlocked = Path(tempfile.mkdtemp(prefix=f".{_PREFIX}", dir=root))
    lock = _lock(unlocked)
    path = unlocked.rename(root / unlocked.name.removeprefix("."))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def sweep_stale(root: Path) -> list[Path]:
    """Removes this user's directories of dead launchers; returns them."""
    removed = []
    for path in sorted(root.glob(f"{_PREFIX}*")):
        try:
            if path.is_symlink() or path.stat().st_uid != os.getuid():
                continue
            lock = _lock(path)
        except OSError:
            continue
        if lock is None:
            continue
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)
        removed.append(path)
    return removed


def _lock(path: Path) -> int | None:
    """A descriptor that holds the lock until it is closed; None when somebody else holds it."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor
