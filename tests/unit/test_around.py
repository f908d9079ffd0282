"""What does not move computed once: losses, gradients and Hessian products are those of whole passes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from language_targets import language_task

from patterning_dist.models.components import num_bytes, select_component
from patterning_dist.models.cutting import cut_around
from patterning_dist.models.huggingface import fresh_language_model
from patterning_dist.models.moving import HeadsPart, ModulePart
from patterning_dist.models.passes import next_token_losses
from patterning_dist.sampling.target import Target
from patterning_dist.tasks.attention_only import Beside as BesideHeads
from patterning_dist.tasks.attention_only import LayersAbove

VOCABULARY, LENGTH = 41, 10
TOKENS = torch.from_numpy(np.random.default_rng(2).integers(1, VOCABULARY, size=(8, LENGTH)))
COEFFICIENTS = torch.rand(2, 8, LENGTH - 1, generator=torch.Generator().manual_seed(0)).double()
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 8,
    "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip
WIDE = SIZES | {"intermediate_size": 48}
NARROW = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 8, "n_positions": 16}
CONFIGS = {
    "neox": transformers.GPTNeoXConfig(**WIDE, use_parallel_residual=True),
    "neox_sequential": transformers.GPTNeoXConfig(**WIDE, use_parallel_residual=False),
    "llama_grouped": transformers.LlamaConfig(**WIDE, num_key_value_heads=4),
    "gpt2": transformers.GPT2Config(**NARROW, bos_token_id=0, eos_token_id=0),
    "gptj": transformers.GPTJConfig(**NARROW, rotary_dim=4, tie_word_embeddings=False),
    "falcon": transformers.FalconConfig(**SIZES, multi_query=True),
    "gemma2": transformers.Gemma2Config(**WIDE, num_key_value_heads=4, head_dim=4, query_pre_attn_scalar=4),
    "gpt_oss": transformers.GptOssConfig(
        **WIDE, num_key_value_heads=4, head_dim=4, num_local_experts=3, num_experts_per_tok=2, pad_token_id=0
    ),
    "mixtral": transformers.MixtralConfig(**WIDE, num_key_value_heads=4, num_local_experts=3, num_experts_per_tok=2),
    "bloom": transformers.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=8),
    "olmo2": transformers.Olmo2Config(**WIDE, pad_token_id=None),
}
# (architecture, component) -> layer, what moves in it, whether it is only added, whether the readout is known.
WAYS = {
    ("neox", "layer.1.head.2"): (1, HeadsPart, True, True),
    ("neox", "layer.0.head.2"): (0, HeadsPart, True, True),
    ("neox", "layer.1.head.1+layer.1.head.4"): (1, HeadsPart, True, True),
    ("neox", "layer.1.attention"): (1, ModulePart, True, True),
    ("neox", "layer.1.mlp"): (1, ModulePart, True, True),
    ("neox", "layer.1"): (1, None, False, True),
    ("neox", "layer.1.head.0+unembedding"): (1, None, False, False),
    ("neox", "unembedding"): (2, None, False, False),
    ("neox_sequential", "layer.1.head.2"): (1, HeadsPart, False, True),
    ("neox_sequential", "layer.0.mlp"): (0, ModulePart, True, True),
    ("llama_grouped", "layer.1.head.5"): (1, HeadsPart, False, True),
    ("llama_grouped", "layer.0.kv.1"): (0, HeadsPart, False, True),
    ("llama_grouped", "layer.1.head.1+layer.1.head.4"): (1, None, False, True),  # of two groups
    ("llama_grouped", "layer.1.mlp"): (1, ModulePart, True, True),
    ("gpt2", "layer.1.head.3"): (1, HeadsPart, False, True),
    ("gpt2", "layer.1.mlp"): (1, ModulePart, True, True),
    ("gptj", "layer.1.head.3"): (1, HeadsPart, True, True),
    ("falcon", "layer.1.head.3"): (1, HeadsPart, True, True),
    ("gemma2", "layer.1.head.3"): (1, HeadsPart, False, False),  # norms after the attention; logits are capped
    ("gpt_oss", "layer.1.head.3"): (1, HeadsPart, False, True),  # attention sinks
    ("mixtral", "layer.1.expert.1"): (1, ModulePart, True, True),
    ("bloom", "layer.1.head.3"): (1, None, False, True),  # its attention adds the residual stream itself
    ("olmo2", "layer.1.head.3"): (1, None, False, True),  # a norm over all heads
}
WHOLE = [("neox", "everything"), ("neox", "embedding"), ("gpt2", "unembedding")]  # the last is tied


def model_of(kind):
    """Weights so large that attention and MLP are not near to a linear map."""
    model = fresh_language_model(CONFIGS[kind], 3)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def pair_of(kind, name, **options):
    """The same target with whole passes, and cut."""
    found = []
    for layered in (False, True):
        if kind == "attention_only":
            task = language_task(TOKENS.numpy(), TOKENS.numpy(), vocabulary_size=VOCABULARY, num_heads=8, d_model=32)
            model, losses = task.build(1), task.losses
            component = select_component(model, name)
            cut = LayersAbove(model, component) if layered else None
        else:
            model, losses = model_of(kind), next_token_losses
            component = select_component(model, name)
            cut = cut_around(model, component) if layered else None
        held_out = {"held_out": TOKENS[:3], "coefficients": COEFFICIENTS[:, :3]}
        options = {"micro_batch_size": 3, "num_component_losses": 1} | held_out | options
        found.append(Target(model, component, losses, TOKENS, TOKENS, layered=cut, **options))
    return found


def displace(target, size=0.1):
    generator = torch.Generator().manual_seed(7)
    target.move_to({n: w + size * torch.randn(w.shape, generator=generator) for n, w in target.center.items()})


def assert_alike(found, wanted, share=1e-4):
    """Within a share of the root mean square."""
    assert (found - wanted).square().mean().sqrt() <= share * wanted.square().mean().sqrt()


def assert_same_numbers(whole, cut):
    centers = [target.losses(target.probe) for target in (whole, cut)]
    for target in (whole, cut):
        displace(target)
    rises = [target.losses(target.probe) - center for target, center in zip((whole, cut), centers, strict=True)]
    assert_alike(rises[1], rises[0])
    ids = np.array([5, 1, 2, 7])
    vector = {name: torch.sin(torch.arange(w.numel())).view(w.shape) for name, w in whole.center.items()}

    def vectors(target):
        return [
            target.gradient(ids)[1],
            target.mean_gradient(target.probe)[1],
            *target.gradient_here_and_at_center(ids)[1:],
            *target.split_gradients(),
            target.hessian_product(target.prepare(TOKENS), vector),
        ]

    for found, wanted in zip(vectors(cut), vectors(whole), strict=True):
        assert_alike(*(torch.cat([g.flatten() for g in each.values()]) for each in (found, wanted)))
    measured, again = cut.measure(), whole.measure()
    assert_alike(measured.observables, again.observables)
    assert measured.mean_loss == pytest.approx(again.mean_loss, rel=1e-6)


@pytest.mark.parametrize(("kind", "name"), WAYS)
def test_a_decoder_is_cut_as_it_can_be_and_gives_the_same_numbers(kind, name):
    whole, cut = pair_of(kind, name)
    way = cut.layered
    part = None if way.part is None else type(way.part)
    assert (way.at, part, way.summed, way.readout is not None) == WAYS[kind, name]
    assert_same_numbers(whole, cut)


@pytest.mark.parametrize(("kind", "name"), WHOLE)
def test_what_all_depends_on_takes_whole_passes(kind, name):
    model = model_of(kind)
    assert cut_around(model, select_component(model, name)) is None


@pytest.mark.parametrize(
    "name", ["layer.1.head.2", "layer.0.head.7", "layer.1", "layer.1.head.0+layer.1.head.3", "layers.*.query[1]",
             "unembedding", "layer.0.head.1+unembedding", "embedding", "layers.1.query[3]"]
)  # fmt: skip
def test_the_attention_only_transformer_gives_the_same_numbers(name):
    assert_same_numbers(*pair_of("attention_only", name))


@pytest.mark.parametrize(("kind", "name"), [("neox", "layer.1.head.2"), ("attention_only", "layer.1.head.2")])
def test_states_are_kept_as_far_as_there_is_room(kind, name):
    """By size alone: with a table, without, or not at all."""
    full = pair_of(kind, name)[1]
    states = [state for prepared in (full.probe, full.held_out) for _, state, _ in prepared.parts]
    assert all(state.table is not None for state in states)
    small = sum(num_bytes(state._replace(table=None)) for state in states)
    tables = sum(num_bytes(state.table) for state in states)
    for size, kept in ((2.2 * (small + tables), True), (2.2 * small, False)):
        target = pair_of(kind, name, cache_bytes=int(size))[1]
        assert all((state.table is not None) == kept for _, state, _ in target.probe.parts)
        assert_same_numbers(pair_of(kind, name)[0], target)
    target = pair_of(kind, name, cache_bytes=0)[1]
    assert all(state is None for _, state, _ in target.probe.parts)
    assert_same_numbers(pair_of(kind, name)[0], target)


def test_what_lies_around_a_component_does_not_depend_on_where_it_is():
    for kind in ("neox", "llama_grouped", "attention_only"):
        target = pair_of(kind, "layer.1.head.2")[1]
        before = target.layered.below(TOKENS, 1 << 20)
        displace(target)
        after = target.layered.below(TOKENS, 1 << 20)
        fields = ("base", "inputs") if isinstance(before, BesideHeads) else ("stream", "others")
        for field in fields:
            a, b = getattr(before, field), getattr(after, field)
            assert (a is None and b is None) or torch.equal(a, b)


def test_a_model_is_left_as_it_was():
    model = model_of("gptj")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = next_token_losses(model, TOKENS)
    way = cut_around(model, select_component(model, "layer.1.head.2"))
    way.above(way.below(TOKENS, 0), TOKENS)
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(next_token_losses(model, TOKENS), expected)


@pytest.mark.parametrize("kind", ["neox", "llama_grouped", "attention_only"])
def test_a_state_that_was_kept_and_one_computed_anew_give_the_same_bits(kind):
    """A chain that goes on elsewhere has its states computed where it is, not at w*."""
    target = pair_of(kind, "layer.1.head.2")[1]
    displace(target)
    found = target.losses(target.probe)
    assert torch.equal(target.losses(target.prepare(TOKENS)), found)
    ids = np.array([5, 1, 2])
    here, there = target.gradient(ids), target.gradient_here_and_at_center(ids)
    assert here[0] == pytest.approx(there[0], rel=1e-6)
    again = target.gradient(ids)
    assert here[0] == again[0] and all(torch.equal(g, again[1][name]) for name, g in here[1].items())
