"""The selftest finds what others wrote, and fails with a sampler, a chi or a window that is wrong."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from typer.testing import CliRunner

from patterning_dist import selftest
from patterning_dist.cli import app
from patterning_dist.sampling import sgld
from patterning_dist.sampling import window as flow
from patterning_dist.selftest import chi, llc, window
from patterning_dist.selftest.check import Check

STEP, RESPONSES, SUSCEPTIBILITY = sgld.step_, flow.responses, chi.susceptibility


def quick():
    """The two stretched Gaussians whose chains are short."""
    return itertools.islice(llc.stretched_gaussian(), 2)


def noise_times(factor):
    return lambda state, gradient, noise, **options: STEP(
        state, gradient, {name: factor * z for name, z in noise.items()}, **options
    )


def uphill(state, gradient, noise, **options):
    return STEP(state, {name: -g for name, g in gradient.items()}, noise, **options)


def without_localization(state, gradient, noise, *, center, **options):
    return STEP(state, gradient, noise, center=state.position, **options)


WRONG = {"hot": noise_times(1.1), "cold": noise_times(0.9), "uphill": uphill, "free": without_localization}


@pytest.mark.slow
@pytest.mark.extended
def test_the_whole_of_it():
    result = CliRunner().invoke(app, ["selftest"])
    assert result.exit_code == 0 and result.stdout.count("\nok") == 18, result.stdout


def test_the_command_says_a_line_each(monkeypatch):
    monkeypatch.setattr(selftest, "print_checks", lambda: selftest.runner.print_checks((quick, window.windows)))
    result = CliRunner().invoke(app, ["selftest"])
    lines = result.stdout.splitlines()
    assert result.exit_code == 0 and [line[:8].strip() for line in lines[1:-1]] == ["ok"] * 4, result.stdout
    assert "gamma 100 t" in lines[1] and "0.8002" in lines[1] and lines[1].endswith(" s")
    assert lines[-1].startswith("all ok")


@pytest.mark.parametrize("step", WRONG.values(), ids=WRONG)
def test_a_wrong_sampler_fails(monkeypatch, capsys, step):
    monkeypatch.setattr(sgld, "step_", step)
    assert selftest.print_checks((quick,)) == 1
    assert "FAILED" in capsys.readouterr().out


def test_a_chain_that_blows_up_is_a_line_too(monkeypatch, capsys):
    monkeypatch.setattr(sgld, "step_", noise_times(float("inf")))
    assert selftest.print_checks((llc.reduced_rank, quick)) == 1
    printed = capsys.readouterr().out
    assert "FAILED  reduced_rank: none of 2 chains came through" in printed and "FAILED  quick: none" in printed


def test_chi_of_a_gaussian_and_a_wrong_one(monkeypatch):
    real, kept = chi.sample_copies, []

    def once(*arguments, **options):
        if not kept:
            kept.append(real(*arguments, **options))
        return kept[0]

    monkeypatch.setattr(chi, "sample_copies", once)
    assert all(check.ok for check in chi.gaussian())

    def halved(*arguments, **options):
        right = SUSCEPTIBILITY(*arguments, **options)
        return dataclasses.replace(right, chi=0.5 * right.chi)

    monkeypatch.setattr(chi, "susceptibility", halved)
    assert not any(check.ok for check in chi.gaussian())


def test_a_window_of_another_length_fails(monkeypatch):
    def longer(values, steps, *end):
        return RESPONSES(values, dataclasses.replace(steps, factors=np.ones(3 * len(steps.factors) // 2)), *end)

    monkeypatch.setattr(flow, "responses", longer)
    assert not any(check.ok for check in window.windows())


@pytest.mark.parametrize(
    ("found", "error", "allowance", "ok"),
    [
        (2.1, 0.03, 0.0, True),
        (1.9, 0.01, 0.07, True),
        (2.2, 0.03, 0.07, False),
        (2.0, 0.2, 0.0, False),
        (float("nan"), 0.1, 0.0, False),
        (2.0, float("nan"), 0.0, False),
        (2.0, 0.0, float("inf"), False),
    ],
)
def test_verdicts(found, error, allowance, ok):
    """Within four standard errors and the allowance, of which together no more than a quarter is a test."""
    assert Check("x", 2.0, found, error, allowance).ok is ok
