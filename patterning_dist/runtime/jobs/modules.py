"""The user's own modules that an experiment names functions of, for a job to take along."""

from __future__ import annotations

import ast
import importlib.machinery
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from patterning_dist.config import Root
from patterning_dist.config.section import Section
from patterning_dist.errors import PatterningError
from patterning_dist.runtime.jobs.inputs import visible_files

Key = tuple[str | int, ...]
# Keys whose values are functions or classes, or names of something else.
_KEYS = {"experiment", "path", "build", "initialise", "per_sample_loss", "evaluate", "load", "open"}
_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def own_modules(experiment: Path, config: Root) -> dict[str, Path]:
    """Those in the current folder, and what they import from there; a package counts as a whole.

    What is installed as well is left out: it goes before the current folder, in a job as in a run on this machine.

    Args:
        experiment: file of the experiment, for messages.
        config: the experiment.

    Returns:
        Name below the current folder -> file.

    Raises:
        PatterningError: a module is neither there nor installed, or is not valid Python.
    """
    here, waiting, packed = Path.cwd(), [], set()
    files: dict[str, Path] = {}
    for key, path in leaves(config):
        if not (key and key[-1] in _KEYS and isinstance(path, str) and _FUNCTION.fullmatch(path)):
            continue
        name = path.partition(":")[0].partition(".")[0]
        if not _is_here(name, here) and not _is_installed(name, here):
            where = ".".join(map(str, key))
            raise PatterningError(
                f"{experiment}: {where}: module {name} is neither in {here} nor installed; submit from the folder that "
                "it is in"
            )
        waiting.append(name)
    while waiting:
        name = waiting.pop()
        if name in packed or not _is_here(name, here) or _is_installed(name, here):
            continue
        packed.add(name)
        folder = here / name
        found = python_package(folder) if folder.is_dir() else {f"{name}.py": here / f"{name}.py"}
        files |= found
        for file in found.values():
            if file.suffix == ".py":
                waiting += _imports(experiment, file)
    return files


def python_package(folder: Path) -> dict[str, Path]:
    """All files of a package that may be sent and are not compiled: name from the package's own folder on -> file."""
    names = {file.relative_to(folder.parent).as_posix(): file for file in visible_files(folder)[0]}
    return {name: file for name, file in names.items() if "__pycache__" not in name}


def leaves(value: Any, key: Key = ()) -> Iterator[tuple[Key, Any]]:
    """Key and value of everything in an experiment that is neither a section nor a list or mapping."""
    if not isinstance(value, Section | list | dict):
        yield key, value
        return
    entries = enumerate(value) if isinstance(value, list) else value.items() if isinstance(value, dict) else value
    for name, entry in entries:
        yield from leaves(entry, (*key, name))


def _is_here(name: str, here: Path) -> bool:
    return (here / name).is_dir() or (here / f"{name}.py").is_file()


def _is_installed(name: str, here: Path) -> bool:
    if name in sys.stdlib_module_names or name == "patterning_dist":  # this package is packed anyway
        return True
    elsewhere = [path for path in sys.path if path and Path(path).resolve() != here.resolve()]
    return importlib.machinery.PathFinder.find_spec(name, elsewhere) is not None


def _imports(experiment: Path, file: Path) -> Iterator[str]:
    """Top-level names of all that a module imports by absolute name."""
    try:
        tree = ast.parse(file.read_bytes(), str(file))
    except (SyntaxError, ValueError) as error:
        raise PatterningError(f"{experiment}: {file}: is not valid Python ({error}); correct it") from None
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.partition(".")[0]
