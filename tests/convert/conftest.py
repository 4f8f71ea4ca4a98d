"""Fixtures that the converter's tests share."""

from __future__ import annotations

from pathlib import Path

import pytest
from convert_tools import fresh_checkpoint


@pytest.fixture
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A checkpoint with the module's `SPEC`."""
    return fresh_checkpoint(tmp_path / "model", request.module.SPEC)


@pytest.fixture
def single(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The same checkpoint with all tensors in model.safetensors."""
    return fresh_checkpoint(tmp_path / "single", request.module.SPEC, shards=1)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An empty folder for converted files."""
    (tmp_path / "out").mkdir()
    return tmp_path / "out"
