"""Every weakness of a run is said, with the knob to turn, and a sound run is not complained about."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny_run import tiny_config

from patterning_dist.measure.warnings import find_warnings


def diagnostics(draws: float | None = 400, reliability: float = 0.6, **finding: Any) -> dict[str, Any]:
    numbers = {"rhat": 1.0, "ess_bulk": draws, "reliability": reliability}
    component = {"excluded": [], "observables": {"induction": numbers}, "findings": [finding] if finding else []}
    return {
        "subjects": {"layer.0.head.0": component, "layer.0.head.1": component},
        "modes": {"baseline": {"observable": "induction", "components": ["layer.0.head.0", "layer.0.head.1"]}},
    }


def solve(residual: float = 1e-4, negative: bool = False) -> dict[str, Any]:
    return {"num_iterations": 3, "relative_residual": residual, "negative_curvature": negative}


def found(tiny_run: Path, evidence: dict[str, Any], *solves: dict[str, Any]) -> list[str]:
    config = tiny_config(tiny_run, "retrain.seeds=[0,1,2]")
    return find_warnings(evidence, {"conjugate_gradients": list(solves)}, {}, config)


def test_a_sound_run_has_none(tiny_run: Path) -> None:
    assert found(tiny_run, diagnostics(), solve()) == []


def test_chains(tiny_run: Path) -> None:
    evidence = diagnostics(draws=12, mode="still_rising", message="the loss still rises; raise sampling.burn_in")
    lines = found(tiny_run, evidence)
    assert lines[0] == (
        "layer.0.head.0: the loss still rises; raise sampling.burn_in. as few as 12 effective draws of an observable; "
        "raise sampling.num_draws"
    )
    assert len(lines) == 2


def test_an_undefined_number_of_draws_is_no_reason_to_crash(tiny_run: Path) -> None:
    assert found(tiny_run, diagnostics(draws=None)) == []


def test_excluded_chain(tiny_run: Path) -> None:
    evidence = diagnostics()
    evidence["subjects"]["layer.0.head.0"] |= {
        "excluded": [{"chain": 2, "reason": "the loss became nan"}],
        "findings": [{"mode": "diverged", "message": "left out: chain 2: the loss became nan"}],
    }
    # Both heads share the dictionary.
    lines = found(tiny_run, evidence)
    assert lines == [f"layer.0.head.{h}: chain 2 was left out: the loss became nan" for h in (0, 1)]


def test_a_direction_of_another_size_than_the_plain_covariance(tiny_run: Path) -> None:
    config = tiny_config(tiny_run, "retrain.seeds=[0,1,2]")

    def lines(*interval: float, key: str = "estimator_agreement") -> list[str]:
        entry = {"slope_samples": 1.4, "slope_interval_samples": list(interval), "slope_entries": 1.0}
        return find_warnings(diagnostics(), {"conjugate_gradients": [], key: {"induction": entry}}, {}, config)

    assert lines(0.9, 1.9) == []
    [line] = lines(1.2, 1.6)
    assert line.startswith("induction: the plain covariance is 1.40 [1.20, 1.60] times the response direction on the")
    [line] = lines(1.2, 1.6, key="control_agreement")
    assert line.startswith("induction: the plain covariance is 1.40 [1.20, 1.60] times the linear control's on the")


def test_modes_of_noise(tiny_run: Path) -> None:
    (line,) = found(tiny_run, diagnostics(reliability=0.05))
    assert "0.05 at best" in line and "noise" in line


def test_response_directions(tiny_run: Path) -> None:
    lines = found(tiny_run, diagnostics(), solve(), solve(residual=0.5), solve(residual=0.5, negative=True))
    assert "curves downwards in 1 of 3" in lines[0] and "raise sampling.localization" in lines[0]
    assert "up to 0.5, wanted 0.001" in lines[1]


def test_few_seeds(tiny_run: Path) -> None:
    config = tiny_config(tiny_run, "retrain.seeds=[0]")
    assert "1 retraining seed(s) of base, plus, minus, permuted" in find_warnings(diagnostics(), {}, {}, config)[-1]


def test_a_study_without_weights_and_arms_is_judged_by_its_chains_alone(tiny_run: Path) -> None:
    config = tiny_config(tiny_run).model_copy(update={"solve": None, "retrain": None})
    assert find_warnings(diagnostics(), {}, {}, config) == []
    assert len(find_warnings(diagnostics(draws=12), {}, {}, config)) == 2


def test_a_check_that_refutes_the_linear_response(tiny_run: Path) -> None:
    config = tiny_config(tiny_run, "retrain.seeds=[0,1,2]")
    linear = {"induction": {"value": -1.0, "standard_error": 0.3}}
    solution = {"conjugate_gradients": [], "arms": {"plus": {"predicted_response": linear}}}

    def lines(value: float) -> list[str]:
        # Half widths of 1.96 * 0.4 and 1.96 * 0.3 make 0.98, whatever Student's t the first has.
        interval = [value - 1.96 * 0.4, value + 1.96 * 0.4]
        entry = {"value": value, "standard_error": 0.25, "interval": interval, "predicted": -1.0}
        checked = {"weights": "plus", "strengths": {"+1": {"induction": entry, "loss": entry}}}
        return find_warnings(diagnostics(), solution, checked, config)

    assert lines(-0.03) == []
    (line,) = lines(-0.01)
    assert "strength +1" in line and "induction (-1 predicted, -0.01 measured)" in line and "loss" not in line
