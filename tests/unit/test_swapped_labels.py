"""On the posterior, pairs whose labels a table swaps are pairs written the other way round."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from swapped_pairs import NUM, swapped_pairs

from patterning_dist.measure.subject import Subject
from patterning_dist.sampling.ranks import Ranks
from patterning_dist.stages.sample import open_subjects
from patterning_dist.stages.train import arm_jobs


def test_a_gradient_under_swapped_labels_is_that_of_exchanged_pairs(tmp_path: Path) -> None:
    found = []
    for exchanged in (False, True):
        config, run = swapped_pairs(tmp_path / str(exchanged), exchanged)
        (job,) = arm_jobs(config, run)  # copies the table
        table = str(job.weights.relative_to(run.path))
        subject = Subject("final", "everything", stream="own", weights=table)
        opener = open_subjects(config, run.location, "cpu")
        subjects = opener.weighted({"own": subject, "half": replace(subject, strength=0.5)}, table)("cpu", Ranks())
        parts = [subjects.target(name).gradient(np.arange(NUM))[1] for name in ("own", "half")]
        found.append([torch.cat([g.flatten() for g in part.values()]) for part in parts])
    (own, half), (exchanged_own, exchanged_half) = found
    torch.testing.assert_close(own, exchanged_own, rtol=1e-4, atol=1e-7)
    # At half the strength a swapped pair of weight -w has (1 - w) / 2, not (1 + w) / 2 of its exchanged self.
    assert (half - exchanged_half).abs().max() > 1e-3
