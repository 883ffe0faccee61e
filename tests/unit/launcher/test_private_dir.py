from __future__ import annotations

from pathlib import Path

from baton.services.launcher.private_dir import private_dir, sweep_stale


def test_the_directory_is_private_and_gone_afterwards(tmp_path: Path) -> None:
    with private_dir(tmp_path) as path:
        assert path.parent == tmp_path
        assert path.stat().st_mode & 0o777 == 0o700
        (path / "pool.kv").write_bytes(b"x")
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_takes_dead_launchers_directories_only(tmp_path: Path) -> None:
    stale = tmp_path / "baton-up-dead"
    stale.mkdir()
    (stale / "pool.kv").write_bytes(b"x")
    foreign = tmp_path / "baton-other"
    foreign.mkdir()
    target = tmp_path / "target"
    target.mkdir()
    (tmp_path / "baton-up-link").symlink_to(target)

    with private_dir(tmp_path) as living:
        assert not stale.exists()
        assert sweep_stale(tmp_path) == []
        assert living.is_dir() and foreign.is_dir() and target.is_dir()
