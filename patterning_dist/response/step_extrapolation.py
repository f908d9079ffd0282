"""Answers at step size 0, from those at two step sizes, 2 a(eps/2) - a(eps) (Richardson 1911).

Without accept and reject an answer is a + b eps + O(eps^2): on a Gaussian direction of precision P the variance is
1 / (P (1 - eps P / 4)) (``sgld``, and ``sgnht`` up to a common factor).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from patterning_dist.errors import PatterningError
from patterning_dist.response.failure_modes import CHANCE
from patterning_dist.response.llc import TraceMean
from patterning_dist.response.moments import Floats
from patterning_dist.response.susceptibility import Susceptibility

Answer = TypeVar("Answer", TraceMean, Susceptibility)


@dataclass(frozen=True)
class StepExtrapolation(Generic[Answer]):
    """One answer at two step sizes, and what follows.

    Attributes:
        coarse, fine: a(eps) and a(eps / 2).
        extrapolated: 2 a(eps/2) - a(eps).
        bias: a(eps) - a(eps/2): what eps / 2 is off by to first order, and half of what eps is.
    """

    coarse: Answer
    fine: Answer
    extrapolated: Answer
    bias: Answer

    @property
    def bias_ratio(self) -> Floats:
        """What eps is off by, 2 bias, in standard errors of a(eps); NaN where that has none."""
        bias, error = 2 * np.asarray(_value(self.bias)), np.asarray(self.coarse.standard_error)
        return np.divide(bias, error, out=np.full_like(bias, np.nan), where=error > 0)

    @property
    def is_biased(self) -> NDArray[np.bool_]:
        """Whether that is more than one standard error of a(eps), and more than chance makes it (once in 1,000)."""
        low, high = map(np.asarray, self.bias.interval(1 - CHANCE))
        return (np.abs(self.bias_ratio) > 1) & ((low > 0) | (high < 0))


def step_extrapolated(coarse: Answer, fine: Answer) -> StepExtrapolation[Answer]:
    """2 a(eps/2) - a(eps) and a(eps) - a(eps/2), with errors that add: the two sets of chains are independent.

    Args:
        coarse: of chains at eps; an LLC or another mean of a trace, or susceptibilities.
        fine: of chains of another seed at eps / 2, with twice the burn-in and the steps between draws.

    Raises:
        PatterningError: answers of unlike shapes or baselines.

    Examples:
        >>> from patterning_dist import step_extrapolated
        >>> from patterning_dist.response.llc import TraceMean
        >>> coarse, fine = TraceMean(5.4, 0.03, 50.0), TraceMean(5.2, 0.04, 50.0)  # LLCs with their errors
        >>> found = step_extrapolated(coarse, fine)
        >>> round(found.extrapolated.value, 3), round(found.extrapolated.standard_error, 3)  # eps made it 0.4 too large
        (5.0, 0.085)
    """
    mine, other = ((np.shape(_value(one)), getattr(one, "baseline", None)) for one in (coarse, fine))
    if mine != other:
        raise PatterningError(f"fine: shape and baseline {other}, expected {mine} as at eps; measure both alike")
    return StepExtrapolation(coarse, fine, _sum(2, fine, -1, coarse), _sum(-1, fine, 1, coarse))


def _value(answer: TraceMean | Susceptibility) -> Any:
    return answer.value if isinstance(answer, TraceMean) else answer.chi


def _sum(a: int, x: Any, b: int, y: Any) -> Any:
    """a x + b y of independent x and y; degrees of freedom by Welch & Satterthwaite, third cumulants add."""

    def error(kind: str = "standard_error") -> Floats:
        return np.hypot(a * getattr(x, kind), b * getattr(y, kind))

    known, variance = error() > 0, np.where(error() > 0, error(), 1.0) ** 2
    of_x, of_y = (a * x.standard_error) ** 2 / variance, (b * y.standard_error) ** 2 / variance
    degrees = 1 / np.where(known, of_x**2 / x.degrees_of_freedom + of_y**2 / y.degrees_of_freedom, 1.0)
    if isinstance(x, TraceMean):
        return TraceMean(a * x.value + b * y.value, float(error()), float(degrees))
    skewness = np.sign(a) * of_x**1.5 * x.skewness / np.sqrt(x.num_batches)
    skewness = skewness + np.sign(b) * of_y**1.5 * y.skewness / np.sqrt(y.num_batches)
    num_batches, num_chains = x.num_batches + y.num_batches, min(len(x.chains), len(y.chains))
    errors = {f"standard_error{kind}": error(f"standard_error{kind}") for kind in ("", "_batch", "_between")}
    return replace(
        x,
        chi=a * x.chi + b * y.chi,
        degrees_of_freedom=degrees,
        skewness=skewness * np.sqrt(num_batches),
        num_batches=num_batches,
        chi_per_chain=a * x.chi_per_chain[:num_chains] + b * y.chi_per_chain[:num_chains],
        chains=x.chains[:num_chains],
        **errors,
    )
