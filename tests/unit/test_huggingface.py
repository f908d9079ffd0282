"""Language models from a folder: what is loaded is what was saved, and every refusal says what to do."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from patterning_dist.config import HuggingFaceConfig
from patterning_dist.errors import PatterningError
from patterning_dist.models.huggingface import language_model_skeleton, load_language_model
from patterning_dist.tasks.huggingface import HuggingFace

SMALL = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 12, "vocab_size": 31}
GPT2 = transformers.GPT2Config(**SMALL, bos_token_id=0, eos_token_id=0)
LLAMA = transformers.LlamaConfig(
    vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=12,
)  # fmt: skip
TOKENS = torch.randint(0, 31, (4, 10), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def next_token_losses(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    architecture = HuggingFace(HuggingFaceConfig(kind="huggingface", path="x"), None, 12, "cpu", None)
    return architecture.token_losses(model, tokens)


def save(model: nn.Module, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def gpt2(tmp_path: Path) -> tuple[nn.Module, Path]:
    torch.manual_seed(3)
    model = transformers.GPT2LMHeadModel(GPT2).eval()
    return model, save(model, tmp_path / "gpt2")


def test_a_saved_model_is_loaded_as_it_was(gpt2: tuple[nn.Module, Path], capfd: pytest.CaptureFixture) -> None:
    model, folder = gpt2
    capfd.readouterr()
    loaded = load_language_model(str(folder))
    assert capfd.readouterr() == ("", "")  # no bars, no reports
    assert not loaded.training
    assert loaded.config._attn_implementation == "eager"
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name
    torch.testing.assert_close(next_token_losses(loaded, TOKENS), next_token_losses(model, TOKENS))


def test_half_precision_weights_become_float32(tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = transformers.LlamaForCausalLM(LLAMA).bfloat16()
    loaded = load_language_model(str(save(model, tmp_path / "half")))
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name).float())
    losses = next_token_losses(loaded.bfloat16(), TOKENS)
    assert losses.dtype == torch.float32
    assert not torch.equal(losses, losses.bfloat16().float())
    with torch.no_grad():
        logits = loaded(input_ids=TOKENS).logits
    assert logits.dtype == torch.float32 and not torch.equal(logits, logits.bfloat16().float())


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_logits_are_float32_under_autocast(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = transformers.GPT2LMHeadModel(GPT2) if kind == "tied" else transformers.LlamaForCausalLM(LLAMA)
    loaded = load_language_model(str(save(model, tmp_path / kind)))
    inputs = TOKENS[:, :-1]
    with torch.autocast("cpu", torch.bfloat16):
        logits = loaded(input_ids=inputs).logits
        rounded = model.eval()(input_ids=inputs).logits  # as it comes from transformers
    assert logits.dtype == torch.float32 and rounded.dtype == torch.bfloat16
    assert not torch.equal(logits, logits.bfloat16().float())
    # A copy multiplies by its own weights.
    twin = copy.deepcopy(loaded)
    with torch.no_grad():
        twin.get_output_embeddings().weight.zero_()
    assert not twin(input_ids=inputs).logits.any() and loaded(input_ids=inputs).logits.any()


def test_the_skeleton_has_the_shapes_and_reads_no_weights(gpt2: tuple[nn.Module, Path]) -> None:
    model, folder = gpt2
    (folder / "model.safetensors").unlink()
    skeleton = language_model_skeleton(str(folder))
    assert {p.device.type for p in skeleton.parameters()} == {"meta"}
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    assert {name: parameter.shape for name, parameter in skeleton.named_parameters()} == shapes


@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_losses_have_gradients_and_hessian_vector_products(
    config: transformers.PretrainedConfig, tmp_path: Path
) -> None:
    """u^T H u from autograd twice against a difference of gradients at s = 1e-3, of relative error O(s^2 |u|^2) = 1e-4;
    losses are float32 even in a float64 model, and 1e-7 / s adds another 1e-4."""
    torch.manual_seed(3)
    saved = transformers.AutoModelForCausalLM.from_config(config)
    model = load_language_model(str(save(saved, tmp_path / "m"))).double()
    parameters = list(model.parameters())
    u = [torch.randn_like(p) * 0.1 for p in parameters]

    def slope(create_graph: bool = False) -> torch.Tensor:
        gradient = torch.autograd.grad(next_token_losses(model, TOKENS).mean(), parameters, create_graph=create_graph)
        return sum((g * d).sum() for g, d in zip(gradient, u, strict=True))

    product = torch.autograd.grad(slope(create_graph=True), parameters)
    curvature = sum((h * d).sum() for h, d in zip(product, u, strict=True))
    slopes = []
    for step in (1e-3, -1e-3):
        for parameter, direction in zip(parameters, u, strict=True):
            parameter.data += step * direction
        slopes.append(slope().item())
        for parameter, direction in zip(parameters, u, strict=True):
            parameter.data -= step * direction
    assert (slopes[0] - slopes[1]) / 2e-3 == pytest.approx(curvature.item(), rel=2e-3)


def test_sequences_longer_than_the_model_are_refused(gpt2: tuple[nn.Module, Path]) -> None:
    tokens = torch.zeros(1, 14, dtype=torch.long)
    assert next_token_losses(gpt2[0], tokens[:, :13]).shape == (1, 12)
    message = "sequences of 14 tokens need 13 positions, and the model has 12; set the context length to 13 or less"
    with pytest.raises(PatterningError, match=message):
        next_token_losses(gpt2[0], tokens)


def refused(path: Path | str, message: str) -> None:
    with pytest.raises(PatterningError, match=message) as caught:
        load_language_model(str(path))
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    for name in (tmp_path / "nowhere", "owner/name", "a/b/c", "./here"):
        refused(
            name, "no such folder, and no model of this name in the local cache or on the hub, or the hub cannot be"
        )
    with pytest.raises(PatterningError, match="no model of this name at revision step100 in"):
        language_model_skeleton("owner/name", "step100")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", r"no config\.json in this folder; expected a model written by save_pretrained")
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file", "not a model but a file; give its folder")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "nonsense"}, r"model type 'nonsense' is not known to transformers \d.*; correct config\.json"),
        ({"architectures": ["X"]}, "model type None is not known to transformers"),
        (
            {"model_type": "nonsense", "auto_map": {"AutoConfig": "configuration_x.X"}},
            "model type 'nonsense' brings its own code, which is not run; use a model that transformers knows",
        ),
        ({"model_type": "vit"}, "a model of type 'vit' is not a causal language model; give one that predicts tokens"),
        (
            {"model_type": "gpt2", "n_embd": "wide"},
            r"config\.json is not valid \(.*'n_embd' expected int, got str .*\); correct it",
        ),
    ],
)
def test_configurations_of_other_models_are_refused(tmp_path: Path, config: dict, message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    refused(tmp_path, message)


def test_a_config_that_is_not_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    refused(tmp_path, r"config\.json: not JSON \(.*\); copy the file again")


def test_pickled_weights_are_not_read(gpt2: tuple[nn.Module, Path]) -> None:
    model, folder = gpt2
    (folder / "model.safetensors").unlink()
    refused(folder, r"no weights in safetensors \(.*\); other formats are not read, since they are unpickled")
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    refused(folder, r"no weights in safetensors \(only pytorch_model\.bin\); other formats are not read")


def test_torn_or_foreign_weights_are_refused(gpt2: tuple[nn.Module, Path]) -> None:
    _, folder = gpt2
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"n_embd": 32}))
    refused(folder, r"has shape \[48\], the model of config\.json \[96\]; copy the folder again, or mend")
    (folder / "config.json").write_text(json.dumps(config))
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(2000)
    refused(folder, r"the weights cannot be read \(.*\); copy them again")


def test_a_model_without_its_head_is_refused(tmp_path: Path) -> None:
    refused(
        save(transformers.LlamaModel(LLAMA), tmp_path / "headless"),
        r"the weights lack lm_head\.weight: the model was not saved as a causal language model; "
        "save the LlamaForCausalLM it belongs to",
    )


def test_weights_without_a_place_are_named(gpt2: tuple[nn.Module, Path], tmp_path: Path) -> None:
    folder = save(transformers.GPT2DoubleHeadsModel(GPT2), tmp_path / "double")
    with pytest.warns(
        UserWarning,
        match=r"weights that a GPT2LMHeadModel has no place for are left out: multiple_choice_head\.",
    ):
        load_language_model(str(folder))


def test_encoders_are_refused(tmp_path: Path) -> None:
    config = transformers.BertConfig(
        vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    refused(
        save(transformers.BertForMaskedLM(config), tmp_path / "bert"),
        "its predictions depend on later tokens, so BertLMHeadModel is not a causal language model here",
    )
