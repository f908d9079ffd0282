"""The results of a run in Python: labelled arrays, tables, and a view of them in a notebook."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from patterning_dist.errors import PatterningError
from patterning_dist.report.plots import Plots
from patterning_dist.report.reading import Run
from patterning_dist.storage.files import FileHashes
from patterning_dist.storage.mirror import Location
from patterning_dist.storage.run import read_manifest, refuse_changed

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

_TOKENIZER = "data/tokenizer.json"
_FILES = ("response.zarr", "response/diagnostics.json", "weights", "retrain", _TOKENIZER, "summary.json")


def open_run(location: Path | str) -> OpenedRun:
    """The results of a run, finished or not.

    Args:
        location: run directory, a path or a URL.

    Raises:
        PatterningError: there is no run.

    Examples:
        >>> from patterning_dist import open_run
        >>> run = open_run("runs/quickstart")
        >>> run.stages["solve"], float(run.weights["plus"].weight.mean())  # rho has mean 1
        ('finished', 1.0)
    """
    manifest = read_manifest(location)
    if not manifest:
        raise PatterningError(f"{location}: no run there, there is no manifest.json; give a run directory")
    found = Location.at(location)
    found.fetch(*_FILES)
    return OpenedRun(found, manifest)


class OpenedRun:
    """What the files of a run hold; each is read when it is first asked for.

    Args:
        location: of the run, whose files are in its folder.
        manifest: of the run.

    Raises:
        PatterningError: of an attribute, that the stage which it comes from is not done, or that what it wrote is
            damaged.
    """

    def __init__(self, location: Location, manifest: Mapping[str, Any]) -> None:
        self.name, self.path, self.manifest = str(location), location.path, manifest
        self._location, self._sha256 = location, FileHashes({})

    @cached_property
    def tree(self) -> xr.DataTree:
        """Everything about the chains, see ``measure.datatree``; ``arviz`` takes its subtrees."""
        import xarray as xr

        return xr.open_datatree(self._there("response.zarr", "sample"), engine="zarr")

    @cached_property
    def susceptibilities(self) -> xr.Dataset:
        """``chi``, ``standard_error`` [checkpoint, component, observable, sample]; NaN where nothing was sampled.

        chi_i = -Cov(phi, l_i - L): negative means that weighting loss i up lowers phi. Coordinates of ``sample`` say
        which loss it is, ``text`` the token where the run has a tokenizer.
        """
        import xarray as xr

        nodes = {
            (node.attrs["checkpoint"], node.attrs["component"]): node["susceptibility"].to_dataset()
            for node in self._subjects()
        }
        first = next(iter(nodes.values()))
        checkpoints, components = (list(dict.fromkeys(key[n] for key in nodes)) for n in range(2))
        observables = list(dict.fromkeys(str(row) for found in nodes.values() for row in found["observable"].values))
        places = {"checkpoint": checkpoints, "component": components}
        coordinates: dict[str, Any] = {**places, "observable": observables}
        coordinates |= {str(name): ("sample", c.values) for name, c in first.coords.items() if c.dims == ("sample",)}
        if (self.path / _TOKENIZER).exists() and "token" in first.coords:
            from tokenizers import Tokenizer

            tokenizer = Tokenizer.from_file(str(self._there(_TOKENIZER, "prepare")))
            texts = [tokenizer.decode([int(token)], skip_special_tokens=False) for token in first["token"].values]
            coordinates["text"] = ("sample", np.array(texts, dtype=object))
        shape, number = (len(checkpoints), len(components)), first.sizes["sample"]
        variables = {}
        for name in ("chi", "standard_error", "rhat", "center_loss"):
            by_row = "observable" in first[name].dims
            values = np.full((*shape, *((len(observables),) if by_row else ()), number), np.nan, np.float32)
            for (checkpoint, component), found in nodes.items():
                at = checkpoints.index(checkpoint), components.index(component)
                part = found[name].reindex(observable=observables) if by_row else found[name]
                values[at] = part.values
            variables[name] = ((*places, *(("observable",) if by_row else ()), "sample"), values)
        return xr.Dataset(variables, coordinates, {key: self.tree.attrs[key] for key in ("units", "sign", "scale")})

    @cached_property
    def chains(self) -> dict[str, xr.Dataset]:
        """Subject -> loss and observables [chain, draw], deviations from their values at the checkpoint."""
        return {node.path.strip("/"): node["posterior"].to_dataset() for node in self._subjects()}

    @cached_property
    def llc(self) -> pd.DataFrame:
        """A row a subject: LLC, its standard error and 95 % interval, the worst R-hat, the fewest effective draws."""
        import pandas as pd

        found = self._json("response/diagnostics.json", "sample")["subjects"]
        rows = {}
        for name, entry in found.items():
            values, llc = entry["observables"].values(), entry["llc"]
            low, high = llc["interval"] or (np.nan, np.nan)
            rows[name] = {
                "llc": llc["value"],
                "standard_error": llc["standard_error"],
                "low": low,
                "high": high,
                "rhat": max((row["rhat"] for row in values if row["rhat"] is not None), default=np.nan),
                "effective_draws": min(
                    (row["ess_bulk"] for row in values if row["ess_bulk"] is not None), default=np.nan
                ),
                "num_chains": entry["num_chains"],
            }
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("subject")

    @cached_property
    def weights(self) -> dict[str, pd.DataFrame]:
        """Table of stage solve -> sample, position where it has one, and weight (mean 1)."""
        import pandas as pd

        files = sorted(self._there("weights", "solve", ".parquet").glob("*.parquet"))
        return {file.stem: pd.read_parquet(file) for file in files}

    @cached_property
    def arms(self) -> pd.DataFrame:
        """Metrics of every retraining: arm, seed, step, and a column a metric."""
        import pandas as pd

        files = sorted(self._there("retrain", "retrain", "metrics.parquet").glob("*/seed-*/metrics.parquet"))
        tables = []
        for file in files:
            arm, seed = file.parts[-3], int(file.parts[-2].removeprefix("seed-"))
            table = pd.read_parquet(file)
            table.insert(0, "seed", seed)
            table.insert(0, "arm", arm)
            tables.append(table)
        return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=["arm", "seed", "step"])

    @cached_property
    def summary(self) -> dict[str, Any]:
        """Every headline number with its interval: docs/reference/summary.md."""
        return self._json("summary.json", "report")

    @cached_property
    def plot(self) -> Plots:
        """Figures of the run, with their numbers: docs/how_to/figures.md."""
        return Plots(Run(self.path), self.name, self._fetch)

    @property
    def stages(self) -> dict[str, str]:
        """Stage -> finished, started, failed or interrupted."""
        return {name: entry["status"] for name, entry in self.manifest.get("stages", {}).items()}

    def __repr__(self) -> str:
        return f"<run {self.name}: {', '.join(f'{name} {status}' for name, status in self.stages.items())}>"

    def _repr_html_(self) -> str:
        stages = " → ".join(f"{escape(name)} ({escape(status)})" for name, status in self.stages.items())
        parts = [f"<p><b>{escape(self.name)}</b><br>{stages}</p>"]
        if (self.path / "summary.json").exists():
            rows = [_headline_row(row) for row in self.summary.get("headline", [])]
            heads = ("arm", "target", "predicted", "checked", "realised")
            parts.append(_table(heads, rows))
        if (self.path / "response/diagnostics.json").exists():
            parts.append(self.llc.round(3).to_html())
        return "".join(parts)

    def _subjects(self) -> list[xr.DataTree]:
        """Nodes of subjects, the first of each checkpoint and component: others have steps of half the size."""
        found: dict[tuple[str, str], xr.DataTree] = {}
        for node in self.tree.subtree:
            if "susceptibility" in node.children:
                found.setdefault((node.attrs["checkpoint"], node.attrs["component"]), node)
        return list(found.values())

    def _json(self, file: str, stage: str) -> dict[str, Any]:
        return json.loads(self._there(file, stage).read_text(encoding="utf-8"))

    def _fetch(self, name: str, suffix: str) -> None:
        """Have a file, or a folder, in the working copy; what stages have written there is whole."""
        self._location.fetch(name)
        refuse_changed(self._location, self.manifest, name, suffix=suffix, sha256=self._sha256)

    def _there(self, name: str, stage: str, suffix: str = "") -> Path:
        """A file or folder of a stage, whole; of a folder those files whose names end so."""
        path = self.path / name
        if not path.exists():
            raise PatterningError(f"{self.name}: {name} is not there, stage {stage} is not done; it has {self.stages}")
        refuse_changed(self._location, self.manifest, name, suffix=suffix, sha256=self._sha256)
        return path


def _headline_row(row: Mapping[str, Any]) -> list[str]:
    return [
        str(row["arm"]),
        str(row["target"]),
        *(_words(row.get(key)) for key in ("predicted", "checked", "realised")),
    ]


def _words(estimate: Mapping[str, Any] | None) -> str:
    if not estimate or estimate.get("value") is None:
        return "–"
    interval = estimate.get("interval")
    ends = "" if interval is None else f" [{interval[0]:.3g}, {interval[1]:.3g}]"
    return f"{estimate['value']:+.3g}{ends}"


def _table(heads: tuple[str, ...], rows: list[list[str]]) -> str:
    def line(cells: Any, tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return f"<table>{line(heads, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"
