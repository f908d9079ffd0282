"""The public names: each is the object its own module has, and importing the package loads nothing heavy."""

from __future__ import annotations

import importlib
import importlib.metadata
import subprocess
import sys

import pytest

import patterning_dist


def test_every_name_is_the_one_of_its_module() -> None:
    for name, module in patterning_dist._MODULES.items():
        assert getattr(patterning_dist, name) is getattr(importlib.import_module(f"patterning_dist.{module}"), name)
    assert patterning_dist.__version__ == importlib.metadata.version("patterning-dist")
    assert set(patterning_dist.__all__) <= set(dir(patterning_dist))


def test_names_that_are_not_there() -> None:
    with pytest.raises(AttributeError, match="module 'patterning_dist' has no attribute 'suceptibility'"):
        _ = patterning_dist.suceptibility


def loaded_by(statement: str) -> set[str]:
    """Which of the heavy packages a fresh interpreter has loaded after ``statement``."""
    code = f"{statement}; import sys; print(*{{'numpy', 'torch', 'ray', 'deepspeed'}} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(result.stdout.split())


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert loaded_by("import patterning_dist") == set()
    assert loaded_by("from patterning_dist import load_config") <= {"numpy"}
    numpy_only = "from patterning_dist import CoMoments, susceptibility, solve_weights, cross_fitted_response"
    assert loaded_by(numpy_only) == {"numpy"}
