"""What a process of each kind does not import, for it would take seconds of every start."""

from __future__ import annotations

import subprocess
import sys

import pytest

SLOW = {"torch", "transformers", "deepspeed", "arviz_stats", "xarray", "pandas", "scipy.special", "scipy.stats"}


@pytest.mark.parametrize(
    ("modules", "allowed"),
    [
        (["patterning_dist.runtime.boards"], set()),
        (["patterning_dist.runtime.chains.aggregator", "patterning_dist.measure.analysis"], set()),
        (["patterning_dist.runtime.model_workers", "patterning_dist.runtime.groups"], {"torch"}),
    ],
    ids=["board", "aggregator shard", "worker"],
)
def test_what_starts_often_starts_soon(modules: list[str], allowed: set[str]) -> None:
    code = f"import sys, {', '.join(modules)}; print(*({SLOW!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) <= allowed
