"""Every weakness of a run is said, with the knob to turn, and a sound run is not complained about."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny_run import tiny_config

from patterning_dist.stages.warnings import find_warnings


def diagnostics(rhat: float | None = 1.0, draws: float = 400, reliability: float = 0.6) -> dict[str, Any]:
    numbers = {"rhat": rhat, "ess_bulk": draws, "reliability": reliability}
    component = {"excluded": [], "observables": {"induction": numbers}}
    return {
        "components": {"layer.0.head.0": component, "layer.0.head.1": component},
        "modes": {"observable": "induction", "components": ["layer.0.head.0", "layer.0.head.1"]},
    }


def solve(residual: float = 1e-4, negative: bool = False) -> dict[str, Any]:
    return {"num_iterations": 3, "relative_residual": residual, "negative_curvature": negative}


def found(tiny_run: Path, evidence: dict[str, Any], *solves: dict[str, Any]) -> list[str]:
    config = tiny_config(tiny_run, "retrain.seeds=[0,1,2]")
    return find_warnings(evidence, {"conjugate_gradients": list(solves)}, config)


def test_a_sound_run_has_none(tiny_run: Path) -> None:
    assert found(tiny_run, diagnostics(), solve()) == []


def test_chains(tiny_run: Path) -> None:
    lines = found(tiny_run, diagnostics(rhat=1.2, draws=12))
    assert lines[0].startswith("layer.0.head.0: R-hat up to 1.20")
    assert "raise sampling.burn_in" in lines[0] and "12 effective draws" in lines[0]
    assert len(lines) == 2


def test_an_undefined_rhat_is_no_reason_to_crash(tiny_run: Path) -> None:
    assert found(tiny_run, diagnostics(rhat=None)) == []


def test_excluded_chain(tiny_run: Path) -> None:
    evidence = diagnostics()
    evidence["components"]["layer.0.head.0"] |= {"excluded": [{"chain": 2, "reason": "the loss became nan"}]}
    assert found(tiny_run, evidence)[0] == "layer.0.head.0: chain 2 was left out: the loss became nan"


def test_modes_of_noise(tiny_run: Path) -> None:
    (line,) = found(tiny_run, diagnostics(reliability=0.05))
    assert "0.05 at best" in line and "noise" in line


def test_response_directions(tiny_run: Path) -> None:
    lines = found(tiny_run, diagnostics(), solve(), solve(residual=0.5), solve(residual=0.5, negative=True))
    assert "curves downwards in 1 of 3" in lines[0] and "raise sampling.localization" in lines[0]
    assert "up to 0.5, wanted 0.001" in lines[1]


def test_few_seeds(tiny_run: Path) -> None:
    config = tiny_config(tiny_run, "retrain.seeds=[0]")
    assert "1 retraining seed(s)" in find_warnings(diagnostics(), {}, config)[-1]
