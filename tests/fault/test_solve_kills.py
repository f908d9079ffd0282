"""A driver that is killed while the pool is scored: the next one computes what is missing, to the same bits."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
from tiny_run import copy_run, finish_inputs, tiny_config

from patterning_dist.driver import run_stages
from patterning_dist.runtime import pool, tasks
from patterning_dist.runtime.spares import SPARES

pytestmark = [pytest.mark.usefixtures("local_ray"), pytest.mark.slow, pytest.mark.timeout(300)]

SHARD = 24  # sequences: two dozen parts of the pool
# ``patterning solve`` that is killed as the kernel does, right before it stores one result.
DRIVER = f"""
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from tiny_run import tiny_config
from patterning_dist.driver import run_stages
from patterning_dist.runtime import pool, tasks
write = tasks.write_npz
def deadly(path, arrays):
    if path.name == sys.argv[2]:
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, arrays)
tasks.write_npz, pool.SHARD_SAMPLES = deadly, {SHARD}
if __name__ == "__main__":
    run_stages(tiny_config(Path(sys.argv[1])), ["solve"], Path(sys.argv[1]))
"""


@pytest.fixture(scope="module")
def sampled(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> Path:
    run = copy_run(tiny_run, tmp_path_factory.mktemp("sampled") / "run")
    config = tiny_config(run.path)
    finish_inputs(config, run)
    run_stages(config, ["sample"], run.path)
    return run.path


@pytest.fixture(scope="module")
def undisturbed(sampled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return solve(sampled, tmp_path_factory.mktemp("undisturbed") / "run")[0]


def solve(source: Path, directory: Path, *overrides: str) -> tuple[Path, set[str]]:
    """Solve in this process, in a copy if there is no such directory; also the names of the results it stored."""
    if not directory.exists():
        shutil.copytree(source, directory)
    stored: set[str] = set()
    with pytest.MonkeyPatch.context() as patch:
        write = tasks.write_npz
        patch.setattr(tasks, "write_npz", lambda path, arrays: (stored.add(path.name), write(path, arrays)))
        patch.setattr(pool, "SHARD_SAMPLES", SHARD)
        run_stages(tiny_config(directory, *overrides), ["solve"], directory)
    return directory, stored


def scores(directory: Path) -> dict[str, int]:
    return {file.name: file.stat().st_mtime_ns for file in (directory / "scores").rglob("*.npz")}


def assert_same_weights(directory: Path, expected: Path) -> None:
    for arm in ("plus", "minus", "permuted"):
        tables = [pq.read_table(folder / "weights" / f"{arm}.parquet") for folder in (directory, expected)]
        assert tables[0].equals(tables[1])
    pools = [next((folder / "response").glob("*pool*.parquet")) for folder in (directory, expected)]
    assert pools[0].read_bytes() == pools[1].read_bytes()


@pytest.mark.extended
@pytest.mark.parametrize("last", ["direction-2.npz", "pool-9.npz"])
def test_a_killed_driver_is_followed_by_one_that_goes_on(
    sampled: Path, undisturbed: Path, tmp_path: Path, last: str
) -> None:
    directory = tmp_path / "run"
    shutil.copytree(sampled, directory)
    SPARES.dismiss()  # they hold the CPUs that the other driver waits for
    environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    killed = subprocess.run(
        [sys.executable, "-c", DRIVER, str(directory), last], env=environment, capture_output=True, timeout=200
    )
    assert killed.returncode == -9, killed.stderr.decode()[-2000:]
    kept, everything = scores(directory), scores(undisturbed).keys()
    assert 0 < len(kept) < len(everything) and last not in kept
    assert not (directory / "weights").exists()

    _, stored = solve(sampled, directory)
    assert stored == everything - kept.keys()
    assert kept.items() <= scores(directory).items()
    assert_same_weights(directory, undisturbed)


def test_other_weights_are_solved_for_without_scoring_again_but_for_what_is_damaged(
    sampled: Path, undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = shutil.copytree(undisturbed, tmp_path / "run")
    damaged = directory / "scores" / "everything" / "pool-3.npz"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 4
    damaged.write_bytes(content)
    _, stored = solve(sampled, directory, "solve.effective_sample_share=0.8")
    assert stored == {"pool-3.npz"}
    assert "scores/everything/pool-3.npz is damaged: everything/pool-3 is computed again" in capsys.readouterr().out
    with np.load(damaged) as now, np.load(undisturbed / "scores" / "everything" / "pool-3.npz") as before:
        np.testing.assert_array_equal(now["scores"], before["scores"])

    assert solve(sampled, directory, "solve.effective_sample_share=0.9")[1] == set()
