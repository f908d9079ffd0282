"""Chains under a table of weights are on L_rho = sum_i rho_i l_i / sum_i rho_i, over the losses that count."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from patterning_dist.aggregation.files import rank_part
from patterning_dist.config import SamplingConfig
from patterning_dist.config.data import FunctionDataConfig
from patterning_dist.config.model import ModuleConfig
from patterning_dist.config.response import DirectionConfig
from patterning_dist.errors import PatterningError
from patterning_dist.measure.subject import Subject
from patterning_dist.measure.subjects import Subjects
from patterning_dist.measure.weighted import Weighted
from patterning_dist.runtime.directions import Solved, _score, _solve
from patterning_dist.storage.files import write_parquet
from patterning_dist.storage.snapshots import Snapshots, pack
from patterning_dist.storage.store import LocalStorage
from patterning_dist.tasks.held_out import held_out_ids
from patterning_dist.tasks.module import ModuleTask

SAMPLING = SamplingConfig.model_validate(
    {
        "components": [{"name": "everything"}],
        "observables": [
            {"kind": "component_loss", "name": "loss"},
            {"kind": "split_loss", "name": "other", "split": "domain:other"},
        ],
        "num_draws": 4,
        "burn_in": 0,
        "inverse_temperature": 10,
        "localization": 1,
        "step_size": 1e-3,
        "probe_sequences": 30,
    }
)
WEIGHTS = np.linspace(0.2, 1.8, 30)


def load() -> tuple[TensorDataset, dict[str, TensorDataset]]:
    generator = torch.Generator().manual_seed(0)
    sets = [
        TensorDataset(torch.randn(number, 3, generator=generator), torch.randn(number, generator=generator))
        for number in (30, 7)
    ]
    return sets[0], {"other": sets[1]}


def build(checkpoint: str) -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 1)


def squared_error(model: nn.Module, batch: list[torch.Tensor]) -> torch.Tensor:
    return (model(batch[0])[:, 0] - batch[1]) ** 2


def subjects(folder: Path, key: str = "sample_id", strength: float = 1.0) -> Subjects:
    write_parquet(folder / "weights.parquet", pa.table({key: np.arange(30), "weight": WEIGHTS}))
    here = "test_weighted_subjects"
    model = ModuleConfig(kind="module", build=f"{here}:build", per_sample_loss=f"{here}:squared_error")
    data = FunctionDataConfig(kind="function", load=f"{here}:load")
    task = ModuleTask(model, data, folder=folder, device="cpu", seed=0)
    subject = Subject("final", "everything", stream="x", weights="weights.parquet", strength=strength)
    return Subjects(task, SAMPLING, 0, folder, {"x": subject})


@pytest.mark.parametrize("strength", [1.0, -1.0, 0.5])
def test_value_and_gradient_are_those_of_the_weighted_mean(tmp_path: Path, strength: float) -> None:
    chains = subjects(tmp_path, strength=strength)
    target, ids = chains.target("x"), held_out_ids(chains.task, 0, 100, "observed")["other"]
    model, batch = build("final"), list(load()[0].tensors)
    rho = torch.from_numpy(1 + strength * (WEIGHTS - 1)).float()
    expected = (rho * squared_error(model, batch)).sum() / rho.sum()
    expected.backward()
    assert target.measure().mean_loss == pytest.approx(expected.item(), rel=1e-6)
    observed = squared_error(model, [part[ids] for part in load()[1]["other"].tensors]).mean().item()
    # The component loss is an observable: the same function of w at every strength, as are the losses recorded.
    plain = squared_error(model, batch)
    assert target.measure().observables.tolist() == pytest.approx([plain.mean().item(), observed], rel=1e-6)
    torch.testing.assert_close(target.measure().losses, plain.detach().double())
    value, gradient = target.gradient(np.arange(30))
    assert value == pytest.approx(expected.item(), rel=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradient[name], parameter.grad)


def test_the_keys_of_the_sampler_reach_chains_on_weighted_losses(tmp_path: Path) -> None:
    """The exact gradient at w* and the spectrum are those of the weighted mean; trials do without the spectrum."""
    found = subjects(tmp_path)
    found.sampling = SAMPLING.model_copy(update={"gradient": "control_variate", "lanczos_steps": 9})
    chain, rho = found.chain("x", 0), torch.from_numpy(WEIGHTS / WEIGHTS.mean())
    inputs = torch.cat([load()[0].tensors[0], torch.ones(30, 1)], dim=1).double()
    precisions = torch.linalg.eigvalsh(10 * 2 / 30 * (inputs.T * rho) @ inputs + torch.eye(4))
    assert chain.spectrum is not None
    assert chain.spectrum.largest == pytest.approx(precisions[-1].item(), rel=1e-4)
    assert chain.spectrum.smallest == pytest.approx(precisions[0].item(), rel=1e-4)
    assert chain.settings.gradient == "control_variate"
    exact = chain.target.gradient(np.arange(30))[1]
    for name, gradient in chain._gradient(np.array([3, 7, 3]))[1].items():
        torch.testing.assert_close(gradient, exact[name])
    assert found.chain("x", 1).spectrum == chain.spectrum
    assert found.chain("x", 0, burn_in=1).spectrum is None


def test_the_loss_of_the_chain_is_the_weighted_mean_on_a_probe_that_is_a_part_of_the_pool(tmp_path: Path) -> None:
    found = subjects(tmp_path, strength=0.7)
    found.sampling = SAMPLING.model_copy(update={"probe_sequences": 11})
    ids, (inputs, labels) = found.probe.ids, load()[0].tensors
    assert len(ids) == 11
    rho = torch.from_numpy(1 + 0.7 * (WEIGHTS[ids] - 1))
    losses = squared_error(build("final"), [inputs[ids], labels[ids]]).double()
    measured = found.target("x").measure()
    assert measured.mean_loss == pytest.approx(((rho * losses).sum() / rho.sum()).item(), rel=1e-6)
    assert measured.observables[0].item() == pytest.approx(losses.mean().item(), rel=1e-6)


def test_a_table_of_other_samples_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PatterningError, match=r"weights.parquet.*sample_id"):
        subjects(tmp_path, key="sequence_id").target("x")
    with pytest.raises(PatterningError, match=r"1 \+ strength \* \(weight - 1\) is -0.6"):
        subjects(tmp_path, strength=2.0).target("x")


def test_losses_that_do_not_count_bear_on_no_mean() -> None:
    weights, counted = np.array([[1.0, 0.0], [3.0, 0.0]]), np.array([[True, False], [True, False]])
    samples = Weighted(torch.zeros(2, 2), weights, counted)
    assert samples[torch.arange(2)][1].tolist() == [[0.5, 0.0], [1.5, 0.0]]


def test_scores_under_weights_are_of_plain_losses_by_the_curvature_of_the_weighted_one(tmp_path: Path) -> None:
    """-grad l_i(w_bar) . (n_beta H_rho + gamma I)^-1 E[grad phi], against numpy, on pool and probe."""
    storage = LocalStorage(tmp_path)
    rng = np.random.default_rng(0)
    position, gradient = rng.normal(size=(2, 4))  # of weight [1, 3] and bias [1]; E[grad phi] could be anything
    means = np.stack([position, gradient])
    Snapshots(storage, "sampling/x/gradients", rank_part(0, 0, 1)).write(1, pack({"means": means}))
    # All samples in the Hessian; the loss is quadratic, so that a wide central difference is exact.
    settings = DirectionConfig(component="everything", hessian_sequences=30, tolerance=1e-6, step=0.1)
    solved = Solved(storage, "x", chains=(0,), rows=(0,), settings=settings)
    worker, ids = SimpleNamespace(study=subjects(tmp_path)), np.arange(30)
    assert not _solve(worker, solved, 0)["negative_curvature"]
    pool, probe = (_score(worker, solved, which, ids, False)["scores"][0] for which in ("pool", "probe"))

    inputs, labels = (tensor.double().numpy() for tensor in load()[0].tensors)
    inputs = np.c_[inputs, np.ones(30)]
    rho = WEIGHTS / WEIGHTS.mean()
    residuals = inputs @ position - labels

    def expected(weights: np.ndarray) -> np.ndarray:
        hessian = 2 * (weights[:, None] * inputs).T @ inputs / 30
        direction = np.linalg.solve(10 * hessian + np.eye(4), gradient)
        return -2 * residuals * (inputs @ direction)

    scale = np.abs(pool).max()
    np.testing.assert_allclose(pool, expected(rho), atol=1e-4 * scale)  # float32 losses, twice, over a step of .1
    np.testing.assert_allclose(probe, pool, atol=1e-4 * scale)
    assert np.abs(pool - expected(np.ones(30))).max() > 0.02 * scale  # the curvature of L is another
