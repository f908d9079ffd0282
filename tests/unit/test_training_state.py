"""The state of a training survives as bytes, bit for bit, and nothing in it is unpickled."""

from __future__ import annotations

import math
from datetime import date

import pytest
import torch

from patterning_dist.errors import PatterningError
from patterning_dist.training.state import decode, encode


def test_state_comes_back_bit_for_bit():
    whole = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    state = {
        "module": {"whole": whole, "shares its memory": whole[2:4], "turned": whole.T},
        "optimizer": {"state": {0: {"step": torch.tensor(3.0), "mean": whole.bfloat16()}, 1: {}}},
        "groups": [{"betas": (0.9, 0.98), "lr": 0.1 + 0.2, "muon": False, "closure": None}],
        "rows": [{"step": 0, "train_loss": float("nan")}],
        "empty": torch.zeros(0),
    }
    back = decode(encode(state))
    for name, tensor in state["module"].items():
        assert torch.equal(back["module"][name], tensor)
    assert back["optimizer"]["state"].keys() == {0, 1}
    assert back["optimizer"]["state"][0]["step"].shape == ()
    assert back["optimizer"]["state"][0]["mean"].dtype == torch.bfloat16
    assert torch.equal(back["optimizer"]["state"][0]["mean"], whole.bfloat16())
    assert back["groups"] == state["groups"]
    assert math.isnan(back["rows"][0]["train_loss"])
    assert back["empty"].shape == (0,)


def test_what_would_have_to_be_pickled_is_refused():
    with pytest.raises(PatterningError, match="the state holds a date, which a checkpoint cannot"):
        encode({"optimizer": [date(2020, 1, 1)]})
