"""Split losses as signed means over masks of entries: those of the task, and functions of the user's own."""

from __future__ import annotations

import numpy as np

from patterning_dist.config.sampling import is_function
from patterning_dist.errors import PatterningError
from patterning_dist.functions import load_function
from patterning_dist.tasks.task import OwnSamples, Task, Terms


def split_terms(task: Task, split: str, samples: OwnSamples, ids: np.ndarray) -> Terms | None:
    """A split loss as signed means, (sign, mask [sample(, position)]) each; None: the task has no such split.

    A function gets a mapping of columns: what ``Task.index`` knows of samples [sample], what ``Task.entries`` knows of
    single losses [sample, position], and where the run cuts its text itself the ``text`` of every token, likewise. It
    returns booleans [sample] or [sample, position], the entries whose mean loss is the split; or numbers, of which
    those above 0 are the first and those below 0 the second term of a difference.

    Args:
        task: of the samples.
        split: of the task, or ``package.module:function``.
        samples: training samples of the task, or a held-out set.
        ids: of the samples that are asked for.

    Raises:
        PatterningError: the function cannot be imported, raises, or returns something else.
    """
    if not is_function(split):
        return task.split(split, samples, ids)
    function = load_function(split, "split")
    columns = task.index(samples, ids) | task.entries(samples, ids)
    if (texts := task.token_texts()) is not None and "token" in columns:
        columns["text"] = texts[columns["token"]]
    shape = (len(ids),) if task.num_positions is None else (len(ids), task.num_positions)
    try:
        signs = np.asarray(function(columns))
    except Exception as error:
        raise PatterningError(
            f"split {split!r} raised {type(error).__name__}: {error}; it gets the columns {', '.join(columns)}"
        ) from error
    if signs.shape == shape[:1] and len(shape) == 2:
        signs = np.broadcast_to(signs[:, None], shape)
    if signs.shape != shape or signs.dtype.kind not in "biuf" or not np.isfinite(signs).all():
        raise PatterningError(
            f"split {split!r} returned {signs.dtype} of shape {list(signs.shape)}; expected booleans or finite numbers "
            f"of shape {list(shape[:1])}" + (f" or {list(shape)}" if len(shape) == 2 else "")
        )
    counted = task.counted(samples, ids)
    masks = [signs] if signs.dtype.kind == "b" else [signs > 0, signs < 0]
    return [(s, mask if counted is None else mask & counted) for s, mask in zip((1.0, -1.0), masks, strict=False)]
