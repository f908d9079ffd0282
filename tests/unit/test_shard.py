"""How a model is cut over ranks: what can be said without other processes.

That the cut model computes the same is in ``tests/ray/test_chain_groups.py``.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from patterning_dist.config import AttentionOnlyConfig
from patterning_dist.errors import PatterningError
from patterning_dist.models.attention import AttentionOnlyTransformer
from patterning_dist.models.huggingface import parameters_without_memory
from patterning_dist.sampling.ranks import Ranks
from patterning_dist.sampling.shard import decoder_layers, shard_model


def blocks(number, size=3):
    return nn.ModuleList(nn.Linear(size, size) for _ in range(number))


class Nested(nn.Module):
    """Two stacks of layers; those of the first have more experts each than there are layers."""

    def __init__(self):
        super().__init__()
        self.first = nn.ModuleList(nn.ModuleDict({"experts": blocks(5)}) for _ in range(2))
        self.second = blocks(3)
        self.head = nn.Linear(3, 3)


def test_layers_are_those_of_the_outermost_lists():
    model = Nested()
    assert list(decoder_layers(model)) == [*model.first, *model.second]
    transformer = AttentionOnlyTransformer(
        AttentionOnlyConfig(num_layers=2, num_heads=1, d_model=4, d_head=2), 7, 5, seed=0
    )
    assert list(decoder_layers(transformer)) == list(transformer.layers)
    assert list(decoder_layers(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))) == []


def test_layers_that_share_or_have_no_parameters_stay_with_the_root():
    model = Nested()
    model.second[1].weight = model.head.weight
    model.second.append(nn.ReLU())
    assert list(decoder_layers(model)) == [*model.first, model.second[0], model.second[2]]
    model.first[0]["experts"][0].bias = model.first[0]["experts"][1].bias  # shared within a layer: no harm
    assert next(decoder_layers(model)) is model.first[0]


def test_one_rank_keeps_the_model_whole():
    model = nn.Linear(3, 2)
    assert shard_model(model, Ranks(), "cpu") is model
    assert type(model.weight) is nn.Parameter


def test_a_single_number_cannot_be_cut():
    model = nn.Linear(3, 2)
    model.scale = nn.Parameter(torch.tensor(1.0))
    with pytest.raises(PatterningError) as caught:
        shard_model(model, Ranks(0, 2), "cpu")
    assert str(caught.value) == (
        "parameter scale is a single number without an axis and cannot be cut over 2 ranks; give it the shape [1], or "
        "use one rank a chain"
    )
    assert shard_model(model, Ranks(), "cpu") is model


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("frequencies", torch.arange(4.0))
        self.register_parameter("absent", None)


def test_modules_are_built_without_memory_for_parameters():
    register = nn.Module.register_parameter
    with parameters_without_memory():
        model = Tied()
    assert nn.Module.register_parameter is register
    assert all(p.is_meta for p in model.parameters())
    assert model.embedding.weight.shape == (5, 3)
    assert model.head.weight is model.embedding.weight
    assert model.absent is None
    torch.testing.assert_close(model.frequencies, torch.arange(4.0))
    with pytest.raises(ValueError, match="broken"), parameters_without_memory():
        raise ValueError("broken")
    assert not nn.Linear(2, 2).weight.is_meta
