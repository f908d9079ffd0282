"""Steps of an optimizer with momentum where the loss has one curvature: what every gradient moves their end by.

See ``sampling.window``, of whose equation this is one eigenvalue.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Steps:
    """Some of the steps of a training, one after the other.

    Attributes:
        factors: f_t [step].
        before: steps that came before them.
        momentum: b.
    """

    factors: np.ndarray
    before: int = 0
    momentum: float = 0.0

    @property
    def numbers(self) -> np.ndarray:
        """t [step], from 1 on."""
        return self.before + 1 + np.arange(len(self.factors))


def responses(
    values: np.ndarray, steps: Steps, of_position: float = 1.0, of_momentum: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """What the end of the steps, c w_T + d m_T, gains for a unit of the gradient at step s, and for one of m_0.

    A step followed for its length, as the module has it, is one of size f_t (1 - exp(-z)) / z, z = (1 - b) f_t x / (1 -
    b^t); the recursion is run backward, so that all s come of one.

    Args:
        values: x.
        steps: of the training.
        of_position: c.
        of_momentum: d.

    Returns:
        k [step, value] and J [value].

    Examples:
        >>> k, _ = responses(np.array([0.0, 1e9]), Steps(factors=np.ones(3)))  # a flat direction and a stiff one
        >>> k.round(3) + 0.0  # the flat one moves by minus the sum of all gradients, the stiff one has forgotten them
        array([[-1.,  0.],
               [-1.,  0.],
               [-1.,  0.]])
    """
    x, b = np.asarray(values, float), steps.momentum
    position, momentum = np.full_like(x, of_position), np.full_like(x, of_momentum)
    sizes = steps.factors / (1 - b**steps.numbers)
    found = np.empty((len(sizes), len(x)))
    for number in reversed(range(len(sizes))):
        size = sizes[number]
        impulse = momentum - size * _mean_decay((1 - b) * size * x) * position
        found[number] = (1 - b) * impulse
        position = position + x * found[number]
        momentum = b * impulse
    return found, momentum


def spread_kernel(values: np.ndarray, steps: Steps, a_pass: float) -> np.ndarray:
    """V(x) = sum_s k_s^2 - sum over passes (sum over the steps s of a pass of k_s)^2 / E.

    Minibatches of a pass of E steps add up to the population, so that their noise is that of a sum that is fixed.
    """
    found, _ = responses(values, steps)
    _, begins = np.unique((steps.numbers - 1) // a_pass, return_index=True)
    shared = (np.add.reduceat(found, begins) ** 2).sum(axis=0)
    return np.maximum((found**2).sum(axis=0) - shared / a_pass, 0.0)


def _mean_decay(x: np.ndarray) -> np.ndarray:
    """(1 - exp(-x)) / x, 1 at x = 0."""
    small = np.abs(x) < 1e-8
    return np.where(small, 1 - x / 2, -np.expm1(-x) / np.where(small, 1.0, x))
