"""Subsets and models of a bank, one of ``transformers`` included that another tool wrote."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from study_models import make_study, study_config

from patterning_dist.data.bergson import read_subsets, write_subsets
from patterning_dist.errors import PatterningError
from patterning_dist.sampling.ranks import Ranks
from patterning_dist.stages.bank import draw_subsets
from patterning_dist.stages.validate import bank_models
from patterning_dist.tasks.open import open_task


def test_subsets_leave_out_as_many_and_every_sample_as_often() -> None:
    removed = draw_subsets(3, 50, 400, 0.7)
    assert {len(np.unique(ids)) for ids in removed} == {15}
    often = np.bincount(np.concatenate(removed), minlength=50)
    # 400 draws of .3: a standard error of 9.2, of 50 samples the largest within four of it.
    assert np.abs(often - 120).max() < 4 * 9.2
    assert [ids.tolist() for ids in draw_subsets(3, 50, 2, 0.7)] == [ids.tolist() for ids in removed[:2]]
    assert [len(ids) for share in (0.001, 0.999) for ids in draw_subsets(0, 50, 1, share)] == [49, 1]


def test_models_that_transformers_saved_are_a_bank(tmp_path: Path) -> None:
    """``retrained/subset_<i>`` by ``save_pretrained``, as bergson has them, load as checkpoints wherever they lie."""
    file = make_study(tmp_path)
    bank = tmp_path / "bank"
    for name, model in (("base", "early"), ("subset_0", "final"), ("subset_1", "early")):
        (bank / "retrained").mkdir(parents=True, exist_ok=True)
        (bank / "retrained" / name).symlink_to(tmp_path / "model" / model)
    write_subsets(bank, [np.array([1]), np.array([2])])
    models = bank_models(bank, len(read_subsets(bank, 40)))
    assert len(models) == 3 and len(set(models.values())) == 2
    (bank / "retrained" / "base").unlink()  # which the ranks of LDS need not
    assert list(bank_models(bank, 2)) == list(models)[1:]
    task = open_task(study_config(file), tmp_path / "run", "cpu")
    loaded, given = task.load(list(models)[1], Ranks()), task.load("final", Ranks())
    batch = task.train[torch.arange(3)]
    torch.testing.assert_close(task.losses(loaded, batch), task.losses(given, batch))
    with pytest.raises(PatterningError, match=r"subset_2: no \*.safetensors there"):
        bank_models(bank, 3)
