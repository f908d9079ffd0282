"""Samples of the user's own: whatever addresses them, a batch is the same."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_model
from torch import Tensor, nn

from patterning_dist import Posterior, sample_chains
from patterning_dist.config import FunctionDataConfig, ModuleConfig
from patterning_dist.errors import PatterningError
from patterning_dist.models.components import select_component
from patterning_dist.sampling.ranks import Ranks
from patterning_dist.sampling.target import Target
from patterning_dist.tasks.held_out import held_out_ids
from patterning_dist.tasks.module import ModuleTask
from patterning_dist.tasks.own_samples import own_samples

X = torch.arange(12, dtype=torch.float32).reshape(6, 2)
Y = torch.tensor([0, 1, 1, 0, 1, 0])


class Batches:
    """A dataset that takes a tensor of numbers and gives dicts."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, ids: Tensor) -> dict[str, Tensor]:
        return {"x": X[ids], "y": Y[ids]}


class Items:
    """The usual dataset of torch: one number, one item."""

    def __init__(self) -> None:
        self.rows = [{"x": X[n].numpy(), "y": int(Y[n])} for n in range(6)]

    def __len__(self) -> int:
        return 6

    def __getitem__(self, number: int) -> dict[str, Any]:
        return self.rows[number]


class Tuples(Items):
    """Items that are tuples, found by a number that must be one."""

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        return torch.tensor(self.rows[int(number)]["x"]), self.rows[int(number)]["y"]


def dataset(form: str | None) -> Any:
    import datasets

    made = datasets.Dataset.from_dict({"x": X.tolist(), "y": Y.tolist()})
    return made if form is None else made.with_format(form)


@pytest.mark.parametrize(
    "make",
    [Batches, Items, lambda: dataset("torch"), lambda: dataset(None), lambda: Items().rows],
    ids=["batches", "items", "datasets with torch format", "datasets", "list"],
)
def test_a_batch_is_a_dict_of_tensors(make: Any) -> None:
    samples = own_samples(make())
    assert len(samples) == 6
    for ids in (torch.tensor([4, 0, 4]), np.array([4, 0, 4])):
        batch = samples[torch.as_tensor(ids)]
        assert torch.equal(batch["x"], X[[4, 0, 4]])
        assert torch.equal(batch["y"], Y[[4, 0, 4]])


def test_tuples_stay_tuples() -> None:
    for samples in (own_samples(Tuples()), own_samples(torch.utils.data.TensorDataset(X, Y))):
        x, y = samples[torch.tensor([2, 5])]
        assert torch.equal(x, X[[2, 5]])
        assert torch.equal(y, Y[[2, 5]])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (iter([1]), "samples are a list_iterator; expected a dataset with a length"),
        ({"x": X}, "samples are a dict; expected a dataset, whose batches may be dicts"),
        ([object()], "a list gives no batch for a tensor of numbers, nor item by item"),
    ],
)
def test_what_gives_no_batches_is_refused(data: Any, message: str) -> None:
    with pytest.raises(PatterningError, match=f"data.load: {message}"):
        own_samples(data)


class Frozen(nn.Module):
    """A classifier whose first layer does not learn."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 3), nn.Linear(3, 2)
        self.first.requires_grad_(False)


def build(checkpoint: str) -> nn.Module:
    torch.manual_seed(0)
    return Frozen()


def load() -> tuple[Any, dict[str, Any]]:
    return Items(), {"same": Batches()}


def loss(module: Frozen, batch: dict[str, Tensor]) -> Tensor:
    scores = module.second(module.first(batch["x"]).tanh())
    return nn.functional.cross_entropy(scores, batch["y"], reduction="none")


def test_a_module_task_over_items_and_dicts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "own_task", sys.modules[__name__])
    own = {name: f"own_task:{name}" for name in ("build", "load", "loss")}
    model = ModuleConfig(kind="module", build=own["build"], per_sample_loss=own["loss"])
    data = FunctionDataConfig(kind="function", load=own["load"])
    task = ModuleTask(model, data, folder=tmp_path, device="cpu", seed=0)
    assert task.num_positions is None
    module = task.load("final", Ranks())
    found = task.evaluate(module, Ranks())
    ids = torch.from_numpy(held_out_ids(task, 0, 100, "realised")["same"])
    assert found["same_loss"] == pytest.approx(loss(module, Batches()[ids]).mean().item())


def test_what_the_run_trained_is_loaded_into_a_module_that_is_only_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "own_task", sys.modules[__name__])
    model = ModuleConfig(kind="module", build="own_task:build", per_sample_loss="own_task:loss")
    data = FunctionDataConfig(kind="function", load="own_task:load")
    task = ModuleTask(model, data, folder=tmp_path, device="cpu", seed=0)
    trained = task.load("final", Ranks())
    with torch.no_grad():
        trained.second.bias += 1
    (tmp_path / "round-1").mkdir()
    save_model(trained, str(tmp_path / "round-1" / "model.safetensors"))
    loaded = task.load("round-1", Ranks())
    assert loaded is not trained
    assert torch.equal(loaded.second.bias, trained.second.bias)


def test_what_the_model_came_with_frozen_stays_and_is_counted() -> None:
    module = build("final")
    sampled = sample_chains(
        module,
        loss,
        own_samples(Items()),
        Batches(),
        posterior=Posterior(10, 10),
        step_size=1e-2,
        num_draws=16,
        num_chains=2,
        batch_size=4,
        observables={"first": lambda m: m.first.weight.sum(), "second": lambda m: m.second.weight.sum()},
    )
    assert np.ptp(sampled.traces[..., 1]) == 0
    assert np.ptp(sampled.traces[..., 2]) > 0
    for _ in range(2):  # chains have since set what they need
        component = select_component(module, "everything")
        assert (component.num_coordinates, component.num_frozen) == (8, 9)
        assert component.parameters == ("second.weight", "second.bias")
        Target(module, component, loss, Batches(), Batches())
    with pytest.raises(PatterningError, match=r"component 'first\.\*': all its parameters are frozen .* first\.weight"):
        select_component(module, "first.*")
