"""The bytes of a chain's checkpoint hold all of its state, to the bit, and nothing of another form gets into them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from language_targets import language_target, language_task
from safetensors import SafetensorError
from safetensors.torch import save

from patterning_dist.errors import PatterningError
from patterning_dist.sampling.chain import Chain, ChainSettings
from patterning_dist.sampling.posterior import Posterior
from patterning_dist.sampling.samplers import Sampler
from patterning_dist.sampling.statistics import PositionMeans
from patterning_dist.training.state import decode, encode

torch.set_num_threads(1)

VOCABULARY, CONTEXT, NUM_DRAWS = 17, 8, 6
TOKENS = np.random.default_rng(1).integers(1, VOCABULARY, size=(40, CONTEXT))
COMPONENT = "layer.0.head.1+unembedding[0:5]"
SAMPLERS = [
    Sampler(),
    Sampler("rmsprop_sgld", {"decay": 0.9, "stability": 0.05, "correction": True}),
    Sampler("sgnht", {"diffusion": 0.3}),
]


def make_chain(sampler=SAMPLERS[0], accumulate_gradients=True, component=COMPONENT):
    task = language_task(TOKENS, TOKENS[20:29], vocabulary_size=VOCABULARY)
    target = language_target(task, component, TOKENS[:5], splits={"all": "overall"})
    settings = ChainSettings(Posterior(40.0, 3.0), 1e-3, 4, 2, NUM_DRAWS, 3, seed=5, sampler=sampler)
    statistics = {"gradients": PositionMeans(target)} if accumulate_gradients else {}
    return Chain(target, settings, 0, population=len(TOKENS), statistics=statistics)


def advanced(num_draws, *arguments):
    chain = make_chain(*arguments)
    for _, _ in zip(range(num_draws), chain.draws(), strict=False):
        pass
    return chain


def assert_same_bits(a, b):
    """States are equal: numbers in value and kind, tensors in every bit, the sign of a zero included."""
    assert a.keys() == b.keys()
    for name, value in a.items():
        if isinstance(value, dict):
            assert_same_bits(value, b[name])
        elif isinstance(value, torch.Tensor):
            assert (value.dtype, value.shape) == (b[name].dtype, b[name].shape)
            assert value.contiguous().numpy().tobytes() == b[name].contiguous().numpy().tobytes()
        else:
            assert type(value) is type(b[name])
            assert value == b[name]


@pytest.mark.parametrize("accumulate", [True, False], ids=["sums", "no sums"])
@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda sampler: sampler.kind)
@pytest.mark.parametrize("taken", [0, 1, 4])
def test_a_chain_that_goes_on_from_the_bytes_is_the_undisturbed_one(sampler, accumulate, taken):
    whole = make_chain(sampler, accumulate)
    undisturbed = list(whole.draws())
    first = advanced(taken, sampler, accumulate)
    content = encode(first.state_dict())
    for _ in first.draws():  # what was written does not change with the chain
        pass
    state = decode(content)
    assert bool(state["statistics"]) == accumulate
    resumed = make_chain(sampler, accumulate)
    resumed.load_state_dict(state)
    rest = list(resumed.draws())
    assert [draw.number for draw in rest] == list(range(taken, NUM_DRAWS))
    for a, b in zip(rest, undisturbed[taken:], strict=True):
        np.testing.assert_array_equal(a.losses, b.losses)
        np.testing.assert_array_equal(a.observables, b.observables)
        assert a.mean_loss == b.mean_loss
    assert np.abs(rest[-1].losses).max() > 1e-3
    assert_same_bits({"state": resumed.state_dict()}, {"state": whole.state_dict()})


@pytest.mark.parametrize("accumulate", [True, False], ids=["sums", "no sums"])
@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda sampler: sampler.kind)
def test_every_bit_of_a_state_comes_back(sampler, accumulate):
    state = advanced(2, sampler, accumulate).state_dict()
    found = decode(encode(state))
    assert_same_bits(found, state)
    assert encode(found) == encode(state)


def test_numbers_and_tensors_that_are_hard_to_write_down():
    """As ranks have them that hold nothing of a piece, and samplers whose numbers are not short decimals."""
    odd = torch.tensor([[-0.0, math.inf, math.nan], [1e-45, -(2.0**-126), 1 / 3]])
    matrix = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    state = {
        "sampler": {
            "position": {"a[0:2,:]": odd, "b.weight/c": matrix.T, "views": matrix[:, 1]},
            "momentum": {"a[0:2,:]": torch.zeros(0, 3), "half": torch.ones(2, dtype=torch.bfloat16).float()},
            "nothing": {},
            "thermostat": 0.1 + 0.2,
            "tiny": 5e-324,
            "step": 2**53 + 1,
        },
        "num_draws": 7,
        "heat": torch.tensor([[1 / 3, -0.0], [5e-324, 7e300]], dtype=torch.float64),
        "statistics": {"gradients": {"sums": torch.arange(6, dtype=torch.float64).reshape(2, 3) / 3}, "empty": {}},
    }
    found = decode(encode(state | {"note": "Ωé"}))
    assert_same_bits(found, state | {"note": "Ωé"})


def test_what_cannot_be_kept_is_refused():
    state = advanced(1).state_dict()
    state["sampler"]["generator"] = torch.Generator()
    with pytest.raises(PatterningError, match="the state holds a Generator, which a checkpoint cannot"):
        encode(state)


@pytest.mark.parametrize("length", [0, 7, 60, -1])
def test_bytes_that_end_too_soon_are_refused(length):
    content = encode(advanced(1).state_dict())
    with pytest.raises(SafetensorError):
        decode(content[:length])


def test_the_state_of_another_component_is_refused():
    state = decode(encode(advanced(1).state_dict()))
    with pytest.raises(KeyError, match="unembedding"):
        make_chain(component="layer.0.head.1").load_state_dict(state)


def test_a_file_of_another_form_is_no_state():
    assert decode(save({"w": torch.zeros(2)}, {"header": "{}"})) is None
    assert decode(save({"w": torch.zeros(2)})) is None
