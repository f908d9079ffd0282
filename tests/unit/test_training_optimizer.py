"""Per-head Muon is Muon on every head alone, its Adam is Adam, and the configuration decides which is built."""

from __future__ import annotations

import pytest
import torch

from patterning_dist.config import AttentionOnlyConfig, TrainingConfig
from patterning_dist.errors import PatterningError
from patterning_dist.models.attention import AttentionOnlyTransformer
from patterning_dist.tasks.optimizers import (
    PerHeadMuon,
    head_matrix_optimizer,
    learning_rate_factor,
    orthogonalize,
    plain_optimizer,
    set_learning_rate_factor,
)

torch.set_num_threads(1)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_model():
    return AttentionOnlyTransformer(AttentionOnlyConfig(num_layers=2, num_heads=3, d_model=8, d_head=4), 31, 12, seed=1)


def set_gradients(parameters, step):
    for index, p in enumerate(parameters):
        p.grad = random(*p.shape, seed=100 * step + index)


@pytest.mark.parametrize("shape", [(5, 8, 8), (3, 4, 20), (2, 1, 6)])
def test_orthogonalize_brings_singular_values_near_one(shape):
    matrices = random(*shape) * torch.logspace(-3, 3, shape[0])[:, None, None]  # whatever their size
    result = orthogonalize(matrices)
    values = torch.linalg.svdvals(result)
    assert values.max() < 1.25
    assert values.median() > 0.65
    # The same singular vectors: U^T X V is diagonal and positive.
    u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
    rotated = u.mT @ result @ vh.mT
    off = rotated - torch.diag_embed(torch.diagonal(rotated, dim1=1, dim2=2))
    assert off.abs().max() < 1e-3
    well = s / s.amax(dim=1, keepdim=True) > 0.1
    assert torch.diagonal(rotated, dim1=1, dim2=2)[well].min() > 0.65


def muon_by_hand(w, gradients, lr, momentum, weight_decay):
    """One head, one matrix, the textbook update."""
    m = torch.zeros_like(w)
    for g in gradients:
        m = momentum * m + g
        update = g + momentum * m
        lying = update.T if update.shape[0] > update.shape[1] else update
        o = orthogonalize(lying[None])[0]
        o = o.T if update.shape[0] > update.shape[1] else o
        w = w * (1 - lr * weight_decay) - lr * max(1.0, w.shape[0] / w.shape[1]) ** 0.5 * o
    return w


def test_all_heads_at_once_equal_every_head_alone():
    shapes = [(3, 8, 4), (2, 3, 8, 4), (2, 4, 8), (3, 8, 8)]  # standing, lying and square, and those of two networks
    parameters = [torch.nn.Parameter(random(*shape, seed=i)) for i, shape in enumerate(shapes)]
    starts = [p.detach().clone() for p in parameters]
    group = {"params": parameters, "lr": 0.03, "muon": True, "momentum": 0.9, "weight_decay": 0.2}
    optimizer, history = PerHeadMuon([group]), []
    for step in range(4):
        set_gradients(parameters, step)
        history.append([p.grad.clone() for p in parameters])
        optimizer.step()
    for index, (p, start) in enumerate(zip(parameters, starts, strict=True)):
        every, starts_of, *steps = (
            tensor.flatten(0, -3) for tensor in (p.detach(), start, *(step[index] for step in history))
        )
        for head, found in enumerate(every):
            wanted = muon_by_hand(starts_of[head], [step[head] for step in steps], 0.03, 0.9, 0.2)
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_a_step_does_not_depend_on_the_size_of_the_gradient_but_on_the_head():
    p, q = (torch.nn.Parameter(torch.zeros(2, 6, 4)) for _ in range(2))
    p.grad, scale = random(2, 6, 4), torch.tensor([1e3, 1e-2])[:, None, None]
    q.grad = p.grad * scale
    for parameter in (p, q):
        PerHeadMuon([{"params": [parameter], "lr": 0.1, "muon": True}]).step()
    torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)
    # Flattened into one matrix, the large head would have taken the step for both.
    assert p[1].abs().max() > 0.01


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_the_rest_is_adam(weight_decay):
    ours, theirs = ([torch.nn.Parameter(random(7, 3, seed=i)) for i in range(2)] for _ in range(2))
    options = {"lr": 0.02, "betas": (0.9, 0.98), "eps": 1e-8, "weight_decay": weight_decay}
    a, b = PerHeadMuon([{"params": ours, **options}]), torch.optim.AdamW(theirs, **options)
    for step in range(12):
        for parameters, optimizer in ((ours, a), (theirs, b)):
            set_gradients(parameters, step)
            optimizer.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


def test_parameters_without_a_gradient_stay():
    p, q = torch.nn.Parameter(random(2, 3, 3)), torch.nn.Parameter(random(2, 3, 3))
    before = p.detach().clone()
    q.grad = torch.ones_like(q)
    PerHeadMuon([{"params": [p, q], "lr": 0.1, "muon": True, "weight_decay": 0.5}]).step()
    assert torch.equal(p.detach(), before)
    assert not torch.equal(q.detach(), before)


def training(**changes):
    rates = {"matrix_learning_rate": 0.04, "learning_rate": 0.01, "bias_learning_rate_factor": 7, "weight_decay": 0.1}
    return TrainingConfig(num_steps=1, batch_size=1, **(rates | changes))


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_groups_and_rates(kind):
    model = make_model()
    optimizer = head_matrix_optimizer(model, training(optimizer=kind))
    assert type(optimizer) is {"muon": PerHeadMuon, "adamw": torch.optim.AdamW}[kind]
    found = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        group = found[id(p)]
        rate = 0.04 if p.dim() == 3 else 0.07 if "bias" in name else 0.01
        assert group["lr"] == pytest.approx(rate), name
        assert group["weight_decay"] == 0.1
        assert group["betas"] == (0.9, 0.98)
        if kind == "muon":
            assert group["muon"] == (p.dim() == 3), name
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(found)


def test_a_model_without_biases_has_no_empty_group():
    model = AttentionOnlyTransformer(
        AttentionOnlyConfig(d_model=8, d_head=4, num_heads=2, relative_position_bias=[]), 31, 12
    )
    optimizer = head_matrix_optimizer(model, training())
    assert [len(group["params"]) for group in optimizer.param_groups] == [8, 2]
    assert [group["muon"] for group in optimizer.param_groups] == [True, False]


def test_the_factor_scales_the_rates_as_built():
    optimizer = head_matrix_optimizer(make_model(), training())
    built = [group["lr"] for group in optimizer.param_groups]
    for factor in (0.5, 0.1, 1.0):
        set_learning_rate_factor(optimizer, factor)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([factor * lr for lr in built])


def test_learning_rate_schedule():
    factors = [learning_rate_factor(step, 6, 3, 4) for step in range(10)]
    assert factors == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1, 4 / 5, 3 / 5, 2 / 5, 1 / 5])
    assert [learning_rate_factor(step, 4, 0, 0) for step in range(4)] == [1.0] * 4


def test_of_other_models_matrices_decay_and_vectors_do_not():
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.LayerNorm(3))
    model[1].bias.requires_grad_(False)
    model[0].weight.ds_shape = torch.Size([3, 4])  # as under ZeRO stage 3, where the rest of it lies elsewhere
    model[0].weight.data = torch.zeros(0)
    optimizer = plain_optimizer(model, training(optimizer="adamw"))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    names = {name: decay.get(id(p)) for name, p in model.named_parameters()}
    assert names == {"0.weight": 0.1, "0.bias": 0.0, "1.weight": 0.0, "1.bias": None}
    assert {group["lr"] for group in optimizer.param_groups} == {0.01}
    with pytest.raises(PatterningError, match=r"training\.optimizer: muon steps on one matrix a head"):
        plain_optimizer(model, training(optimizer="muon"))
