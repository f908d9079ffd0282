"""A chain is a function of (settings, number): exact resumption, frozen weights that stay frozen, honest failures."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from language_targets import Sequences, language_target, language_task, whole_sets
from torch.func import functional_call

from patterning_dist.models.components import model_components
from patterning_dist.models.losses import token_losses
from patterning_dist.sampling.chain import Chain, ChainFailure, ChainSettings
from patterning_dist.sampling.noise import standard_normal
from patterning_dist.sampling.posterior import Posterior
from patterning_dist.sampling.samplers import Sampler
from patterning_dist.sampling.statistics import PositionMeans
from patterning_dist.tasks.held_out import held_out_splits

torch.set_num_threads(1)

VOCABULARY, CONTEXT = 31, 12
SPLITS = {"induction": "induction_minus_rest", "second": "domain:b", "repeated": "repeated_sequence"}
UNIONS = ["embedding+layer.1.head.0", "layer.0.head.1+layer.1.head.1", "layer.1+unembedding", "layer.0+layer.0.head.1"]
PATTERNS = ["layers.*.query[1,:,0:3]", "layers.0.position_bias", "embedding[3:5]+layer.1.head.1"]


def make_tokens(num, seed):
    halves = np.random.default_rng(seed).integers(1, VOCABULARY, size=(num, CONTEXT // 2))
    return np.tile(halves, 2)


POOL, PROBE, HELD_OUT = make_tokens(40, 1), make_tokens(5, 2), make_tokens(19, 3)


def make_task(pool=None):
    domains = np.array(["a", "b"] * 9 + ["a"], dtype=object)
    return language_task(pool or Sequences(POOL), HELD_OUT, domains=domains, position_bias_init=0.5)


def make_model():
    return make_task().build(1)


COMPONENTS = [*model_components(make_model()), *UNIONS, *PATTERNS]


def row_sum(model):
    return torch.stack([model.embedding.sum(), model.layers[1].query[1].square().sum()])


def make_chain(component="layer.0.head.1", number=0, pool=None, **changes):
    settings = {
        "posterior": Posterior(inverse_temperature=40.0, localization=3.0),
        "step_size": 1e-3,
        "batch_size": 4,
        "burn_in": 2,
        "num_draws": 4,
        "steps_between_draws": 3,
        "seed": 5,
    } | changes
    target = language_target(make_task(pool), component, PROBE, splits=SPLITS, functions=(row_sum,))
    statistics = {"gradients": PositionMeans(target)}
    return Chain(target, ChainSettings(**settings), number, population=len(POOL), statistics=statistics)


def sums(chain):
    return chain.statistics["gradients"].sums


def assert_same_draw(a, b):
    assert a.number == b.number
    np.testing.assert_array_equal(a.observables, b.observables)
    np.testing.assert_array_equal(a.losses, b.losses)
    assert a.mean_loss == b.mean_loss


# Resuming


SAMPLERS = [
    Sampler(),
    Sampler("rmsprop_sgld", {"decay": 0.9, "stability": 0.05, "correction": True}),
    Sampler("sgnht", {"diffusion": 3.0}),
]


@pytest.mark.parametrize("taken", [0, 1, 3, 4])
@pytest.mark.parametrize("component", ["layer.0.head.1", "everything"])
@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda sampler: sampler.kind)
def test_a_resumed_chain_is_the_undisturbed_one(component, taken, sampler):
    whole = make_chain(component, sampler=sampler)
    undisturbed = list(whole.draws())
    first = make_chain(component, sampler=sampler)
    stream = first.draws()
    for _ in range(taken):
        next(stream)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    resumed = make_chain(component, sampler=sampler)
    resumed.load_state_dict(torch.load(file))
    rest = list(resumed.draws())
    assert len(rest) == 4 - taken
    for a, b in zip(rest, undisturbed[taken:], strict=True):
        assert_same_draw(a, b)
    assert torch.equal(sums(resumed), sums(whole))
    assert resumed.state.step == whole.state.step == 2 + 3 * 3


@pytest.mark.parametrize("gradient", ["control_variate", "full"])
def test_a_chain_with_another_gradient_is_resumed_bit_for_bit(gradient):
    """What the checkpoint's exact gradient is comes from the center, wherever the chain is."""
    whole, plain = make_chain("layer.1", gradient=gradient), make_chain("layer.1")
    undisturbed, first = list(whole.draws()), make_chain("layer.1", gradient=gradient)
    next(first.draws())
    resumed = make_chain("layer.1", gradient=gradient)
    resumed.load_state_dict(first.state_dict())
    for a, b in zip(resumed.draws(), undisturbed[1:], strict=True):
        assert_same_draw(a, b)
    assert resumed.temperatures() == whole.temperatures()
    assert len(whole.temperatures()[0]) == len(whole.temperatures()[1]) == 3 * 3
    assert np.abs(next(plain.draws()).losses - undisturbed[0].losses).max() > 1e-5


def test_the_control_variate_is_the_difference_of_two_minibatches_and_the_exact_gradient():
    chain, ids = make_chain("layer.1.head.0", gradient="control_variate"), np.array([3, 17, 3, 30])
    target, away = chain.target, {}
    exact = target.mean_gradient(target.prepare(torch.from_numpy(POOL)))[1]
    at_center = target.gradient(ids)[1]
    np.testing.assert_equal(
        {n: g.numpy() for n, g in chain._gradient(ids)[1].items()}, {n: g.numpy() for n, g in exact.items()}
    )
    generator = torch.Generator().manual_seed(3)
    for name, w in target.center.items():
        away[name] = w + 0.1 * torch.randn(w.shape, generator=generator)
    target.move_to(away)
    loss, plain = target.gradient(ids)
    controlled_loss, controlled = chain._gradient(ids)
    assert controlled_loss == loss
    for name, w in target.live().items():
        assert torch.equal(w, away[name])
        torch.testing.assert_close(controlled[name], plain[name] - at_center[name] + exact[name], rtol=0, atol=1e-6)
        assert (controlled[name] - plain[name]).abs().max() > 1e-3


def test_a_chain_looks_at_the_spectrum_and_walks_as_if_it_had_not():
    looking, other = (make_chain("layer.1.head.0", number, lanczos_steps=6) for number in (0, 1))
    assert other.spectrum == looking.spectrum  # of the posterior, whichever the chain
    posterior = looking.settings.posterior
    ids = torch.from_numpy(POOL)  # fewer than 64: all of them
    direction = looking.target.mean_gradient(looking.target.prepare(ids))[1]
    curved = looking.target.hessian_product(looking.target.prepare(ids), direction)
    quotient = looking.target.dot(direction, curved) / looking.target.dot(direction, direction)
    precision = posterior.inverse_temperature * quotient + posterior.localization
    ends = looking.spectrum
    assert ends.smallest - ends.smallest_error <= precision <= ends.largest + ends.largest_error
    assert ends.smallest < posterior.localization + 1 and ends.largest > posterior.localization + 1
    for a, b in zip(looking.draws(), make_chain("layer.1.head.0").draws(), strict=True):
        assert_same_draw(a, b)


def test_a_saved_state_does_not_change_while_the_chain_goes_on():
    chain = make_chain()
    stream = chain.draws()
    next(stream)
    saved = chain.state_dict()
    rest = list(stream)
    resumed = make_chain()
    resumed.load_state_dict(saved)
    for a, b in zip(resumed.draws(), rest, strict=True):
        assert_same_draw(a, b)
    assert torch.equal(sums(resumed), sums(chain))


# What moves and what does not


@pytest.mark.parametrize("component", COMPONENTS)
def test_only_the_component_moves(component):
    chain = make_chain(component, num_draws=1)
    list(chain.draws())
    checkpoint = dict(make_model().named_parameters())
    for name, now in chain.target.model.named_parameters():
        free = torch.zeros_like(now, dtype=torch.bool)
        for piece in chain.target.component.pieces:
            if piece.parameter == name:
                piece.view(free)[:] = True
        assert torch.equal(now != checkpoint[name], free), name


@pytest.mark.parametrize("component", COMPONENTS)
def test_losses_from_the_frozen_prefix_equal_the_full_forward_pass(component):
    target, tokens = language_target(make_task(), component, PROBE), torch.from_numpy(make_tokens(19, 8))
    batch = target.prepare(tokens)  # before the component moves
    generator = torch.Generator().manual_seed(1)
    target.move_to({n: w + 0.3 * torch.randn(w.shape, generator=generator) for n, w in target.center.items()})
    with torch.no_grad():
        whole = token_losses(target.model(tokens[:, :-1]), tokens)
    torch.testing.assert_close(target.losses(batch).float(), whole, rtol=1e-6, atol=1e-6)
    untouched = make_model()
    with torch.no_grad():
        before = token_losses(untouched(tokens[:, :-1]), tokens)
    assert (whole - before).abs().max() > 0.01


def full_gradient(tokens, coefficients):
    model = make_model()
    (coefficients * token_losses(model(tokens[:, :-1]), tokens)).sum().backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("component", COMPONENTS)
def test_restricted_gradients_are_slices_of_the_full_one(component):
    tokens = torch.from_numpy(HELD_OUT)
    generator = torch.Generator().manual_seed(2)
    coefficients = torch.randn(3, len(tokens), CONTEXT - 1, generator=generator)
    coefficients[1, 16:] = 0  # the second chunk has nothing of this observable
    coefficients[2] = 0
    target = language_target(make_task(), component, PROBE, held_out=tokens, coefficients=coefficients)
    chosen, gradients = target.component, target.split_gradients()
    for k in range(3):
        full = full_gradient(tokens, coefficients[k])
        assert list(gradients[k]) == [piece.name for piece in chosen.pieces]
        for name, wanted in chosen.free(full).items():
            torch.testing.assert_close(gradients[k][name], wanted, rtol=1e-4, atol=1e-5)
    loss, gradient = target.mean_gradient(target.prepare(tokens))
    full = full_gradient(tokens, torch.full((len(tokens), CONTEXT - 1), 1 / (len(tokens) * (CONTEXT - 1))))
    for name, wanted in chosen.free(full).items():
        torch.testing.assert_close(gradient[name], wanted, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        assert loss == pytest.approx(token_losses(make_model()(tokens[:, :-1]), tokens).mean().item(), rel=1e-6)


# Draws


def test_deviations_vanish_at_the_center():
    draw = next(make_chain(burn_in=0).draws())
    assert not draw.observables.any()
    assert not draw.losses.any()
    assert draw.mean_loss == 0.0


def test_a_draw_is_the_difference_of_two_full_evaluations():
    chain, splits = make_chain("everything"), held_out_splits(make_task(), whole_sets(make_task()), SPLITS)
    *_, draw = chain.draws()
    weights = {name: w.clone() for name, w in chain.state.position.items()}
    model = make_model()

    def evaluate(parameters):
        with torch.no_grad():
            probe = torch.from_numpy(PROBE)
            losses = token_losses(functional_call(model, parameters, probe[:, :-1]), probe).double()
            held = splits.samples[torch.arange(len(splits.samples))]
            held_losses = token_losses(functional_call(model, parameters, held[:, :-1]), held).double()
            split = [(c * held_losses).sum() for c in splits.coefficients]
            function = [parameters["embedding"].sum(), parameters["layers.1.query"][1].square().sum()]
        return torch.cat([losses.flatten(), losses.mean(dim=1)]), torch.stack([losses.mean(), *split, *function])

    here, center = evaluate(weights), evaluate(dict(model.named_parameters()))
    np.testing.assert_allclose(draw.losses, (here[0] - center[0]).numpy(), atol=2e-6)
    np.testing.assert_allclose(draw.observables, (here[1] - center[1]).detach().numpy(), atol=2e-5)
    assert draw.mean_loss == pytest.approx(draw.losses[: PROBE[:, 1:].size].mean(), abs=1e-12)
    assert draw.observables[0] == pytest.approx(draw.mean_loss, abs=1e-12)
    assert np.abs(draw.losses).max() > 1e-3
    np.testing.assert_allclose(chain.center_losses, center[0].numpy(), atol=1e-6)


def test_sums_hold_positions_and_gradients_of_the_splits():
    chain = make_chain("layer.1.head.0")
    wanted = torch.zeros_like(sums(chain))
    for _ in chain.draws():
        flat = [torch.cat([w.flatten() for w in chain.state.position.values()])]
        gradients = chain.target.split_gradients()
        flat += [torch.cat([g.flatten() for g in gradient.values()]) for gradient in gradients]
        wanted += torch.stack(flat).double()
    assert wanted.shape == (1 + len(SPLITS), 4 * 8 * 4)
    torch.testing.assert_close(sums(chain), wanted)
    assert wanted[1:].abs().max(dim=1).values.min() > 1e-4


def test_chains_and_components_share_neither_minibatches_nor_noise():
    asked, first_words = [], []
    for component, number in [("layer.1.head.0", 0), ("layer.1.head.0", 1), ("layer.1.head.1", 0), ("layer.1", 0)]:
        pool = Sequences(POOL)
        chain = make_chain(component, number, pool)
        list(chain.draws())
        asked.append(pool.asked)
        noise = standard_normal(chain.seed, number, 0, "w", 0, 64)
        first_words.append(noise)
    for i in range(len(asked)):
        assert len(asked[i]) == 2 + 3 * 3
        assert all(len(ids) == 4 for ids in asked[i])
        for j in range(i):
            assert all(a != b for a, b in zip(asked[i], asked[j], strict=True))
            assert abs(torch.corrcoef(torch.stack([first_words[i], first_words[j]]))[0, 1].item()) < 0.5
    repeated = Sequences(POOL)
    list(make_chain("layer.1.head.0", 0, repeated).draws())
    assert repeated.asked == asked[0]


def test_seeds_give_other_chains():
    a, b = (next(make_chain(seed=seed).draws()) for seed in (5, 6))
    assert np.abs(a.losses - b.losses).max() > 1e-4


# Failures


def test_a_loss_that_is_not_finite_ends_the_chain():
    with pytest.raises(ChainFailure, match=r"the loss became nan at step 1; lower sampling\.step_size \(1e\+38\)"):
        next(make_chain(step_size=1e38).draws())


def test_leaving_the_neighbourhood_ends_the_chain():
    with pytest.raises(ChainFailure, match=r"by step 1 .*lower sampling\.step_size \(100\) or raise sampling\.local"):
        next(make_chain(step_size=100.0, burn_in=1).draws())


def test_an_observable_that_is_not_finite_ends_the_chain():
    chain = make_chain()
    chain.target.functions = (lambda model: torch.tensor([0.0, torch.nan]),)
    with pytest.raises(ChainFailure, match=r"not finite at draw 0 \(step 2\); lower sampling\.step_size \(0\.001\)"):
        next(chain.draws())
