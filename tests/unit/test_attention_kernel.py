"""A fused attention kernel gives the numbers of the plain one, second derivatives and attention patterns included."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from torch.nn.functional import scaled_dot_product_attention

from patterning_dist.config import HuggingFaceConfig
from patterning_dist.errors import PatterningError
from patterning_dist.models.components import select_component
from patterning_dist.models.passes import next_token_losses
from patterning_dist.sampling.ranks import Ranks
from patterning_dist.sampling.target import Target
from patterning_dist.tasks.huggingface import HuggingFace

TOKENS = torch.from_numpy(np.random.default_rng(0).integers(0, 31, size=(6, 12)))
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def task(attention, model_type="llama", **more):
    architecture = {"model_type": model_type, **SIZES, **more}
    return HuggingFace(
        HuggingFaceConfig(kind="huggingface", architecture=architecture, attention=attention), 31, 12, "cpu", None
    )


@pytest.fixture
def calls(monkeypatch):
    """Calls of the fused kernel."""
    found = []

    def counted(*arguments, **options):
        found.append(1)
        return scaled_dot_product_attention(*arguments, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    return found


@pytest.mark.parametrize("model_type", ["llama", "gpt_neox"])
def test_it_gives_the_same(calls, model_type):
    measured = []
    for attention in ("eager", "sdpa"):
        calls.clear()
        model = task(attention, model_type).build(3)
        target = Target(model, select_component(model, "everything"), next_token_losses, TOKENS, TOKENS)
        loss, gradient = target.gradient(np.arange(6))
        assert bool(calls) == (attention == "sdpa")
        vector = {name: torch.ones_like(w) for name, w in target.live().items()}
        product = target.hessian_product(target.prepare(TOKENS), vector)
        patterns = task(attention, model_type).patterns(model, TOKENS)
        assert len(patterns) == 2
        measured.append([torch.tensor(loss), *gradient.values(), *product.values(), *patterns])
        assert model.config._attn_implementation == attention
    for fused, plain in zip(*measured, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-5 * max(plain.abs().max().item(), 1e-2))


def test_saved_models_are_read_with_it(tmp_path):
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=31, **SIZES)).save_pretrained(tmp_path / "m")
    config = HuggingFaceConfig(kind="huggingface", path=str(tmp_path / "m"), attention="sdpa")
    model = HuggingFace(config, None, 12, "cpu", None).load_given("final", Ranks())
    assert model.config._attn_implementation == "sdpa"


def test_what_it_would_leave_out_is_refused():
    capped = task("sdpa", "gemma2", num_key_value_heads=1, head_dim=8, attn_logit_softcapping=1e-3)
    with pytest.raises(PatterningError, match=r"model\.attention: sdpa is not for Gemma2ForCausalLM; set it to eager"):
        capped.build(0)
