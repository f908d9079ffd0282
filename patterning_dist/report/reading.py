"""The files of a run, read leniently: a missing file is None, a broken one is None and a problem to show."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from patterning_dist.report.blocks import Section

ARM_ORDER = ("base", "plus", "minus", "permuted")
COMPONENT_ORDER = ("everything", "attention", "embedding")


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def in_order(names: Any, order: tuple[str, ...]) -> list[str]:
    """Names with the known ones first, in the given order, then the others (layer.2 before layer.10).

    Names of subjects, ``checkpoint/component``, go by checkpoint first.
    """

    def rank(name: str) -> Any:
        checkpoint, _, own = name.rpartition("/")
        return _natural(checkpoint), order.index(own) if own in order else len(order), _natural(own)

    return sorted(names, key=rank)


def schema_json(table: pa.Table) -> dict[str, Any]:
    """What the table's schema metadata says under `patterning`; empty where there is none."""
    raw = (table.schema.metadata or {}).get(b"patterning")
    return json.loads(raw) if raw else {}


def column(table: pa.Table, name: str) -> np.ndarray:
    """One column as a numpy array, nulls as NaN."""
    return table.column(name).to_numpy(zero_copy_only=False)


@dataclass
class Run:
    """A run directory and what went wrong while it was read."""

    directory: Path
    problems: list[str] = field(default_factory=list)

    def _problem(self, path: str, error: Exception) -> None:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        self.problems.append(f"{path} cannot be read ({reason}); run its stage again.")

    def text(self, path: str) -> str | None:
        """A text file as it stands."""
        try:
            return (self.directory / path).read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            self._problem(path, error)
            return None

    def _json(self, path: str, kind: type) -> Any:
        text = self.text(path)
        if text is None:
            return None
        try:
            value = json.loads(text)
            if not isinstance(value, kind):
                raise ValueError(f"expected a JSON {'object' if kind is dict else 'list'}")
            return value
        except ValueError as error:
            self._problem(path, error)
            return None

    def json(self, path: str) -> dict[str, Any] | None:
        """A JSON object."""
        return self._json(path, dict)

    def json_list(self, path: str) -> list[dict[str, Any]]:
        """A JSON list of objects; empty where there is none."""
        return self._json(path, list) or []

    def table(self, path: str, columns: list[str] | None = None) -> pa.Table | None:
        """A Parquet table (memory-mapped), of a file or of a folder of files; all columns or those named."""
        full = self.directory / path
        if not full.is_file() and not any(full.glob("*.parquet")):
            return None
        try:
            table = pq.read_table(full, columns=columns, memory_map=True)
            missing = sorted(set(columns or ()) - set(table.column_names))
            if missing:
                raise ValueError(f"no column {', '.join(missing)}")
            return table
        except (OSError, ValueError, pa.ArrowException) as error:
            self._problem(path, error)
            return None

    def of_subjects(self, file: str, summary: Mapping[str, Any]) -> dict[str, str]:
        """Subject -> path of a file in its folder below sampling/; of those that a summary tells of, if there is one.

        Strengths and rounds that are asked for no longer leave their folders behind.
        """
        root, known = self.directory / "sampling", summary.get("chains")
        found = {path.parent.relative_to(root).as_posix(): path for path in root.rglob(file)}
        return self._listed({name: path for name, path in found.items() if known is None or name in known})

    def susceptibilities(self) -> dict[str, str]:
        """Subject -> path of its table of single losses; of those that were sampled without weights."""
        root, found = self.directory / "response", {}
        for path in root.rglob("susceptibility-*.parquet"):
            component = path.name.removeprefix("susceptibility-").removesuffix(".parquet")
            folder = path.parent.relative_to(root)
            if not component.endswith("-samples") and folder.parts[:1] not in (("check",), ("retrain",)):
                found[(folder / component).as_posix()] = path
        return self._listed(found)

    def _listed(self, found: dict[str, Path]) -> dict[str, str]:
        return {name: found[name].relative_to(self.directory).as_posix() for name in in_order(found, COMPONENT_ORDER)}

    @cached_property
    def config(self) -> dict[str, Any]:
        """The experiment file; empty where it cannot be read."""
        try:
            found = yaml.safe_load(self.text("config.yaml") or "")
        except yaml.YAMLError:
            found = None
        return found if isinstance(found, dict) else {}

    def leaves_out(self, *sections: str) -> bool:
        """Whether the experiment file says that one of these sections is not asked for."""
        return any(name in self.config and self.config[name] is None for name in sections)

    def excuse(self, section: Section, missing: str, absent: str = "", *sections: str) -> None:
        """Say why there is nothing to show: the experiment file leaves these sections out, or it has not been run."""
        section.absent = absent if self.leaves_out(*sections) else ""
        section.missing = "" if section.absent else missing

    def retrained(self, summary: Mapping[str, Any]) -> dict[str, dict[int, pa.Table]]:
        """Arm -> seed -> the metrics of that retraining, for those which have begun; likewise."""
        arms: dict[str, dict[int, pa.Table]] = {}
        known = summary.get("arms")
        for path in sorted((self.directory / "retrain").glob("*/seed-*/metrics.parquet")):
            arm, seed = path.parent.parent.name, path.parent.name.removeprefix("seed-")
            if not seed.isdigit() or not (known is None or int(seed) in known.get(arm, {}).get("seeds", ())):
                continue
            table = self.table(path.relative_to(self.directory).as_posix())
            if table is not None and table.num_rows:
                arms.setdefault(arm, {})[int(seed)] = table
        return {arm: dict(sorted(arms[arm].items())) for arm in in_order(arms, ARM_ORDER)}


def interval_of(estimate: Mapping[str, Any] | None) -> tuple[float, float] | None:
    """The interval of an estimate, or None when there is none (one seed) or it is not finite."""
    interval = (estimate or {}).get("interval")
    if not interval or any(end is None or not math.isfinite(end) for end in interval):
        return None
    return float(interval[0]), float(interval[1])
