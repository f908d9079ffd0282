"""Heads of language models by finite differences: what a component's name says moves is what moves, and nothing else.

The input of the attention's output projection holds the heads' outputs side by side, so a head that is displaced must
change its own slice there and no other.
"""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import Tensor, nn

from patterning_dist.errors import PatterningError
from patterning_dist.models.anatomy import Heads, find_layers, language_model_components, missing_head
from patterning_dist.models.components import Component, model_components, select_component
from patterning_dist.models.losses import token_losses

TINY = {"vocab_size": 53, "bos_token_id": 0, "eos_token_id": 0}
LLAMA = TINY | {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
GROUPED = LLAMA | {"num_key_value_heads": 2, "head_dim": 10}  # 4 heads of 10 in a width of 24
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 8}
LATENT = LLAMA | EXPERTS | {
    "num_key_value_heads": 4, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 5,
    "n_group": 1, "topk_group": 1, "n_routed_experts": 3, "n_shared_experts": 1, "first_k_dense_replace": 1,
}  # fmt: skip
OPT = TINY | {
    "hidden_size": 24,
    "word_embed_proj_dim": 24,
    "ffn_dim": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}

CONFIGS = {
    "gpt2": lambda: transformers.GPT2Config(n_embd=24, n_layer=2, n_head=4, n_positions=32, **TINY),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(
        **LLAMA, rotary_pct=0.5, use_parallel_residual=True, tie_word_embeddings=False
    ),
    "llama": lambda: transformers.LlamaConfig(**LLAMA, attention_bias=True),
    "llama_grouped": lambda: transformers.LlamaConfig(**LLAMA, num_key_value_heads=2),
    "qwen2": lambda: transformers.Qwen2Config(**LLAMA, num_key_value_heads=1),
    "qwen3": lambda: transformers.Qwen3Config(**GROUPED),
    "gemma": lambda: transformers.GemmaConfig(**GROUPED),
    "gemma2": lambda: transformers.Gemma2Config(**GROUPED, query_pre_attn_scalar=10, attn_logit_softcapping=5.0),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **GROUPED, query_pre_attn_scalar=10, layer_types=["sliding_attention", "full_attention"], sliding_window=4
    ),
    "mixtral": lambda: transformers.MixtralConfig(**LLAMA, num_key_value_heads=2, num_local_experts=3),
    "phi3": lambda: transformers.Phi3Config(**LLAMA, num_key_value_heads=2, pad_token_id=0),
    "opt": lambda: transformers.OPTConfig(**OPT),
    "codegen": lambda: transformers.CodeGenConfig(
        n_embd=24, n_layer=2, n_head=4, n_positions=32, n_ctx=32, rotary_dim=4, tie_word_embeddings=False, **TINY
    ),
    "ctrl": lambda: transformers.CTRLConfig(n_embd=24, n_layer=2, n_head=4, n_positions=32, dff=40, **TINY),
    "gpt_bigcode": lambda: transformers.GPTBigCodeConfig(n_embd=24, n_layer=2, n_head=4, n_positions=32, **TINY),
    "gpt_bigcode_whole": lambda: transformers.GPTBigCodeConfig(
        n_embd=24, n_layer=2, n_head=4, n_positions=32, multi_query=False, **TINY
    ),
    "falcon": lambda: transformers.FalconConfig(**LLAMA, multi_query=True, bias=True),
    "falcon_new": lambda: transformers.FalconConfig(**LLAMA, new_decoder_architecture=True, num_kv_heads=2),
    "deepseek_v2": lambda: transformers.DeepseekV2Config(**LATENT, q_lora_rank=8),
    "deepseek_v2_lite": lambda: transformers.DeepseekV2Config(**LATENT, q_lora_rank=None),
    "deepseek_v3": lambda: transformers.DeepseekV3Config(**LATENT, q_lora_rank=8),
    "qwen3_next": lambda: transformers.Qwen3NextConfig(
        **GROUPED, layer_types=["full_attention"] * 2, mlp_only_layers=[0, 1]
    ),
    "gpt_oss": lambda: transformers.GptOssConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2, pad_token_id=0),
    "afmoe": lambda: transformers.AfmoeConfig(**GROUPED, num_dense_layers=2),
}
GROUPS = {"llama_grouped": 2, "qwen2": 1, "qwen3": 2, "gemma": 2, "gemma2": 2, "gemma3": 2, "mixtral": 2, "phi3": 2}
GROUPS |= {"gpt_bigcode": 1, "falcon": 1, "falcon_new": 2, "qwen3_next": 2, "afmoe": 2, "gpt_oss": 2}
TIED = {"gpt2", "gemma", "gemma2", "gemma3", "opt", "ctrl", "gpt_bigcode", "gpt_bigcode_whole", "falcon", "falcon_new"}
BIASED = {"codegen", "ctrl"}  # their unembedding
POSITIONS = {"gpt2", "opt", "gpt_bigcode", "gpt_bigcode_whole"}
NUM_HEADS = 4
TOKENS = torch.randint(1, 53, (3, 9), generator=torch.Generator().manual_seed(5))


def build(config: transformers.PretrainedConfig) -> nn.Module:
    """float64, every parameter N(0, 0.3): fresh biases and norms are constants, in which errors would hide."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", experts_implementation="eager"
    )
    model = model.double().eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3)
    return model


@pytest.fixture(params=CONFIGS, scope="module")
def architecture(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(architecture: str) -> nn.Module:
    return build(CONFIGS[architecture]())


def displace(model: nn.Module, component: Component, size: float, seed: int, only: str | None = None) -> None:
    generator = torch.Generator().manual_seed(seed)
    for piece in component.pieces:
        if only is None or piece.parameter == only:
            view = piece.view(model.get_parameter(piece.parameter).data)
            view += size * torch.randn(view.shape, generator=generator, dtype=view.dtype)


def heads_and_attention(model: nn.Module, layer: int) -> tuple[Tensor, Tensor]:
    """Outputs of the heads [head, sample, position, d_head] and of the attention, at one layer."""
    heads = find_layers(model)[layer].heads
    assert isinstance(heads, Heads)
    seen = []
    hook = heads.output.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    with torch.no_grad():
        model(input_ids=TOKENS, use_cache=False)
    hook.remove()
    (into, out), num_samples = seen[0], len(TOKENS)
    return into.reshape(num_samples, TOKENS.shape[1], NUM_HEADS, -1).permute(2, 0, 1, 3), out


def moved(model: nn.Module, component: Component, layer: int, only: str | None = None, skip: str | None = None):
    """Which heads' outputs change, and whether the attention's does, when some parameters of a component move."""
    before = heads_and_attention(model, layer)
    state = {name: p.detach().clone() for name, p in model.named_parameters()}
    for number, name in enumerate(component.parameters):
        if name != skip and only in (None, name):
            displace(model, component, 0.2, number, only=name)
    after = heads_and_attention(model, layer)
    for name, parameter in model.named_parameters():
        parameter.data.copy_(state[name])
    changed = (after[0] - before[0]).abs().flatten(1).amax(dim=1)
    # A head that is left alone is computed from the same numbers: its output is the same to the last bit or so.
    return [head for head in range(NUM_HEADS) if changed[head] > 1e-9], (after[1] - before[1]).abs().max() > 1e-9


def output_weight(model: nn.Module, layer: int) -> str:
    heads = find_layers(model)[layer].heads
    return next(name for name, p in model.named_parameters() if p is heads.output.weight)


DENSE = LLAMA | {"num_key_value_heads": 2, "pad_token_id": 0}
NARROW = {"n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 32} | TINY
ROUTED = DENSE | EXPERTS | {"num_experts": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1}
OTHERS = {
    "openai-gpt": NARROW, "gptj": NARROW | {"rotary_dim": 4},
    "bloom": TINY | {"hidden_size": 24, "n_layer": 2, "n_head": 4},
    "gpt_neo": TINY
    | {"hidden_size": 24, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    "mpt": TINY | {"d_model": 24, "n_layers": 2, "n_heads": 4, "max_seq_len": 32},
    "persimmon": DENSE | {"partial_rotary_factor": 1.0}, "phi": DENSE | {"partial_rotary_factor": 1.0},
    "biogpt": DENSE, "mistral": DENSE, "olmo": DENSE, "stablelm": DENSE,
    "starcoder2": DENSE, "cohere": DENSE, "cohere2": DENSE, "granite": DENSE, "smollm3": DENSE, "nemotron": DENSE,
    "ernie4_5": DENSE, "arcee": DENSE, "apertus": DENSE, "falcon": LLAMA | {"multi_query": False, "alibi": True},
    "exaone4": DENSE, "glm": DENSE | {"head_dim": 6}, "glm4": DENSE | {"head_dim": 6},
    "helium": DENSE | {"head_dim": 6}, "seed_oss": DENSE | {"head_dim": 6}, "hunyuan_v1_dense": DENSE | {"head_dim": 6},
    "qwen2_moe": ROUTED | {"shared_expert_intermediate_size": 8}, "qwen3_moe": ROUTED | {"head_dim": 6},
    "phimoe": DENSE | {"num_local_experts": 4}, "granitemoe": DENSE | {"num_local_experts": 4},
    "dots1": ROUTED | {"n_shared_experts": 1},
    "glm4_moe": ROUTED | {"head_dim": 6}, "llama4_text": DENSE | {"num_local_experts": 4, "head_dim": 6},
    "minicpm3": LATENT | {"q_lora_rank": 8},
}  # fmt: skip


@pytest.mark.parametrize("model_type", OTHERS)
def test_heads_of_other_architectures_move_their_own_outputs(model_type: str) -> None:
    model = build(transformers.CONFIG_MAPPING[model_type](**OTHERS[model_type]))
    components, output = language_model_components(model), output_weight(model, 1)
    for head in (0, 3):
        assert moved(model, components[f"layer.1.head.{head}"], 1, skip=output) == ([head], True)
    (columns,) = (p for p in components["layer.1.head.3"].pieces if p.parameter == output)
    columns.view(model.get_parameter(output).data).zero_()
    assert moved(model, components["layer.1.head.3"], 1, skip=output) == ([3], False)


def test_moving_a_head_moves_its_output_only(model: nn.Module) -> None:
    components = language_model_components(model)
    for layer in (0, 1):
        output = output_weight(model, layer)
        for head in range(NUM_HEADS):
            component = components[f"layer.{layer}.head.{head}"]
            assert moved(model, component, layer, skip=output) == ([head], True)
            # Every parameter of it matters on its own, but for a bias of keys: softmax does not see it without
            # position (GPT-2, OPT), where it moves nothing.
            for parameter in component.parameters:
                heads, attention = moved(model, component, layer, only=parameter)
                assert heads in ([], [head]) if parameter != output else heads == []
                assert attention or "k_proj.bias" in parameter or "Wk.bias" in parameter
                assert (heads == [head]) == attention or parameter == output


def test_a_head_reaches_the_model_through_its_own_output_columns_only(model: nn.Module) -> None:
    components, output = language_model_components(model), output_weight(model, 1)
    weight = model.get_parameter(output)
    kept = weight.detach().clone()
    for head in range(NUM_HEADS):
        component = components[f"layer.1.head.{head}"]
        (columns,) = (piece for piece in component.pieces if piece.parameter == output)
        columns.view(weight.data).zero_()
        assert moved(model, component, 1, skip=output) == ([head], False)
        weight.data.copy_(kept)


def test_moving_a_group_moves_the_heads_that_read_it(model: nn.Module, architecture: str) -> None:
    components = language_model_components(model)
    groups = [name for name in components if ".kv." in name]
    assert len(groups) == 2 * GROUPS.get(architecture, 0)
    for name in groups:
        _, layer, _, group = name.split(".")
        size = NUM_HEADS // GROUPS[architecture]
        readers = list(range(int(group) * size, (int(group) + 1) * size))
        assert moved(model, components[name], int(layer)) == (readers, True)
        assert components[name].note == f"keys and values of heads {readers[0]} to {readers[-1]}"
        for head in readers:
            assert components[f"layer.{layer}.head.{head}"].note == f"reads {name}"


def count(model: nn.Module, components: list[Component]) -> dict[str, Tensor]:
    """How many of the components hold each coordinate."""
    counts = {name: torch.zeros(p.shape) for name, p in model.named_parameters()}
    for component in components:
        for piece in component.pieces:
            piece.view(counts[piece.parameter]).add_(1)
    return counts


def test_heads_groups_and_what_is_shared_partition_the_attention(model: nn.Module, architecture: str) -> None:
    components = language_model_components(model)
    latent = {"kv_a_proj_with_mqa.weight", "kv_a_layernorm.weight"}
    shared = {
        "gpt2": {"c_proj.bias"},
        "gpt_neox": {"dense.bias"},
        "llama": {"o_proj.bias"},
        "opt": {"out_proj.bias"},
        "qwen3": {"q_norm.weight", "k_norm.weight"},
        "gemma3": {"q_norm.weight", "k_norm.weight"},
        "ctrl": {"dense.bias"},
        "gpt_bigcode": {"c_proj.bias"},
        "gpt_bigcode_whole": {"c_proj.bias"},
        "falcon": {"dense.bias"},
        "deepseek_v2": latent | {"q_a_proj.weight", "q_a_layernorm.weight"},
        "deepseek_v2_lite": latent,
        "deepseek_v3": latent | {"q_a_proj.weight", "q_a_layernorm.weight"},
        "qwen3_next": {"q_norm.weight", "k_norm.weight"},
        "gpt_oss": {"o_proj.bias"},
        "afmoe": {"q_norm.weight", "k_norm.weight"},
    }.get(architecture, set())
    for layer in (0, 1):
        attention = components[f"layer.{layer}.attention"]
        parts = [c for name, c in components.items() if name.startswith((f"layer.{layer}.head", f"layer.{layer}.kv"))]
        whole, covered = count(model, [attention]), count(model, parts)
        for name in whole:
            rest = whole[name] - covered[name]
            if any(name.endswith(ending) for ending in shared) and name in attention.parameters:
                assert (rest == 1).all(), name
            else:
                assert (rest == 0).all(), name
        named = {name for name in attention.note.removeprefix("with ").removesuffix(", of no head").split(", ") if name}
        assert named == shared


def test_everything_is_everything_once_and_layers_do_not_overlap(model: nn.Module, architecture: str) -> None:
    components = language_model_components(model)
    assert all((counts == 1).all() for counts in count(model, [components["everything"]]).values())
    assert components["everything"].num_coordinates == sum(p.numel() for p in model.parameters())
    apart = [components["layer.0"], components["layer.1"], components["embedding"]]
    apart += [] if architecture in TIED else [components["unembedding"]]
    apart += [components["position_embedding"]] if architecture in POSITIONS else []
    counts = count(model, apart)
    assert max(c.max() for c in counts.values()) == 1
    left = [name for name, c in counts.items() if c.max() == 0]
    assert left, "the last norm belongs to everything only"
    assert all("norm" in name or "ln_f" in name or name == "lm_head.bias" for name in left)
    for part in ("attention", "mlp"):
        inside = [components[f"layer.{layer}.{part}"] for layer in (0, 1)]
        assert [p for c in inside for p in c.pieces] == list(components[part].pieces)
        block = count(model, [components["layer.0"]])
        assert all((block[p] == 1).all() for p in inside[0].parameters)


def test_tied_embeddings_are_one_parameter_and_say_so(model: nn.Module, architecture: str) -> None:
    components = language_model_components(model)
    embedding, unembedding = components["embedding"], components["unembedding"]
    assert embedding.parameters[0].endswith(
        ("wte.weight", "embed_in.weight", "embed_tokens.weight", "transformer.w.weight", "word_embeddings.weight")
    )
    bias = 53 if architecture in BIASED else 0
    assert embedding.num_coordinates == unembedding.num_coordinates - bias == 53 * 24
    assert (embedding.pieces[0] == unembedding.pieces[0]) == (architecture in TIED)
    assert ("tied" in unembedding.note, "tied" in embedding.note) == (architecture in TIED,) * 2
    both = select_component(model, "embedding+unembedding")
    assert both.num_coordinates == 53 * 24 * (1 if architecture in TIED else 2) + bias


def test_differences_of_the_loss_agree_with_the_gradient_on_the_pieces(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D(s) = [L(w + s u) - L(w - s u)] / 2s = grad L . u + O(s^2) for u inside a component; of the slopes: u^T H u.

    The remainder of D(s) is a third of D(2s) - D(s), up to O(s^4); rounding adds 1e-16 L / s, which is below 1e-11.
    """
    # Norms and softmaxes are computed in float32 by name, whatever the model is.
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    known = language_model_components(model)
    names = ["layer.1.head.2", "layer.0.attention", "layer.1.mlp", "embedding", "everything"]
    names += [name for name in ("layer.0.kv.0", "position_embedding") if name in known]
    parameters = dict(model.named_parameters())

    def loss() -> Tensor:
        logits = model(input_ids=TOKENS[:, :-1], use_cache=False).logits
        return nn.functional.cross_entropy(logits.flatten(0, 1), TOKENS[:, 1:].flatten())

    def inner(
        component: Component, tensors: tuple[Tensor, ...], names: tuple[str, ...], u: dict[str, Tensor]
    ) -> Tensor:
        views = component.free(dict(zip(names, tensors, strict=True)))
        return sum((views[piece] * u[piece]).sum() for piece in u)

    for name in names:
        component = known[name]
        data = {n: parameters[n].data for n in component.parameters}
        center = {piece: view.clone() for piece, view in component.free(data).items()}
        generator = torch.Generator().manual_seed(7)
        u = {piece: torch.randn(v.shape, generator=generator, dtype=v.dtype) for piece, v in center.items()}
        norm = torch.sqrt(sum(part.square().sum() for part in u.values()))
        u = {piece: part / norm for piece, part in u.items()}
        moving = [parameters[n] for n in component.parameters]

        def differences(step: float, component=component, data=data, center=center, u=u, moving=moving):
            values, slopes = [], []
            for sign in (1, -1):
                for piece, view in component.free(data).items():
                    view.copy_(center[piece] + sign * step * u[piece])
                values.append(loss())
                gradient = torch.autograd.grad(values[-1], moving)
                slopes.append(inner(component, gradient, component.parameters, u).item())
            for piece, view in component.free(data).items():
                view.copy_(center[piece])
            return (values[0] - values[1]).item() / (2 * step), (slopes[0] - slopes[1]) / (2 * step)

        gradient = torch.autograd.grad(loss(), moving, create_graph=True)
        slope = inner(component, gradient, component.parameters, u)
        curvature = inner(component, torch.autograd.grad(slope, moving), component.parameters, u)
        for exact, once, twice in zip((slope, curvature), differences(1e-4), differences(2e-4), strict=True):
            remainder = abs(twice - once)
            assert abs(once - exact.item()) < remainder / 2 + 1e-10, name
            assert remainder < 1e-2 * abs(exact.item()), (name, "too coarse a step to tell")


def test_the_losses_are_those_of_transformers(model: nn.Module) -> None:
    losses = token_losses(model(input_ids=TOKENS[:, :-1]).logits, TOKENS)
    assert losses.shape == (3, 8)
    assert losses.dtype == torch.float32
    theirs = model(input_ids=TOKENS, labels=TOKENS).loss
    assert losses.mean().item() == pytest.approx(theirs.item(), rel=1e-6)


def test_models_on_the_meta_device_have_the_same_components(model: nn.Module, architecture: str) -> None:
    with torch.device("meta"):
        skeleton = transformers.AutoModelForCausalLM.from_config(CONFIGS[architecture]())
    assert language_model_components(skeleton) == model_components(model)


def test_norms_over_all_heads_are_said_to_mix_them() -> None:
    model = build(transformers.Olmo2Config(**LLAMA, pad_token_id=0))
    components = language_model_components(model)
    note = "norm over all heads (q_norm, k_norm): moving one head rescales the others"
    assert components["layer.0.head.1"].note == note
    assert moved(model, components["layer.0.head.1"], 0) == ([0, 1, 2, 3], True)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (
            transformers.RwkvConfig(hidden_size=24, num_hidden_layers=2, attention_hidden_size=24, **TINY),
            r"heads are not known in an attention of time_shift, .* \(known are q_proj, k_proj, v_proj .*; c_attn with",
        ),
        (
            transformers.DiffLlamaConfig(**LLAMA),
            "heads are not known in an attention that also has lambda_q1, .*, which may mix them",
        ),
    ],
    ids=["no heads", "pairs of heads"],
)
def test_unknown_heads_are_refused_and_the_rest_is_there(config: transformers.PretrainedConfig, reason: str) -> None:
    model = build(config)
    components = language_model_components(model)
    assert {"everything", "attention", "mlp", "embedding", "unembedding", "layer.1", "layer.1.mlp"} <= set(components)
    assert not [name for name in components if ".head." in name or ".kv." in name]
    message = missing_head(model, "layer.1.head.2")
    assert message is not None
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(message)
    assert components["layer.1.attention"].note == message.partition(" (known are")[0]
    pattern = message.rpartition(" ")[2].replace("0:64", "0:6")
    assert select_component(model, pattern).num_coordinates > 0


def test_what_is_missing_is_explained() -> None:
    model = build(CONFIGS["llama"]())
    assert missing_head(model, "layer.1.head.4") == "this layer has heads 0 to 3 and 4 key/value groups"
    assert "are in the head" in str(missing_head(model, "layer.1.kv.0"))
    assert missing_head(model, "layer.2.head.0") is None
    assert missing_head(model, "embedding") is None
    assert missing_head(model, "layer.0.expert.0") == "this layer has no experts"
    grouped = build(CONFIGS["qwen3"]())
    assert missing_head(grouped, "layer.0.kv.2") == "this layer has heads 0 to 3 and 2 key/value groups"
    with pytest.raises(PatterningError, match=r"component 'layer\.1\.head\.4' does not exist in this model"):
        select_component(model, "layer.1.head.4")


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "llama_grouped", "gemma2"])
def test_a_classifier_has_the_layers_of_its_language_model_and_a_head(name: str) -> None:
    config = CONFIGS[name]()
    language_model = build(config)
    config.num_labels = 3
    classifier = transformers.AutoModelForSequenceClassification.from_config(config)
    found, theirs = model_components(classifier), model_components(language_model)
    assert found.keys() - theirs.keys() == {"head"}
    assert theirs.keys() - found.keys() == {"unembedding"}
    assert [piece.name for piece in found["head"].pieces] == ["score.weight"]
    assert found["head"].num_coordinates == 3 * 24
    for part in theirs.keys() - {"everything", "unembedding"}:
        assert found[part].pieces == theirs[part].pieces
    assert list(found["everything"].parameters) == [n for n, _ in classifier.named_parameters()]


MIXTURES = {
    "mixtral": lambda: transformers.MixtralConfig(**LLAMA, num_local_experts=4),
    "qwen2_moe": lambda: transformers.Qwen2MoeConfig(
        **LLAMA, **EXPERTS, num_experts=4, shared_expert_intermediate_size=8
    ),
    "deepseek_v3": lambda: transformers.DeepseekV3Config(**LATENT | {"n_routed_experts": 4}),
    "gpt_oss": CONFIGS["gpt_oss"],
    "jetmoe": lambda: transformers.JetMoeConfig(**LLAMA, num_local_experts=4, num_experts_per_tok=2, kv_channels=6),
}


@pytest.mark.parametrize("name", MIXTURES)
def test_moving_an_expert_moves_the_tokens_that_are_routed_to_it_only(name: str) -> None:
    model = build(MIXTURES[name]())
    components, layer = language_model_components(model), find_layers(model)[1]
    (mlp,) = layer.mlp
    experts = [components[f"layer.1.expert.{number}"] for number in range(4)]
    assert "layer.1.expert.4" not in components
    assert missing_head(model, "layer.1.expert.4") == "this layer has experts 0 to 3"
    shared = components.get("layer.1.shared_expert")
    assert (shared is not None) == (name in ("qwen2_moe", "deepseek_v3"))
    x = torch.randn(40, 1, 24, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def outputs(component: Component | None) -> Tensor:
        state = {n: p.detach().clone() for n, p in model.named_parameters()}
        if component is not None:
            displace(model, component, 0.1, 3)
        with torch.no_grad():
            found = mlp(x)
        for n, p in model.named_parameters():
            p.data.copy_(state[n])
        return (found[0] if isinstance(found, tuple) else found).reshape(40, 24)

    before = outputs(None)
    moved = torch.stack([(outputs(expert) - before).abs().amax(dim=1) > 1e-9 for expert in experts])
    assert (moved.sum(dim=0) == 2).all()  # every token has two
    assert (moved.sum(dim=1) > 0).all() and (moved.sum(dim=1) < 40).all()
    assert ((outputs(components["layer.1.router"]) - before).abs().amax(dim=1) > 1e-9).all()
    if shared is not None:
        assert ((outputs(shared) - before).abs().amax(dim=1) > 1e-9).all()
    # Experts, router and shared expert are the whole of it, and do not overlap.
    parts = [*experts, components["layer.1.router"], *([shared] if shared is not None else [])]
    whole, covered = count(model, [components["layer.1.mlp"]]), count(model, parts)
    assert all(torch.equal(whole[n], covered[n]) for n in whole if not n.endswith("mlp.bias"))
    in_all = {n for n, c in count(model, [components["experts"], components["router"]]).items() if c.max()}
    assert {n for n, c in covered.items() if c.max() and "shared" not in n} <= in_all


TWO = LLAMA | {"num_key_value_heads": 2}
MIXERS = {
    "mamba": lambda: transformers.MambaConfig(hidden_size=24, num_hidden_layers=2, state_size=4, **TINY),
    "mamba2": lambda: transformers.Mamba2Config(
        hidden_size=24, num_hidden_layers=2, state_size=4, num_heads=6, head_dim=8, n_groups=2, **TINY
    ),
    "jamba": lambda: transformers.JambaConfig(
        **TWO, num_experts=2, attn_layer_period=2, attn_layer_offset=1, mamba_d_state=4, use_mamba_kernels=False
    ),
    "recurrent_gemma": lambda: transformers.RecurrentGemmaConfig(
        **LLAMA | {"num_hidden_layers": 3}, lru_width=24, attention_window_size=16
    ),
    "qwen3_next": lambda: transformers.Qwen3NextConfig(
        **GROUPED, layer_types=["linear_attention", "full_attention"], mlp_only_layers=[0, 1],
        linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
    ),
    "lfm2": lambda: transformers.Lfm2Config(**TWO, layer_types=["conv", "full_attention"]),
    "nemotron_h": lambda: transformers.NemotronHConfig(
        **TWO | {"num_hidden_layers": 3}, layers_block_type=["mamba", "attention", "mlp"], mamba_num_heads=4,
        mamba_head_dim=8, ssm_state_size=4, n_groups=2, head_dim=6,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MIXERS)
def test_state_space_mixers_and_other_recurrences_are_components(name: str) -> None:
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(MIXERS[name]())
    components = language_model_components(model)
    with_attention = {"mamba": set(), "mamba2": set(), "recurrent_gemma": {2}}.get(name, {1})
    num_layers = len(find_layers(model))
    mixers = {int(part.split(".")[1]) for part in components if part.endswith(".mixer")}
    assert {int(part.split(".")[1]) for part in components if part.endswith(".attention")} == with_attention
    assert mixers == set(range(num_layers)) - with_attention - ({2} if name == "nemotron_h" else set())
    assert all(f"layer.{number}.head.3" in components for number in with_attention)
    # Norms apart, a layer is what mixes positions and its mlp.
    for number in range(num_layers):
        names = [f"layer.{number}.{part}" for part in ("attention", "mixer", "mlp")]
        covered = count(model, [components[part] for part in names if part in components])
        left = [n for n, c in count(model, [components[f"layer.{number}"]]).items() if c.sum() > covered[n].sum()]
        assert all("norm" in n for n in left), left


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("l0h1", "layer.0.head.1"), ("L1H3", "layer.1.head.3"), ("blocks.1.attn.h.2", "layer.1.head.2"),
        ("blocks.1.attn.head.2", "layer.1.head.2"), ("blocks.0.attn.2", "layer.0.head.2"), ("blocks.1", "layer.1"),
        ("blocks.0.attn", "layer.0.attention"), ("blocks.0.mlp", "layer.0.mlp"), ("embed", "embedding"),
        ("W_E", "embedding"), ("unembed.W_U", "unembedding"), ("pos_embed", "position_embedding"),
        ("l0h1+l1h0+embed", "layer.0.head.1+layer.1.head.0+embedding"),
    ],
)  # fmt: skip
def test_names_of_others_stand_for_ours(theirs: str, ours: str) -> None:
    model = build(CONFIGS["gpt2"]())
    assert select_component(model, theirs).pieces == select_component(model, ours).pieces
    with pytest.raises(PatterningError, match="component 'l7h0' does not exist in this model; there are: everything"):
        select_component(model, "l7h0")
