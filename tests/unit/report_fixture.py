"""A small synthetic run directory with every file the report reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from report_fixture_posterior import OBSERVABLES, write_json, write_posterior, write_table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

TEXT = (
    "The lantern-keeper of Arnholt counted the boats, and the boats came home; the lantern-keeper slept. ",
    "def fold(items):\n    for item in items:\n\tyield item\n\nfold(items)\n",
    "<script>alert('token')</script> & <b>bold</b> <script>alert('token')</script>\n",
    "Café naïve — crème brûlée, 漢字 and 漢字; a rare \x07 bell.\n",
)
DOMAINS = ("stories", "python", "<markup>", "mixed")
ARMS = {"base": 0.0, "plus": 1.0, "minus": -0.6, "permuted": 0.0}
METRICS = (
    "prefix_matching",
    "induction_gap",
    "repeated_gap",
    "in_context_gap",
    "validation_loss",
    "rest_loss",
)


def _data(run: Path, sequences: int, length: int, rng: np.random.Generator) -> np.ndarray:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    (run / "data").mkdir(parents=True)
    tokenizer.save(str(run / "data/tokenizer.json"))
    streams = [np.array(tokenizer.encode(text * 40).ids, dtype=np.uint16) for text in TEXT]
    kinds = rng.integers(0, len(TEXT), sequences)
    starts = [int(rng.integers(0, streams[kind].size - length)) for kind in kinds]
    blocks = np.stack([streams[k][s : s + length] for k, s in zip(kinds, starts, strict=True)])
    for split, rows in (("train", blocks), ("validation", blocks[::-1])):
        columns = {
            "sequence_id": np.arange(sequences),
            "domain": pa.array([DOMAINS[k] for k in (kinds if split == "train" else kinds[::-1])]).dictionary_encode(),
            "document": np.arange(sequences),
            "tokens": pa.array([row.astype("<u2").tobytes() for row in rows], pa.binary(2 * length)),
        }
        write_table(
            run / f"data/{split}.parquet",
            columns,
            {"context_length": length, "vocabulary_size": 400, "split": split},
        )
    return blocks


def _metrics(path: Path, lean: float, steps: int, rng: np.random.Generator) -> float:
    step = np.linspace(0, steps, 41).astype(np.int64)
    middle = steps * (0.62 - 0.22 * lean + 0.06 * rng.standard_normal())
    formed = (0.16 + 0.14 * lean) / (1 + np.exp(-(step - middle) / (steps * 0.06)))
    noise = lambda size: size * rng.standard_normal(step.size)  # noqa: E731
    validation = 4.1 + 2.8 * np.exp(-step / (steps * 0.12)) + 0.12 * abs(lean) + noise(0.01)
    gap = 0.35 - 2.2 * formed + noise(0.015)
    heads = {
        f"prefix_matching_{i}_{j}": 0.01 + (formed if (i, j) == (1, 1) else 0) + abs(noise(0.004))
        for i in (0, 1)
        for j in (0, 1)
    }
    previous = {
        f"previous_token_{i}_{j}": 0.05 + (0.7 if (i, j) == (0, 1) else 0.1 * j) * (1 - np.exp(-step / 300))
        for i in (0, 1)
        for j in (0, 1)
    }
    columns = {
        "step": step,
        "train_loss": validation - 0.1 + noise(0.03),
        "validation_loss": validation,
        "induction_loss": validation + gap,
        "rest_loss": validation - 0.02,
        "induction_gap": gap,
        "repeated_gap": 0.02 - 2.6 * formed + noise(0.01),
        "in_context_gap": -0.3 - formed,
        **previous,
        **heads,
        "prefix_matching": np.max(list(heads.values()), axis=0),
        "seconds": step * 0.05,
    }
    write_table(path, columns)
    return float(columns["prefix_matching"][-1])


def _estimate(value: float, error: float, **more: Any) -> dict[str, Any]:
    return {
        "value": value,
        "standard_error": error,
        "interval": [value - 1.96 * error, value + 1.96 * error],
        **more,
    }


def _weights(run: Path, blocks: np.ndarray, rng: np.random.Generator) -> None:
    ids, positions = (
        axis.ravel() for axis in np.meshgrid(np.arange(blocks.shape[0]), np.arange(1, blocks.shape[1]), indexing="ij")
    )
    score = rng.standard_normal(ids.size) + 0.4 * rng.standard_normal(blocks.shape[0])[ids]
    solved = {}
    for arm, sign in (("plus", 1), ("minus", -1), ("permuted", 0)):
        weight = np.clip(1 + 0.7 * (sign * score if sign else rng.permutation(score)), 0, 4)
        write_table(
            run / f"weights/{arm}.parquet",
            {"sequence_id": ids, "position": positions.astype(np.int16), "weight": weight.astype(np.float32)},
            {"arm": arm, "strength": 0.5},
        )
        counts, edges = np.histogram(weight, bins=30)
        entry = {
            "target": {},
            "strength": 0.5,
            "largest_feasible_strength": 1.7,
            "effective_sample_size": float(weight.sum() ** 2 / (weight**2).sum()),
            "effective_sample_share": float(weight.mean() ** 2 / (weight**2).mean()),
            "top_percent_share": 0.034,
            "num_at_minimum": int((weight == 0).sum()),
            "num_at_maximum": int((weight == 4).sum()),
            "newton_iterations": 6,
            "residual": 1.2e-12,
            "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
        }
        if sign:
            entry["target"] = {"induction_gap": -0.05 * sign, "rest_loss": 0.0}
            entry["predicted_response"] = {
                "induction_gap": _estimate(-0.05 * sign, 0.008),
                "rest_loss": _estimate(0.0, 0.006),
            }
            entry["cross_fitted_response"] = {
                "induction_gap": _estimate(-0.031 * sign, 0.01),
                "rest_loss": _estimate(0.004, 0.008),
            }
        solved[arm] = entry
    agreement = {
        o: {
            "correlation_entries": 0.41,
            "interval_entries": [0.37, 0.45],
            "correlation_samples": 0.88,
            "interval_samples": [0.79, 0.93],
        }
        for o in OBSERVABLES
    }
    write_json(
        run / "weights/solution.json",
        {
            "observables": list(OBSERVABLES),
            "estimator": "response_direction",
            "estimator_agreement": agreement,
            "arms": solved,
        },
    )


def _retraining(run: Path, seeds: int, rng: np.random.Generator) -> None:
    finals: dict[str, list[dict[str, float]]] = {}
    transitions: dict[str, list[int | None]] = {}
    for arm, lean in ARMS.items():
        for seed in range(seeds):
            path = run / f"retrain/{arm}/seed-{seed}/metrics.parquet"
            _metrics(path, lean, 4000, rng)
            table = pq.read_table(path).to_pydict()
            finals.setdefault(arm, []).append({metric: table[metric][-1] for metric in METRICS})
            passed = [step for step, value in zip(table["step"], table["prefix_matching"], strict=True) if value > 0.1]
            transitions.setdefault(arm, []).append(passed[0] if passed else None)
    contrasts: dict[str, dict[str, Any]] = {}
    for one, other in (("plus", "base"), ("plus", "permuted"), ("minus", "base"), ("permuted", "base")):
        contrasts.setdefault(one, {})[other] = {}
        for metric in METRICS:
            each = [a[metric] - b[metric] for a, b in zip(finals[one], finals[other], strict=True)]
            contrasts[one][other][metric] = _estimate(
                float(np.mean(each)), float(np.std(each, ddof=1) / np.sqrt(seeds)) * 1.2, per_seed=each
            )
            if metric == "prefix_matching":
                ratios = [a[metric] / b[metric] for a, b in zip(finals[one], finals[other], strict=True)]
                middle = float(np.exp(np.log(ratios).mean()))
                ratio = {"value": middle, "interval": [middle / 1.5, middle * 1.5], "per_seed": ratios}
                contrasts[one][other][metric]["ratio"] = ratio
    lead = contrasts["plus"]["base"]
    solution = json.loads((run / "weights/solution.json").read_text())
    solved = {arm: solution["arms"][arm] for arm in ("plus", "minus")}
    checked = {o: {**_estimate(-0.04, 0.006), "predicted": -0.05} for o in OBSERVABLES}
    slope = {"strength": 0.1, "predicted": -0.05, "predicted_interval": [-0.066, -0.034], "z": 0.7, "ratio": 0.9}
    slopes = {o: {**_estimate(-0.045, 0.002), **slope, "verdict": "agrees"} for o in OBSERVABLES}
    slopes["loss"] = {**_estimate(0.012, 0.001), "strength": 0.1}
    check = {"subject": "everything", "weights": "plus", "strengths": {"+1": checked}, "slopes": slopes}
    write_json(run / "check/response.json", check)
    terms = {"induction_gap:induction": -0.16, "induction_gap:rest": 0.57, "overall": 0.45}
    parts = {name: _estimate(value, 0.02, covers=["seeds", "sequences"]) for name, value in terms.items()}
    predicted = {name: _estimate(value, 0.05, covers=["sequences"]) for name, value in terms.items()}
    outside = {"missing": "outside the window, no prediction: it starts from initialisation"}
    headline = [
        {
            "arm": arm,
            "target": "induction_gap",
            "asked": {"value": -sign, "direction": "down" if sign > 0 else "up"},
            "solved": {**solved[arm]["predicted_response"]["induction_gap"], "covers": ["chains"], "share": 0.5},
            "predicted": outside,
            "checked": {**checked["induction_gap"], "covers": ["chains"]},
            "realised": {**lead["induction_gap"], "covers": ["seeds", "sequences"]},
            "parts": {name: {"realised": parts[name], "predicted": predicted[name]} for name in list(terms)[:2]},
            "cost": {"observable": "overall", "realised": parts["overall"]},
        }
        for arm, sign in (("plus", 1), ("minus", -1))
    ]
    write_json(
        run / "summary.json",
        {
            "name": "induction-small",
            "created": "2025-01-31T12:00:00Z",
            "seconds": {
                "data": 31.0,
                "baseline": 212.4,
                "sampling": 640.0,
                "response": 88.0,
                "weights": 4.2,
                "retrain": 1710.0,
            },
            "headline": headline,
            "metrics": {
                name: {"label": name.replace("_", " "), "unit": "nats", "meaning": "a loss", "scale": "linear"}
                for name in METRICS
            },
            "arms": {
                arm: {"seeds": list(range(seeds)), "weights": None if arm == "base" else arm, "strength": 1.0}
                for arm in ARMS
            },
            "contrasts": contrasts,
            "solved": {arm: entry["predicted_response"] for arm, entry in solved.items()},
            "cross_fitted": {arm: entry["cross_fitted_response"] for arm, entry in solved.items()},
            "predicted": {"plus": predicted},
            "checked": {"plus": checked},
            "realised": {arm: {**{o: lead[o] for o in OBSERVABLES}, **parts} for arm in ("plus", "minus", "permuted")},
            "transition_steps": transitions,
            "time_to_event": {arm: _time_to_event(arm) for arm in ARMS},
            "oracle_shares": {"plus": {"minus": {"prefix_matching": _estimate(0.4, 0.1)}}},
            "warnings": ["Component layer.1.head.1: 1 of 4 chains was left out."],
        },
    )


def _time_to_event(arm: str) -> dict[str, Any]:
    """Two runs of which one formed a head, and a test against base."""
    test = {"chi2": 4.0, "p": 0.0455, "hazard_ratio": {"value": 4.0, "interval": [1.1, 15.0]}}
    return {
        "runs": 2,
        "events": 1,
        "median": 2400,
        "median_interval": [2400, None],
        "censored_at": [4000],
        "not_reached": {"times": [2400], "share": [0.5], "low": [0.1], "high": [0.9]},
        "against": {} if arm == "base" else {"base": test},
    }


def write_run(run: Path, *, sequences: int = 40, length: int = 32, seeds: int = 2) -> Path:
    """Write a finished run into the new folder `run` and return it."""
    rng = np.random.default_rng(7)
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(
        "name: induction-small\nsampling:\n  inverse_temperature: 30.0\n  localization: 4.0\n"
    )
    write_json(
        run / "manifest.json",
        {
            "commit": "0123abc",
            "versions": {"python": "3.12.1", "torch": "2.13.0"},
            "seeds": {"baseline": 0, "retrain": [0, 1]},
        },
    )
    blocks = _data(run, sequences, length, rng)
    _metrics(run / "baseline/metrics.parquet", 0.0, 2250, rng)
    write_json(run / "baseline/evaluation.json", {"validation_loss": 4.31, "heads": {"best": "layer.1.head.1"}})
    write_posterior(run, blocks, rng)
    _weights(run, blocks, rng)
    _retraining(run, seeds, rng)
    return run
