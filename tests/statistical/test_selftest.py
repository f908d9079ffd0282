"""The selftest finds what others wrote, says so in a line, and does not pass with a sampler, a kernel or a chi that is wrong."""

from __future__ import annotations

import math

import pytest
from typer.testing import CliRunner

from patterning_dist.cli import app
from patterning_dist.response.moments import CoMoments
from patterning_dist.sampling import sgld
from patterning_dist.sampling import window as flow
from patterning_dist.selftest import chi, llc, print_checks, runner, window
from patterning_dist.selftest.check import Check

STEP = sgld.step_


def softest_is_left_out():
    """The two quickest posteriors of the stretched Gaussian."""
    return (check for check in list(llc.stretched_gaussian())[2:])


def noise_times(factor):
    def step_(state, gradient, noise, **options):
        return STEP(state, gradient, {name: factor * z for name, z in noise.items()}, **options)

    return step_


def uphill(state, gradient, noise, **options):
    return STEP(state, {name: -g for name, g in gradient.items()}, noise, **options)


def without_localization(state, gradient, noise, *, center, **options):
    return STEP(state, gradient, noise, center=state.position, **options)
