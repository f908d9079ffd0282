"""Losses of a language model by chunks of logits are those of all logits at once, and take the memory of a chunk."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

from patterning_dist.models import losses
from patterning_dist.models.components import select_component
from patterning_dist.models.huggingface import fresh_language_model
from patterning_dist.models.losses import token_losses
from patterning_dist.models.passes import logits, next_token_losses
from patterning_dist.sampling.target import Target

VOCABULARY, WIDTH = 97, 16
TOKENS = torch.from_numpy(np.random.default_rng(0).integers(0, VOCABULARY, size=(4, 12)))
SIZES = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "max_position_embeddings": 16, "bos_token_id": None, "eos_token_id": None}
CONFIGS = {
    "neox": transformers.GPTNeoXConfig(**SIZES, **HEADS),
    "tied": transformers.LlamaConfig(**SIZES, **HEADS, tie_word_embeddings=True),
    "capped": transformers.Gemma2Config(
        **SIZES, **HEADS, num_key_value_heads=1, head_dim=8, final_logit_softcapping=0.2
    ),
    "scaled": transformers.GraniteConfig(**SIZES, **HEADS, logits_scaling=3.0),
}
IN_CHUNKS = ["neox", "tied"]


class MostLogits(TorchDispatchMode):
    """The most numbers of any tensor with an entry for every token at the end, while it is entered."""

    def __init__(self):
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        found = function(*arguments, **(options or {}))
        for tensor in found if isinstance(found, tuple | list) else [found]:
            if isinstance(tensor, torch.Tensor) and tensor.shape[-1:] == (VOCABULARY,):
                self.most = max(self.most, tensor.numel())
        return found


def chunk(monkeypatch, numbers):
    monkeypatch.setattr(losses, "CHUNK", numbers)


def model_of(kind):
    return fresh_language_model(CONFIGS[kind], 3)


def whole(model):
    return token_losses(logits(model, TOKENS[:, :-1]), TOKENS)


def gradients(model, found):
    coefficients = torch.linspace(0.5, 2, found.numel()).view(found.shape)
    return torch.autograd.grad((coefficients * found).sum(), list(model.parameters()))


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("positions", [1, 7, 43])
def test_losses_and_gradients_are_those_of_all_logits_at_once(monkeypatch, kind, positions):
    model = model_of(kind)
    expected = whole(model)
    assert torch.equal(next_token_losses(model, TOKENS), expected)  # one chunk is the old way, to the bit
    chunk(monkeypatch, positions * VOCABULARY)
    found = next_token_losses(model, TOKENS)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    for mine, theirs in zip(gradients(model, found), gradients(model, expected), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6 * theirs.abs().max().item())
    with torch.no_grad():
        torch.testing.assert_close(next_token_losses(model, TOKENS), expected, rtol=1e-6, atol=1e-6)
    # Nothing of it is left on the model.
    assert logits(model, TOKENS[:, :-1]).shape == (4, 11, VOCABULARY)


@pytest.mark.parametrize("kind", CONFIGS)
def test_no_tensor_is_larger_than_a_chunk_of_logits(monkeypatch, kind):
    model = model_of(kind)
    next_token_losses(model, TOKENS)
    with MostLogits() as at_once:
        next_token_losses(model, TOKENS).sum().backward()
    assert at_once.most == 4 * 11 * VOCABULARY
    positions = WIDTH + 1  # of the rest, the head's matrix is largest, transposed
    chunk(monkeypatch, positions * VOCABULARY)
    with MostLogits() as in_chunks:
        next_token_losses(model, TOKENS).sum().backward()
    assert in_chunks.most == (positions * VOCABULARY if kind in IN_CHUNKS else at_once.most)


def test_several_backward_passes_and_second_derivatives(monkeypatch):
    model = model_of("neox")
    component = select_component(model, "everything")
    coefficients = torch.rand(3, 4, 11, generator=torch.Generator().manual_seed(0)).double()

    def measured():
        options = {"held_out": TOKENS, "coefficients": coefficients}
        target = Target(model, component, next_token_losses, TOKENS, TOKENS, **options)
        vector = {name: torch.sin(torch.arange(w.numel()).float()).view(w.shape) for name, w in target.live().items()}
        return [*target.split_gradients(), target.hessian_product(target.prepare(TOKENS), vector)]

    expected = measured()
    chunk(monkeypatch, 7 * VOCABULARY)
    for found, wanted in zip(measured(), expected, strict=True):
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5 * value.abs().max().item(), msg=name)


def test_losses_of_bfloat16_passes_are_taken_from_float32_logits(monkeypatch):
    model = model_of("neox")
    chunk(monkeypatch, 7 * VOCABULARY)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = next_token_losses(model, TOKENS), whole(model)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
