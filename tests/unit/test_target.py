"""Targets: the same numbers with the layers below computed once, and whatever the micro-batches; bad losses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from language_targets import language_target, language_task, whole_sets
from torch import nn
from torch.utils.data import TensorDataset

from patterning_dist.errors import PatterningError
from patterning_dist.models.components import select_component
from patterning_dist.models.losses import token_losses
from patterning_dist.sampling.target import Target
from patterning_dist.tasks.held_out import held_out_splits

torch.set_num_threads(1)

TOKENS = torch.from_numpy(np.tile(np.random.default_rng(1).integers(1, 31, size=(30, 6)), 2))
PROBE, HELD_OUT = TOKENS[:7], TOKENS[20:]
SPLITS = {"gap": "induction_minus_rest", "b": "domain:b"}
COMPONENTS = ["everything", "embedding", "layer.1.head.0", "layers.*.query[1,:,0:3]+unembedding[2:4]"]
TASK = language_task(TOKENS.numpy(), HELD_OUT.numpy(), domains=np.array(["a", "b"] * 5, dtype=object))


def make_model():
    return TASK.build(1)


def next_token_losses(model, tokens):
    return token_losses(model(tokens[:, :-1]), tokens)


def norm(model):
    return model.embedding.square().sum()[None]


def make_target(component="everything", model=None, loss=next_token_losses, **options):
    model = model or make_model()
    splits = held_out_splits(TASK, whole_sets(TASK), SPLITS)
    options = {"held_out": splits.samples, "coefficients": splits.coefficients, "num_component_losses": 1} | options
    return Target(model, select_component(model, component), loss, TOKENS, PROBE, functions=(norm,), **options)


def layered_target(component):
    return language_target(TASK, component, PROBE, splits=SPLITS, functions=(norm,))


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("micro_batch_size", [1, 2, 64])
def test_it_is_the_layered_target(component, micro_batch_size):
    ids = np.array([3, 17, 3, 5, 9])
    wanted, got = layered_target(component), make_target(component, micro_batch_size=micro_batch_size)
    assert list(got.center) == list(wanted.center)
    assert got.totals == wanted.totals
    assert got.extents == wanted.extents
    for target in (wanted, got):
        for w in target.live().values():
            w.mul_(1.3)  # the live coordinates are the model's own
    loss, gradient = wanted.gradient(ids)
    for _ in range(2):  # nothing of one gradient is left in the next
        found, again = got.gradient(ids)
        assert found == pytest.approx(loss, rel=1e-6)
        for name, g in gradient.items():
            torch.testing.assert_close(again[name], g, rtol=1e-4, atol=1e-6)
    a, b = wanted.measure(), got.measure()
    torch.testing.assert_close(b.observables, a.observables, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(b.losses, a.losses, rtol=1e-5, atol=1e-6)
    assert b.mean_loss == pytest.approx(a.mean_loss, rel=1e-6)
    assert not np.allclose(b.losses, make_target(component).measure().losses)


def test_what_the_loss_does_not_reach_has_gradient_zero():
    target = make_target(loss=lambda model, tokens: (model.embedding[tokens[:, 0]] ** 2).sum(dim=1), held_out=None)
    _, gradient = target.gradient(np.array([0, 1]))
    assert not gradient["layers.0.query"].any()
    assert gradient["embedding"].any()
    assert target.measure().losses.shape == (len(PROBE),)


def test_bfloat16_is_for_computing_only():
    target, exact = make_target(compute_dtype=torch.bfloat16), make_target()
    ids = np.arange(8)
    loss, gradient = target.gradient(ids)
    assert all(g.dtype == torch.float32 for g in gradient.values())
    assert all(w.dtype == torch.float32 for w in target.live().values())
    assert loss == pytest.approx(exact.gradient(ids)[0], abs=0.02)
    difference = (target.measure().losses - exact.measure().losses).abs().max().item()
    assert 0 < difference < 0.1


def test_a_data_set_of_several_tensors():
    inputs, labels = torch.randn(20, 3, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 2
    model = nn.Linear(3, 2)

    def loss(model, batch):
        x, y = batch
        return nn.functional.cross_entropy(model(x), y, reduction="none")

    data = TensorDataset(inputs, labels)
    target = Target(model, select_component(model, "weight[0]"), loss, data, data)
    value, gradient = target.gradient(np.arange(20))
    loss(model, (inputs, labels)).mean().backward()
    torch.testing.assert_close(gradient["weight[0:1,:]"], model.weight.grad[0:1])
    assert value == pytest.approx(target.measure().mean_loss, rel=1e-6)


@pytest.mark.parametrize(
    ("loss", "text"),
    [
        (lambda model, tokens: model(tokens).mean(), r"has shape \[\]; expected one row a sample"),
        (lambda model, tokens: model(tokens)[0], r"has shape \[12, 31\]; expected one row a sample"),
        (lambda model, tokens: model(tokens).mean(dim=(1, 2)) * torch.nan, "not finite at the checkpoint"),
    ],
)
def test_losses_of_a_wrong_kind_are_refused(loss, text):
    with pytest.raises(PatterningError, match=text):
        make_target(loss=loss)


def test_weights_of_a_wrong_type_are_refused():
    with pytest.raises(PatterningError, match=r"parameter embedding is torch.bfloat16; .* set compute_dtype instead"):
        make_target("embedding", make_model().to(torch.bfloat16))


def test_no_samples_are_refused():
    model = make_model()
    with pytest.raises(PatterningError, match="probe: there are no samples"):
        Target(model, select_component(model, "everything"), next_token_losses, TOKENS, TOKENS[:0])
