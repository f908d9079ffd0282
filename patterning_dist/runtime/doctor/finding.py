"""What a check found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """One line of the doctor.

    Attributes:
        check: what was looked at.
        state: ``ok``; ``warning``: runs work, but something should be known; ``broken``: runs will fail.
        text: what is there and, unless it is ok, what to do.
    """

    check: str
    state: Literal["ok", "warning", "broken"]
    text: str
