"""`patterning components`: every name once, with its size, whatever the model is given as; no weights are read."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest
import torch
import transformers
from test_cli import EXPERIMENT
from typer.testing import CliRunner

from patterning_dist.cli import app
from patterning_dist.listing import Row, compressed, open_model
from patterning_dist.models.components import Component, Piece, model_components

GPT2 = transformers.GPT2Config(
    n_embd=16, n_layer=12, n_head=4, n_positions=8, vocab_size=31, bos_token_id=0, eos_token_id=0
)
STUDY = """
name: study
seed: 1
model: {model}
data: {{kind: tokens, train: tokens.parquet, context_length: 8}}
sampling:
  components: [{{name: everything}}]
  observables: [{{kind: component_loss, name: restricted}}]
  num_draws: 100
  burn_in: 10
  inverse_temperature: 30
  localization: 4
  step_size: 0.075
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "x.yaml").write_text(EXPERIMENT)
    GPT2.save_pretrained(tmp_path / "gpt2")  # config.json and nothing else
    return tmp_path


def listed(*arguments: str) -> dict[str, list[str]]:
    """Component -> the other cells of its line."""
    result = CliRunner().invoke(app, ["components", *arguments])
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.stdout.splitlines()[2:-1]]
    return {line[0]: line[1:] for line in lines}


def test_components_alike_share_a_line(capfd: pytest.CaptureFixture) -> None:
    lines = listed("gpt2")
    assert capfd.readouterr().err == ""
    # 12 d^2 + 13 d a block; a head: 4 of its 4 columns of q, k and v with biases, and 4 rows of c_proj.
    assert lines["layer.0..11"] == ["12", f"{12 * 16**2 + 13 * 16:,}"]
    assert lines["layer.0..11.head.0..3"] == ["48", str(3 * 4 * 16 + 3 * 4 + 4 * 16)]
    assert lines["layer.0..11.attention"] == [
        "12",
        f"{4 * 16**2 + 4 * 16:,}",
        "with",
        "c_proj.bias,",
        "of",
        "no",
        "head",
    ]
    assert lines["embedding"] == ["1", str(31 * 16), "tied", "to", "the", "unembedding"]
    assert list(lines) == [
        "everything", "attention", "mlp", "embedding", "position_embedding", "layer.0..11", "layer.0..11.attention",
        "layer.0..11.mlp", "layer.0..11.head.0..3", "unembedding",
    ]  # fmt: skip


def test_all_lists_each_and_the_names_are_those_that_can_be_used() -> None:
    lines, known = listed("gpt2", "--all"), model_components(open_model("gpt2", None))
    assert list(lines) == list(known)
    assert {name: int(cells[0].replace(",", "")) for name, cells in lines.items()} == {
        name: component.num_coordinates for name, component in known.items()
    }


def test_the_last_line_shows_a_pattern_that_works() -> None:
    output = CliRunner().invoke(app, ["components", "gpt2"]).stdout
    assert output.startswith("gpt2: GPT2LMHeadModel, 148 parameter tensors\n")
    pattern = output.split()[-1]
    assert pattern == "transformer.wte.weight[0:16]"


def test_notes_that_differ_show_the_first() -> None:
    transformers.Qwen3Config(
        vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=6, bos_token_id=0, eos_token_id=0,
    ).save_pretrained("qwen3")  # fmt: skip
    lines = listed("qwen3")
    assert lines["layer.0..1.head.0..3"] == ["8", str(2 * 6 * 16), "the", "first:", "reads", "layer.0.kv.0"]
    assert lines["layer.0..1.kv.0..1"][:2] == ["4", str(2 * 6 * 16)]
    assert " ".join(lines["layer.0..1.kv.0..1"][2:]) == "the first: keys and values of heads 0 to 1"


def test_layers_that_differ_are_not_put_together() -> None:
    def component(name: str, size: int, note: str = "") -> Component:
        return Component(name, (Piece.whole("w", (size,)),), note=note)

    sizes = {0: 5, 1: 7, 2: 5, 3: 5}
    rows = compressed(component(f"layer.{layer}", size) for layer, size in sizes.items())
    assert rows == [Row("layer.0,2..3", 3, 5, ""), Row("layer.1", 1, 7, "")]
    # Heads 0 and 1 in layer 0, head 0 alone in layer 1: not all combinations.
    heads = [component(name, 3) for name in ("layer.0.head.0", "layer.0.head.1", "layer.1.head.0")]
    assert compressed(heads) == [Row("layer.0.head.0..1", 2, 3, ""), Row("layer.1.head.0", 1, 3, "")]
    assert [row.name for row in compressed([component("fc1.weight", 3), component("fc2.weight", 3)])] == [
        "fc1.weight",
        "fc2.weight",
    ]


def test_the_model_of_an_experiment_is_listed(here: Path) -> None:
    assert listed("x.yaml")["layer.0.head.0..3"] == ["4", f"{4 * 64 * 32 + 128:,}"]
    (here / "run").mkdir()
    (here / "run" / "config.yaml").write_text(EXPERIMENT)
    assert listed("run") == listed("x.yaml")
    (here / "study.yaml").write_text(STUDY.format(model="{kind: huggingface, path: gpt2}"))
    assert listed("study.yaml") == listed("gpt2")


def test_a_module_of_the_users_own_is_listed_by_its_parameters(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "my_models.py").write_text(
        textwrap.dedent("""
        import torch

        def build(checkpoint):
            return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 5))

        def loss(model, batch):
            return model(batch).square().mean(dim=1)

        def data():
            return torch.zeros(2, 3), {}
        """)
    )
    monkeypatch.syspath_prepend(here)
    (here / "study.yaml").write_text(
        STUDY.format(model='{kind: module, build: "my_models:build", per_sample_loss: "my_models:loss"}').replace(
            "{kind: tokens, train: tokens.parquet, context_length: 8}", '{kind: function, load: "my_models:data"}'
        )
    )
    assert listed("study.yaml") == {
        "everything": ["1", "41"], "0.weight": ["1", "12"], "0.bias": ["1", "4"], "1.weight": ["1", "20"],
        "1.bias": ["1", "5"],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["owner/name"],
            "error: owner/name: no such folder, and no model of this name in the local cache or on the hub",
        ),
        (["owner/name", "--revision", "step3"], "no model of this name at revision step3 in the local cache"),
        (["gone.yaml"], "error: gone.yaml: cannot be read"),
    ],
)
def test_refusals_are_one_line_and_exit_code_2(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["components", *arguments])
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_a_large_model_is_listed_without_its_weights() -> None:
    """7 billion float32 parameters would take 27 GB."""
    transformers.LlamaConfig(num_key_value_heads=8).save_pretrained("large")
    model = open_model("large", None)
    assert sum(p.numel() for p in model.parameters()) > 5e9
    assert {p.device for p in model.parameters()} == {torch.device("meta")}
    assert listed("large")["layer.0..31.head.0..31"][0] == "1,024"
