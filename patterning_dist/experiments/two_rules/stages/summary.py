"""Every headline number of the parentheses experiment, with its interval, from the files of the run."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binomtest

from patterning_dist.aggregation.files import read_chains
from patterning_dist.experiments.two_rules.config import ParenthesesConfig
from patterning_dist.experiments.two_rules.stages.references import EQUAL_COUNT, NESTED, read_references
from patterning_dist.experiments.two_rules.stages.retrain import weighted_arms
from patterning_dist.experiments.two_rules.task import COMPONENT
from patterning_dist.measure.results import table_name
from patterning_dist.stages.arms import interval
from patterning_dist.storage.files import read_parquet

# Shares of networks that are told, by the share of out-of-distribution strings that they reject.
_SHARES = {"above_half": 0.5, "clean_nested": 0.9, "clean_equal_count": 0.1}


def summarise_arms(config: ParenthesesConfig, folder: Path) -> dict[str, Any]:
    """What the networks of every arm do, and how they differ from base, network by network.

    Means have 95 % Student intervals over networks, shares of networks exact (Clopper-Pearson) binomial ones.
    """
    tables = {arm: _behaviour(folder / "retrain" / arm) for arm in ("base", *weighted_arms(config))}
    base, found = tables["base"]["rejected"], {}
    for arm, table in tables.items():
        rejected, number = table["rejected"], len(table["rejected"])
        found[arm] = {
            "num_networks": number,
            "rejected": mean_with_interval(rejected) | {"per_seed": rejected.tolist()},
            "difference_from_base": mean_with_interval(rejected - base[:number]),
            "train_accuracy_min": float(table["train"].min()),
            "test_accuracy_min": float(table["test"].min()),
            "num_imperfect_on_train": int((table["train"] < 1).sum()),
            "first_symbol": mean_with_interval(table["rejected_close"] - table["rejected_open"]),
            **{name: _share(rejected, bound) for name, bound in _SHARES.items()},
        }
    return found


def summarise_contrasts(folder: Path) -> list[dict[str, Any]]:
    """Differences between arms, network by network: against controls, and between ways to make the weights."""
    pairs = [(f"{kind}{rule}", "permuted") for kind in ("", "llc_") for rule in (NESTED, EQUAL_COUNT)]
    for rule in (NESTED, EQUAL_COUNT):
        pairs += [(rule, f"{kind}_{rule}") for kind in ("loss", "free_energy", "llc")]
        pairs += [(f"{kind}_{rule}", rule) for kind in ("online", "one_phase")]
    found = []
    for arm, other in pairs:
        first, second = (_behaviour(folder / "retrain" / name)["rejected"] for name in (arm, other))
        number = min(len(first), len(second))
        difference = mean_with_interval(first[:number] - second[:number])
        found.append({"arm": arm, "other": other, "num_networks": number, "difference": difference})
    return found


def summarise_rounds(folder: Path) -> list[dict[str, Any]]:
    """What the networks of every online round do, the plain ones first, and how reliable their direction is."""
    solution = json.loads((folder / "weights" / "solution.json").read_text())
    plain = {"reliability": solution["reliability"], "correlation_with_score": None}
    found = []
    for name, told in ({"plain": plain} | solution["rounds"]).items():
        networks = folder / "baseline" if name == "plain" else folder / "rounds" / name
        rejected = _behaviour(networks)["rejected"]
        references = [asdict(reference) for reference in read_references(networks)]
        found.append(
            told
            | {
                "round": name,
                "num_networks": len(rejected),
                "rejected": mean_with_interval(rejected),
                "references": references,
            }
        )
    return found


def summarise_llc(folder: Path) -> dict[str, Any]:
    """LLC of the references of either rule: mean with an interval over networks, and every network with its own."""
    diagnostics = read_diagnostics(folder, "diagnostics.json")
    found: dict[str, Any] = {}
    for number, reference in enumerate(read_references(folder / "baseline")):
        entry = diagnostics[f"{reference.rule}-{number}"]["llc"]
        found.setdefault(reference.rule, {"per_network": []})["per_network"].append(
            {"rejected": reference.rejected} | {key: entry[key] for key in ("value", "interval")}
        )
    for rule in found.values():
        rule |= mean_with_interval(np.array([entry["value"] for entry in rule["per_network"]]))
    return found


def summarise_check(config: ParenthesesConfig, folder: Path) -> list[dict[str, Any]]:
    """LLC and free energy, predicted by linear response and measured under the weights of every strength.

    The free energy is not measured itself, but its slope along the weights is, see ``_slope``. Its change from 0 to s
    is the integral of the slope, by the trapezoid rule over the strengths on the way. Intervals are over the references
    that were measured again, the same ones for prediction and measurement.
    """
    n_beta = config.sampling.resolve(COMPONENT).inverse_temperature
    references = list(enumerate(read_references(folder / "baseline")))
    rows = []
    for rule in dict.fromkeys(reference.rule for _, reference in references):
        names = [f"{r.rule}-{number}" for number, r in references if r.rule == rule][: config.check.per_rule]
        for side in (-1, 1):
            strengths = sorted((s for s in config.check.strengths if s * side > 0), key=abs)
            measured = [_along(config, folder, name, strengths, n_beta) for name in names]
            for position, strength in enumerate(strengths):
                for quantity in ("llc", "free_energy"):
                    pairs = np.array([entry[quantity][position] for entry in measured])
                    rows.append(
                        {
                            "rule": "nested" if rule == NESTED else rule,
                            "strength": strength,
                            "quantity": quantity,
                            "predicted": mean_with_interval(pairs[:, 0]),
                            "measured": mean_with_interval(pairs[:, 1]),
                            "difference": mean_with_interval(pairs[:, 1] - pairs[:, 0]),
                        }
                    )
    return rows


def read_diagnostics(folder: Path, file: str) -> dict[str, dict[str, Any]]:
    """Diagnostics by subject, of a file in response/."""
    return json.loads((folder / "response" / file).read_text())["subjects"]


def mean_with_interval(values: np.ndarray) -> dict[str, Any]:
    """Mean and 95 % Student interval; None as the interval of one value."""
    return {"value": float(values.mean()), "interval": interval(values)}


def _share(rejected: np.ndarray, bound: float) -> dict[str, Any]:
    """Share of networks beyond a bound, with its exact interval."""
    hits = int((rejected < bound).sum() if bound < 0.5 else (rejected > bound).sum())
    exact = binomtest(hits, len(rejected)).proportion_ci(0.95, method="exact")
    return {"value": hits / len(rejected), "interval": [float(exact.low), float(exact.high)]}


def _behaviour(folder: Path) -> dict[str, np.ndarray]:
    table, _ = read_parquet(folder / "networks.parquet", ("seed", "train", "test", "rejected"))
    return {name: table[name].to_numpy() for name in table.column_names}


def _along(
    config: ParenthesesConfig, folder: Path, name: str, strengths: list[float], n_beta: float
) -> dict[str, list[tuple[float, float]]]:
    """(predicted, measured) change of LLC and free energy of one reference at strengths of one sign, outwards."""
    names = [f"chi_{quantity.name}" for quantity in config.sampling.posterior_quantities]
    plain, _ = read_parquet(folder / table_name(name), names)
    llc, free_energy = (plain[chi].to_numpy().astype(np.float64) for chi in names)
    diagnostics = read_diagnostics(folder, "diagnostics.json")
    realised = read_diagnostics(folder, "realised.json")
    base = diagnostics[name]["llc"]["value"]
    found: dict[str, list[tuple[float, float]]] = {"llc": [], "free_energy": []}
    at, slope, integral = 0.0, None, 0.0
    for strength in strengths:
        weights = read_parquet(folder / "weights" / f"strength_{strength:+g}.parquet", ("relative_weight",))[0]
        h = weights["relative_weight"].to_numpy() - 1
        unit = h / strength  # dh/ds: weights move along one line
        scale = n_beta / len(h)
        if slope is None:
            slope = scale * float(free_energy @ unit)
        changed = f"{name}@{strength:+g}"
        here = _slope(folder, changed, h, unit, n_beta)
        integral += 0.5 * (slope + here) * (strength - at)
        at, slope = strength, here
        found["llc"].append((scale * float(llc @ h), realised[changed]["llc"]["value"] - base))
        found["free_energy"].append((scale * float(free_energy @ h), integral))
    return found


def _slope(folder: Path, name: str, h: np.ndarray, unit: np.ndarray, n_beta: float) -> float:
    """dF/ds = (n_beta / n) sum_i (dh_i/ds) <l_i> at a strength, from chains under its weights."""
    chains, _ = read_chains(folder / "sampling" / name)
    table, _ = read_parquet(folder / table_name(name), ("center_loss",))
    deviation = np.mean([chain.total().mean_loss for chain in chains], axis=0)
    weighted = deviation + table["center_loss"].to_numpy()  # the chains measure (1 + h_i) l_i
    return float(n_beta / len(h) * (weighted @ (unit / (1 + h))))
