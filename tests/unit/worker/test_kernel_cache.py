from __future__ import annotations

import os
from pathlib import Path

import pytest

from baton.services.worker.process import keep_kernels, parse_args
from baton.shared.model_files.fields import ModelError


def test_compiled_kernels_stay_in_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", "/somewhere")
    keep_kernels(parse_args(["--role", "both", "--model", "m"]).kernel_cache_dir)
    assert os.environ["TRITON_CACHE_DIR"] == "/somewhere"
    monkeypatch.setenv("BATON_KERNEL_CACHE_DIR", str(tmp_path / "new" / "kernels"))
    keep_kernels(parse_args(["--role", "both", "--model", "m"]).kernel_cache_dir)
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "new" / "kernels")
    assert (tmp_path / "new" / "kernels").is_dir()


def test_a_folder_that_cannot_be_one(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="kernel_cache_dir: .*file"):
        keep_kernels(tmp_path / "file")
