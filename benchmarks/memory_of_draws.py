"""Does the memory of the sampling stage grow with the number of draws?

Runs the real stage (Ray actors, aggregator and all) on a tiny model and a made-up corpus, once with 100 and once with
1,000 draws a chain, and prints the peak resident memory of the actors. Keeping every per-token loss would need
draws x chains x probe tokens x 4 bytes; the last column says how much that is.

    python benchmarks/memory_of_draws.py
"""

from __future__ import annotations

import argparse
import os
import random
import re
import tempfile
import threading
import time
from pathlib import Path

import yaml
from safetensors.torch import save_file

from patterning_dist.config import Config, load_config
from patterning_dist.data.corpus import Document
from patterning_dist.data.prepare import prepare_tokens
from patterning_dist.models.attention import AttentionOnlyTransformer
from patterning_dist.progress import Progress
from patterning_dist.stages.sample import sample
from patterning_dist.storage.run import RunDirectory

NUM_CHAINS, PROBE_SEQUENCES, CONTEXT_LENGTH = 2, 128, 128
EXPERIMENT = {
    "name": "memory",
    "seed": 0,
    "device": "cpu",
    "data": {"sources": [{"path": "made-up"}], "vocabulary_size": 300, "context_length": CONTEXT_LENGTH},
    "model": {"num_layers": 1, "num_heads": 2, "d_model": 8, "d_head": 4},
    "training": {"num_steps": 1, "batch_size": 1},
    "sampling": {
        "components": [{"name": "attention"}],
        "observables": [{"kind": "split_loss", "name": "overall", "split": "overall"}],
        "num_chains": NUM_CHAINS,
        "burn_in": 5,
        "inverse_temperature": 30,
        "localization": 100,
        "step_size": 1e-3,
        "batch_size": 1,
        "probe_sequences": PROBE_SEQUENCES,
        "evaluation_sequences": 2,
    },
    "response": {"direction": {"component": "attention"}},
    "solve": {"component": "attention", "targets": {"overall": -1}, "strength": 1},
    "retrain": {"seeds": [0], "num_steps": 1},
}


class PeakMemory:
    """While it is entered: the largest resident set that every actor of this process's own Ray has had, in MB.

    The kernel keeps that peak for each process (VmHWM), so looking now and then misses only what happens after the
    last look. Actors are told apart by the title that Ray gives their process.
    """

    def __init__(self, every: float = 0.2) -> None:
        self._peaks: dict[int, tuple[str, float]] = {}
        self._every, self._stop = every, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def of(self, actor: str) -> float:
        """The largest peak among the processes of one kind of actor."""
        found = [peak for name, peak in self._peaks.values() if name == actor]
        if not found:
            seen = sorted({name for name, _ in self._peaks.values()})
            raise SystemExit(f"no process of actor {actor} was seen; seen: {', '.join(seen) or 'none'}")
        return max(found)

    def _watch(self) -> None:
        while not self._stop.wait(self._every):
            for pid in _descendants(os.getpid()):
                try:
                    title = Path(f"/proc/{pid}/cmdline").read_text()
                    status = Path(f"/proc/{pid}/status").read_text()
                except (OSError, UnicodeDecodeError):
                    continue  # it ended, or is no actor
                actor, peak = re.match(r"ray::(\w+)", title), re.search(r"VmHWM:\s+(\d+) kB", status)
                if actor and peak:
                    self._peaks[pid] = (actor[1], int(peak[1]) / 1000)


def _descendants(root: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                # The second field, the command, is in brackets and may hold anything.
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            children.setdefault(parent, []).append(int(entry.name))
    found, waiting = [], [root]
    while waiting:
        waiting += (mine := children.get(waiting.pop(), []))
        found += mine
    return found


def make_run(directory: Path, num_draws: int) -> tuple[Config, RunDirectory]:
    """A run directory whose stages before the sampling are done: made-up tokens, an untrained model."""
    experiment = EXPERIMENT | {"sampling": EXPERIMENT["sampling"] | {"num_draws": num_draws}}
    file = directory.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(experiment))
    config, run = load_config(file), RunDirectory(directory)
    words = random.Random(0)
    documents = [
        Document("words", " ".join(f"w{words.randrange(400)}" for _ in range(1500)), str(i)) for i in range(60)
    ]
    corpus = prepare_tokens(
        documents,
        run.path / "data",
        context_length=CONTEXT_LENGTH,
        vocabulary_size=config.data.vocabulary_size,
        validation_fraction=0.2,
        seed=config.seed,
    )
    model = AttentionOnlyTransformer(config.model, corpus["vocabulary_size"], CONTEXT_LENGTH, seed=config.seed)
    (run.path / "baseline").mkdir()
    save_file(dict(model.named_parameters()), run.path / "baseline" / "model.safetensors")
    return config, run


def measure(directory: Path, num_draws: int) -> dict[str, float]:
    """Peak memory of the actors in MB and wall time in seconds of one sampling stage."""
    config, run = make_run(directory, num_draws)
    started = time.monotonic()
    with PeakMemory() as peak, Progress() as progress:
        sample(config, run, progress)
    return {
        "aggregator": peak.of("AggregatorShard"),
        "worker": peak.of("ModelWorker"),
        "seconds": time.monotonic() - started,
        "kept": num_draws * NUM_CHAINS * PROBE_SEQUENCES * (CONTEXT_LENGTH - 1) * 4 / 1e6,
    }


def main() -> None:
    """Measure both and print the table."""
    parser = argparse.ArgumentParser(description="Peak memory of the sampling stage against the number of draws.")
    parser.add_argument("--draws", type=int, nargs=2, default=(100, 1000), metavar=("FEW", "MANY"))
    few, many = parser.parse_args().draws
    if os.environ.get("RAY_ADDRESS"):
        parser.error("RAY_ADDRESS is set: actors of another cluster cannot be measured from here; unset it")
    with tempfile.TemporaryDirectory() as folder:
        rows = {draws: measure(Path(folder) / f"draws-{draws}", draws) for draws in (few, many)}
    print(f"\n{'draws a chain':>14}{'aggregator MB':>15}{'worker MB':>11}{'seconds':>9}{'all losses MB':>15}")
    for draws, row in rows.items():
        print(f"{draws:>14}{row['aggregator']:>15.0f}{row['worker']:>11.0f}{row['seconds']:>9.0f}{row['kept']:>15.0f}")
    aggregator, worker, seconds, kept = (rows[many][key] / rows[few][key] for key in rows[few])
    print(f"{'ratio':>14}{aggregator:>15.2f}{worker:>11.2f}{seconds:>9.2f}{kept:>15.2f}")


if __name__ == "__main__":
    main()
