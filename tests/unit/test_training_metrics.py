"""Metrics on models whose attention and losses are made by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from patterning_dist.models.attention import AttentionOnlyTransformer
from patterning_dist.models.losses import token_losses
from patterning_dist.training.metrics import EvaluationSet, attention_scores, batched_losses, evaluate

torch.set_num_threads(1)
VOCABULARY = 23


class HandMade(torch.nn.Module):
    """Predicts the token after the last occurrence one period back; before that it knows nothing."""

    def __init__(self, period, patterns=()):
        super().__init__()
        self.period, self.patterns = period, patterns
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, inputs):
        logits = torch.zeros(*inputs.shape, VOCABULARY)
        position = torch.arange(inputs.shape[1])[self.period :]
        rows = torch.arange(len(inputs))[:, None]
        logits[rows, position, inputs[:, position - self.period + 1]] = 60.0
        return logits

    def attention_patterns(self, inputs):
        return [pattern.expand(len(inputs), -1, -1, -1) for pattern in self.patterns]


def pattern(length, attends_to):
    """[1, head, query, key] with all weight of query i on ``attends_to[head](i)``."""
    result = torch.zeros(1, len(attends_to), length, length)
    for head, target in enumerate(attends_to):
        for i in range(length):
            result[0, head, i, target(i)] = 1
    return result


@pytest.mark.parametrize("context", [12, 13])
def test_scores_of_perfect_heads(context):
    half = context // 2
    previous, first, induction = lambda i: max(i - 1, 0), lambda i: 0, lambda i: max(i - half + 1, 0)
    patterns = [pattern(context - 1, [first, previous]), pattern(context - 1, [induction, previous])]
    evaluation = EvaluationSet.build(np.zeros((2, context), np.int64), VOCABULARY, 3)
    scores = attention_scores(HandMade(half, patterns), evaluation.repeated)
    assert scores["previous_token_0_1"] == scores["previous_token_1_1"] == 1
    assert scores["prefix_matching_1_0"] == scores["prefix_matching"] == 1
    assert scores["previous_token_0_0"] == pytest.approx(1 / (context - 2))  # only position 1
    assert scores["previous_token_1_0"] == pytest.approx(1 / (context - 2))
    for name in ("prefix_matching_0_0", "prefix_matching_0_1", "prefix_matching_1_1"):
        assert scores[name] == 0
    assert len(scores) == 2 * 2 * 2 + 1


def test_scores_of_spread_out_attention_are_its_probabilities():
    uniform = torch.full((1, 1, 11, 11), 0.25)
    scores = attention_scores(HandMade(6, [uniform]), torch.ones(2, 12, dtype=torch.int64))
    assert set(scores.values()) == {0.25}


def test_prefix_matching_points_at_the_token_after_the_earlier_one():
    # The definition in terms of tokens: the key that is attended to follows the query's token in the first copy.
    repeated = EvaluationSet.build(np.zeros((2, 12), np.int64), VOCABULARY, 5).repeated
    for i in range(6, 11):
        assert torch.equal(repeated[:, (i - 6 + 1) - 1], repeated[:, i])


@pytest.mark.parametrize("context", [16, 17])
def test_losses_of_a_perfect_copier(context):
    half = context // 2
    blocks = np.tile(np.arange(half), 3)[:context][None].repeat(3, axis=0)
    evaluation = EvaluationSet.build(blocks, VOCABULARY, 4)
    found = evaluate(HandMade(half, [pattern(context - 1, [lambda i: i])]), evaluation)
    unknown = math.log(VOCABULARY)
    # The first token of the second copy cannot be foreseen and is in neither mean.
    assert found["repeated_gap"] == pytest.approx(-unknown, rel=1e-5)
    assert found["induction_loss"] == pytest.approx(0, abs=1e-5)
    assert found["rest_loss"] == pytest.approx(unknown, rel=1e-5)
    assert found["induction_gap"] == pytest.approx(-unknown, rel=1e-5)
    assert found["in_context_gap"] == pytest.approx(-unknown, rel=1e-5)
    assert found["validation_loss"] == pytest.approx(unknown * half / (context - 1), rel=1e-5)


def test_a_model_that_knows_nothing_has_no_gaps():
    model = HandMade(100, [pattern(15, [lambda i: i])])
    found = evaluate(model, EvaluationSet.build(np.tile(np.arange(8), 2)[None], VOCABULARY, 2))
    for name in ("repeated_gap", "induction_gap", "in_context_gap"):
        assert found[name] == pytest.approx(0, abs=1e-6)
    assert found["validation_loss"] == pytest.approx(math.log(VOCABULARY), rel=1e-6)


def test_losses_do_not_depend_on_the_batches():
    model = AttentionOnlyTransformer(vocabulary_size=VOCABULARY, context_length=12, d_model=8, d_head=4, num_heads=2)
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, VOCABULARY, size=(21, 12)))
    with torch.no_grad():
        whole = token_losses(model(tokens[:, :-1]), tokens)
    for batch_size in (1, 5, 16, 100):
        torch.testing.assert_close(batched_losses(model, tokens, batch_size), whole, rtol=1e-5, atol=1e-5)
    assert not batched_losses(model, tokens).requires_grad
