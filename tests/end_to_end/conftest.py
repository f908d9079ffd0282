"""What tests of the whole loop share."""

from __future__ import annotations

from pathlib import Path

import pytest
from shared_ray import joined
from whole_run import invoke


@pytest.fixture(scope="session")
def finished(tiny_run: Path, ray_address: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run to which nothing happened."""
    directory = tmp_path_factory.mktemp("pipeline") / "run"
    with joined(ray_address):
        result = invoke("run", tiny_run / "config.yaml", directory)
    assert result.exit_code == 0, result.output
    return directory
