"""A stored result of a task is believed only if it is what was written, for the inputs that it was written for."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from patterning_dist.errors import PatterningError
from patterning_dist.progress import Progress
from patterning_dist.runtime.tasks import Task, _read, _write, run_tasks
from patterning_dist.storage.run import RunDirectory

RESULT: dict[str, Any] = {
    "scores": np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3),
    "empty": np.zeros((0, 3)),
    "num_iterations": 7,
    "relative_residual": 0.1 + 0.2,
    "failure": "",
}


def never(*_: Any) -> Any:
    raise AssertionError("the result is there")


def task(fingerprint: str = "a") -> Task:
    return Task("part 1", "scores/part-1.npz", fingerprint, never)


@pytest.fixture
def shown() -> Progress:
    return Progress(Console(file=io.StringIO(), width=300))


def said(shown: Progress) -> str:
    return shown.console.file.getvalue()


def assert_is_result(found: dict[str, Any]) -> None:
    assert found.keys() == RESULT.keys()
    for name, value in RESULT.items():
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(found[name], value)
            assert found[name].dtype == value.dtype and found[name].shape == value.shape
        else:
            assert found[name] == value


def test_what_is_stored_is_found_without_workers(tmp_path: Path, shown: Progress) -> None:
    run = RunDirectory(tmp_path)
    _write(tmp_path / task().file, RESULT, "a")
    (found,) = run_tasks([task()], run, never, shown, "scoring", what="parts", timeout=300)
    assert_is_result(found)
    assert said(shown) == "1 of 1 parts were done before\n"


def test_results_are_read_when_they_are_asked_for(tmp_path: Path, shown: Progress) -> None:
    tasks = [Task(f"part {n}", f"scores/part-{n}.npz", "a", never) for n in range(3)]
    for each in tasks:
        _write(tmp_path / each.file, RESULT, "a")
    found = run_tasks(tasks, RunDirectory(tmp_path), never, shown, "scoring", what="parts", timeout=300)
    assert len(found) == 3
    assert found[0] is not found[0]  # nothing is kept
    for result in (*found, *found[1:], found[-1]):
        assert_is_result(result)
    (tmp_path / tasks[1].file).unlink()
    with pytest.raises(PatterningError, match=r"part-1\.npz: is gone or damaged since it was written; run the same"):
        list(found)


def test_a_result_of_other_inputs_or_none_is_not_used(tmp_path: Path, shown: Progress) -> None:
    file = tmp_path / "part.npz"
    assert _read(file, task(), shown) is None
    _write(file, RESULT, "a")
    assert _read(file, task("b"), shown) is None
    assert said(shown) == ""


def test_no_flipped_bit_and_no_torn_end_changes_a_result(tmp_path: Path, shown: Progress) -> None:
    """Bits that nobody reads, such as dates in the archive, may flip."""
    file = tmp_path / "part.npz"
    _write(file, RESULT, "a")
    whole, refused = file.read_bytes(), 0
    for place in range(len(whole)):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        found = _read(file, task(), shown)
        if found is None:
            refused += 1
        else:
            assert_is_result(found)
    assert refused > 0.5 * len(whole)
    assert said(shown).count("part.npz is damaged: part 1 is computed again\n") == refused
    for length in range(0, len(whole), 7):
        file.write_bytes(whole[:length])
        assert _read(file, task(), shown) is None
