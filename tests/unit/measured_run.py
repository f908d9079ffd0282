"""A run directory whose draws are known: chains of two checkpoints, analysed and written by what does so in a run.

The losses of a draw follow two factors, which the observables are made of; how much a token follows them is up to its
pattern at the second checkpoint, and up to nothing at the first.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import yaml
from report_fixture import _data
from report_fixture_posterior import write_json

from patterning_dist.aggregation.files import write_subject
from patterning_dist.aggregation.ledger import ChainRecord, Ledger, LedgerPlan
from patterning_dist.aggregation.protocol import START, Incarnation, PushId, block_digest
from patterning_dist.data.induction import induction_tokens
from patterning_dist.data.patterns import INDUCTION, token_patterns
from patterning_dist.data.tokenizer import token_texts
from patterning_dist.measure.analysis import Analysis, TablePlan
from patterning_dist.measure.diagnostics import chain_diagnostics
from patterning_dist.measure.groups import write_groups
from patterning_dist.measure.results import table_name
from patterning_dist.response.reliability import reliability_from_sums
from patterning_dist.storage.store import LocalStorage

OBSERVABLES, COMPONENTS = ("component", "induction"), ("everything", "layer.0.head.0", "layer.1.head.1")
NUM_CHAINS, NUM_DRAWS, NUM_BATCHES, BURN_IN, STEPS = 4, 96, 8, 60, 5
DOMAINS = {"stories": 0.4, "python": -0.4, "<markup>": 0.0, "mixed": 0.0}


def probe_index(run: Path, blocks: np.ndarray) -> dict[str, np.ndarray]:
    """What every predicted token of the blocks is of, as stage sample has it [entry]."""
    domains = np.array(read_domains(run), dtype=object)
    ids, positions = (
        a.ravel() for a in np.meshgrid(np.arange(len(blocks)), np.arange(1, blocks.shape[1]), indexing="ij")
    )
    patterns = token_patterns(token_texts(run / "data/tokenizer.json"))[blocks[:, 1:]]
    patterns[induction_tokens(blocks)] = INDUCTION
    tokens = blocks[ids, positions].astype(np.int32)
    named = {"sequence_id": ids, "domain": domains[ids], "position": positions.astype(np.int32)}
    return named | {"token": tokens, "pattern": patterns.ravel()}


def read_domains(run: Path) -> list[str]:
    import pyarrow.parquet as pq

    return pq.read_table(run / "data/train.parquet")["domain"].to_pylist()


def loadings(index: dict[str, np.ndarray], signal: float) -> np.ndarray:
    """How much a loss follows either factor [factor, entry]: 1 of its pattern, or 0."""
    by_pattern = np.where(index["pattern"] == INDUCTION, 1.0, np.where(index["pattern"] == "word start", -0.7, 0.0))
    by_domain = np.array([DOMAINS[str(domain)] for domain in index["domain"]])
    own = 0.4 * np.random.default_rng(3).normal(size=(2, len(by_pattern)))
    return signal * (np.stack([by_pattern, by_domain]) + own)


def draws_of(seed: int, chain: int, loads: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Observables [draw, observable], losses [draw, entry] and their means [draw], deviations from the checkpoint."""
    rng = np.random.default_rng((seed, chain))
    factors = rng.normal(size=(NUM_DRAWS, 2))
    losses = 0.05 + 0.04 * factors @ loads + 0.05 * rng.normal(size=(NUM_DRAWS, loads.shape[1]))
    losses = losses.astype(np.float32)
    return 0.3 * factors + 0.02 * rng.normal(size=factors.shape), losses, losses.mean(axis=1, dtype=np.float64)


def write_measured(run: Path, signals: dict[str, float], *, sequences: int = 40, length: int = 32) -> Path:
    """Write what stages prepare and sample write, and return the run directory.

    Args:
        run: a new folder.
        signals: checkpoint -> how much losses follow the factors there; 0: chi is noise.
        sequences, length: of the probe.
    """
    blocks = _data(run, sequences, length, np.random.default_rng(7))
    (run / "config.yaml").write_text(yaml.safe_dump({"name": "measured", "solve": None, "retrain": None}))
    write_json(run / "manifest.json", {"name": "measured", "stages": {}})
    index, storage, by_name, diagnostics = probe_index(run, blocks), LocalStorage(run), {}, {}
    for number, (checkpoint, signal) in enumerate(signals.items()):
        for component in COMPONENTS:
            name = component if checkpoint == "baseline" else f"{checkpoint}/{component}"
            subject = SimpleNamespace(checkpoint=checkpoint, component=component, half_step=False)
            scale = 1.0 if component != COMPONENTS[1] else 0.5
            loads = loadings(index, signal * scale)
            by_name[name] = subject
            diagnostics[name] = _write_subject(storage, name, index, loads, seed=100 * number + len(by_name))
    opened = SimpleNamespace(by_name=by_name, observable_names=list(OBSERVABLES))
    write_groups(SimpleNamespace(path=run), opened, diagnostics, index, "restricted")
    write_json(run / "response/diagnostics.json", {"subjects": diagnostics, "modes": {}})
    return run


def _write_subject(storage: LocalStorage, name: str, index: dict[str, np.ndarray], loads: np.ndarray, seed: int):
    num_entries = loads.shape[1]
    plan = LedgerPlan(name, OBSERVABLES, num_entries, NUM_DRAWS, NUM_BATCHES, NUM_CHAINS)
    ledger, center = Ledger(plan, 0, 1, storage, name), np.full(num_entries, 3.0)
    for chain in range(NUM_CHAINS):
        observables, losses, means = draws_of(seed, chain, loads)
        first, end = (PushId(name, chain, Incarnation(1, 1), number) for number in (0, 1))
        ledger.open(first, np.append(center, center.mean()))
        digest = block_digest(START, (observables, losses, means))
        ledger.push(first, START, digest, observables, losses, means)
        ledger.close(end, digest, ChainRecord(chain))
    settings = {"burn_in": BURN_IN, "steps_between_draws": STEPS}
    tables = [TablePlan(table_name(name), 0, index)]
    part = Analysis(storage, name, OBSERVABLES, tables, settings, 2, inverse_temperature=1000.0)(ledger.part())
    records = [record for record in ledger.records() if record is not None]
    traces = [ledger.traces(chain) for chain in range(NUM_CHAINS)]
    write_subject(storage.root / "sampling" / name, OBSERVABLES, records, traces)
    stacked = {q: np.stack([rows[:, k] for rows in traces]) for k, q in enumerate(("loss", *OBSERVABLES))}
    return chain_diagnostics(
        stacked,
        OBSERVABLES,
        records=records,
        excluded={},
        reliability={"reliability": reliability_from_sums(part.reliability[0])},
        inverse_temperature=1000.0,
        num_coordinates=64,
    )
