"""Component names stand for the right coordinates, alone and joined."""

from __future__ import annotations

import pytest
import torch

from patterning_dist.config import AttentionOnlyConfig
from patterning_dist.errors import PatterningError
from patterning_dist.models.attention import AttentionOnlyTransformer
from patterning_dist.models.components import (
    Component,
    model_components,
    pieces_of,
    select_component,
)

HEAD, BIAS = 4 * 8 * 4, 12  # query, key, value, output of a head; its position bias (lowest layer only)


@pytest.fixture
def model():
    return AttentionOnlyTransformer(AttentionOnlyConfig(num_layers=2, num_heads=2, d_model=8, d_head=4), 31, 12, seed=1)


def test_names(model):
    assert list(model_components(model)) == [
        "everything",
        "attention",
        "embedding",
        "layer.0",
        "layer.0.attention",
        "layer.1",
        "layer.1.attention",
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
    assert component.num_coordinates == num_coordinates
    assert component.first_layer == first_layer


def test_pieces_of_a_union_do_not_overlap_and_follow_the_model(model):
    component = select_component(model, "unembedding+layer.1.head.1+layer.1.head.0+embedding+embedding[3:5]")
    assert list(component.parameters) == [n for n, _ in model.named_parameters() if n in component.parameters]
    queries = [piece.name for piece in component.pieces if piece.parameter == "layers.1.query"]
    assert queries == ["layers.1.query[0:1,:,:]", "layers.1.query[1:2,:,:]"]
    assert [piece.name for piece in component.pieces if piece.parameter == "embedding"] == ["embedding"]
    assert not any(name.startswith("layers.0") for name in component.parameters)


@pytest.mark.parametrize(
    ("pattern", "names", "num_coordinates"),
    [
        ("layers.*.query", ["layers.0.query", "layers.1.query"], 4 * 32),
        ("layers.?.query[1]", ["layers.0.query[1:2,:,:]", "layers.1.query[1:2,:,:]"], 2 * 32),
        ("embedding[2:7,:3]", ["embedding[2:7,0:3]"], 15),
        ("embedding[:,:]", ["embedding"], 31 * 8),
        ("layers.1.output[1:, 2, 0:8]", ["layers.1.output[1:2,2:3,:]"], 8),
    ],
)
def test_patterns_of_parameter_names(model, pattern, names, num_coordinates):
    component = select_component(model, pattern)
    assert [piece.name for piece in component.pieces] == names
    assert component.num_coordinates == num_coordinates


@pytest.mark.parametrize("slices", ["0:32", "3:3", "1:2,1:2,1:2", "a:b", "-1:2", ""])
def test_slices_that_do_not_fit_say_the_shape(model, slices):
    with pytest.raises(PatterningError, match=r"does not fit embedding, whose shape is \[31, 8\]; write start:stop"):
        select_component(model, f"embedding[{slices}]")


def test_slices_that_share_a_part_are_refused(model):
    with pytest.raises(PatterningError, match=r"embedding\[0:4,:\] and embedding\[2:8,:\] share a part"):
        select_component(model, "embedding[0:4]+embedding[2:8]")


def test_a_model_without_names_of_its_own_knows_everything_and_patterns():
    plain = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    assert select_component(plain, "everything").num_coordinates == 26
    assert select_component(plain, "*.bias").num_coordinates == 6
    with pytest.raises(PatterningError, match=r"there are: everything, patterns of parameter names like '0.weight'"):
        select_component(plain, "layer.0")


@pytest.mark.parametrize("name", ["layer.0.head.1", "embedding", "layer.1.head.0+unembedding"])
def test_free_coordinates_are_views_of_the_component_and_nothing_else(model, name):
    component, parameters = select_component(model, name), dict(model.named_parameters())
    before = {n: p.detach().clone() for n, p in parameters.items()}
    free = {n: w.detach().clone() + 7 for n, w in component.free(parameters).items()}
    with torch.no_grad():
        for n, w in component.free(parameters).items():
            w.copy_(free[n])
    for n, w in component.free(parameters).items():
        assert torch.equal(w, free[n])
    for n, p in parameters.items():
        wanted = before[n].clone()
        for piece in component.pieces:
            if piece.parameter == n:
                piece.view(wanted).add_(7)
        assert torch.equal(p, wanted), n


@pytest.mark.parametrize("name", ["layer.2", "layer.0.head.2", "heads", "", "layer.0.mlp", "embedding+layer.9"])
def test_unknown_names_list_those_that_exist(model, name):
    part = name.split("+")[-1]
    with pytest.raises(PatterningError) as caught:
        select_component(model, name)
    text = str(caught.value)
    assert text.startswith(f"component {part!r} does not exist in this model; there are: everything, attention, ")
    assert text.endswith("unembedding, patterns of parameter names like 'embedding' (join several with '+')")


class Named(torch.nn.Module):
    """A module that names a part of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)

    def components(self) -> dict[str, Component]:
        return {"top": Component("top", pieces_of(self, "head."))}


def test_a_module_names_its_own_components():
    assert select_component(Named(), "top").num_coordinates == 10
    with pytest.raises(PatterningError, match=r"there are: top, patterns of parameter names like 'body\.weight'"):
        select_component(Named(), "body")


def test_a_list_of_modules_called_components_is_no_name():
    plain = torch.nn.Module()
    plain.components = torch.nn.ModuleList([torch.nn.Linear(2, 2)])
    assert list(model_components(plain)) == ["everything"]
