"""Layers that are computed again in the backward pass give the same numbers, and keep less in between."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from patterning_dist.errors import PatterningError
from patterning_dist.models.components import select_component
from patterning_dist.models.huggingface import fresh_language_model
from patterning_dist.models.passes import next_token_losses
from patterning_dist.sampling.shard import checkpoint_layers, decoder_layers
from patterning_dist.sampling.target import Target

TOKENS = torch.from_numpy(np.random.default_rng(0).integers(0, 31, size=(6, 24)))
CONFIG = transformers.LlamaConfig(
    vocab_size=31, hidden_size=16, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
    max_position_embeddings=32,
)  # fmt: skip


def make_target(checkpointed):
    model = fresh_language_model(CONFIG, 3)
    if checkpointed:
        checkpoint_layers(checkpoint_layers(model))  # twice is once
        assert [type(layer.forward.func) is not partial for layer in decoder_layers(model)] == [True] * 3
    component = select_component(model, "everything")
    return Target(model, component, next_token_losses, TOKENS, TOKENS)


def kept_bytes(target):
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = next_token_losses(target.model, TOKENS).sum()
    weights = {p.untyped_storage().data_ptr() for p in target.model.parameters()}
    loss.backward()
    return sum(size for pointer, size in kept.items() if pointer not in weights)


def test_gradients_have_the_same_bits_and_less_is_kept():
    plain, again = make_target(False), make_target(True)
    ids = np.arange(6)
    (loss, gradient), (same_loss, same) = plain.gradient(ids), again.gradient(ids)
    assert loss == same_loss and all(torch.equal(same[name], g) for name, g in gradient.items())
    vector = {name: torch.ones_like(w) for name, w in plain.live().items()}
    expected = plain.hessian_product(plain.prepare(TOKENS), vector)
    for name, product in again.hessian_product(again.prepare(TOKENS), vector).items():
        torch.testing.assert_close(product, expected[name], rtol=1e-5, atol=1e-6)
    assert kept_bytes(again) < 0.4 * kept_bytes(plain)


def test_a_model_without_layers_is_refused():
    with pytest.raises(PatterningError, match=r"gradient_checkpointing: Linear has no layers in an nn\.ModuleList"):
        checkpoint_layers(nn.Linear(2, 2))
