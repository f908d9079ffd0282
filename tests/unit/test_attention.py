"""The transformer against a reference in plain loops, and what its slices, biases and seeds do."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from patterning_dist.config import AttentionOnlyConfig
from patterning_dist.models.attention import AttentionLayer, AttentionOnlyTransformer
from patterning_dist.models.losses import token_losses

torch.set_num_threads(1)
LAYERS, HEADS, WIDTH, HEAD_WIDTH, CONTEXT, VOCABULARY = 2, 3, 8, 4, 10, 29


def make_model(seed=2, vocabulary_size=VOCABULARY, **changes):
    sizes = {"num_layers": LAYERS, "num_heads": HEADS, "d_model": WIDTH, "d_head": HEAD_WIDTH}
    config = AttentionOnlyConfig(**sizes | {"position_bias_init": 0.7} | changes)
    return AttentionOnlyTransformer(config, vocabulary_size, CONTEXT, seed)


def make_tokens(num=3, length=CONTEXT, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, VOCABULARY, size=(num, length)))


def rms_norm(x):
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-6)


def reference(model, tokens):
    """Logits [position, vocabulary] of one sequence, position by position and head by head."""
    weights = {name: p.detach().double().numpy() for name, p in model.named_parameters()}
    x = weights["embedding"][tokens]
    for layer in range(LAYERS):
        normed, after = rms_norm(x), x.copy()
        for head in range(HEADS):
            q, k, v = (normed @ weights[f"layers.{layer}.{part}"][head] for part in ("query", "key", "value"))
            bias = weights.get(f"layers.{layer}.position_bias")
            for i in range(len(tokens)):
                scores = np.array([q[i] @ k[j] / np.sqrt(HEAD_WIDTH) for j in range(i + 1)])
                if bias is not None:
                    scores += [bias[head, i - j] for j in range(i + 1)]
                pattern = np.exp(scores - scores.max())
                mixed = (pattern / pattern.sum()) @ v[: i + 1]
                after[i] += mixed @ weights[f"layers.{layer}.output"][head]
        x = after
    return rms_norm(x) @ weights["unembedding"]


def test_forward_equals_the_reference():
    model, tokens = make_model(), make_tokens()
    with torch.no_grad():
        model.layers[0].position_bias.normal_(generator=torch.Generator().manual_seed(1))
        logits = model(tokens)
    for row, sequence in enumerate(tokens.numpy()):
        np.testing.assert_allclose(logits[row], reference(model, sequence), rtol=1e-4, atol=1e-4)


def test_losses_are_cross_entropies_of_the_next_token():
    model, tokens = make_model(), make_tokens()
    with torch.no_grad():
        losses = token_losses(model(tokens[:, :-1]), tokens)
    logits = reference(model, tokens[1, :-1].numpy())
    wanted = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(CONTEXT - 1), tokens[1, 1:].numpy()]
    np.testing.assert_allclose(losses[1], wanted, rtol=1e-4, atol=1e-5)
    half = model(tokens[:, :-1]).detach().bfloat16()
    assert token_losses(half, tokens).dtype == torch.float32


@pytest.mark.parametrize("position", [1, 4, 9])
def test_nothing_is_seen_of_later_tokens(position):
    model, tokens = make_model(), make_tokens()
    other = tokens.clone()
    other[:, position] = (other[:, position] + 5) % VOCABULARY
    with torch.no_grad():
        a, b = model(tokens), model(other)
    assert torch.equal(a[:, :position], b[:, :position])
    assert (a[:, position:] - b[:, position:]).abs().max() > 0.1


def test_a_shorter_sequence_gives_the_first_logits():
    model, tokens = make_model(), make_tokens()
    with torch.no_grad():
        torch.testing.assert_close(model(tokens[:, :6]), model(tokens)[:, :6])


def test_patterns_are_causal_distributions_and_those_of_the_forward_pass():
    model, tokens = make_model(), make_tokens()
    with torch.no_grad():
        logits, patterns = model(tokens, return_patterns=True)
        assert torch.equal(logits, model(tokens))
        x = model.embed(tokens)
        for layer, pattern in zip(model.layers, patterns, strict=True):
            assert pattern.shape == (3, HEADS, CONTEXT, CONTEXT)
            torch.testing.assert_close(pattern.sum(-1), torch.ones(3, HEADS, CONTEXT))
            assert not pattern.triu(1).any()
            normed = torch.from_numpy(rms_norm(x.double().numpy())).float()
            value = torch.einsum("bld,hde->bhle", normed, layer.value)
            after = x + torch.einsum("bhle,hed->bld", pattern @ value, layer.output)
            x = layer(x)
            torch.testing.assert_close(x, after, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["query", "key", "value", "output", "position_bias"])
def test_the_slice_of_a_head_is_that_head(name):
    layer = make_model().layers[0]
    x = torch.randn(2, CONTEXT, WIDTH, generator=torch.Generator().manual_seed(3))

    def contribution(head):
        """Of one head to the layer's output: the others' output matrices are taken away."""
        alone = AttentionLayer(HEADS, WIDTH, HEAD_WIDTH, CONTEXT, True)
        alone.load_state_dict(layer.state_dict())
        with torch.no_grad():
            alone.output[[h for h in range(HEADS) if h != head]] = 0
            return alone(x) - x

    with torch.no_grad():
        before, whole = [contribution(h) for h in range(HEADS)], layer(x)
        torch.testing.assert_close(sum(before), whole - x, rtol=1e-4, atol=1e-5)
        getattr(layer, name)[1] += 0.01 * torch.randn(getattr(layer, name)[1].shape)
        after, changed = [contribution(h) for h in range(HEADS)], layer(x)
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[2], after[2])
    difference = after[1] - before[1]
    assert difference.abs().max() > 1e-5
    torch.testing.assert_close(changed - whole, difference, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("place", [(0, 2), (1, 0)])
def test_an_ablated_head_is_one_whose_output_matrix_is_zero(place):
    model, tokens = make_model(), make_tokens()
    layer, head = place
    with torch.no_grad():
        whole, ablated = model(tokens), model(tokens, ablated=place)
        patterns = model(tokens, return_patterns=True, ablated=place)[1]
        model.layers[layer].output[head] = 0
        torch.testing.assert_close(ablated, model(tokens), rtol=1e-5, atol=1e-6)
        assert torch.equal(patterns[1], model(tokens, return_patterns=True)[1][1])
    assert (ablated - whole).abs().max() > 0.01


def test_position_bias_starts_at_the_previous_tokens():
    model = make_model(num_heads=12, position_bias_init=40.0)
    bias = model.layers[0].position_bias
    for head in range(12):
        wanted = torch.zeros(CONTEXT)
        if head + 1 < CONTEXT:
            wanted[head + 1] = 40.0
        assert torch.equal(bias[head].detach(), wanted)
    with torch.no_grad():
        pattern = model(make_tokens(), return_patterns=True)[1][0]
    for head in range(9):
        back = torch.arange(head + 1, CONTEXT)
        assert pattern[:, head, back, back - head - 1].min() > 0.99
    assert not hasattr(model.layers[1], "position_bias")
    assert not make_model(position_bias_init=0.0).layers[0].position_bias.any()


def test_layers_with_a_position_bias_can_be_chosen():
    model = make_model(relative_position_bias=(1,))
    assert [hasattr(layer, "position_bias") for layer in model.layers] == [False, True]


def test_seeds_decide_the_weights_and_the_global_generator_does_not():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    a = make_model(seed=4).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    b, c = make_model(seed=4).state_dict(), make_model(seed=5).state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)
    for name in a:
        assert torch.equal(a[name], c[name]) == name.endswith("position_bias")


def test_weights_have_their_variances():
    model = make_model(vocabulary_size=3000, d_model=40, d_head=30, num_heads=4, embedding_std=0.45)
    wanted = {"embedding": 0.45, "unembedding": 40**-0.5, "layers.1.query": 40**-0.5, "layers.1.key": 40**-0.5}
    wanted |= {"layers.1.value": 40**-0.5, "layers.1.output": 120**-0.5}
    for name, weight in model.named_parameters():
        if name in wanted:
            error = wanted[name] * (2 * weight.numel()) ** -0.5
            assert abs(weight.std().item() - wanted[name]) < 4 * error, name
            assert abs(weight.mean().item()) < 4 * wanted[name] * weight.numel() ** -0.5, name


def test_the_model_follows_the_configuration():
    sizes = {"num_layers": 3, "num_heads": 2, "d_model": 12, "d_head": 5}
    config = AttentionOnlyConfig(**sizes, embedding_std=0.2, relative_position_bias=[0, 2], position_bias_init=1.5)
    built = AttentionOnlyTransformer(config, 50, 9, seed=3).state_dict()
    assert {name: list(w.shape) for name, w in built.items() if not name.startswith("layers.1.")} == {
        "embedding": [50, 12],
        "unembedding": [12, 50],
        **{f"layers.{n}.{name}": [2, 12, 5] for n in (0, 2) for name in ("query", "key", "value")},
        **{f"layers.{n}.output": [2, 5, 12] for n in (0, 2)},
        **{f"layers.{n}.position_bias": [2, 9] for n in (0, 2)},
    }
    assert "layers.1.query" in built
    assert "layers.1.position_bias" not in built
    assert [built["layers.2.position_bias"][head, head + 1].item() for head in range(2)] == [1.5, 1.5]
    assert built["embedding"].std().item() == pytest.approx(0.2, rel=0.1)
