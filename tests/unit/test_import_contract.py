"""The plan of the house, as imports: rooms import downwards, nobody imports an experiment, Ray stays in `runtime/`.

Read from the source, so that imports within functions count too; those under TYPE_CHECKING do not.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = "patterning_dist"
# Upwards; rooms of one level do not import each other.
LEVELS = (
    ("__init__", "errors", "heartbeat", "live"),
    ("response", "storage", "progress", "preemption"),
    ("functions",),
    ("config", "data", "aggregation", "report"),
    ("models",),
    ("sampling",),
    ("tasks", "selftest"),
    ("training",),
    ("runtime",),
    ("measure",),
    ("stages",),
    ("experiments",),
    ("driver", "listing", "opened", "status", "command_options"),
    ("trackers",),
    ("cli",),
    ("__main__",),
)
LEVEL_OF = {room: number for number, rooms in enumerate(LEVELS) for room in rooms}
NUMPY_ONLY = {"numpy", "scipy", "arviz_stats", "sklearn"}  # of `response/`: what computes on arrays


class Import(NamedTuple):
    """One module, dotted, that a file of the package imports."""

    file: str
    module: str
    line: int

    @property
    def room(self) -> str:
        return self.file.partition("/")[0].removesuffix(".py")

    @property
    def top(self) -> str:
        """The room imported, or the package of someone else."""
        first, _, rest = self.module.partition(".")
        return (rest.partition(".")[0] or "__init__") if first == PACKAGE else first

    @property
    def inside(self) -> bool:
        return self.module.partition(".")[0] == PACKAGE

    def __repr__(self) -> str:
        return f"{PACKAGE}/{self.file}:{self.line} imports {self.module}"


def read_imports(file: str, source: str) -> Iterator[Import]:
    """All imports of a source text but those under TYPE_CHECKING."""
    waiting: list[ast.AST] = [ast.parse(source)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting += node.orelse
            continue
        if isinstance(node, ast.Import):
            yield from (Import(file, name.name, node.lineno) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{file}:{node.lineno}: relative imports are not read here"
            # `from patterning_dist import driver` takes a room, `from patterning_dist import Config` a name.
            rooms = [name.name for name in node.names if node.module == PACKAGE and name.name in LEVEL_OF]
            yield from (Import(file, ".".join([node.module, room]), node.lineno) for room in rooms)
            if len(rooms) < len(node.names):
                yield Import(file, node.module, node.lineno)
        waiting += ast.iter_child_nodes(node)


def package_imports() -> list[Import]:
    folder = ROOT / PACKAGE
    files = {file.relative_to(folder).as_posix(): file.read_text() for file in sorted(folder.rglob("*.py"))}
    return [found for file, source in files.items() for found in read_imports(file, source)]


def upwards(found: Import) -> bool:
    return found.inside and found.top != found.room and LEVEL_OF[found.top] >= LEVEL_OF[found.room]


def of_an_experiment(found: Import) -> bool:
    """Experiments are found by name; what one is (`experiments/experiment.py`) may be known."""
    if not found.inside or found.top != "experiments":
        return False
    folder, _, rest = found.file.partition("/")
    own = rest.partition("/")[0].removesuffix(".py") if folder == "experiments" else ""
    return found.module.split(".")[2:3] not in (["experiment"], [own])


def ray_outside_runtime(found: Import) -> bool:
    return found.top in ("ray", "deepspeed") and found.room != "runtime"


def more_than_numpy(found: Import) -> bool:
    """What keeps `response/` from being used on arrays alone."""
    return found.room == "response" and not found.inside and found.top not in NUMPY_ONLY | sys.stdlib_module_names


RULES = (upwards, of_an_experiment, ray_outside_runtime, more_than_numpy)


def test_every_room_has_its_level() -> None:
    rooms = {
        path.stem if path.is_file() else path.name
        for path in (ROOT / PACKAGE).iterdir()
        if path.suffix == ".py" or (path.is_dir() and list(path.rglob("*.py")))
    }
    assert rooms <= set(LEVEL_OF), "a new room: give it its level in LEVELS"


@pytest.mark.parametrize("rule", RULES)
def test_imports_keep_the_plan(rule: Callable[[Import], bool]) -> None:
    broken = [found for found in package_imports() if rule(found)]
    assert not broken, f"{rule.__name__}: {broken}"


@pytest.mark.parametrize(
    ("file", "source", "rule"),
    [
        ("models/attention.py", "from patterning_dist.sampling.chain import Chain", upwards),
        ("data/corpus.py", "def f():\n    import patterning_dist.report.page", upwards),
        ("sampling/chain.py", "from patterning_dist import driver", upwards),
        ("driver.py", "from patterning_dist.experiments.two_rules import stages", of_an_experiment),
        ("experiments/loop.py", "import patterning_dist.experiments.two_rules.study", of_an_experiment),
        ("sampling/chain.py", "try:\n    from ray.actor import Actor\nfinally: pass", ray_outside_runtime),
        ("stages/train.py", "import deepspeed.comm as comm", ray_outside_runtime),
        ("response/llc.py", "import torch", more_than_numpy),
    ],
)
def test_a_broken_rule_is_seen(file: str, source: str, rule: Callable[[Import], bool]) -> None:
    assert any(rule(found) for found in read_imports(file, source))


def test_what_is_allowed_passes() -> None:
    source = "import numpy.linalg, json\nfrom scipy.stats import t\nfrom patterning_dist.errors import PatterningError"
    assert not any(rule(found) for found in read_imports("response/llc.py", source) for rule in RULES)
    assert not any(rule(found) for found in read_imports("runtime/pool.py", "import ray") for rule in RULES)
    shared = "from patterning_dist.experiments.experiment import Stage"
    assert not any(rule(found) for found in read_imports("driver.py", shared) for rule in RULES)
    types = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import ray\nelse:\n    import torch"
    assert {found.module for found in read_imports("sampling/chain.py", types)} == {"typing", "torch"}
