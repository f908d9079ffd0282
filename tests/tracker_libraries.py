"""Experiment trackers in tests: the library, read back by its own means; a stand-in where it is not installed.

A stand-in knows the few calls that an adapter makes, and keeps what it is handed: it says that these calls are made, in
which order and with what, and nothing of whether the library takes them.
"""

from __future__ import annotations

import importlib.util
import struct
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

Series = dict[str, list[tuple[int, float]]]  # name/of -> (step, value), in the order of its points
NAMES = ("tensorboard", "wandb", "trackio", "mlflow")


def is_installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def import_again(name: str, patch: pytest.MonkeyPatch) -> None:
    """The adapter, at its next import; what is imported then is forgotten after the test."""
    adapter = f"patterning_dist.trackers.{name}"
    patch.setitem(sys.modules, adapter, ModuleType(adapter))
    del sys.modules[adapter]


def configure(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """What is written goes into a folder, and nothing to the network."""
    patch.chdir(folder)
    patch.setenv("WANDB_MODE", "offline")
    patch.setenv("TRACKIO_DIR", str(folder / "trackio"))
    patch.setenv("MLFLOW_TRACKING_URI", f"file:{folder}/mlruns")
    patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")


def read_tensorboard(folder: Path) -> Series:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (run,) = (folder / "patterning").iterdir()
    found: Series = {}
    for part in sorted({file.parent for file in run.rglob("*tfevents*")}):
        events = EventAccumulator(str(part), size_guidance={"tensors": 0}).Reload()
        for tag in events.Tags()["tensors"]:
            points = [(e.step, float(e.tensor_proto.float_val[0])) for e in events.Tensors(tag)]
            found[f"{tag}/{part.relative_to(run)}"] = points
    return found


def read_wandb(folder: Path) -> Series:
    found: Series = {}
    for file in sorted((folder / "wandb").glob("offline-run-*/*.wandb")):
        deadline = time.monotonic() + 30
        while not any(record.HasField("exit") for record in _wandb_records(file.read_bytes())):
            assert time.monotonic() < deadline, "its own process writes the end of a run, after finish()"
            time.sleep(0.1)
        for record in _wandb_records(file.read_bytes()):
            if record.HasField("history"):
                row = {item.key or "/".join(item.nested_key): float(item.value_json) for item in record.history.item}
                step = row.get("seconds", row.get("training_step"))
                for name, value in row.items():
                    if "/" in name:
                        found.setdefault(name, []).append((int(step or 0), value))
    return found


def _wandb_records(content: bytes, block: int = 32768) -> Iterator[Any]:
    """Records of a log in the format of LevelDB, after a header of seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    assert content[:4] == b":W&B"
    at, whole = 7, b""
    while at + 7 <= len(content):
        if block - at % block < 7:
            at += block - at % block
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # full, last
            record = Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


def read_trackio(folder: Path) -> Series:
    from trackio.sqlite_storage import SQLiteStorage

    (run,) = SQLiteStorage.get_runs("patterning")
    found: Series = {}
    for row in SQLiteStorage.get_logs("patterning", run):
        for name, value in row.items():
            if "/" in name:
                found.setdefault(name, []).append((row["step"], value))
    return found


def read_mlflow(folder: Path) -> Series:
    import mlflow

    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("patterning")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.data.params["sampling.num_draws"] == "4"
    names = run.data.metrics
    return {name: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)] for name in names}


READERS: dict[str, Callable[[Path], Series]] = {
    "tensorboard": read_tensorboard,
    "wandb": read_wandb,
    "trackio": read_trackio,
    "mlflow": read_mlflow,
}


class StandIn:
    """Modules with the calls of an adapter, in the place of a library; ``series`` is what they were handed."""

    def __init__(self, name: str, patch: pytest.MonkeyPatch) -> None:
        self.series: Series = {}
        self.open = 0
        modules = getattr(self, f"_{name}")()
        for module, content in modules.items():
            made = ModuleType(module)
            vars(made).update(content)
            patch.setitem(sys.modules, module, made)
        import_again(name, patch)

    def _log(self, values: dict[str, float], step: int) -> None:
        assert self.open, "it is sent to before it is opened, or after it is closed"
        for name, value in values.items():
            self.series.setdefault(name, []).append((step, value))

    def _opened(self, **calls: Any) -> SimpleNamespace:
        self.open += 1
        return SimpleNamespace(**calls)

    def _closed(self, *_: object) -> None:
        self.open -= 1

    def _tensorboard(self) -> dict[str, dict[str, Any]]:
        def writer(folder: str) -> SimpleNamespace:
            of = "/".join(Path(folder).parts[2:])
            return self._opened(
                add_scalar=lambda tag, data, step, wall_time: self._log({f"{tag}/{of}": data}, step),
                flush=lambda: None,
                close=self._closed,
            )

        return {"tensorboard": {}, "tensorboard.summary": {"Writer": writer}}

    def _wandb(self) -> dict[str, dict[str, Any]]:
        axes: dict[str, str] = {}

        def log(row: dict[str, float]) -> None:
            series = {name: value for name, value in row.items() if "/" in name}
            (axis,) = {axes[name] for name in series}
            self._log(series, int(row[axis]))

        def init(**options: Any) -> SimpleNamespace:
            assert options["id"] == options["name"] and options["resume"] == "allow"
            define = lambda name, step_metric: axes.update({name: step_metric})  # noqa: E731
            return self._opened(url=None, dir="wandb/r/files", define_metric=define, log=log, finish=self._closed)

        return {"wandb": {"init": init, "Settings": lambda **_: None}}

    def _trackio(self) -> dict[str, dict[str, Any]]:
        def init(**options: Any) -> SimpleNamespace:
            assert options["resume"] == "allow"
            return self._opened(log=lambda values, step: self._log(values, step), finish=self._closed)

        return {"trackio": {"init": init}}

    def _mlflow(self) -> dict[str, dict[str, Any]]:
        runs: list[SimpleNamespace] = []

        def create(experiment: str, run_name: str) -> SimpleNamespace:
            runs.append(SimpleNamespace(info=SimpleNamespace(run_id=run_name)))
            return runs[0]

        def log_batch(run: str, metrics: Any = (), params: Any = ()) -> None:
            for key, value, _, step in metrics:
                self._log({key: value}, step)

        def client() -> SimpleNamespace:
            return self._opened(
                search_runs=lambda *_: runs, create_run=create, log_batch=log_batch, set_terminated=self._closed
            )

        experiment = SimpleNamespace(experiment_id="1")
        calls = {
            "MlflowClient": client,
            "set_experiment": lambda _: experiment,
            "get_tracking_uri": lambda: "file:mlruns",
        }
        entities = {"Metric": lambda *values: values, "Param": lambda *values: values}
        return {"mlflow": calls, "mlflow.entities": entities}
