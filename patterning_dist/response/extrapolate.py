"""From probe tokens to a whole pool: regression of chi on token features."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from patterning_dist.errors import PatterningError
from patterning_dist.response.moments import Floats
from patterning_dist.response.reliability import Correlation, bootstrap_correlation

NUM_FOLDS = 5


@dataclass(frozen=True)
class Extrapolation:
    """Scores for the pool, and how well held-out probe sequences were predicted."""

    predictions: Floats  # pool sample
    held_out: Floats  # probe sample: predicted by the fold that did not see its sequence
    correlation: Correlation  # held_out with scores; 95 % interval from resampling sequences


def extrapolate(
    features: ArrayLike,
    scores: ArrayLike,
    sequence_ids: ArrayLike,
    pool_features: ArrayLike,
    *,
    seed: int,
) -> Extrapolation:
    """Gradient-boosted trees from token features to chi, scored on sequences they did not see.

    features: [probe, feature], scores: [probe], sequence_ids: [probe], pool_features: [pool, feature]. Folds
    are whole sequences, since tokens of one sequence share noise. The correlation is with *noisy* scores: it
    cannot pass sqrt(reliability) of the scores even if the prediction is perfect. Deterministic given `seed`.
    Raises PatterningError for unlike shapes, scores that are not finite, or fewer sequences than folds.
    """
    features, pool = np.asarray(features, np.float64), np.asarray(pool_features, np.float64)
    scores, groups = np.asarray(scores, np.float64), np.asarray(sequence_ids)
    if features.ndim != 2 or pool.ndim != 2 or features.shape[1] != pool.shape[1]:
        raise PatterningError(
            f"extrapolation: features {features.shape} and {pool.shape}, expected two matrices with the same columns"
        )
    if scores.shape != (len(features),) or groups.shape != scores.shape or not np.isfinite(scores).all():
        raise PatterningError(
            f"extrapolation: expected {len(features)} finite scores and sequence ids, one for each row of features"
        )
    if len(np.unique(groups)) < NUM_FOLDS:
        raise PatterningError(
            f"extrapolation: {len(np.unique(groups))} sequences, expected at least {NUM_FOLDS}; use a larger probe"
        )
    # Half a second to import, which every start of the driver would pay.
    from sklearn.ensemble import HistGradientBoostingRegressor
    from sklearn.model_selection import GroupKFold, cross_val_predict

    # Early stopping would hold out tokens of sequences it also trains on.
    model = HistGradientBoostingRegressor(early_stopping=False, random_state=seed)
    folds = GroupKFold(NUM_FOLDS, shuffle=True, random_state=seed)
    held_out = cross_val_predict(model, features, scores, groups=groups, cv=folds)
    return Extrapolation(
        model.fit(features, scores).predict(pool),
        held_out,
        bootstrap_correlation(held_out, scores, groups, seed),
    )
