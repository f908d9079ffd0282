"""One published number, what this machine finds for it, and whether the two agree."""

from __future__ import annotations

from dataclasses import dataclass

SIGMAS = 4.0  # of the standard error: chance alone passes it once in 16,000 checks
LOOSEST = 0.25  # of the expected value: a check with a wider tolerance could not fail, and counts as failed


@dataclass(frozen=True)
class Check:
    """One line.

    Attributes:
        name: of the quantity, with its source.
        expected: the number that others wrote, or a closed form.
        found: by this package's estimators, from its own chains or trainings.
        standard_error: of ``found``.
        allowance: what ``found`` may be off by beyond chance: the bias of finite steps, or what a claim leaves open.
    """

    name: str
    expected: float
    found: float
    standard_error: float
    allowance: float = 0.0

    @property
    def tolerance(self) -> float:
        """How far ``found`` may lie from ``expected``."""
        return SIGMAS * self.standard_error + self.allowance

    @property
    def ok(self) -> bool:
        """Whether they agree; never where the tolerance is too wide to tell, or not finite."""
        return abs(self.found - self.expected) <= self.tolerance <= LOOSEST * abs(self.expected)
