"""Ridge regression in one pass: sums of products of features and a target, merged and solved afterwards."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from patterning_dist.response.moments import Floats


@dataclass
class Products:
    """Sums over rows of what ridge regression needs, float64.

    Attributes:
        count: number of rows.
        total: sum of (features, target) [feature + 1].
        square: sum of their products [feature + 1, feature + 1].
    """

    count: int
    total: Floats
    square: Floats

    @classmethod
    def empty(cls, num_features: int) -> Products:
        """Of no rows."""
        size = num_features + 1
        return cls(0, np.zeros(size), np.zeros((size, size)))

    def update(self, features: Floats, target: Floats) -> None:
        """Take in rows, features [row, feature] and target [row]."""
        rows = np.column_stack([features, target]).astype(np.float64)
        self.count += len(rows)
        self.total += rows.sum(axis=0)
        self.square += rows.T @ rows

    def __add__(self, other: Products) -> Products:
        return Products(self.count + other.count, self.total + other.total, self.square + other.square)

    def covariance(self) -> Floats:
        """Of features and target [feature + 1, feature + 1]."""
        mean = self.total / self.count
        return self.square / self.count - np.outer(mean, mean)


@dataclass(frozen=True)
class Ridge:
    """y = intercept + x . coefficients."""

    coefficients: Floats  # feature
    intercept: float
    penalty: float

    def predict(self, features: Floats) -> Floats:
        """[row] of features [row, feature]."""
        return features @ self.coefficients + self.intercept


def fit_ridge(products: Products, penalty: float) -> Ridge:
    """argmin_{b,c} mean (y - c - x . b)^2 + penalty sum_j var(x_j) b_j^2, a penalty in units of the features' spread.

    Args:
        products: of the rows to fit.
        penalty: > 0, without unit.
    """
    covariance = products.covariance()
    scale = np.sqrt(np.diag(covariance)[:-1])
    inverse = np.divide(1.0, scale, out=np.zeros_like(scale), where=scale > 0)  # a constant feature says nothing
    correlation = covariance[:-1, :-1] * np.outer(inverse, inverse)
    solved = np.linalg.solve(correlation + penalty * np.eye(len(scale)), covariance[:-1, -1] * inverse)
    coefficients = solved * inverse
    mean = products.total / products.count
    return Ridge(coefficients, float(mean[-1] - mean[:-1] @ coefficients), penalty)


def mean_squared_error(products: Products, ridge: Ridge) -> float:
    """mean (y - c - x . b)^2 over the rows of ``products``."""
    weights = np.append(-ridge.coefficients, 1.0)
    mean = products.total / products.count
    return float(weights @ products.covariance() @ weights + (mean @ weights - ridge.intercept) ** 2)


def choose_ridge(fitted: Products, held_back: Products, penalties: Floats) -> Ridge:
    """The ridge of both together, at the penalty whose fit to the first has the least error on the second."""
    errors = [mean_squared_error(held_back, fit_ridge(fitted, penalty)) for penalty in penalties]
    return fit_ridge(fitted + held_back, float(penalties[int(np.argmin(errors))]))


def grouped_correlation(
    predicted: Floats, target: Floats, groups: np.ndarray, num_resampled: int = 1000
) -> tuple[float, list[float]]:
    """Pearson's r, and the middle 95 % of it where whole groups are drawn again with replacement.

    Args:
        predicted: [row].
        target: [row].
        groups: rows of a group are not independent [row].
        num_resampled: bootstrap samples.
    """
    _, group = np.unique(groups, return_inverse=True)
    x, y = predicted - predicted.mean(), target - target.mean()
    columns = (np.ones_like(x), x, y, x * x, y * y, x * y)
    sums = np.stack([np.bincount(group, column) for column in columns], axis=1)  # group, column
    drawn = np.random.default_rng(0).multinomial(len(sums), np.full(len(sums), 1 / len(sums)), num_resampled)
    low, high = np.quantile(_correlations(drawn.astype(np.float64) @ sums), [0.025, 0.975])
    return float(_correlations(sums.sum(axis=0))), [float(low), float(high)]


def _correlations(sums: Floats) -> Floats:
    """r from sums of 1, x, y, x^2, y^2 and xy [..., 6]; 0 where one of the two does not vary."""
    count, x, y, xx, yy, xy = np.moveaxis(sums, -1, 0)
    spread = np.sqrt(np.maximum(xx - x * x / count, 0) * np.maximum(yy - y * y / count, 0))
    return np.divide(xy - x * y / count, spread, out=np.zeros_like(spread), where=spread > 0)
