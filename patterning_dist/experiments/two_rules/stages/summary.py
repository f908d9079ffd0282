"""Every headline number of the parentheses experiment, with its interval, from the files of the run."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import scipy

from patterning_dist.experiments.two_rules.config import ParenthesesConfig
from patterning_dist.experiments.two_rules.stages.references import EQUAL_COUNT, NESTED, read_references
from patterning_dist.experiments.two_rules.stages.retrain import weighted_arms
from patterning_dist.experiments.two_rules.task import COMPONENT
from patterning_dist.measure.results import table_name
from patterning_dist.response.coupled import free_energy_slope
from patterning_dist.response.paired import mean_interval
from patterning_dist.stages.check import read_coupled
from patterning_dist.storage.files import read_parquet

# Shares of networks that are named, by the share of out-of-distribution strings that they reject.
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
    for name, described in ({"plain": plain} | solution["rounds"]).items():
        networks = folder / "baseline" if name == "plain" else folder / "rounds" / name
        rejected = _behaviour(networks)["rejected"]
        references = [asdict(reference) for reference in read_references(networks)]
        found.append(
            described
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
    """How the LLC and the free energy of held-out references answer to the weights, predicted and measured.

    Of the LLC that is lambda(s) - lambda(0), of the free energy the slope dF/ds at s, from chains under the weights of
    s alone: no part of either is what linear response predicts. Coupled chains, see ``response.coupled``. ``predicted``
    is the linear response at the references that the weights were solved from, ``linear`` that at the held-out ones,
    ``difference`` what was measured less ``linear``. Intervals are over references.
    """
    references = list(enumerate(read_references(folder / "baseline")))
    arms = json.loads((folder / "weights" / "solution.json").read_text())["arms"]
    rows = []
    for rule in (NESTED, EQUAL_COUNT):
        names = [
            f"{rule}-{number}" for number, reference in references if reference.is_held_out and reference.rule == rule
        ]
        for strength in sorted(config.check.strengths):
            promised = arms[NESTED if strength > 0 else EQUAL_COUNT]["predicted"]
            pairs = [_response(config, folder, name, strength) for name in names]
            for quantity, scale in (("llc", abs(strength)), ("free_energy", 1.0)):
                linear, measured = np.array([pair[quantity] for pair in pairs]).T
                rows.append(
                    {
                        "rule": rule,
                        "strength": strength,
                        "quantity": quantity,
                        "predicted": mean_with_interval(
                            scale * np.array(promised[f"{quantity}_{rule}"]["per_solution"])
                        ),
                        "linear": mean_with_interval(linear),
                        "measured": mean_with_interval(measured),
                        "difference": mean_with_interval(measured - linear),
                    }
                )
    return rows


def read_diagnostics(folder: Path, file: str) -> dict[str, dict[str, Any]]:
    """Diagnostics by subject, of a file in response/."""
    return json.loads((folder / "response" / file).read_text())["subjects"]


def mean_with_interval(values: np.ndarray) -> dict[str, Any]:
    """Mean and 95 % Student interval; None as the interval of one value."""
    return {"value": float(values.mean()), "interval": mean_interval(values)}


def _share(rejected: np.ndarray, bound: float) -> dict[str, Any]:
    """Share of networks beyond a bound, with its exact interval."""
    hits = int((rejected < bound).sum() if bound < 0.5 else (rejected > bound).sum())
    exact = scipy.stats.binomtest(hits, len(rejected)).proportion_ci(0.95, method="exact")
    return {"value": hits / len(rejected), "interval": [float(exact.low), float(exact.high)]}


def _behaviour(folder: Path) -> dict[str, np.ndarray]:
    table, _ = read_parquet(folder / "networks.parquet", ("seed", "train", "test", "rejected"))
    return {name: table[name].to_numpy() for name in table.column_names}


def _response(config: ParenthesesConfig, folder: Path, name: str, strength: float) -> dict[str, tuple[float, float]]:
    """(linear, measured) of one reference: change of the LLC from 0, and slope of the free energy at the strength."""
    llc, free_energy = (f"chi_{quantity.name}" for quantity in config.sampling.posterior_quantities)
    table = read_parquet(folder / table_name(name), (llc, free_energy, "center_loss"))[0]
    file = folder / "weights" / f"{NESTED if strength > 0 else EQUAL_COUNT}.parquet"
    h = read_parquet(file, ("relative_weight",))[0]["relative_weight"].to_numpy() - 1
    along = {column: float(table[column].to_numpy().astype(float) @ h / len(h)) for column in table.column_names}
    traces = read_coupled(folder, {0.0: name, strength: f"{name}@{strength:+g}"})
    n_beta, size = config.sampling.resolve(COMPONENT).inverse_temperature, abs(strength)
    own, (loss, *_) = traces[strength]["loss"], config.sampling.observable_names
    slope = free_energy_slope(own, traces[strength][loss], size, n_beta, along["center_loss"], mean_weight=1.0)
    return {
        "llc": (n_beta * size * along[llc], n_beta * float((own - traces[0.0]["loss"]).mean())),
        "free_energy": (n_beta * along[free_energy], float(slope.mean())),
    }
