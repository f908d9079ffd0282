"""Susceptibilities with Monte-Carlo errors, from the co-moments of healthy chains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from patterning_dist.errors import PatterningError
from patterning_dist.response.moments import CoMoments, Floats, Moments, merge_moments


@dataclass(frozen=True)
class Susceptibility:
    """chi and its standard errors, in units of the observable times nats."""

    chi: Floats  # observable probe
    standard_error: Floats  # observable probe: the larger of the two below
    standard_error_batch: Floats  # observable probe: batch means inside chains
    standard_error_between: Floats  # observable probe: spread between chains, NaN with one chain
    chi_per_chain: Floats  # chain observable probe
    chains: tuple[int, ...]
    baseline: str
    excluded: Mapping[int, str] = field(default_factory=dict)  # chain -> reason


def susceptibility(
    chains: Sequence[CoMoments],
    *,
    loss_weights: ArrayLike | None = None,
    baseline: Literal["restricted", "full"] = "restricted",
    full: Sequence[CoMoments] | None = None,
    min_chains: int = 1,
    excluded: Mapping[int, str] | None = None,
) -> Susceptibility:
    """chi_i = -Cov(phi, l_i - L), Wang & Murfet 2601.13548; or with two posteriors, Baker et al. 2504.18274.

    `restricted`: covariance per chain with 1/(T-1), then the plain mean over chains.
    `full`: -( E_C[phi (l_i - L)] - E_C[phi] E_full[l_i - L] ), every E a plain mean over chains and draws;
    `full` holds the chains of the unrestricted posterior (on the same probe columns), and may be `chains`
    itself. Feeding l_i as a deviation from l_i(w*) changes neither: the constant leaves E_C[phi l_i] -
    E_C[phi] E_full[l_i]. A constant in phi does change `full`, so phi must be phi(w) - phi(w*) there, as
    Baker et al. have it.

    L = sum_m w_m l_m with w = `loss_weights` [probe] normalised to sum 1 (default: uniform); give 0 to
    columns that are not to be averaged. If w is uniform over a set of columns, every row of chi sums to zero
    over that set. Standard errors: batch means inside chains, and the spread between chains over
    sqrt(chains); the larger, entry by entry. A 95 % interval is chi +- 1.96 standard errors. Both bear on
    Monte-Carlo noise: covariance about a chain's own mean is low by a relative (autocorrelation time /
    draws), and by more where chains have not mixed (see R-hat).

    Raises PatterningError with fewer than `min_chains` chains (naming `excluded`, chain -> reason), for
    chains of unlike shapes, fewer than two draws, and weights that are negative, all zero or of another
    length.
    """
    excluded = dict(excluded or {})
    if len(chains) < max(min_chains, 1):
        reasons = "; ".join(f"chain {chain} excluded: {reason}" for chain, reason in excluded.items())
        raise PatterningError(
            f"{len(chains)} healthy chains, expected at least {max(min_chains, 1)} (min_chains)"
            f"{': ' + reasons if reasons else ''}; mend what stopped them or lower min_chains"
        )
    if baseline not in ("restricted", "full"):
        raise PatterningError(f"baseline: got {baseline!r}, expected 'restricted' or 'full'")
    if baseline == "full" and not full:
        raise PatterningError("baseline: 'full' needs the chains of the whole model; sample component 'everything'")
    _check_shapes(chains, full or ())
    weights = _normalised(loss_weights, chains[0].mean_loss.shape[1])

    if baseline == "restricted":
        parts = []
        for moments in chains:
            total = moments.total()
            unbiased = total.count / (total.count - 1)
            mean, variance = _product_mean(moments, weights, total.mean_phi, total.mean_loss)
            parts.append((-unbiased * mean, unbiased**2 * variance))
        shares = np.full(len(chains), 1 / len(chains))
        baseline_variance: Floats | float = 0.0
    else:
        assert full is not None
        pooled_mean = _pooled(full).mean_loss
        mean_phi = _pooled(chains).mean_phi
        # Chains that serve as their own baseline are centred in phi as well: the sum is the same, and the
        # baseline's noise then cancels where it should instead of being counted as if it were independent.
        same = len(full) == len(chains) and all(a is b for a, b in zip(full, chains, strict=True))
        center = mean_phi if same else np.zeros_like(mean_phi)
        parts = [_product_mean(moments, weights, center, pooled_mean) for moments in chains]
        parts = [(-mean, variance) for mean, variance in parts]
        counts = np.array([moments.num_recorded for moments in chains], np.float64)
        shares = counts / counts.sum()
        baseline_variance = 0.0 if same else mean_phi[:, None] ** 2 * _mean_contrast_variance(full, weights)

    chi_per_chain = np.stack([mean for mean, _ in parts])
    batch = np.sqrt(sum(s**2 * v for s, (_, v) in zip(shares, parts, strict=True)) + baseline_variance)
    between = np.full_like(batch, np.nan)
    if len(chains) > 1:
        between = np.sqrt(chi_per_chain.var(axis=0, ddof=1) / len(chains) + baseline_variance)
    return Susceptibility(
        chi=np.tensordot(shares, chi_per_chain, 1),
        standard_error=np.fmax(batch, between),
        standard_error_batch=batch,
        standard_error_between=between,
        chi_per_chain=chi_per_chain,
        chains=tuple(moments.chain for moments in chains),
        baseline=baseline,
        excluded=excluded,
    )


def _contrast(values: Floats, weights: Floats) -> Floats:
    """values of l_i -> values of l_i - L; probe is the last axis."""
    return values - (values @ weights)[..., None]


def _product_mean(
    moments: CoMoments, weights: Floats, phi_center: Floats, loss_center: Floats
) -> tuple[Floats, Floats]:
    """Mean over draws of (phi - phi_center)(x - x_center), x = l - L, and its variance by batch means."""
    mean: Floats | float = 0.0
    used = np.flatnonzero(moments.count)

    def batch_mean(index: int) -> Floats:
        part = moments.batch(index)
        product = np.outer(part.mean_phi - phi_center, part.mean_loss - loss_center)
        return _contrast(part.comoment / part.count + product, weights)

    # Two passes over the batches, so that memory stays that of one batch.
    for index in used:
        mean = mean + moments.count[index] / moments.num_recorded * batch_mean(index)
    mean = np.asarray(mean)
    if len(used) < 2:
        return mean, np.full_like(mean, np.nan)
    spread = sum(moments.count[index] * (batch_mean(index) - mean) ** 2 for index in used)
    return mean, spread / ((len(used) - 1) * moments.num_recorded)


def _mean_contrast_variance(chains: Sequence[CoMoments], weights: Floats) -> Floats:
    """Variance of the pooled mean of l_i - L: by batch means or between chains, the larger. [probe]"""
    total = sum(moments.num_recorded for moments in chains)
    batch: Floats | float = 0.0
    means = []
    for moments in chains:
        used = np.flatnonzero(moments.count)
        count = moments.count[used].astype(np.float64)
        values = _contrast(moments.mean_loss[used], weights)
        means.append(count @ values / count.sum())
        scale = (len(used) - 1) * count.sum() or np.nan
        batch = batch + (count.sum() / total) ** 2 * (count @ (values - means[-1]) ** 2) / scale
    between = np.var(means, axis=0, ddof=1) / len(means) if len(means) > 1 else np.nan
    return np.fmax(batch, between)


def _pooled(chains: Sequence[CoMoments]) -> Moments:
    merged = chains[0].total()
    for moments in chains[1:]:
        merged = merge_moments(merged, moments.total())
    return merged


def _check_shapes(chains: Sequence[CoMoments], full: Sequence[CoMoments]) -> None:
    observables, probes = chains[0].comoment.shape[1:]
    # Only the mean losses of the baseline's chains are used: their observables may be others.
    for moments, wanted in [*((m, observables) for m in chains), *((m, m.mean_phi.shape[1]) for m in full)]:
        got = (moments.mean_phi.shape[1], moments.mean_loss.shape[1])
        if got != (wanted, probes):
            raise PatterningError(
                f"chain {moments.chain}: {got[0]} observables and {got[1]} probe columns, expected "
                f"{wanted} and {probes} as in chain {chains[0].chain}; "
                "sample all chains with the same observables and probe set"
            )
        if moments.num_recorded < 2:
            raise PatterningError(
                f"chain {moments.chain}: {moments.num_recorded} draws, expected at least 2; sample it again"
            )


def _normalised(weights: ArrayLike | None, num_probes: int) -> NDArray[np.float64]:
    if weights is None:
        return np.full(num_probes, 1 / num_probes)
    weights = np.asarray(weights, np.float64)
    if weights.shape != (num_probes,) or not np.isfinite(weights).all() or (weights < 0).any() or not weights.any():
        raise PatterningError(
            f"loss_weights: expected {num_probes} finite weights >= 0 that are not all 0, one for each probe column"
        )
    return weights / weights.sum()
