"""One step of every sampler: by hand, in place, the same bits in any layout, its limits; the exact law of SGLD."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.linalg import solve_discrete_lyapunov

from patterning_dist.sampling import rmsprop_sgld, sgld, sgnht
from patterning_dist.sampling.posterior import Posterior

CENTER = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
HESSIAN = torch.tensor([[2.0, 0.7, -0.3], [0.7, 1.5, 0.4], [-0.3, 0.4, 0.8]], dtype=torch.float64)
OPTIMUM = torch.tensor([0.2, 0.1, -0.6], dtype=torch.float64)
POSTERIOR = Posterior(inverse_temperature=17.0, localization=3.5)

W = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64)
NOISE = torch.tensor([0.3, -0.2, 1.1], dtype=torch.float64)
DRIFT = 17.0 * (HESSIAN @ (W - OPTIMUM)) + 3.5 * (W - CENTER)

SAMPLERS = {
    "sgld": (sgld, {}),
    "rmsprop_sgld": (rmsprop_sgld, {"decay": 0.93, "stability": 0.07}),
    "rmsprop_sgld, corrected": (rmsprop_sgld, {"decay": 0.6, "stability": 0.02, "correction": True}),
    "sgnht": (sgnht, {"diffusion": 0.2, "num_coordinates": 37}),
}
SHAPES = {"a": (4, 5), "b": (3,), "c": (2, 1, 7)}  # 37 coordinates


def make(generator, scale=1.0):
    return {name: scale * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def inputs(seed, settings):
    """Gradient, noise and what else a step takes."""
    generator = torch.Generator().manual_seed(seed)
    more = {"curvature": make(generator)} if settings.get("correction") else {}
    gradient = make(generator, 0.3)
    gradient["b"][0] = 0.0  # as for an embedding that no token of the batch uses
    return gradient, make(generator), settings | more


def stepped(module, state, *arguments, **settings):
    """``step_`` on copies of the state's tensors."""
    copies = {
        key: {name: w.clone() for name, w in value.items()}
        for key, value in state._asdict().items()
        if isinstance(value, dict)
    }
    return module.step_(state._replace(**copies), *arguments, **settings)


def fields(state):
    """Every tensor of a state by (field, piece)."""
    return {
        (key, name): w for key, value in state._asdict().items() if isinstance(value, dict) for name, w in value.items()
    }


# All samplers


@pytest.mark.parametrize("case", SAMPLERS)
def test_a_step_overwrites_its_state_and_nothing_else(case):
    module, settings = SAMPLERS[case]
    generator = torch.Generator().manual_seed(1)
    center, state = make(generator), module.init(make(generator))
    for seed in range(2):  # the second step starts from a momentum, a second moment, a thermostat
        gradient, noise, more = inputs(seed, settings)
        given = {
            (kind, name): w
            for kind, vector in {"g": gradient, "n": noise, "c": center, "h": more.get("curvature", {})}.items()
            for name, w in vector.items()
        }
        before = {key: w.clone() for key, w in given.items()}
        position = {name: w.clone() for name, w in state.position.items()}
        after = module.step_(state, gradient, noise, center=center, posterior=POSTERIOR, step_size=0.03, **more)
        assert all(torch.equal(given[key], w) for key, w in before.items())
        assert (state.step, after.step) == (seed, seed + 1)
        assert all(w is fields(state)[key] for key, w in fields(after).items())
        assert not any(torch.equal(after.position[name], position[name]) for name in SHAPES)
        state = after


@pytest.mark.parametrize("case", SAMPLERS)
def test_a_view_into_a_parameter_and_a_tensor_of_its_own_give_the_same_bits(case):
    module, settings = SAMPLERS[case]
    generator = torch.Generator().manual_seed(1)
    center, start = make(generator), make(generator)
    # The rest of the larger parameter must not move.
    parameters = {name: torch.full((*shape[:-1], shape[-1] + 3), 8.25) for name, shape in SHAPES.items()}
    live = {name: parameters[name][..., 2:-1] for name in SHAPES}
    for name, w in live.items():
        w.copy_(start[name])
    whole, view = module.init(start), module.init(live)
    own = {key: w.data_ptr() for key, w in fields(view).items()}
    for seed in range(6):
        gradient, noise, more = inputs(seed, settings)
        arguments = {"center": center, "posterior": POSTERIOR, "step_size": 0.03, **more}
        whole = module.step_(whole, gradient, noise, **arguments)
        view = module.step_(view, gradient, noise, **arguments)
        for key, w in fields(whole).items():
            assert torch.isfinite(w).all()
            assert torch.equal(w, fields(view)[key]), (seed, key)
        assert [v for v in whole if not isinstance(v, dict)] == [v for v in view if not isinstance(v, dict)]
    assert {key: w.data_ptr() for key, w in fields(view).items()} == own
    for name, parameter in parameters.items():
        assert torch.equal(parameter[..., 2:-1], whole.position[name])
        assert (parameter[..., :2] == 8.25).all()
        assert (parameter[..., -1] == 8.25).all()


@pytest.mark.parametrize("case", SAMPLERS)
def test_init_holds_the_position_as_it_is(case):
    position = make(torch.Generator().manual_seed(1))
    state = SAMPLERS[case][0].init(position)
    assert all(state.position[name] is w for name, w in position.items())
    assert state.step == 0


@pytest.mark.parametrize("case", SAMPLERS)
def test_pieces_do_not_touch_each_other(case):
    # Half of the pieces, as another rank holds them, move as they do among the others.
    module, settings = SAMPLERS[case]
    generator = torch.Generator().manual_seed(1)
    center, start = make(generator), make(generator)
    gradient, noise, more = inputs(0, settings)
    arguments = {"center": center, "posterior": POSTERIOR, "step_size": 0.03}
    whole = stepped(module, module.init(start), gradient, noise, **arguments, **more)
    part = stepped(module, module.init({"b": start["b"]}), gradient, noise, **arguments, **more)
    for key, w in fields(part).items():
        assert torch.equal(w, fields(whole)[key])


@pytest.mark.parametrize("case", SAMPLERS)
def test_an_element_moves_the_same_in_any_slice(case):
    # Vector instructions and what is left over at the end of a tensor must round alike, or shards would drift apart.
    module, settings = SAMPLERS[case]
    generator = torch.Generator().manual_seed(1)
    kinds = torch.randn(5, 1003, generator=generator)
    total = {"num_coordinates": 1003, "total": lambda own: 900.0} if module is sgnht else {}

    def walk(part):
        w, gradient, noise, center, curvature = ({"w": kind[part]} for kind in kinds)
        more = {"curvature": curvature} if settings.get("correction") else {}
        state = module.init(w)
        for _ in range(4):
            state = stepped(
                module,
                state,
                gradient,
                noise,
                center=center,
                posterior=POSTERIOR,
                step_size=0.003,
                **settings | more | total,
            )
        return state.position["w"]

    whole = walk(slice(None))
    for start, stop in [(0, 1), (3, 17), (5, 505), (1, 1002), (998, 1003)]:
        assert torch.equal(walk(slice(start, stop)), whole[start:stop])


# SGLD


def advance(w, noise, step_size):
    state = sgld.State({"w": w}, 4)
    gradient = {"w": HESSIAN @ (w - OPTIMUM)}
    settings = {"center": {"w": CENTER}, "posterior": POSTERIOR, "step_size": step_size}
    return stepped(sgld, state, gradient, {"w": noise}, **settings)


def affine_map(step_size):
    """(A, b, c) of w -> A w + b + c noise, read off the step itself."""
    zero = torch.zeros(3, dtype=torch.float64)
    b = advance(zero, zero, step_size).position["w"]
    columns = [advance(e, zero, step_size).position["w"] - b for e in torch.eye(3, dtype=torch.float64)]
    c = torch.stack([advance(zero, e, step_size).position["w"] - b for e in torch.eye(3, dtype=torch.float64)])
    return torch.stack(columns, dim=1).numpy(), b.numpy(), c.numpy()


def precision():
    return (POSTERIOR.inverse_temperature * HESSIAN + POSTERIOR.localization * torch.eye(3)).numpy()


def stationary_covariance(step_size):
    a, _, c = affine_map(step_size)
    return solve_discrete_lyapunov(a, c @ c.T)


def test_one_step_of_sgld_by_hand():
    after = advance(W, NOISE, 0.02)
    torch.testing.assert_close(after.position["w"], W - 0.01 * DRIFT + 0.02**0.5 * NOISE, rtol=1e-14, atol=1e-14)
    assert after.step == 5


@pytest.mark.parametrize("step_size", [1e-3, 0.01, 0.03])
def test_the_fixed_point_is_the_posterior_mean_and_the_law_is_that_of_the_recursion(step_size):
    a, b, c = affine_map(step_size)
    np.testing.assert_allclose(a, np.eye(3) - step_size / 2 * precision(), atol=1e-13)
    np.testing.assert_allclose(c, np.sqrt(step_size) * np.eye(3), atol=1e-13)
    mean = np.linalg.solve(precision(), (17.0 * HESSIAN @ OPTIMUM + 3.5 * CENTER).numpy())
    np.testing.assert_allclose(np.linalg.solve(np.eye(3) - a, b), mean, rtol=1e-10)
    exact = np.linalg.inv(precision() - step_size / 4 * precision() @ precision())
    np.testing.assert_allclose(stationary_covariance(step_size), exact, rtol=1e-9, atol=1e-12)


def test_the_bias_of_the_covariance_halves_with_the_step():
    target = np.linalg.inv(precision())
    bias = [np.linalg.norm(stationary_covariance(0.004 / 2**k) - target) for k in range(5)]
    ratios = np.array(bias[:-1]) / np.array(bias[1:])
    assert 1.9 < ratios[0] < 2.3
    assert np.all(np.diff(np.abs(ratios - 2)) < 0)  # of first order exactly: the ratio tends to two
    assert ratios[-1] == pytest.approx(2.0, abs=0.01)


# RMSprop-SGLD


def rmsprop(state, **changes):
    gradient = {"w": HESSIAN @ (state.position["w"] - OPTIMUM)}
    settings = {"center": {"w": CENTER}, "posterior": POSTERIOR, "step_size": 0.02, "decay": 0.9, "stability": 0.05}
    return stepped(rmsprop_sgld, state, gradient, {"w": NOISE}, **settings | changes)


def test_two_steps_of_rmsprop_sgld_by_hand():
    first = rmsprop(rmsprop_sgld.init({"w": W}))
    # After one step V is g^2 whatever the decay.
    g1 = HESSIAN @ (W - OPTIMUM)
    scale = 1 / (g1.abs() + 0.05)
    wanted = W - 0.01 * scale * DRIFT + (0.02 * scale) ** 0.5 * NOISE
    torch.testing.assert_close(first.position["w"], wanted, rtol=1e-13, atol=1e-13)
    second = rmsprop(first)
    g2 = HESSIAN @ (wanted - OPTIMUM)
    scale = 1 / (((0.9 * 0.1 * g1**2 + 0.1 * g2**2) / (1 - 0.9**2)).sqrt() + 0.05)
    drift = 17.0 * g2 + 3.5 * (wanted - CENTER)
    wanted = wanted - 0.01 * scale * drift + (0.02 * scale) ** 0.5 * NOISE
    torch.testing.assert_close(second.position["w"], wanted, rtol=1e-12, atol=1e-12)
    assert second.step == 2


@pytest.mark.parametrize("decay", [0.0, 0.7, 0.99, 1.0])
def test_the_second_moment_is_the_weighted_mean_of_all_steps(decay):
    state, squares = rmsprop_sgld.init({"w": W}), []
    for step in range(12):
        squares.append((HESSIAN @ (state.position["w"] - OPTIMUM)).square())
        state = rmsprop(state, decay=decay)
        weights = torch.tensor([decay**age for age in range(step, -1, -1)], dtype=torch.float64)
        wanted = (weights[:, None] * torch.stack(squares)).sum(dim=0) / weights.sum()
        torch.testing.assert_close(state.second_moment["w"], wanted, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("decay", "step"), [(0.0, 0), (0.8, 0), (0.8, 3), (0.99, 40), (1.0, 9)])
def test_the_correction_is_the_derivative_of_the_preconditioner(decay, step):
    moment = {"w": torch.tensor([0.3, 1.2, 0.02], dtype=torch.float64)}
    num = sum(decay**age for age in range(step + 1))
    settings = {"decay": decay, "step_size": 0.02}
    curvature = {"w": HESSIAN.diag()}

    def scale(w):
        """G_ii(w) for each i, with only w_i moved off W: what the drift of the step is multiplied by."""
        g = HESSIAN @ (w - OPTIMUM)
        v = moment["w"] + (g**2 - moment["w"]) / num
        return 1 / (v.sqrt() + 0.05)

    wanted = torch.autograd.functional.jacobian(scale, W).diag()
    state = rmsprop_sgld.State({"w": W}, moment, step)
    plain, corrected = (rmsprop(state, **settings, correction=c, curvature=curvature) for c in (False, True))
    got = (corrected.position["w"] - plain.position["w"]) / 0.01
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
    assert torch.equal(corrected.second_moment["w"], plain.second_moment["w"])


def test_the_correction_needs_the_curvature():
    with pytest.raises(ValueError, match="correction=True needs curvature, the diagonal of the Hessian"):
        rmsprop(rmsprop_sgld.init({"w": W}), correction=True)


@pytest.mark.parametrize("correction", [False, True])
def test_a_coordinate_without_gradient_is_only_held_by_the_prior(correction):
    zero = {"w": torch.zeros(3, dtype=torch.float64)}
    settings = {"decay": 0.9, "stability": 0.05, "correction": correction, "curvature": {"w": HESSIAN.diag()}}
    after = stepped(
        rmsprop_sgld,
        rmsprop_sgld.init({"w": W}),
        zero,
        {"w": NOISE},
        center={"w": CENTER},
        posterior=POSTERIOR,
        step_size=0.02,
        **settings,
    )
    wanted = W - 0.01 * 20 * 3.5 * (W - CENTER) + (0.02 * 20) ** 0.5 * NOISE
    torch.testing.assert_close(after.position["w"], wanted, rtol=1e-13, atol=1e-13)


# SGNHT


def thermostat_step(state, **changes):
    gradient = {"w": HESSIAN @ (state.position["w"] - OPTIMUM)}
    settings = {"center": {"w": CENTER}, "posterior": POSTERIOR, "step_size": 0.02, "diffusion": 0.3}
    return stepped(sgnht, state, gradient, {"w": NOISE}, **settings | {"num_coordinates": 3} | changes)


def test_one_step_of_sgnht_by_hand():
    p = torch.tensor([0.4, -1.3, 0.9], dtype=torch.float64)
    after = thermostat_step(sgnht.State({"w": W}, {"w": p}, 0.15, 9))
    h, kept = math.sqrt(0.02), math.exp(-0.45)
    momentum = kept * p - h * (1 + kept) / 2 * DRIFT + math.sqrt(1 - math.exp(-0.6)) * NOISE
    torch.testing.assert_close(after.momentum["w"], momentum, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(after.position["w"], W + h * momentum, rtol=1e-13, atol=1e-13)
    assert after.thermostat == pytest.approx(0.15 + 0.09 * (momentum.square().sum().item() / 3 - 1), rel=1e-12)
    assert after.step == 10


def test_at_infinite_friction_sgnht_is_sgld():
    state = sgnht.State({"w": W}, {"w": torch.tensor([0.4, -1.3, 0.9], dtype=torch.float64)}, 0.0, 4)
    after = thermostat_step(state, diffusion=60.0)
    torch.testing.assert_close(after.position["w"], advance(W, NOISE, 0.02).position["w"], rtol=1e-12, atol=1e-12)


def test_without_friction_sgnht_is_leapfrog():
    # Reversed momentum, same number of steps: back where it started. That holds for no scheme but a symmetric one.
    h, settings = math.sqrt(0.02), {"diffusion": 1e-300, "noise": {"w": torch.zeros(3, dtype=torch.float64)}}

    def run(position, num_steps):
        state = sgnht.State(*position, 0.0, 0)
        for _ in range(num_steps):
            gradient = {"w": HESSIAN @ (state.position["w"] - OPTIMUM)}
            state = stepped(
                sgnht,
                state,
                gradient,
                settings["noise"],
                center={"w": CENTER},
                posterior=POSTERIOR,
                step_size=0.02,
                diffusion=settings["diffusion"],
                num_coordinates=3,
            )
        return state

    p = torch.tensor([0.4, -1.3, 0.9], dtype=torch.float64)
    there = run(({"w": W}, {"w": p}), 7)
    # The round of a step begins after the drift: the turn has to be made one drift later.
    turned = ({"w": there.position["w"] - h * there.momentum["w"]}, {"w": -there.momentum["w"]})
    back = run(turned, 7)
    torch.testing.assert_close(back.position["w"], W - h * p, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(back.momentum["w"], -p, rtol=1e-9, atol=1e-9)


def test_the_thermostat_sees_all_ranks():
    generator = torch.Generator().manual_seed(1)
    center, start, (gradient, noise, _) = make(generator), make(generator), inputs(0, {})
    settings = {"center": center, "posterior": POSTERIOR, "step_size": 0.03, "diffusion": 0.2, "num_coordinates": 37}
    whole = stepped(sgnht, sgnht.init(start), gradient, noise, **settings)
    energies = []

    def first_pass(own):
        energies.append(own)
        return own

    ranks = [{"a": start["a"]}, {"b": start["b"], "c": start["c"]}]
    for mine in ranks:
        stepped(sgnht, sgnht.init(mine), gradient, noise, **settings, total=first_pass)
    assert all(isinstance(energy, float) for energy in energies)
    for mine in ranks:
        after = stepped(sgnht, sgnht.init(mine), gradient, noise, **settings, total=lambda own: sum(energies))
        assert after.thermostat == pytest.approx(whole.thermostat, rel=1e-12)
    assert whole.thermostat == pytest.approx(0.04 * (sum(energies) / 37 - 1), rel=1e-12)
