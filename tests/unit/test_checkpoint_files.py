"""What folders hold and how it is read: experts one by one, ties as in the files, and folders that are broken.

The same on several ranks and under ZeRO stage 3: ``tests/ray/test_chain_groups.py``.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from patterning_dist.config import HuggingFaceConfig
from patterning_dist.errors import PatterningError
from patterning_dist.models import huggingface
from patterning_dist.models.checkpoint import INDEX, SINGLE, Files, read_checkpoint
from patterning_dist.models.components import model_components
from patterning_dist.models.huggingface import language_model_skeleton, load_language_model, open_saved_model
from patterning_dist.models.pretrained_config import model_config, read_config
from patterning_dist.models.weights import state_shapes
from patterning_dist.tasks.huggingface import HuggingFace

SIZES = {
    "vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 12, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
ROUTED = SIZES | {"num_experts_per_tok": 2, "moe_intermediate_size": 8}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 6}
GROUPLESS = {"n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_routed_experts": 3}
EXPERTS = {
    "mixtral": SIZES | {"num_local_experts": 3},
    "olmoe": ROUTED | {"num_experts": 3},
    "qwen2_moe": ROUTED | {"num_experts": 3, "shared_expert_intermediate_size": 8},
    "qwen3_moe": ROUTED | {"num_experts": 3, "head_dim": 4},
    "deepseek_v2": ROUTED | LATENT | GROUPLESS | {"num_key_value_heads": 4},
    "deepseek_v3": ROUTED | LATENT | GROUPLESS | {"num_key_value_heads": 4},
    "phimoe": SIZES | {"num_local_experts": 3},
    "granitemoe": SIZES | {"num_local_experts": 3, "num_experts_per_tok": 2},
    "gpt_oss": SIZES | {"num_local_experts": 3, "num_experts_per_tok": 2, "head_dim": 4},
}


def build(model_type: str, **keys: object) -> transformers.PreTrainedModel:
    torch.manual_seed(3)
    return transformers.AutoModelForCausalLM.from_config(transformers.CONFIG_MAPPING[model_type](**keys)).eval()


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    build("llama", **SIZES).save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def refused(folder: Path, message: str) -> None:
    """By all that looks at a folder, before anything is read."""
    for opened in (language_model_skeleton, load_language_model):
        with pytest.raises(PatterningError, match=message) as caught:
            opened(str(folder))
        assert str(caught.value).startswith(str(folder)) and "\n" not in str(caught.value)


def rewrite(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def weights_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / SINGLE)


def write(folder: Path, weights: dict[str, Tensor]) -> None:
    save_file({key: w.contiguous().clone() for key, w in weights.items()}, folder / SINGLE, {"format": "pt"})


@pytest.mark.parametrize("model_type", EXPERTS)
def test_experts_are_stacked_while_their_rows_are_read(model_type: str, tmp_path: Path) -> None:
    model = build(model_type, **EXPERTS[model_type])
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    loaded = load_language_model(str(tmp_path))
    mine = {name: tuple(p.shape) for name, p in loaded.named_parameters()}
    assert mine == {name: tuple(p.shape) for name, p in language_model_skeleton(str(tmp_path)).named_parameters()}
    wanted = model.state_dict()
    assert all(torch.equal(w, wanted[name]) for name, w in loaded.state_dict().items())
    # Two ranks, of which the second holds the smaller part.
    sources, shapes, files = open_saved_model(str(tmp_path)).sources, state_shapes(model), Files()
    assert sources is not None
    for source in sources:
        halves = [{n: (0, -(-shapes[n][0] // 2)) for n in source.names}, {}]
        halves[1] = {n: (stop, shapes[n][0]) for n, (_, stop) in halves[0].items()}
        parts = [source.read(files, shapes, rows, model.config) for rows in halves]
        for name in parts[0]:
            assert len(parts[0][name]) == halves[0][name][1]
            assert torch.equal(torch.cat([part[name] for part in parts]), wanted[name]), name


def test_a_rank_reads_the_experts_that_it_holds_and_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("mixtral", **EXPERTS["mixtral"])
    model.save_pretrained(tmp_path)
    sources, shapes = open_saved_model(str(tmp_path)).sources, state_shapes(model)
    assert sources is not None
    (source,) = (one for one in sources if one.target.endswith("layers.1.mlp.experts.gate_up_proj"))
    read, files = [], Files()
    original = type(source.stored[0][1]).read
    monkeypatch.setattr(type(source.stored[0][1]), "read", lambda s, *a: read.append(s.key) or original(s, *a))
    part = source.read(files, shapes, {source.target: (1, 2)}, model.config)[source.target]
    assert torch.equal(part, model.state_dict()[source.target][1:2])
    assert [key.split(".experts.")[1] for key in read] == ["1.w1.weight", "1.w3.weight"]
    assert source.read(files, shapes, {source.target: (3, 3)}, model.config)[source.target].shape == (0, 48, 16)


@pytest.mark.parametrize(
    ("said", "different", "tied"), [(True, True, False), (True, False, True), (False, False, False)]
)
def test_the_file_decides_whether_embeddings_are_tied(said: bool, different: bool, tied: bool, llama: Path) -> None:
    """Two matrices, of other numbers or of the same, and what config.json says of them."""
    weights = weights_of(llama)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + different
    write(llama, weights)
    rewrite(llama, tie_word_embeddings=said)
    models = [language_model_skeleton(str(llama)), load_language_model(str(llama))]
    for model in models:
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
        note = model_components(model)["unembedding"].note
        assert ("config.json says that it is tied to the embedding" in note) == (said and different)
        assert (note == "tied: the same parameter as the embedding") == tied
    assert torch.equal(models[1].lm_head.weight, weights["lm_head.weight"])
    assert torch.equal(models[1].model.embed_tokens.weight, weights["model.embed_tokens.weight"])
    assert [p.shape for p in models[0].parameters()] == [p.shape for p in models[1].parameters()]


@pytest.mark.parametrize("key", ["lm_head.weight", "model.embed_tokens.weight"])
def test_tied_embeddings_are_stored_under_either_name(key: str, llama: Path) -> None:
    weights = weights_of(llama)
    weights.pop("lm_head.weight"), weights.setdefault(key, weights.pop("model.embed_tokens.weight"))
    write(llama, weights)
    rewrite(llama, tie_word_embeddings=True)
    loaded = load_language_model(str(llama))
    assert torch.equal(loaded.lm_head.weight, weights[key]) and torch.equal(
        loaded.model.embed_tokens.weight, weights[key]
    )
    rewrite(llama, tie_word_embeddings=False)
    if key == "model.embed_tokens.weight":
        refused(
            llama, r'the weights lack lm_head\.weight, .* write "tie_word_embeddings": true into config\.json, else'
        )


@pytest.mark.parametrize(
    "wrapped",
    ["module.{}", "_orig_mod.{}", "_orig_mod.module.{}", "module.module.{}", "_fsdp_wrapped_module.{}"],
)
def test_prefixes_of_wrappers_are_taken_off_and_named(wrapped: str, llama: Path) -> None:
    weights = weights_of(llama)
    write(llama, {wrapped.format(key): w for key, w in weights.items()})
    with pytest.warns(UserWarning, match=rf"prefixes of wrappers, like {wrapped.format('')}.*; they are read without"):
        loaded = load_language_model(str(llama))
    assert all(torch.equal(p, weights[name]) for name, p in loaded.named_parameters())


def test_a_model_that_is_a_part_of_another_is_found(tmp_path: Path) -> None:
    """As Lightning saves it."""
    model = build("gpt2", n_embd=16, n_layer=1, n_head=4, n_positions=8, vocab_size=9)
    model.save_pretrained(tmp_path)
    weights = weights_of(tmp_path)
    write(tmp_path, {f"net.{key}": w for key, w in weights.items()})
    loaded = load_language_model(str(tmp_path))
    assert all(torch.equal(p, model.get_parameter(name)) for name, p in loaded.named_parameters())


def test_wrappers_of_single_layers_are_taken_off(llama: Path) -> None:
    weights = weights_of(llama)
    put = "layers.1._fsdp_wrapped_module._checkpoint_wrapped_module."
    write(llama, {key.replace("layers.1.", put): w for key, w in weights.items()})
    with pytest.warns(UserWarning, match="_fsdp_wrapped_module"):
        loaded = load_language_model(str(llama))
    assert all(torch.equal(p, weights[name]) for name, p in loaded.named_parameters())


def test_empty_tensors_of_zero_3_are_refused(llama: Path) -> None:
    weights = weights_of(llama)
    write(llama, weights | {"model.norm.weight": torch.empty(0)})
    refused(llama, r"model\.norm\.weight hold no numbers, .* ZeRO stage 3 .*zero_to_fp32\.py")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_no_numbers_are_refused_by_name(value: float, llama: Path) -> None:
    weights = weights_of(llama)
    weights["model.layers.1.mlp.up_proj.weight"][3, 2] = value
    write(llama, weights)
    with pytest.raises(
        PatterningError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN or infinite weights, of"
    ):
        load_language_model(str(llama))


def test_of_stacked_experts_the_one_that_is_no_number_is_named(tmp_path: Path) -> None:
    build("mixtral", **EXPERTS["mixtral"]).save_pretrained(tmp_path)
    weights = weights_of(tmp_path)
    (name,) = (key for key in weights if key.endswith("layers.1.block_sparse_moe.experts.2.w3.weight"))
    weights[name][-1, 0] = torch.nan
    write(tmp_path, weights)
    with pytest.raises(PatterningError, match=rf"model\.safetensors: {name} holds NaN or infinite weights"):
        load_language_model(str(tmp_path))


def test_codes_of_a_quantised_model_are_refused_by_name(llama: Path) -> None:
    weights = weights_of(llama)
    name = "model.layers.0.mlp.up_proj.weight"
    write(llama, weights | {name: weights[name].to(torch.int8)})
    with pytest.raises(
        PatterningError, match=rf"{name} holds torch\.int8, codes of a quantised model, of which no loss"
    ):
        load_language_model(str(llama))


def test_broken_indices_and_missing_shards_are_refused(llama: Path) -> None:
    transformers.AutoModelForCausalLM.from_pretrained(llama).save_pretrained(llama, max_shard_size="4KB")
    (llama / SINGLE).unlink(missing_ok=True)
    index, kept = json.loads((llama / INDEX).read_text()), (llama / INDEX).read_text()
    name = index["weight_map"]["model.norm.weight"]
    (llama / name).rename(llama / "away")
    refused(llama, rf"{name} of \d+ shards not there, which {INDEX} names; copy the folder again, whole")
    (llama / "away").rename(llama / name)
    for content, message in (
        ("{", rf"{INDEX}: not JSON \(.*\); copy the file again"),
        ("[]", rf"{INDEX}: a list where keys are expected"),
        ("{}", rf"{INDEX}: no weight_map from names to files"),
        ('{"weight_map": {"a": 1}}', rf"{INDEX}: no weight_map from names to files"),
        ('{"weight_map": {"a": "../x.safetensors"}}', r"'\.\./x\.safetensors' is no file of this folder"),
        (
            kept.replace('"lm_head.weight"', '"lm_head.other"'),
            rf"{INDEX} names lm_head\.other, not in model-.*; copy index",
        ),
    ):
        (llama / INDEX).write_text(content)
        refused(llama, message)
    (llama / INDEX).unlink()
    refused(llama, rf"and \d+ more without {INDEX}, which says what they hold; copy it too")


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        ("gpt2", {"n_head": 0}, r"config\.json: n_head is 0; expected 1 or more"),
        ("gpt2", {"n_head": 3}, r"config\.json: no model can be made of it \(ValueError: .*\); correct it"),
        ("gpt2", {"vocab_size": -1}, r"config\.json: vocab_size is -1; expected 1 or more"),
        ("gpt2", {"n_layer": -2}, r"config\.json: n_layer is -2; expected 1 or more"),
        ("llama", {"hidden_act": "nonsense"}, r"config\.json: no model can be made of it \(KeyError: .*\); correct it"),
        ("llama", {"num_key_value_heads": 3}, r"config\.json"),
        (
            "llama",
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            r"a quantised model \(gptq\).*dequantize",
        ),
        ("llama", {"quantization_config": {"load_in_4bit": True}}, "a quantised model"),
    ],
)
def test_a_config_that_cannot_be_is_one_line(model_type: str, changes: dict, message: str, tmp_path: Path) -> None:
    keys = (
        SIZES if model_type == "llama" else {"n_embd": 16, "n_layer": 1, "n_head": 4, "n_positions": 8, "vocab_size": 9}
    )
    build(model_type, **keys).save_pretrained(tmp_path)
    rewrite(tmp_path, **changes)
    refused(tmp_path, message)


@pytest.mark.parametrize("content", ["[]", "3", '"x"', "null", "[" * 5000, "{"])
def test_a_config_of_another_kind_is_one_line(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    refused(tmp_path, r"config\.json: (a \w+ where keys are expected|not JSON \(.*\)); copy the file again")


def test_an_architecture_that_cannot_be_is_one_line() -> None:
    for keys in ({"vocab_size": -1}, {"num_attention_heads": 0}, {"num_hidden_layers": 0}):
        with pytest.raises(PatterningError, match=r"model\.architecture: \w+ is -?\d; expected 1 or more"):
            model_config({"model_type": "llama"} | SIZES | keys)
    section = HuggingFaceConfig(kind="huggingface", architecture={"model_type": "gpt2", "n_embd": 16, "n_head": 3})
    with pytest.raises(
        PatterningError, match=r"model\.architecture: no model can be made of it \(ValueError: .*; correct"
    ):
        HuggingFace(section, 31, 8, "cpu", None).skeleton()


def test_multimodal_models_are_refused_with_what_to_save(tmp_path: Path) -> None:
    transformers.Gemma3Config(text_config=SIZES, vision_config={"hidden_size": 16}).save_pretrained(tmp_path)
    refused(tmp_path, r"a multimodal or composite model \(text_config, vision_config\).*model type 'gemma3_text'")


def test_training_checkpoints_of_deepspeed_are_refused_with_what_to_do(llama: Path) -> None:
    (llama / SINGLE).unlink()
    (llama / "latest").write_text("global_step10")
    with pytest.raises(
        PatterningError, match=r"a training checkpoint of DeepSpeed; write its weights with zero_to_fp32"
    ):
        load_language_model(str(llama))


def test_a_part_in_the_cache_is_enough_for_the_skeleton(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model on the hub: the index is there, its shards are not."""
    transformers.AutoModelForCausalLM.from_pretrained(llama).save_pretrained(llama, max_shard_size="4KB")
    for shard in llama.glob("*.safetensors"):
        shard.unlink()
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **keys: str(llama))
    monkeypatch.setattr(huggingface, "read_config", lambda path, revision, head: read_config(str(llama), None, head))
    skeleton = language_model_skeleton("owner/name")
    assert skeleton.lm_head.weight.shape == (31, 16)
    with pytest.raises(PatterningError, match=r"shards not there, which model\.safetensors\.index\.json names"):
        load_language_model("owner/name")


def test_an_interrupted_copy_is_refused(llama: Path) -> None:
    with (llama / SINGLE).open("r+b") as file:
        file.truncate((llama / SINGLE).stat().st_size - 100)
    refused(llama, r"model\.safetensors: the weights cannot be read \(.*\); copy them again")
    assert read_checkpoint(llama.parent) == {}
