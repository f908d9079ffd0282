"""The strength at which the solution is of a given size: Newton's method for the dual point and the strength together.

    grad f(nu) = s beta,     |h(nu)| / sqrt(n) = size

Both equations come out of one pass over the columns, and so do their derivatives: d/dnu of the first is the generalised
Hessian of f, and of the second Q h_free / (n size). From a start that is near, as one from a small sample is, the steps
converge quadratically, as of any semismooth Newton method (Qi & Sun, 1993). Where they do not, the strength is
bracketed: |h| grows with it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import scipy

from patterning_dist.response.bounded import RESIDUAL, Dual, Pass, minimise, steadied
from patterning_dist.response.moments import Floats

_STEPS = 20  # of Newton's method; each is to halve the miss, which then is rounding
_SIZE = 1e-12  # relative miss of the size that is rounding


class Reached(NamedTuple):
    """A strength, its dual point, the sums there, and Newton's steps on the way."""

    strength: float
    dual: Floats
    found: Pass
    num_iterations: int


def newton(problem: Dual, beta: Floats, size: float, strength: float, dual: Floats) -> Reached | None:
    """The strength at which sqrt(mean h^2) is `size`, from a strength and dual point that are near.

    None: a step does not halve what the equations miss by, before that is rounding.
    """
    before = np.inf
    for step in range(_STEPS):
        found = problem.evaluate(dual)
        here = float(np.sqrt(found.square))
        off, excess = found.gradient - strength * beta, here - size
        scale = strength * float(np.abs(beta).max())
        of_gradient, of_size = float(np.abs(off).max()), abs(excess) / size
        if of_gradient <= RESIDUAL * scale + 1e-15 * float(np.abs(dual).max()) and of_size <= _SIZE:
            return Reached(strength, dual, found, step)
        miss = max(of_gradient / scale, of_size)
        if not miss <= 0.5 * before or here == 0:
            return None
        before, curvature = miss, steadied(found.curvature)
        back, along = np.linalg.solve(curvature, np.column_stack([off, beta])).T
        slope = found.pull / here
        rate = float(slope @ along)
        if not rate > 0:
            return None
        more = (float(slope @ back) - excess) / rate
        strength, dual = strength + more, dual - back + more * along
        if not strength > 0:
            return None
    return None


def bracketed(problem: Dual, beta: Floats, size: float, upper: float, last: Floats) -> Reached:
    """The same, between 0 and a strength whose solution is at least as large, by minimisations from the last on."""
    identity, num_iterations = np.eye(len(beta)), 0

    def excess(strength: float) -> float:
        nonlocal last, num_iterations
        last, found, steps = minimise(problem, strength * beta, last, identity)
        num_iterations += steps
        return float(np.sqrt(found.square)) - size

    # Without bounds |h| is linear in the strength, so that its root is found in few steps.
    strength = scipy.optimize.brentq(excess, 0.0, upper, xtol=1e-12 * upper, rtol=1e-10)
    dual, found, steps = minimise(problem, strength * beta, last, identity)
    return Reached(strength, dual, found, num_iterations + steps)
