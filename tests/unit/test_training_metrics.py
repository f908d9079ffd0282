"""Metrics of language models on models whose attention and losses are made by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from patterning_dist.models.losses import token_losses
from patterning_dist.sampling.ranks import Ranks
from patterning_dist.tasks.language import LanguageTask

torch.set_num_threads(1)
VOCABULARY = 23


class HandMade(torch.nn.Module):
    """Predicts the token after the last occurrence one period back; before that it knows nothing."""

    vocabulary_size = VOCABULARY

    def __init__(self, period, patterns=(), copies=None):
        super().__init__()
        self.period, self.attention, self.copies = period, patterns, copies

    def skeleton(self):
        return self

    def logits(self, model, inputs):
        logits = torch.zeros(*inputs.shape, VOCABULARY)
        position = torch.arange(inputs.shape[1])[self.period :]
        rows = torch.arange(len(inputs))[:, None]
        logits[rows, position, inputs[:, position - self.period + 1]] = 60.0
        return logits

    def token_losses(self, model, tokens):
        return token_losses(self.logits(model, tokens[:, :-1]), tokens)

    def patterns(self, model, inputs):
        return [pattern.expand(len(inputs), -1, -1, -1) for pattern in self.attention]

    def without_head(self, layer, head):
        """``copies``: (layer, head) -> the share of the logits that is left without that head."""
        if self.copies is None:
            return None
        share = self.copies[layer, head]
        return lambda model, tokens: token_losses(share * self.logits(model, tokens[:, :-1]), tokens)


class Sequences:
    """Samples of a language task, with a mask of the predicted tokens that count."""

    mean_counted = None

    def __init__(self, tokens, counted=None):
        self.blocks, self.mask = np.asarray(tokens), counted
        self.domains, self.documents = np.full(len(self.blocks), "here", object), np.arange(len(self.blocks))
        self.context_length = self.blocks.shape[1]

    def __len__(self):
        return len(self.blocks)

    def __getitem__(self, ids):
        tokens = torch.from_numpy(self.blocks[np.asarray(ids)])
        return (
            tokens if self.mask is None else {"tokens": tokens, "counted": torch.from_numpy(self.mask[np.asarray(ids)])}
        )

    def tokens(self, ids):
        return self.blocks[ids]

    document_tokens = tokens

    def counted(self, ids):
        return None if self.mask is None else self.mask[ids]


def make_task(model, held_out):
    return LanguageTask(
        model, held_out, {"here": held_out}, folder=Path(), given=(), evaluation=(0, 1000), device="cpu"
    )


def evaluate(model, tokens, counted=None):
    """Every sequence comes three times, one for each part of the held-out samples."""
    held_out = Sequences(np.repeat(tokens, 3, axis=0), None if counted is None else np.repeat(counted, 3, axis=0))
    held_out.domains = np.repeat(np.arange(len(tokens)), 3)  # the parts are divided up domain by domain
    return make_task(model, held_out).evaluate(model, Ranks())


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
    found = evaluate(HandMade(half, patterns), np.tile(np.arange(context) % 5, (2, 1)))
    scores = {name: value for name, value in found.items() if name.startswith(("previous_token", "prefix_matching"))}
    assert scores["previous_token_0_1"] == scores["previous_token_1_1"] == 1
    assert scores["prefix_matching_1_0"] == scores["prefix_matching"] == 1
    assert scores["previous_token_0_0"] == pytest.approx(1 / (context - 2))  # only position 1
    assert scores["previous_token_1_0"] == pytest.approx(1 / (context - 2))
    for name in ("prefix_matching_0_0", "prefix_matching_0_1", "prefix_matching_1_1"):
        assert scores[name] == 0
    assert len(scores) == 2 * 2 * 2 + 1


def test_scores_of_spread_out_attention_are_its_probabilities():
    uniform = torch.full((1, 1, 11, 11), 0.25)
    found = evaluate(HandMade(6, [uniform]), np.tile(np.arange(12) % 5, (2, 1)))
    assert {value for name, value in found.items() if name.startswith(("previous_token", "prefix_matching"))} == {0.25}


def test_prefix_matching_points_at_the_token_after_the_earlier_one():
    # The definition in terms of tokens: the key that is attended to follows the query's token in the first copy.
    repeated = make_task(HandMade(6), Sequences(np.tile(np.arange(12) % 5, (2, 1)))).evaluation.repeated
    for i in range(6, 11):
        assert torch.equal(repeated[:, (i - 6 + 1) - 1], repeated[:, i])


@pytest.mark.parametrize("context", [16, 17])
def test_losses_of_a_perfect_copier(context):
    half = context // 2
    blocks = np.tile(np.arange(half), 3)[:context][None].repeat(3, axis=0)
    found = evaluate(HandMade(half, [pattern(context - 1, [lambda i: i])]), blocks)
    unknown = math.log(VOCABULARY)
    # The first token of the second copy cannot be foreseen and is in neither mean.
    assert found["repeated_gap"] == pytest.approx(-unknown, rel=1e-5)
    assert found["induction_loss"] == pytest.approx(0, abs=1e-5)
    assert found["rest_loss"] == pytest.approx(unknown, rel=1e-5)
    assert found["induction_gap"] == pytest.approx(-unknown, rel=1e-5)
    assert found["in_context_gap"] == pytest.approx(-unknown, rel=1e-5)
    assert found["validation_loss"] == pytest.approx(unknown * half / (context - 1), rel=1e-5)


def test_a_gap_is_carried_by_the_head_without_which_it_is_gone():
    induction, first = lambda i: max(i - 6 + 1, 0), lambda i: 0
    patterns = [pattern(11, [first] * 2), pattern(11, [first, first, first, induction, first, first])]
    # Only the logits of the second copy are not 0: a factor of 0 takes all away, one of 1 nothing. Of the others, heads
    # 4, 5 and 0 come next; head 1, without which nothing would be left either, is not asked for.
    copies = {(1, 3): 0.0, (1, 4): 1.0, (1, 5): 1.0, (1, 0): 0.0, (1, 1): 0.0}
    found = evaluate(HandMade(6, patterns, copies), np.tile(np.arange(12) % 5, (2, 1)))
    unknown = math.log(VOCABULARY)
    assert found["repeated_gap"] == pytest.approx(-unknown, rel=1e-5)
    assert found["ablated_gap"] == pytest.approx(0, abs=1e-6)
    assert found["other_ablated_gap"] == pytest.approx(-2 / 3 * unknown, rel=1e-5)


def test_a_layer_of_one_head_has_no_other_to_ablate_and_unknown_heads_none_at_all():
    alone = [pattern(11, [lambda i: max(i - 5, 0)])]
    found = evaluate(HandMade(6, alone, {(0, 0): 0.5}), np.tile(np.arange(12) % 5, (2, 1)))
    assert "ablated_gap" in found and "other_ablated_gap" not in found
    assert not any("ablated" in name for name in evaluate(HandMade(6, alone), np.tile(np.arange(12) % 5, (2, 1))))


def test_a_model_that_knows_nothing_has_no_gaps():
    model = HandMade(100, [pattern(15, [lambda i: i])])
    found = evaluate(model, np.tile(np.arange(8), 2)[None])
    for name in ("repeated_gap", "induction_gap", "in_context_gap"):
        assert found[name] == pytest.approx(0, abs=1e-6)
    assert found["validation_loss"] == pytest.approx(math.log(VOCABULARY), rel=1e-6)


def test_a_model_that_shows_no_attention_has_no_scores_of_heads():
    found = evaluate(HandMade(100), np.tile(np.arange(8), 2)[None])
    assert not any(name.startswith(("previous_token", "prefix_matching")) for name in found)


def test_what_does_not_count_is_in_no_metric():
    # Sequences of 16 tokens whose last four are pads, against those sequences without pads.
    tokens = np.tile(np.arange(6), 2)[None].repeat(3, axis=0)
    padded = np.concatenate([tokens, np.zeros((3, 4), np.int64)], axis=1)
    counted = np.ones((3, 15), bool)
    counted[:, 11:] = False
    bare, masked = evaluate(HandMade(6), tokens), evaluate(HandMade(6), padded, counted)
    for name in ("validation_loss", "induction_loss", "rest_loss", "induction_gap"):
        assert masked[name] == pytest.approx(bare[name], rel=1e-12), name
    assert evaluate(HandMade(6), padded)["validation_loss"] != pytest.approx(bare["validation_loss"], rel=1e-3)
