"""Weights are written one tensor at a time, to a file that safetensors reads to the same numbers."""

from __future__ import annotations

import torch
from safetensors import safe_open
from safetensors.torch import load_model

from patterning_dist.runtime.training.weights import save_weights


class Engine:
    """As much of one as saving needs where parameters are whole."""

    def __init__(self, module):
        self.module = module

    def zero_optimization_stage(self):
        return 0


def make_module(seed):
    torch.manual_seed(seed)
    module = torch.nn.Sequential(
        torch.nn.Linear(3, 5), torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 5, bias=False), torch.nn.Embedding(7, 3)
    )
    module[0].weight.data = torch.randn(3, 5).T  # not contiguous
    module[2].weight = torch.nn.Parameter(torch.randn(5, 5).bfloat16())
    module.register_buffer("scratch", torch.ones(2), persistent=False)
    module.tied = module[3]
    module[1](torch.randn(9, 5))
    return module


def test_what_is_written_is_what_there_was(tmp_path):
    module, other = make_module(0), make_module(1)
    save_weights(Engine(module), tmp_path / "model.safetensors")
    save_weights(Engine(module), None)  # of the other ranks, which write nothing
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    expected = dict(module.named_parameters()) | {n: b for n, b in module.named_buffers() if n != "scratch"}
    assert stored.keys() == expected.keys()
    assert "tied.weight" not in stored
    for name, value in expected.items():
        assert stored[name].shape == value.shape
        assert torch.equal(stored[name], value.float() if value.is_floating_point() else value), name
    assert stored["1.num_batches_tracked"].dtype == torch.int64
    load_model(other, tmp_path / "model.safetensors")
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in other.state_dict().items())
