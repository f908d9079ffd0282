"""Component names stand for the right coordinates, alone and joined."""

from __future__ import annotations

import pytest
import torch

from patterning_dist.errors import PatterningError
from patterning_dist.models.attention import AttentionOnlyTransformer
from patterning_dist.models.components import component_names, select_component

HEAD, BIAS = 4 * 8 * 4, 12  # query, key, value, output of a head; its position bias (lowest layer only)


@pytest.fixture
def model():
    return AttentionOnlyTransformer(
        vocabulary_size=31, context_length=12, num_layers=2, num_heads=2, d_model=8, d_head=4, seed=1
    )


def test_names():
    assert component_names(2, 2) == [
        "everything",
        "attention",
        "embedding",
        "layer.0",
        "layer.1",
        "layer.0.head.0",
        "layer.0.head.1",
        "layer.1.head.0",
        "layer.1.head.1",
        "unembedding",
    ]


@pytest.mark.parametrize(
    ("name", "num_coordinates", "first_layer"),
    [
        ("everything", 2 * 31 * 8 + 4 * HEAD + 2 * BIAS, 0),
        ("attention", 4 * HEAD + 2 * BIAS, 0),
        ("embedding", 31 * 8, 0),
        ("unembedding", 31 * 8, 2),
        ("layer.0", 2 * HEAD + 2 * BIAS, 0),
        ("layer.1", 2 * HEAD, 1),
        ("layer.1.attention", 2 * HEAD, 1),
        ("layer.0.head.1", HEAD + BIAS, 0),
        ("layer.1.head.0", HEAD, 1),
        ("layer.1.head.0+unembedding", HEAD + 31 * 8, 1),
        ("layer.1.head.1+layer.1.head.0", 2 * HEAD, 1),
        ("layer.1.head.0+layer.1.head.0", HEAD, 1),
        ("layer.1+layer.1.head.0", 2 * HEAD, 1),
        ("layer.1.head.0+layer.1", 2 * HEAD, 1),
        ("unembedding+embedding", 2 * 31 * 8, 0),
    ],
)
def test_number_of_coordinates_and_first_layer(model, name, num_coordinates, first_layer):
    component = select_component(model, name)
    assert component.name == name
    assert component.num_coordinates(dict(model.named_parameters())) == num_coordinates
    assert component.first_layer == first_layer


def test_rows_of_a_union_are_sorted_and_follow_the_model(model):
    component = select_component(model, "unembedding+layer.1.head.1+layer.1.head.0+embedding")
    assert list(component.rows) == [n for n, _ in model.named_parameters() if n in component.rows]
    assert component.rows["layers.1.query"] == (0, 1)
    assert component.rows["embedding"] is None
    assert not any(name.startswith("layers.0") for name in component.rows)


@pytest.mark.parametrize("name", ["layer.0.head.1", "embedding", "layer.1.head.0+unembedding"])
def test_assign_writes_what_free_reads_and_nothing_else(model, name):
    component, parameters = select_component(model, name), dict(model.named_parameters())
    before = {n: p.detach().clone() for n, p in parameters.items()}
    free = {n: w.detach().clone() + 7 for n, w in component.free(parameters).items()}
    component.assign(parameters, free)
    for n, w in component.free(parameters).items():
        assert torch.equal(w, free[n])
    for n, p in parameters.items():
        wanted = before[n].clone()
        rows = component.rows.get(n, ())
        wanted[slice(None) if rows is None else list(rows)] += 7
        assert torch.equal(p, wanted), n


@pytest.mark.parametrize("name", ["layer.2", "layer.0.head.2", "heads", "", "layer.0.mlp", "embedding+layer.9"])
def test_unknown_names_list_those_that_exist(model, name):
    part = name.split("+")[-1]
    with pytest.raises(PatterningError) as caught:
        select_component(model, name)
    text = str(caught.value)
    assert text.startswith(f"component {part!r} does not exist in this model; there are: everything, attention, ")
    assert text.endswith("layer.1.head.1, unembedding (join several with '+')")
