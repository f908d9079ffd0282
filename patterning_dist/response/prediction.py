"""Predicted responses with their errors over chains, naive and cross-fitted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy
from numpy.typing import ArrayLike

from patterning_dist.errors import PatterningError
from patterning_dist.response.moments import Floats


@dataclass(frozen=True)
class PredictedResponse:
    """(n_beta / n) chi h with its Monte-Carlo error, in the observables' units."""

    value: Floats  # observable
    standard_error: Floats  # observable
    interval: Floats  # observable low,high: from Student's t
    per_chain: Floats  # chain observable


def predicted_response_with_error(
    chi_per_chain: ArrayLike, weights: ArrayLike, inverse_temperature: float, *, level: float = 0.95
) -> PredictedResponse:
    """dmu = (n_beta / n) chi h, h = rho / mean(rho) - 1, Wang & Murfet 2601.13548, with its spread over
    chains.

    chi_per_chain: [chain, observable, sample]; weights rho: [sample], chosen WITHOUT these chains. If they
    were solved from the same chains the value is optimistic: h leans on the noise of chi that happened to
    help, and the same noise is counted again in the prediction (h = chi^T ... adds the noise's square). Use
    `cross_fitted_response` then. The error is NaN with one chain. Raises PatterningError for unlike shapes.

    Examples:
        >>> from patterning_dist import predicted_response_with_error
        >>> chi_per_chain = [[[-0.2, 0.0, 0.2]], [[-0.4, 0.0, 0.4]]]  # chain observable sample
        >>> found = predicted_response_with_error(chi_per_chain, [1.25, 1.0, 0.75], inverse_temperature=3.0)
        >>> found.value.round(3), found.standard_error.round(3)  # the chains say -0.1 and -0.2
        (array([-0.15]), array([0.05]))
    """
    chi, rho = np.asarray(chi_per_chain, np.float64), np.asarray(weights, np.float64)
    if chi.ndim != 3 or rho.shape != chi.shape[2:]:
        raise PatterningError(
            f"predicted response: got chi {chi.shape} and {rho.shape} weights, "
            "expected [chain, observable, sample] and one weight for each sample"
        )
    h = rho / rho.mean() - 1.0
    per_chain = inverse_temperature / len(h) * (chi @ h)
    error = np.full(chi.shape[1], np.nan)
    if len(chi) > 1:
        error = per_chain.std(axis=0, ddof=1) / np.sqrt(len(chi))
    return _summary(per_chain, error, len(chi) - 1, level)


def cross_fitted_response(
    chi_per_chain: ArrayLike,
    solve: Callable[[Floats], ArrayLike],
    inverse_temperature: float,
    *,
    level: float = 0.95,
) -> PredictedResponse:
    """Solve on one half of the chains, predict with the other, both ways; the mean over chains.

    chi_per_chain: [chain, observable, sample]; `solve` maps chi [observable, sample] to weights rho [sample]. Each
    chain is predicted with weights that never saw it, so the value is unbiased for the response to weights solved from
    half of the chains. Weights from all chains are less noisy, so for those it errs on the low side.

    The error is the spread inside the halves, counted as if both ways were one measurement: where noise dominates they
    nearly are (both come down to chi_a . chi_b), and treating them as independent covers too little. Student t with
    chains - 2 degrees of freedom; NaN with two chains. PatterningError with fewer than 2.

    Examples:
        >>> from patterning_dist import cross_fitted_response, solve_weights
        >>> chains = [[[-0.2, 0.0, 0.2]], [[0.0, -0.2, 0.2]]] * 2  # halves that agree on sample 2 alone
        >>> solve = lambda chi: solve_weights(chi, [-0.1], inverse_temperature=3.0).weights
        >>> cross_fitted_response(chains, solve, inverse_temperature=3.0).value.round(3)  # half of the -0.1 was noise
        array([-0.05])
    """
    chi = np.asarray(chi_per_chain, np.float64)
    if chi.ndim != 3 or len(chi) < 2:
        raise PatterningError(f"cross-fitting: got chi {chi.shape}, expected [chain, observable, sample] with 2 chains")
    per_chain = np.empty(chi.shape[:2])
    squares, widening = np.zeros(chi.shape[1]), 0.0
    even = np.arange(len(chi)) % 2 == 0
    for half in (even, ~even):
        weights = solve(chi[half].mean(axis=0))
        predicted = predicted_response_with_error(chi[~half], weights, inverse_temperature).per_chain
        per_chain[~half] = predicted
        squares += ((predicted - predicted.mean(axis=0)) ** 2).sum(axis=0)
        widening += 0.5 / np.sqrt(len(predicted))
    dof = len(chi) - 2
    error = np.sqrt(squares / dof) * widening if dof else np.full(chi.shape[1], np.nan)
    return _summary(per_chain, error, dof, level)


def _summary(per_chain: Floats, error: Floats, dof: int, level: float) -> PredictedResponse:
    value = per_chain.mean(axis=0)
    width = scipy.special.stdtrit(dof, (1 + level) / 2) * error if dof else error
    return PredictedResponse(value, error, np.stack([value - width, value + width], axis=-1), per_chain)
