"""LoRA folders as peft writes them: base and adapter are read, moved, trained and written as such.

The oracle is the model in which the adapter is merged by hand: W + (alpha / r) B A.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from small_adapter import ALPHA, make, write
from torch import Tensor, nn

from patterning_dist.config import HuggingFaceConfig, TrainingConfig
from patterning_dist.config.checkpoints import checkpoints_in
from patterning_dist.errors import PatterningError
from patterning_dist.models.anatomy import language_model_components
from patterning_dist.models.components import select_component
from patterning_dist.models.huggingface import language_model_skeleton, load_language_model
from patterning_dist.runtime.training.weights import save_weights
from patterning_dist.sampling.posterior import Posterior
from patterning_dist.sampling.ranks import Ranks
from patterning_dist.sampling.sample import sample_chains
from patterning_dist.tasks.huggingface import HuggingFace
from patterning_dist.training.stack import TorchEngine

TOKENS = torch.randint(0, 31, (3, 8), generator=torch.Generator().manual_seed(1))


def architecture(folder: Path, **keys: object) -> HuggingFace:
    config = HuggingFaceConfig(kind="huggingface", path=str(folder))
    return HuggingFace(config, None, 12, "cpu", None, **keys)


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("llama", {}), ("gpt2", {}), ("llama", {"use_rslora": True}),
        ("llama", {"alpha_pattern": {"1.mlp.down_proj": 3 * ALPHA}}),
    ],
)  # fmt: skip
def test_base_and_adapter_are_the_merged_model(model_type: str, settings: dict, tmp_path: Path) -> None:
    folder, merged = make(tmp_path, model_type, **settings)
    model = load_language_model(str(folder))
    with torch.no_grad():
        theirs, ours = merged(input_ids=TOKENS).logits, model(input_ids=TOKENS).logits
        model.load_state_dict({n: w for n, w in model.state_dict().items() if "lora_" in n}, strict=False)
        base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")(input_ids=TOKENS).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())
    assert (base - theirs).abs().max() > 0.1
    skeleton = language_model_skeleton(str(folder))
    shapes = {n: p.shape for n, p in model.named_parameters()}
    assert {n: p.shape for n, p in skeleton.named_parameters()} == shapes
    assert list(language_model_components(skeleton)) == list(language_model_components(model))


def test_the_adapter_is_a_component_and_heads_are_those_of_the_base(tmp_path: Path) -> None:
    folder, _ = make(tmp_path)
    model = language_model_skeleton(str(folder))
    component = select_component(model, "adapter")
    assert set(component.parameters) == {n for n, _ in model.named_parameters() if "lora_" in n}
    # 2 layers, of q_proj (16 to 16), v_proj (16 to 8), down_proj (24 to 16), at rank 2.
    assert component.num_coordinates == 2 * 2 * (16 + 16 + 16 + 8 + 24 + 16)
    head = select_component(model, "layer.0.head.1")
    assert not any("lora_" in name for name in head.parameters)
    base = language_model_skeleton(str(tmp_path / "base"))
    assert head.pieces == select_component(base, "layer.0.head.1").pieces
    assert "adapter" not in language_model_components(base)


def test_chains_on_the_adapter_move_it_and_nothing_else(tmp_path: Path) -> None:
    folder, _ = make(tmp_path)
    model_of = architecture(folder)
    model = model_of.load_given("final", Ranks())

    def moved(adapter: bool) -> Callable[[nn.Module], Tensor]:
        return lambda m: sum(p.square().sum() for n, p in m.named_parameters() if ("lora_" in n) == adapter)[None]

    sampled = sample_chains(
        model, model_of.token_losses, TOKENS, TOKENS,
        posterior=Posterior(10.0, 100.0), step_size=1e-4, num_draws=16, num_chains=2, batch_size=2, component="adapter",
        observables={"base": moved(False), "adapter": moved(True)},
    )  # fmt: skip
    assert not sampled.traces[..., 1].any() and sampled.traces[:, 1:, 2].all()
    assert np.abs(sampled.losses).max() > 1e-4


def test_training_trains_and_writes_the_adapter_alone(tmp_path: Path) -> None:
    folder, _ = make(tmp_path)
    model_of = architecture(folder)
    model = model_of.load_given("final", Ranks())
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    settings = TrainingConfig(num_steps=1, batch_size=3, learning_rate=1e-2, optimizer="adamw")
    optimizer = model_of.optimizer(model, settings)
    model_of.token_losses(model, TOKENS).square().mean().backward()
    optimizer.step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n in before if "lora_" in n}

    out = tmp_path / "arm"
    out.mkdir()
    save_weights(TorchEngine(model, optimizer), out / "model.safetensors")
    model_of.describe(out)
    assert set(load_file(out / "model.safetensors")) == moved
    written = load_file(out / "adapter_model.safetensors")
    assert set(written) == set(load_file(folder / "adapter_model.safetensors"))  # names that peft reads
    again = model_of.load(out, Ranks())
    assert all(torch.equal(p, model.get_parameter(n)) for n, p in again.named_parameters())


def test_a_fresh_adapter_is_the_base_and_follows_the_seed(tmp_path: Path) -> None:
    folder, _ = make(tmp_path)
    model_of = architecture(folder)
    one, two, other = model_of.build(1), model_of.build(1), model_of.build(2)
    assert all(torch.equal(p, two.get_parameter(n)) for n, p in one.named_parameters())
    assert {n for n, p in one.named_parameters() if not torch.equal(p, other.get_parameter(n))} == {
        n for n, _ in one.named_parameters() if "lora_A" in n
    }
    base = load_language_model(str(tmp_path / "base"))
    with torch.no_grad():
        assert torch.equal(one(input_ids=TOKENS).logits, base(input_ids=TOKENS).logits)


@pytest.mark.filterwarnings("ignore:.*weights that a LlamaForSequenceClassification has no place for:UserWarning")
def test_a_reward_model_may_be_an_adapter_with_a_head(tmp_path: Path) -> None:
    """As peft saves one: the base is a causal language model, and the head is beside the adapter."""
    folder, _ = make(tmp_path)
    tensors = load_file(folder / "adapter_model.safetensors")
    score = torch.randn(1, 16)
    write(folder, tensors | {"base_model.model.score.weight": score}, task_type="SEQ_CLS", modules_to_save=["score"])
    model_of = architecture(folder, num_labels=1)
    model = model_of.load_given("final", Ranks())
    assert type(model).__name__ == "LlamaForSequenceClassification" and model.config.num_labels == 1
    assert torch.equal(model.score.weight, score)
    assert type(language_model_skeleton(str(folder))).__name__ == "LlamaForSequenceClassification"
    components = language_model_components(model)
    assert components["head"].parameters == ("score.weight",)
    assert "score.weight" in components["adapter"].parameters


def test_fingerprints_are_of_adapter_and_base(tmp_path: Path) -> None:
    folder, _ = make(tmp_path)
    names = architecture(folder).files_fingerprint("final", lambda path: path.name)
    assert {"adapter_model.safetensors", "adapter_config.json", "base/model.safetensors", "base/config.json"} <= set(
        names
    )
    (tmp_path / "run").mkdir()
    folder.rename(tmp_path / "run" / "checkpoint-10")
    assert checkpoints_in(tmp_path / "run") == ["checkpoint-10"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"peft_type": "IA3"},
            r"an adapter of kind IA3, not plain LoRA; merge it \(merge_and_unload of peft\) and write",
        ),
        ({"use_dora": True}, r"an adapter of kind use_dora, not plain LoRA; merge it"),
        ({"base_model_name_or_path": None}, r"adapter_config\.json: base_model_name_or_path is not there; write the"),
        ({"base_model_name_or_path": "/nowhere"}, r"/nowhere: no such folder, and no model of this name"),
    ],
)
def test_other_adapters_and_lost_bases_are_refused(settings: dict, message: str, tmp_path: Path) -> None:
    folder, _ = make(tmp_path)
    write(folder, load_file(folder / "adapter_model.safetensors"), **settings)
    for opened in (language_model_skeleton, load_language_model):
        with pytest.raises(PatterningError, match=message):
            opened(str(folder))


@pytest.mark.parametrize(
    "key", ["model.embed_tokens.lora_embedding_A", "model.layers.9.self_attn.q_proj.lora_A.weight"]
)
def test_adapters_that_do_not_fit_are_refused(key: str, tmp_path: Path) -> None:
    folder, _ = make(tmp_path)
    tensors = load_file(folder / "adapter_model.safetensors")
    write(folder, tensors | {f"base_model.model.{key}": torch.zeros(2, 16)})
    with pytest.raises(
        PatterningError, match=r"of the adapter cannot be placed in a LlamaForCausalLM of .*base; give the"
    ):
        language_model_skeleton(str(folder))


def test_an_adapter_without_safetensors_is_refused(tmp_path: Path) -> None:
    folder, _ = make(tmp_path)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(PatterningError, match=r"no adapter_model\.safetensors in this folder; write the adapter with"):
        language_model_skeleton(str(folder))
