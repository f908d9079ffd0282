"""Components that cost the same are timed once; of many kinds, the nearest in size stands in."""

from __future__ import annotations

import torch

from patterning_dist.config import AttentionOnlyConfig
from patterning_dist.models.attention import AttentionOnlyTransformer
from patterning_dist.models.components import select_component
from patterning_dist.stages.plan.sampling import representatives


def test_heads_of_a_layer_stand_for_each_other() -> None:
    model = AttentionOnlyTransformer(AttentionOnlyConfig(num_layers=2, num_heads=3, d_model=8, d_head=4), 300, 16)
    names = ["attention", "layer.0.head.1", "layer.1.head.0", "layer.1.head.2", "embedding"]
    found = representatives(model, {name: name for name in names}, frozenset({"attention"}))
    assert found["layer.1.head.2"] == found["layer.1.head.0"] == "layer.1.head.0"
    # A head of the first layer has all layers above it to go through.
    assert found["layer.0.head.1"] == "layer.0.head.1"
    assert found["attention"] == "attention" and found["embedding"] == "embedding"


def test_a_checkpoint_stands_for_the_others() -> None:
    model = AttentionOnlyTransformer(AttentionOnlyConfig(num_layers=2, num_heads=3, d_model=8, d_head=4), 300, 16)
    subjects = {f"{c}/{name}": name for c in ("early", "final") for name in ("attention", "layer.1.head.2")}
    found = representatives(model, subjects, frozenset({"early/attention", "final/attention"}))
    assert found == {subject: subject.replace("final/", "early/") for subject in subjects}


def test_of_many_kinds_the_nearest_in_size_stands_in() -> None:
    model = torch.nn.ParameterDict({f"w{size}": torch.nn.Parameter(torch.zeros(size)) for size in range(10, 310, 10)})
    names = list(dict(model.named_parameters()))
    sizes = {name: select_component(model, name).num_coordinates for name in names}
    found = representatives(model, {name: name for name in names}, frozenset({"w150"}))
    assert len(set(found.values())) <= 8 and found["w150"] == "w150"
    timed = [sizes[name] for name in set(found.values())]
    for name in names:
        nearest = min(abs(size - sizes[name]) for size in timed)
        assert abs(sizes[found[name]] - sizes[name]) == nearest
