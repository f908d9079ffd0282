"""Controls of the weights: what each follows is what it is by hand, and all have the share and the bounds of plus."""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_model
from tiny_run import InProcess, copy_run, quiet, tiny_config
from torch import nn
from torch.utils.data import TensorDataset

from patterning_dist.config import Config
from patterning_dist.data.weights import SampleWeights
from patterning_dist.errors import PatterningError
from patterning_dist.measure.preflight import preflight
from patterning_dist.response.reliability import split_half_reliability
from patterning_dist.response.solver import solve_for_effective_sample_share
from patterning_dist.sampling.statistics import flatten
from patterning_dist.stages import moments
from patterning_dist.stages.controls import contrast_scores, control_weights, given_scores, with_contrasts
from patterning_dist.stages.masses import mass_groups
from patterning_dist.stages.moments import first_moment_scores
from patterning_dist.stages.sample import open_subjects
from patterning_dist.stages.solve import write_weights
from patterning_dist.storage.run import RunDirectory
from patterning_dist.storage.snapshots import Snapshots, pack
from patterning_dist.tasks.held_out import held_out_ids

HERE, SHARE = "test_controls", 0.8


def load() -> tuple[TensorDataset, dict[str, TensorDataset]]:
    rng = torch.Generator().manual_seed(2)
    x, y = torch.randn(288, 4, generator=rng), torch.randn(288, generator=rng)
    return TensorDataset(x[:258], y[:258]), {"far": TensorDataset(x[258:] + 1, y[258:])}  # the pool is two tasks


LOAD = load


def initialise(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 1), nn.Linear(1, 1))


def half_squares(model: nn.Module, batch: list[torch.Tensor]) -> torch.Tensor:
    """(v (x . w + b) + c - y)^2 / 2: quadratic in w, the component of these tests."""
    return (model(batch[0])[:, 0] - batch[1]).square() / 2


def pool_of(config: Config, run: RunDirectory, subject: str) -> InProcess:
    opener = with_contrasts(config, open_subjects(config, run.location, "cpu"), subject)
    return InProcess(config, run, opener, subject, "cpu")


def lines(folder: Path, *controls: dict) -> InProcess:
    """The pool of a small regression, at a checkpoint some way from its initialisation."""
    names = {"initialise": f"{HERE}:initialise", "per_sample_loss": f"{HERE}:half_squares"}
    config = Config.model_validate(
        {
            "name": "lines",
            "seed": 3,
            "model": {"kind": "module", **names},
            "data": {"kind": "function", "load": f"{HERE}:load"},
            "sampling": {
                "components": [{"name": "0.weight"}],
                "observables": [{"kind": "component_loss", "name": "loss"}, {"kind": "free_energy", "name": "energy"}],
                "num_draws": 4,
                "burn_in": 0,
                "inverse_temperature": 10,
                "localization": 1,
                "step_size": 1e-3,
                "probe_sequences": 30,
            },
            "solve": {
                "scores": "first_moment",
                "component": "0.weight",
                "targets": {"energy": -1},
                "effective_sample_share": SHARE,
                "controls": controls,
            },
        }
    )
    (folder / "baseline").mkdir()
    save_model(trained(), str(folder / "baseline" / "model.safetensors"))
    return pool_of(config, RunDirectory(folder), "0.weight")


def trained() -> nn.Module:
    model = initialise(11)
    with torch.no_grad():
        model[1].weight.fill_(1.5)
    return model


def weights_of(pool: InProcess, plus: np.ndarray | None = None):
    return control_weights(pool, None, np.ones(258) if plus is None else plus, SHARE, quiet())


def solved(pool: InProcess, row: np.ndarray) -> np.ndarray:
    """Weights that follow a row up, by the bounded solver."""
    options = {"inverse_temperature": pool.inverse_temperature, "weight_min": 0.0, "weight_max": 4.0}
    return solve_for_effective_sample_share((row - row.mean())[None], [1.0], SHARE, **options).weights


def far_samples(pool: InProcess) -> list[torch.Tensor]:
    """Held-out samples that chains observe."""
    ids = held_out_ids(pool.subjects.task, 3, 256, "observed")["far"]
    assert 0 < len(ids) < 30  # on no sample that results are measured on
    return [part[ids] for part in load()[1]["far"].tensors]


def gradients(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """[sample, coordinate]: v r x, with the slope v of the layer that stays where it is."""
    return 1.5 * (trained()(x)[:, 0] - y).detach()[:, None] * x


def test_the_gradient_row_is_the_alignment_in_closed_form_and_weighs_up_what_lowers_the_split(tmp_path: Path) -> None:
    pool = lines(tmp_path, {"kind": "gradient", "name": "aligned", "split": "overall"})
    model, (x, y) = trained(), load()[0].tensors
    far_x, far_y = far_samples(pool)
    alignment = (gradients(x, y) @ gradients(far_x, far_y).mean(dim=0)).double().numpy()
    found = weights_of(pool)["aligned"]
    # The central difference of a quadratic is exact but for float32: 1e-7 of losses of about 1, over steps of 1e-3.
    np.testing.assert_allclose(found.weights, solved(pool, alignment), atol=2e-3)
    assert found.report == {"control": {"kind": "gradient", "split": "overall"}}
    before = half_squares(model, [far_x, far_y]).mean()
    with torch.no_grad():  # what a step of gradient descent on the weighted pool adds to one on the plain pool
        model[0].weight -= 1e-3 * (torch.from_numpy(found.weights - 1).float()[:, None] * gradients(x, y)).mean(dim=0)
    assert half_squares(model, [far_x, far_y]).mean() < before


def test_the_influence_row_has_the_damped_inverse_hessian_in_between(tmp_path: Path) -> None:
    settings = {"conjugate_gradient_iterations": 8, "hessian_sequences": 100}
    control = {"kind": "influence", "name": "influential", "split": "overall"} | settings
    pool = lines(tmp_path, control)
    x, y = load()[0].tensors
    some = x[torch.from_numpy(pool.opener("cpu", pool.subjects.ranks).hessian_ids(100))]
    damped = 1.5**2 * some.T @ some / 100 + torch.eye(4) * 1 / 10  # of localization 1 and inverse temperature 10
    towards = gradients(*far_samples(pool)).mean(dim=0)
    influence = (gradients(x, y) @ torch.linalg.solve(damped, towards)).double().numpy()
    alignment = (gradients(x, y) @ towards).double().numpy()
    found = weights_of(pool)["influential"]
    np.testing.assert_allclose(found.weights, solved(pool, influence), atol=2e-3)  # as above
    assert np.abs(found.weights - solved(pool, alignment)).max() > 0.05
    assert found.report["control"] == {"kind": "influence", "split": "overall"} | settings
    solve = found.report["conjugate_gradients"]
    assert solve["relative_residual"] <= 1e-3 and 0 < solve["num_iterations"] <= 5 and not solve["negative_curvature"]


def test_a_loss_contrast_is_the_difference_of_the_losses_at_the_two_checkpoints(tmp_path: Path) -> None:
    pool = lines(tmp_path, {"kind": "loss_contrast", "name": "earlier", "checkpoint": "initialisation"})
    batch = list(load()[0].tensors)
    with torch.no_grad():
        wanted = (half_squares(initialise(3), batch) - half_squares(trained(), batch)).double().numpy()
    with pool.tasks(quiet()) as run_calls:
        np.testing.assert_allclose(contrast_scores(run_calls, pool, "initialisation"), wanted, atol=1e-5)
    found = weights_of(pool)["earlier"]
    np.testing.assert_allclose(found.weights, solved(pool, wanted), atol=1e-4)
    assert np.corrcoef(found.weights, wanted)[0, 1] > 0.5  # up, although the target is to go down


def test_scores_that_are_all_the_same_are_refused(tmp_path: Path) -> None:
    pool = lines(tmp_path, {"kind": "loss_contrast", "name": "same", "checkpoint": "initialisation"})
    save_model(initialise(3), str(tmp_path / "baseline" / "model.safetensors"))
    with pytest.raises(PatterningError, match=r"solve\.controls: the scores of same tell no training losses apart"):
        weights_of(pool)


@pytest.mark.parametrize(
    ("control", "text"),
    [
        (
            {"kind": "split", "split": "induction"},
            r"solve\.controls: this task has no split 'induction'",
        ),
        (
            {"kind": "gradient", "split": "induction"},
            r"solve\.controls: this task has no split 'induction'",
        ),
        ({"kind": "permuted", "within": "label"}, r"solve\.controls: c is within each label, .* there is sample_id;"),
    ],
)
def test_what_a_task_lacks_is_said_when_the_file_is_checked(tmp_path: Path, control: dict, text: str) -> None:
    pool = lines(tmp_path, control | {"name": "c"})
    with pytest.raises(PatterningError, match=text):
        preflight(pool.config, tmp_path)


def test_a_gradient_without_held_out_samples_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = lines(tmp_path, {"kind": "gradient", "name": "c", "split": "overall"})
    assert preflight(pool.config, tmp_path) == []
    monkeypatch.setattr(sys.modules[HERE], "load", lambda: (LOAD()[0], {}))
    with pytest.raises(PatterningError, match=r"solve\.controls: c is the gradient of a held-out loss, and this task"):
        preflight(pool.config, tmp_path)


def test_what_a_task_does_not_know_is_refused(tmp_path: Path) -> None:
    pool = lines(tmp_path, {"kind": "permuted", "name": "dealt", "within": "domain"})
    with pytest.raises(PatterningError, match=r"solve\.controls: dealt: 'domain' is not known of these samples"):
        weights_of(pool)


def test_units_that_a_task_does_not_know_are_refused(tmp_path: Path) -> None:
    pool = lines(tmp_path)
    solve = pool.config.solve.model_copy(update={"level": "document"})
    with pytest.raises(PatterningError, match=r"solve\.level: nothing is known of a document of these samples; choose"):
        preflight(pool.config.model_copy(update={"solve": solve}), tmp_path)


@pytest.mark.parametrize("draws", ["antithetic", "chains"])
def test_first_moments_of_the_other_draws_are_the_scores_of_solve_with_those_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, draws: str
) -> None:
    pool = lines(tmp_path, {"kind": "first_moment", "name": "other", "draws": draws})
    center = flatten(pool.subjects.target("0.weight").center).numpy()
    for chain in range(2):
        positions = center + 0.3 * np.random.default_rng(chain).normal(size=(3, len(center)))
        store = Snapshots(pool.run.storage, "sampling/0.weight/positions", f"chain-{chain}")
        store.write(1, pack({"positions": positions}))
    chains = [SimpleNamespace(chain=chain) for chain in range(2)]
    monkeypatch.setattr(moments, "read_chains", lambda folder: (chains, {}))
    found = weights_of(pool)["other"]
    solve = pool.config.solve.model_copy(update={"draws": draws})
    main = InProcess(pool.config.model_copy(update={"solve": solve}), pool.run, pool.opener, "0.weight", "cpu")
    scores = first_moment_scores(main, ["energy"], quiet())
    np.testing.assert_allclose(found.weights, solved(pool, -scores.row(0).astype(float)), atol=1e-6)  # as plus: down
    assert found.report["reliability"] == split_half_reliability(scores.per_chain)[0]
    assert found.report["replicates"] == {"chains": {"of": "chains", "number": 2}}.get(
        draws, {"of": "pairs of draws", "number": 8}
    )


def test_permuted_weights_are_those_of_plus_group_by_group(tiny_run: Path, tmp_path: Path) -> None:
    run = copy_run(tiny_run, tmp_path)
    controls = ", ".join(f"{{kind: permuted, name: within_{key}, within: {key}}}" for key in ("token", "domain"))
    pool = pool_of(tiny_config(run.path, f"solve.controls=[{controls}]"), run, "everything")
    number = len(pool.index["position"])
    plus = np.random.default_rng(0).gamma(2.0, size=number)
    found = control_weights(pool, None, plus, SHARE, quiet())
    assert list(found) == ["within_token", "within_domain"]
    for key in ("token", "domain"):
        control, groups = found[f"within_{key}"], mass_groups(pool.subjects.task, pool.index, key)
        assert control.solution is None and control.report == {"control": {"kind": "permuted", "within": key}}
        for group in range(groups.max() + 1):
            here = groups == group
            np.testing.assert_array_equal(np.sort(control.weights[here]), np.sort(plus[here]))
        # Uniform within groups: an entry of a group of k stays with a chance of 1 / k; five standard deviations.
        stays = np.mean(control.weights == plus)
        expected = (groups.max() + 1) / number
        assert stays < expected + 5 * (expected / number) ** 0.5
    assert not np.array_equal(found["within_token"].weights, found["within_domain"].weights)


@pytest.mark.parametrize("key", ["domain", "token"])
def test_controls_keep_the_masses_that_plus_keeps(tiny_run: Path, tmp_path: Path, key: str) -> None:
    run, other = copy_run(tiny_run, tmp_path), {"domain": "token", "token": "domain"}[key]
    split, permuted = (
        "{kind: split, name: oracle, split: induction}",
        f"{{kind: permuted, name: dealt, within: {other}}}",
    )
    pool = pool_of(
        tiny_config(run.path, f"solve.controls=[{split}, {permuted}]", f"solve.keep_mass={key}"), run, "everything"
    )
    groups = {name: mass_groups(pool.subjects.task, pool.index, name) for name in (key, other)}
    plus = np.random.default_rng(0).gamma(2.0, size=len(groups[key]))
    found = control_weights(pool, None, plus, 0.9, quiet())
    change = found["oracle"].weights - 1
    assert found["oracle"].solution.effective_sample_share == pytest.approx(0.9, abs=1e-3)
    assert np.abs(np.bincount(groups[key], change)).max() < 1e-8 * len(change)
    assert np.abs(np.bincount(groups[other], change)).max() > 1  # nobody asked for that
    for of in groups.values():  # dealt within both
        np.testing.assert_allclose(np.bincount(of, found["dealt"].weights), np.bincount(of, plus), rtol=1e-9)
    assert not np.array_equal(found["dealt"].weights, plus)


def test_scores_of_groups_alone_are_refused_where_groups_keep_their_mass(tiny_run: Path, tmp_path: Path) -> None:
    run = copy_run(tiny_run, tmp_path)
    control = "solve.controls=[{kind: split, name: fables, split: 'domain:fables'}]"
    with pytest.raises(PatterningError, match=r"fables weighs a whole domain, and solve\.keep_mass keeps"):
        tiny_config(run.path, control, "solve.keep_mass=domain")
    config = tiny_config(run.path, control)
    solve = config.solve.model_copy(update={"keep_mass": "domain"})  # as where the file does not say what is what
    pool = pool_of(config.model_copy(update={"solve": solve}), run, "everything")
    with pytest.raises(PatterningError, match="fables tell no training losses of the same domain apart"):
        control_weights(pool, None, np.ones(len(pool.index["position"])), SHARE, quiet())


def test_a_gradient_needs_no_observable_of_its_split(tiny_run: Path, tmp_path: Path) -> None:
    """Of a language model, where an entry is a token and the layers below a head are computed once."""
    run = copy_run(tiny_run, tmp_path)
    controls = "[{kind: gradient, name: aligned, split: induction}]"
    pool = pool_of(tiny_config(run.path, f"solve.controls={controls}"), run, "layer.0.head.1")
    assert "induction" not in [o.split for o in pool.config.sampling.observables if o.kind == "split_loss"]
    found = control_weights(pool, None, np.ones(len(pool.index["position"])), SHARE, quiet())["aligned"]
    subjects = pool.opener("cpu", pool.subjects.ranks)
    target, held_out = subjects.target("layer.0.head.1"), subjects.split_loss("induction")
    [towards] = target.sum_gradients(target.prepare(held_out.samples), held_out.coefficients)
    number = 3 * subjects.task.num_positions  # losses, one gradient each
    each = target.sum_gradients(
        target.prepare(subjects.task.train, np.arange(3)), torch.eye(number).reshape(number, 3, -1)
    )
    by_hand = np.array([target.dot(gradient, towards) for gradient in each])
    assert found.solution.effective_sample_share == pytest.approx(SHARE, abs=1e-3)
    inside = (found.weights[:number] > 0) & (found.weights[:number] < 4)
    assert np.corrcoef(by_hand[inside], found.weights[:number][inside])[0, 1] > 0.999


def test_scores_of_the_users_own_are_followed_up_at_the_share_of_plus(tmp_path: Path) -> None:
    score, order = np.random.default_rng(4).normal(size=258), np.random.default_rng(5).permutation(258)
    file = tmp_path / "scores.parquet"
    pool = lines(tmp_path, {"kind": "scores", "name": "mine", "path": str(file)})
    pq.write_table(pa.table({"sample_id": order, "score": score[order]}), file)
    found = weights_of(pool)["mine"]
    np.testing.assert_allclose(found.weights, solved(pool, score), atol=1e-9)
    assert found.solution.effective_sample_share == pytest.approx(SHARE)
    for changed, message in (
        ({"sample_id": [*order[1:], order[1]]}, r"row 257: sample_id was given before; expected one row for each"),
        ({"sample_id": [*order[1:], 258]}, rf"no score of sample_id {order[0]}; give one for every training loss"),
        ({"score": [np.nan, *score[1:]]}, r"row 0: score is nan; expected a finite number"),
        ({"position": np.ones(258, int)}, r"has a column 'position', and a sample has one loss here"),
    ):
        pq.write_table(pa.table({"sample_id": order, "score": score} | changed), file)
        with pytest.raises(PatterningError, match=r"scores\.parquet:? " + message):
            weights_of(pool)


def test_scores_of_single_losses_or_of_all_of_a_sample() -> None:
    index = {"sequence_id": np.array([0, 0, 3, 3]), "position": np.array([1, 2, 1, 2])}
    with TemporaryDirectory() as folder:
        file = Path(folder) / "s.parquet"
        pq.write_table(pa.table({"sequence_id": [3, 0], "score": [1, 2]}), file)
        assert given_scores(file, index, "sequence_id").tolist() == [2, 2, 1, 1]
        columns = {"sequence_id": [0, 3, 3, 0], "position": [2, 1, 2, 1], "score": [5.0, 6.0, 7.0, 8.0]}
        pq.write_table(pa.table(columns), file)
        assert given_scores(file, index, "sequence_id").tolist() == [8, 5, 6, 7]


def test_minimum_norm_weights_have_no_bounds_and_say_how_many_are_below_zero(tmp_path: Path) -> None:
    """rho = 1 + alpha chi^+ dmu: along centred chi, of the share of plus, on whatever side of 0."""
    pool = lines(tmp_path, {"kind": "minimum_norm", "name": "unbounded"})
    chi = np.random.default_rng(6).normal(size=(1, 258)) ** 3
    scores = SimpleNamespace(chi=[chi.astype(np.float32)], observables=["energy"])
    found = control_weights(pool, scores, np.ones(258), 0.5, quiet())["unbounded"]
    h = -(chi - chi.mean())[0]  # the target is -1
    np.testing.assert_allclose(found.weights, 1 + h / np.sqrt(np.square(h).mean()), atol=1e-5)
    number = int((found.weights < 0).sum())
    assert number > 0 and found.report["num_swapped"] == number and found.weights.max() > 4
    write_weights(pool, tmp_path / "w.parquet", "unbounded", found.weights)
    joined = SampleWeights.load(tmp_path / "w.parquet", "sample_id").join(258, None)
    np.testing.assert_array_equal(joined.swapped, found.weights < 0)
    np.testing.assert_allclose(joined.weights, np.abs(found.weights), rtol=1e-6)
