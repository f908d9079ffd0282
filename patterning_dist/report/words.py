"""Numbers and names as a reader wants to see them."""

from __future__ import annotations

import math
from typing import Any

from patterning_dist.report.reading import interval_of

METRICS = {
    "prefix_matching": (
        "Prefix-matching score",
        "share of attention",
        "the strongest head's attention to what followed this token before",
    ),
    "induction_gap": ("Induction gap", "nats", "loss on induction tokens minus loss on the rest"),
    "repeated_gap": (
        "Repeated-sequence gap",
        "nats",
        "loss on the second minus the first half of repeated random sequences",
    ),
    "validation_loss": ("Validation loss", "nats", "mean loss on held-out text"),
    "in_context_gap": ("In-context gap", "nats", "loss late minus loss early in the context"),
    "induction_loss": ("Loss on induction tokens", "nats", "mean loss on induction tokens"),
    "rest_loss": ("Loss on the rest", "nats", "mean loss on all other tokens"),
    "train_loss": ("Training loss", "nats", "mean loss on the training batches"),
}
COMPARED = ("prefix_matching", "induction_gap", "repeated_gap", "validation_loss")


def label(metric: str) -> str:
    """What a metric is called on the page."""
    return METRICS[metric][0] if metric in METRICS else metric.replace("_", " ").capitalize()


def unit(metric: str) -> str:
    """The unit a metric is measured in; empty for one that is not known here."""
    if metric in METRICS:
        return METRICS[metric][1]
    return "nats" if metric.endswith(("_loss", "_gap", "loss")) else ""


def in_sentence(metric: str) -> str:
    """A metric's name in the middle of a sentence."""
    name = label(metric)
    return f"the {name[0].lower()}{name[1:]}"


def number(value: Any, digits: int = 3, decimals: int | None = None, sign: bool = False) -> str:
    """A number in words: a true minus, thousands separated, no false precision; a dash for none."""
    if value is None or isinstance(value, str) or not math.isfinite(value):
        return "–" if value is None or value != value else str(value)
    if decimals is not None:
        text = f"{value:,.{decimals}f}"
    elif value == 0:
        text = "0"
    elif abs(value) >= 10 ** (digits - 1):
        text = f"{value:,.0f}"
    elif abs(value) < 1e-4:
        text = f"{value:.{digits - 1}e}".replace("e-0", "e-")
    else:
        text = f"{value:.{digits}g}"
    if sign and value > 0:
        text = f"+{text}"
    return text.replace("-", "−")


def estimate(value: dict[str, Any] | None, sign: bool = False) -> str:
    """Value and interval on one line, with as many decimals as the interval can bear."""
    if not value or value.get("value") is None:
        return "–"
    interval = interval_of(value)
    if interval is None or not math.isfinite(value["value"]):
        return number(value["value"], sign=sign)
    width = interval[1] - interval[0]
    decimals = min(7, max(0, math.ceil(-math.log10(width)) + 1)) if width > 0 else 3
    ends = ",\u00a0".join(number(end, decimals=decimals) for end in interval)
    return f"{number(value['value'], decimals=decimals, sign=sign)}\u00a0[{ends}]"


def clear(value: dict[str, Any] | None) -> int:
    """+1 or -1 when the interval lies on one side of zero, else 0 (also when there is no interval)."""
    interval = interval_of(value)
    if interval is None:
        return 0
    return 1 if interval[0] > 0 else -1 if interval[1] < 0 else 0


def effect(metric: str, value: dict[str, Any]) -> str:
    """What happened to a metric, claimed no further than its interval goes."""
    amount = (
        f"{estimate(value, sign=True)} {unit(metric)}".strip() if unit(metric) == "nats" else estimate(value, sign=True)
    )
    if interval_of(value) is None:
        return f"{in_sentence(metric)} moved by {amount} (no interval, so it cannot be told from chance)"
    if not clear(value):
        return f"no clear effect on {in_sentence(metric)} ({amount})"
    return f"{'raised' if clear(value) > 0 else 'lowered'} {in_sentence(metric)} ({amount})"


def listed(parts: list[str]) -> str:
    """a, b and c."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}" if parts else ""


def duration(seconds: float) -> str:
    """Seconds as s, min or h."""
    if seconds < 120:
        return f"{number(seconds)} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
