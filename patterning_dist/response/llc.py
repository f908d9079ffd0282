"""The local learning coefficient, and how it and the free energy respond to the weights of the samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from patterning_dist.errors import PatterningError
from patterning_dist.response.arviz import array_stats
from patterning_dist.response.batch_means import (
    batch_mean,
    covariance_of_means,
    degrees_of_freedom,
    product_mean,
    student_interval,
)
from patterning_dist.response.diagnostics import checked_trace
from patterning_dist.response.moments import CoMoments, Floats, Moments
from patterning_dist.response.susceptibility import Susceptibility, check_chains, combine_chains, contrast, normalised


class TraceMean(NamedTuple):
    """A mean over draws and chains, its Monte-Carlo standard error, and the degrees of freedom of that error."""

    value: float
    standard_error: float
    degrees_of_freedom: float

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """value -+ t * standard error with Student's t, wider than 1.96 where chains are few or short.

        Examples:
            >>> from patterning_dist import trace_mean
            >>> low, high = trace_mean([[1.0] * 10, [3.0] * 10]).interval()
            >>> round(low, 1), round(high, 1)  # 2 -+ t, which of two chains is 12.7 and not 1.96
            (-10.7, 14.7)
        """
        low, high = student_interval(self.value, self.standard_error, self.degrees_of_freedom, level)
        return float(low), float(high)


def trace_mean(values: ArrayLike) -> TraceMean:
    """Mean of a scalar trace [chain, draw].

    The standard error is the larger of the one inside chains (effective sample size) and the spread between chains /
    sqrt(chains).

    Raises:
        PatterningError: fewer than 4 draws a chain, or values that are not finite.

    Examples:
        >>> from patterning_dist import trace_mean
        >>> stuck = trace_mean([[1.0] * 10, [3.0] * 10])  # two chains that stay where they are
        >>> stuck.value, stuck.standard_error  # the error is their disagreement, however many the draws
        (2.0, 1.0)
    """
    trace = checked_trace("losses", np.asarray(values, np.float64))
    num_chains = len(trace)
    varying = [chain[None] for chain in trace if np.ptp(chain)]
    inside = sum(float(array_stats().mcse(chain, method="mean")) ** 2 for chain in varying) / num_chains**2
    between = trace.mean(axis=1).var(ddof=1) / num_chains if num_chains > 1 else np.nan
    # The variance inside a chain sums autocovariances up to a lag of about 2 autocorrelation times tau. Such a sum over
    # T draws has a relative variance of about 8 tau / T (Sokal 1997), as a chi-square with T / (4 tau) degrees has.
    effective = sum(float(array_stats().ess(chain, method="mean")) for chain in varying)
    degrees = degrees_of_freedom(inside, between, max(effective / 4, 1.0), num_chains)
    return TraceMean(float(trace.mean()), float(np.sqrt(np.fmax(inside, between))), float(degrees))


def llc(losses: ArrayLike, inverse_temperature: float, burn_in: int = 0) -> TraceMean:
    """lambda = n_beta E[L(w) - L(w*)], Lau et al. 2308.12108.

    losses: [chain, draw] of L(w) - L(w*) in nats; the first `burn_in` draws of each chain are left out. The
    standard error is that of the sampling: w* is given, and L is the mean over the probe.

    Raises PatterningError for fewer than 4 draws a chain after burn-in and for losses that are not finite.

    Examples:
        >>> from patterning_dist import llc
        >>> n_beta, rng = 100.0, np.random.default_rng(0)
        >>> losses = rng.chisquare(6, size=(4, 2000)) / (2 * n_beta)  # of a regular minimum of 6 parameters
        >>> found = llc(losses, n_beta)
        >>> round(found.value, 1), round(found.standard_error, 2)  # half of the 6
        (3.0, 0.02)
    """
    mean = trace_mean(np.asarray(losses, np.float64)[..., burn_in:])
    return TraceMean(
        inverse_temperature * mean.value, inverse_temperature * mean.standard_error, mean.degrees_of_freedom
    )


def llc_response(
    chains: Sequence[CoMoments],
    observable: int,
    inverse_temperature: float,
    *,
    loss_weights: ArrayLike | None = None,
    min_chains: int = 1,
    excluded: Mapping[int, str] | None = None,
) -> Susceptibility:
    """chi_i = <l_i - L> - (l_i - L)(w*) - n_beta Cov(L, l_i - L), a row for the solver like any other.

    Scaled so that d lambda / d h_i = (n_beta / n) chi_i with rho_i = 1 + h_i and lambda = n_beta (<L_rho> - L_rho(w*)),
    Lau et al. 2308.12108. The covariance is how the posterior moves; the first two terms are how L_rho itself changes.
    They are of opposite sign and cancel for a regular quadratic without localisation; the covariance alone, chi of a
    component loss times n_beta, can have the wrong sign. `CoMoments` hold deviations l_i(w) - l_i(w*), so the first two
    terms are the mean deviation of l_i less that of L. w* is held fixed.

    Args:
        chains: healthy chains whose row `observable` is L(w) - L(w*), a component loss over the samples of L.
        observable: index of that row.
        inverse_temperature: n_beta of the chains.
        loss_weights: [probe] of L, as in ``susceptibility``; chi sums to zero over the samples of L.
        min_chains: as in ``susceptibility``.
        excluded: as in ``susceptibility``.

    Returns:
        chi [1, probe] in nats, with errors from the same batches and chains as those of ``susceptibility``.

    Raises:
        PatterningError: as in ``susceptibility``, or the row is not the mean of the probe losses with these weights.

    Examples:
        >>> from patterning_dist import CoMoments, llc_response
        >>> n_beta, rng = 100.0, np.random.default_rng(0)
        >>> chain = CoMoments.empty(chain=0, num_draws=20000, num_observables=1, num_probes=2)
        >>> squares = np.sqrt(rng.gamma(0.25, size=(20000, 1)) / n_beta)  # w^2, of the posterior of L = w^4
        >>> chain.update(squares**2, squares**2 + squares * [1, -1])  # L, and two samples that lean towards +-w^2
        >>> (100 * llc_response([chain], 0, n_beta).chi).round(1)  # +-<w^2> / 2: of w^2 the LLC is higher
        array([[ 1.7, -1.7]])
    """
    check_chains(chains, min_chains, excluded)
    weights = normalised(loss_weights, chains[0].mean_loss.shape[1])
    parts = []
    for moments in chains:
        row = _row(moments, observable)
        _check_is_mean_loss(row, weights)
        total = row.total()

        def statistic(part: Moments, total: Moments = total) -> Floats:
            covariance = product_mean(part, total.mean_phi, total.mean_loss)
            return contrast(part.mean_loss[None] - inverse_temperature * covariance, weights)

        found = batch_mean(row, statistic)
        parts.append((found.mean - inverse_temperature * contrast(covariance_of_means(row), weights), found))
    return combine_chains(chains, parts, excluded=excluded)


def free_energy_response(
    chains: Sequence[CoMoments],
    center_losses: ArrayLike,
    *,
    loss_weights: ArrayLike | None = None,
    min_chains: int = 1,
    excluded: Mapping[int, str] | None = None,
) -> Susceptibility:
    """chi_i = <l_i - L>, a row for the solver like any other.

    Scaled so that dF / d h_i = (n_beta / n) chi_i, F = -log integral exp(-n_beta L_rho - gamma/2 |w - w*|^2) dw. A mean
    and no covariance, so far less noisy than ``llc_response``. Between two solutions U and V of equal loss the log
    posterior odds of U move by -(dF_U - dF_V), and F_U - F_V is (lambda_U - lambda_V) log n to leading order.

    Args:
        chains: healthy chains.
        center_losses: [probe] l_i(w*) in nats, which the deviations in ``CoMoments`` leave out.
        loss_weights: [probe] of L, as in ``susceptibility``; chi sums to zero over the samples of L.
        min_chains: as in ``susceptibility``.
        excluded: as in ``susceptibility``.

    Returns:
        chi [1, probe] in nats.

    Raises:
        PatterningError: as in ``susceptibility``, or `center_losses` are not finite or of another length.

    Examples:
        >>> from patterning_dist import CoMoments, free_energy_response
        >>> chain = CoMoments.empty(chain=0, num_draws=160, num_observables=1, num_probes=2)
        >>> chain.update(np.zeros((160, 1)), np.tile([[0.01, 0.0], [0.03, 0.0]], (80, 1)))
        >>> free_energy_response([chain], center_losses=[1.0, 1.0]).chi.round(3)  # weight on sample 0 counts against w*
        array([[ 0.01, -0.01]])
    """
    check_chains(chains, min_chains, excluded)
    num_probes = chains[0].mean_loss.shape[1]
    weights = normalised(loss_weights, num_probes)
    at_center = np.asarray(center_losses, np.float64)
    if at_center.shape != (num_probes,) or not np.isfinite(at_center).all():
        raise PatterningError(
            f"center_losses: expected {num_probes} finite losses l_i(w*), one for each probe column, "
            f"got shape {at_center.shape}; pass the center_losses of the same chains"
        )

    def statistic(part: Moments) -> Floats:
        return contrast(part.mean_loss[None] + at_center, weights)

    spreads = [batch_mean(moments, statistic) for moments in chains]
    return combine_chains(chains, [(spread.mean, spread) for spread in spreads], excluded=excluded)


def _row(moments: CoMoments, observable: int) -> CoMoments:
    """The moments of one observable alone (views)."""
    num_observables = moments.mean_phi.shape[1]
    if not 0 <= observable < num_observables:
        raise PatterningError(
            f"observable {observable}: chain {moments.chain} has observables 0 to {num_observables - 1}; "
            "give the row of the component loss"
        )
    row = slice(observable, observable + 1)
    return replace(
        moments,
        mean_phi=moments.mean_phi[:, row],
        m2_phi=moments.m2_phi[:, row],
        comoment=moments.comoment[:, row],
    )


def _check_is_mean_loss(row: CoMoments, weights: Floats) -> None:
    """Cov(L, l_i) is only known if L was an observable: its batch means must be those of the probe losses."""
    given, wanted = row.mean_phi[:, 0], row.mean_loss @ weights
    size = np.sqrt((row.m2_phi.sum() + (row.count * given**2).sum()) / row.num_recorded)
    # Losses may have been rounded to float32 on their way here; another set of samples differs by far more.
    off = np.abs(given - wanted)[row.count > 0].max()
    if off > 1e-3 * size:
        raise PatterningError(
            f"chain {row.chain}: the observable is not the mean probe loss (a batch mean is off by {off:.2g} of "
            f"{size:.2g} nats); give the row of a component_loss observable and the loss_weights of its mean"
        )
