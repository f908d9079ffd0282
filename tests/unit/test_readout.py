"""Losses by the final norm and the unembedding: part by part, by a table, and with second derivatives."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from patterning_dist.models import readout as module
from patterning_dist.models.readout import readout_of

WIDTH, DIRECTIONS, VOCABULARY = 16, 4, 29
NORMS = {
    "layer": lambda: nn.LayerNorm(WIDTH),
    "layer_without_bias": lambda: nn.LayerNorm(WIDTH, bias=False),
    "rms": lambda: LlamaRMSNorm(WIDTH),
    "torch_rms": lambda: nn.RMSNorm(WIDTH, eps=1e-5),
    "one_plus": lambda: GemmaRMSNorm(WIDTH),
}


def parts(kind, *, bias=True, size=1.0):
    """Norm, head, and base, z, O, targets: all at random, a mean far from 0."""
    torch.manual_seed(0)
    norm, head = NORMS[kind](), nn.Linear(WIDTH, VOCABULARY, bias=bias)
    with torch.no_grad():
        for parameter in [*norm.parameters(), *head.parameters()]:
            parameter.normal_(0.3, 0.5)
        head.weight *= size
    norm.requires_grad_(False)
    head.requires_grad_(False)
    base, z = torch.randn(3, 7, WIDTH) + 2, torch.randn(3, 7, DIRECTIONS, requires_grad=True)
    output = torch.randn(DIRECTIONS, WIDTH, requires_grad=True)
    return norm, head, base, z, output, torch.randint(VOCABULARY, (3, 7))


def plain(norm, head, x, targets):
    return nn.functional.cross_entropy(head(norm(x)).flatten(0, 1), targets.flatten(), reduction="none").view(3, 7)


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [1.0, 60.0])  # sums of exponentials in range as they are, and not
@pytest.mark.parametrize("at_once", [1 << 18, 5 * VOCABULARY])
def test_losses_are_those_of_the_modules(monkeypatch, kind, bias, size, at_once):
    monkeypatch.setattr(module, "_IN_CACHE", at_once)
    norm, head, base, z, output, targets = parts(kind, bias=bias, size=size)
    readout = readout_of(norm, head)
    assert readout._bounded == (size == 1.0)
    with torch.no_grad():
        wanted = plain(norm, head, base + z @ output, targets)
        allowed = {"rtol": 1e-5, "atol": 1e-6 * size * WIDTH}
        torch.testing.assert_close(readout.losses(base + z @ output, targets), wanted, **allowed)
        found = readout.losses_by_table(readout.table(base), base, z, output, targets)
        torch.testing.assert_close(found, wanted, **allowed)


@pytest.mark.parametrize("kind", NORMS)
def test_first_and_second_derivatives(kind):
    norm, head, base, z, output, targets = parts(kind)
    readout, above = readout_of(norm, head), torch.rand(3, 7)

    def derivatives(losses):
        loss = (above * losses(base + z @ output)).sum()
        kept = torch.autograd.grad(loss, [z, output], retain_graph=True)
        again = torch.autograd.grad(loss, [z, output], retain_graph=True)
        first = torch.autograd.grad(loss, [z, output], create_graph=True)
        along = sum((g * g.detach().sin()).sum() for g in first)
        return [*kept, *again, *first, *torch.autograd.grad(along, [z, output])]

    found = derivatives(lambda x: readout.losses(x, targets))
    wanted = derivatives(lambda x: plain(norm, head, x, targets))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6 * b.abs().max().item() * WIDTH)


def test_other_norms_and_heads_are_not_taken():
    norm, head, *_ = parts("layer")
    assert readout_of(nn.Identity(), head) is None
    assert readout_of(norm, nn.Sequential(head)) is None

    class Half(LlamaRMSNorm):
        def forward(self, x):
            return 0.5 * super().forward(x)

    assert readout_of(Half(WIDTH), head) is None


def test_a_table_is_for_few_directions():
    readout = readout_of(*parts("layer")[:2])
    assert [readout.pays(number) for number in (1, 4, 5, 16)] == [True, True, False, False]
    base = parts("layer")[2]
    assert readout.table_bytes(base) == readout.table(base).nbytes
