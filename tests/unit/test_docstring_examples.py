"""Examples in docstrings do what stands below them, and every public function has one.

`np` and `torch` are taken as imported; what the package exports is imported in its example, as a user would.
"""

from __future__ import annotations

import doctest
import importlib
import inspect
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import patterning_dist
from patterning_dist.data.weights import write_sample_weights
from patterning_dist.storage.run import RunDirectory

ROOT = Path(__file__).parents[2]
WITHOUT = {"run_stages": "starts Ray"}
MODULES = [
    ".".join(file.relative_to(ROOT).with_suffix("").parts)
    for file in sorted((ROOT / "patterning_dist").rglob("*.py"))
    if ">>> " in file.read_text(encoding="utf-8")
]


def examples(module: str) -> Iterator[doctest.DocTest]:
    found = importlib.import_module(module)
    given: dict[str, Any] = {"np": np, "torch": torch}
    for test in doctest.DocTestFinder(exclude_empty=True).find(found, globs=given):
        public = test.name.removeprefix(f"{module}.").partition(".")[0] in patterning_dist.__all__
        test.globs = given.copy() if public else vars(found) | given
        yield test


def test_there_are_many() -> None:
    assert sum(1 for module in MODULES for test in examples(module) if test.examples) >= 40


@pytest.mark.parametrize("module", MODULES)
def test_examples_say_what_comes_out(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder with what two of them read: an experiment, and a run whose weights are solved for."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    run = RunDirectory("runs/quickstart")
    with run.stage("solve", "as it is") as outputs:
        outputs.append(run.path / "weights")
        outputs[0].mkdir()
        write_sample_weights(outputs[0] / "plus.parquet", np.arange(3), None, np.array([1.5, 1.0, 0.5]), {})
    for test in examples(module):
        said: list[str] = []
        result = doctest.DocTestRunner(verbose=False).run(test, out=said.append)
        assert not result.failed, "".join(said)


def test_every_public_function_has_one() -> None:
    public = {name: getattr(patterning_dist, name) for name in patterning_dist.__all__ if name != "__version__"}
    missing = [name for name, value in public.items() if inspect.isfunction(value) and ">>> " not in value.__doc__]
    assert missing == list(WITHOUT), "give them an example"
