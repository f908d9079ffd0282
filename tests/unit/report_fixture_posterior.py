"""The synthetic run's posterior: chains, susceptibilities, modes and their diagnostics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

OBSERVABLES = ("induction_gap", "rest_loss")
COMPONENTS = ("everything", "layer.0.head.0", "layer.0.head.1", "layer.1.head.0", "layer.1.head.1")


def write_json(path: Path, value: Any) -> None:
    """A JSON file, its folders made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_table(path: Path, columns: dict[str, Any], metadata: dict[str, Any] | None = None) -> None:
    """A Parquet file with `patterning` metadata, its folders made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns)
    if metadata is not None:
        table = table.replace_schema_metadata({b"patterning": json.dumps(metadata).encode()})
    pq.write_table(table, path, compression="none")


def _walk(rng: np.random.Generator) -> np.ndarray:
    chains = [np.convolve(rng.standard_normal(64), np.ones(5) / 5, "valid") for _ in range(4)]
    return np.concatenate(chains)


def write_posterior(run: Path, blocks: np.ndarray, rng: np.random.Generator) -> None:
    """The files of the sampling and response stages; `blocks` are the token ids (sample position)."""
    ids, positions = (
        axis.ravel() for axis in np.meshgrid(np.arange(blocks.shape[0]), np.arange(1, blocks.shape[1]), indexing="ij")
    )
    truth = {
        o: rng.standard_normal(ids.size) * 0.02 + 0.03 * rng.standard_normal(blocks.shape[0])[ids] for o in OBSERVABLES
    }
    pool = {"sequence_id": ids, "position": positions.astype(np.int16)}
    for o in OBSERVABLES:
        pool |= {f"chi_{o}": truth[o].astype(np.float32), f"se_{o}": np.full(ids.size, 0.004, np.float32)}
    write_table(run / "response/pool.parquet", pool, {"units": "nats^2", "subject": "everything"})
    metadata = {
        "units": "nats^2",
        "sign": "minus covariance",
        "inverse_temperature": 30.0,
        "localization": 4.0,
        "num_chains": 4,
        "num_draws": 60,
    }
    for component in COMPONENTS:
        chain, draw = np.repeat(np.arange(4, dtype=np.int32), 60), np.tile(np.arange(60, dtype=np.int32), 4)
        write_table(
            run / f"sampling/{component}/traces.parquet",
            {
                "chain": chain,
                "draw": draw,
                "loss": 0.05 + 0.02 * _walk(rng),
                **{o: 0.03 * _walk(rng) for o in OBSERVABLES},
            },
        )
        lost = {
            "chain": 3,
            "healthy": False,
            "reason": "loss became NaN at step 212",
            "draws": 17,
            "steps": 212,
            "seconds": 4.0,
        }
        states = [
            {"chain": c, "healthy": True, "reason": None, "draws": 60, "steps": 240, "seconds": 9.5} for c in range(3)
        ]
        write_json(
            run / f"sampling/{component}/chains.json",
            [*states, lost if component == "layer.1.head.1" else {**states[0], "chain": 3}],
        )
        table = {
            "sequence_id": ids,
            "position": positions.astype(np.int16),
            "token": blocks[ids, positions].astype(np.int32),
            "domain": ["stories"] * ids.size,
            "loss": np.ones(ids.size, np.float32),
        }
        for o in OBSERVABLES:
            table |= {
                f"chi_{o}": (truth[o] + 0.08 * rng.standard_normal(ids.size)).astype(np.float32),
                f"se_{o}": np.full(ids.size, 0.08, np.float32),
            }
        write_table(
            run / f"response/susceptibility-{component}.parquet/part-00000.parquet",
            {**table, "rhat": np.full(ids.size, 1.01)},
            metadata,
        )
        rows = {
            "sequence_id": np.arange(blocks.shape[0]),
            **{f"chi_{o}": np.zeros(blocks.shape[0]) for o in OBSERVABLES},
        }
        write_table(run / f"response/susceptibility-{component}-samples.parquet/part-00000.parquet", rows, metadata)
    heads = COMPONENTS[1:]
    loadings = np.linalg.qr(rng.standard_normal((4, 4)))[0]
    values = [2.4, 0.9, 0.4, 0.1]
    write_table(
        run / "response/modes.parquet",
        {"mode": np.arange(4), "singular_value": values, **{h: loadings[i] for i, h in enumerate(heads)}},
    )
    picks = [
        (m, s, r, *map(int, (ids[k], positions[k])))
        for m in range(4)
        for s in (1, -1)
        for r, k in enumerate(rng.integers(0, ids.size, 8))
    ]
    columns = dict(
        zip(
            ("mode", "sign", "rank", "sequence_id", "position"),
            map(list, zip(*picks, strict=True)),
            strict=True,
        )
    )
    write_table(run / "response/mode-tokens.parquet", {**columns, "score": [0.3 * p[1] / (1 + p[2]) for p in picks]})
    diagnostics = {
        component: {
            "num_chains": 4 - (component == "layer.1.head.1"),
            "excluded": [{"chain": 3, "reason": "loss became NaN at step 212"}]
            if component == "layer.1.head.1"
            else [],
            "num_coordinates": 4096,
            "llc": {"value": 11.0 + i, "standard_error": 0.8, "interval": [9.4 + i, 12.6 + i]},
            "temperature": {"value": 1.31, "standard_error": 0.02, "interval": [1.27, 1.35]},
            "step_bias": {"value": 2.4, "standard_error": 0.1, "interval": [2.2, 2.6]},
            "findings": [],
            "observables": {
                o: {
                    "mean": 0.01,
                    "standard_deviation": 0.03,
                    "rhat": 1.02 + 0.03 * i,
                    "ess_bulk": 420.0 / (1 + 2 * i),
                    "mcse": 0.0021,
                    "reliability": 0.12 + 0.02 * i,
                    "reliability_samples": 0.55 + 0.05 * i,
                }
                for o in OBSERVABLES
            },
        }
        for i, component in enumerate(COMPONENTS)
    }
    variance = (np.square(values) / np.square(values).sum()).tolist()
    write_json(
        run / "response/diagnostics.json",
        {
            "subjects": diagnostics,
            "modes": {"baseline": {"components": heads, "singular_values": values, "explained_variance": variance}},
        },
    )
