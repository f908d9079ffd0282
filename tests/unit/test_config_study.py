"""The file of an experiment on a model that exists: what it accepts, and that every refusal names key and remedy."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from huggingface_hub import HfApi
from huggingface_hub.errors import OfflineModeIsEnabled

from patterning_dist.config import HuggingFaceConfig, ModuleConfig, dump_config, load_config
from patterning_dist.errors import PatterningError
from patterning_dist.experiments.loop import Loop

STUDY = {
    "name": "heads",
    "seed": 3,
    "model": {"kind": "huggingface", "path": "owner/name", "checkpoints": ["step1000", "final"]},
    "data": {
        "kind": "tokens",
        "train": "train.parquet",
        "held_out": {"prose": "prose.parquet"},
        "context_length": 64,
    },
    "sampling": {
        "components": [{"name": "layer.0.head.1", "num_draws": 200}, {"name": "h.*.mlp.c_fc.weight[0:16,:]"}],
        "observables": [
            {"kind": "component_loss", "name": "component"},
            {"kind": "split_loss", "name": "prose", "split": "domain:prose"},
            {"kind": "llc", "name": "llc"},
            {"kind": "free_energy", "name": "free_energy"},
        ],
        "num_draws": 100,
        "burn_in": 10,
        "inverse_temperature": 30,
        "localization": 4,
        "step_size": 0.075,
    },
}
OWN = {
    "model": {"kind": "module", "build": "mine:build", "per_sample_loss": "mine:loss"},
    "data": {"kind": "function", "load": "mine:load"},
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "x.yaml"
    file.write_text(yaml.safe_dump(STUDY))
    return file


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(PatterningError) as caught:
        load_config(path, overrides)
    return str(caught.value)


def test_stages_follow_from_the_sections_that_are_there(path: Path) -> None:
    def stages(*overrides: str) -> list[str]:
        return list(Loop().stages(load_config(path, overrides)))

    solve = "solve={component: layer.0.head.1, checkpoint: final, scores: plain, targets: {prose: -1}, strength: 1}"
    training, retrain = "training={batch_size: 4, optimizer: adamw}", "retrain={seeds: [0], num_steps: 4}"
    assert stages() == ["sample", "report"]
    assert stages(solve, "check={}") == ["sample", "solve", "check", "report"]
    assert stages(solve, training, retrain) == ["sample", "solve", "retrain", "report"]
    fresh = ("model={kind: huggingface, architecture: {model_type: gpt2}}", "training={batch_size: 4, num_steps: 2}")
    assert stages(*fresh, "training.optimizer=adamw") == ["train", "sample", "report"]


def test_a_model_without_a_kind_is_the_attention_only_transformer(path: Path) -> None:
    raw = copy.deepcopy(STUDY)
    del raw["model"]["kind"]
    path.write_text(yaml.safe_dump(raw))
    assert "model.path is a key of kind huggingface, and model.kind is attention_only; change one" in refusal(path)


def test_dumped_study_loads_to_the_same(path: Path, tmp_path: Path) -> None:
    overrides = [
        "sampling.sampler={kind: rmsprop_sgld, stability: 0.2}",
        "sampling.ranks_per_chain=2",
        "sampling.compute_dtype=bfloat16",
        "traces.thin=5",
        "calibration.step_sizes=[1e-3, 1e-2]",
    ]
    config = load_config(path, overrides)
    again = tmp_path / "again.yaml"
    again.write_text(dump_config(config))
    assert load_config(again) == config
    assert config.sampling.sampler.model_dump() == {
        "kind": "rmsprop_sgld",
        "decay": 0.99,
        "stability": 0.2,
        "correction": False,
    }
    assert config.calibration.step_sizes == [0.001, 0.01]


def test_the_users_own_model(path: Path) -> None:
    path.write_text(yaml.safe_dump(STUDY | OWN))
    config = load_config(path)
    assert isinstance(config.model, ModuleConfig)
    assert config.model.checkpoints == ["final"]
    # Domains of samples that a function gives are known only once it has run.
    assert load_config(path, ["sampling.observables.1.split=domain:elsewhere"])


def test_names_that_are_paths_here_are_made_absolute(path: Path, tmp_path: Path) -> None:
    assert load_config(path).model.path == "owner/name"
    assert load_config(path).data.train == "train.parquet"
    (tmp_path / "owner" / "name").mkdir(parents=True)
    (tmp_path / "train.parquet").touch()
    config = load_config(path)
    assert isinstance(config.model, HuggingFaceConfig)
    assert config.model.path == str((tmp_path / "owner" / "name").resolve())
    assert config.data.train == str((tmp_path / "train.parquet").resolve())


def test_what_is_measured_and_what_follows_from_all_draws(path: Path) -> None:
    sampling = load_config(path).sampling
    assert sampling.observable_names == ["component", "prose"]
    assert [(q.kind, q.name) for q in sampling.posterior_quantities] == [
        ("llc", "llc"),
        ("free_energy", "free_energy"),
    ]


@pytest.fixture
def steps(path: Path, tmp_path: Path) -> Path:
    """The folder of a model with checkpoints, which the experiment at ``path`` samples around."""
    for name in ("", "step2", "step10", "step1", "notes"):
        (tmp_path / "model" / name).mkdir(exist_ok=True)
        (tmp_path / "model" / name / ("config.json" if name != "notes" else "readme")).touch()
    raw = copy.deepcopy(STUDY)
    raw["model"]["path"] = "model"
    path.write_text(yaml.safe_dump(raw))
    return path


@pytest.mark.parametrize(
    ("names", "there"),
    [
        ("['step*']", ["step1", "step2", "step10"]),
        ("['*']", ["step1", "step2", "step10", "final"]),
        ("[step10, 'step?']", ["step10", "step1", "step2"]),
        ("['step1[0-9]', final]", ["step10", "final"]),
    ],
)
def test_globs_of_checkpoints_come_in_the_order_of_the_training(steps: Path, names: str, there: list[str]) -> None:
    config = load_config(steps, [f"model.checkpoints={names}"])
    assert config.checkpoints == there
    steps.write_text(dump_config(config))  # a run keeps the names: checkpoints that come later are not its own
    assert load_config(steps) == config


@pytest.mark.parametrize(
    ("names", "text"),
    [
        ("['stop*']", "matches 'stop*'; there are step1, step2, step10, final"),
        ("[step1, 'step*']", "model.checkpoints: 'step1' is listed twice; remove one"),
    ],
)
def test_globs_of_checkpoints_that_match_nothing_or_the_same_are_refused(steps: Path, names: str, text: str) -> None:
    message = refusal(steps, f"model.checkpoints={names}")
    assert message.startswith(f"{steps}: model.checkpoints: ") and text in message


def test_globs_of_revisions_on_the_hub(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refs(hub: HfApi, name: str) -> SimpleNamespace:
        assert name == "owner/name"
        branches = [SimpleNamespace(name=branch) for branch in ("main", "step10", "step9", "refs/pr")]
        return SimpleNamespace(branches=branches, tags=[SimpleNamespace(name="v1")])

    monkeypatch.setattr(HfApi, "list_repo_refs", refs)
    assert load_config(path, ["model.checkpoints=['*']"]).checkpoints == ["step9", "step10", "v1", "final"]

    def unreachable(hub: HfApi, name: str) -> None:
        raise OfflineModeIsEnabled("offline mode is enabled. To disable it")

    monkeypatch.setattr(HfApi, "list_repo_refs", unreachable)
    assert "of owner/name on the hub cannot be listed (offline mode is enabled. To disable it); write" in refusal(
        path, "model.checkpoints=['*']"
    )


def test_functions_of_the_users_own_do_not_say_which_checkpoints_there_are(path: Path) -> None:
    path.write_text(yaml.safe_dump(STUDY | OWN))
    assert "model.checkpoints: 'step*' is a glob, and only your own functions know which there are; list" in refusal(
        path, "model.checkpoints=['step*']"
    )


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("model.pth=a", "model.pth is not a known key; did you mean model.path?"),
        (
            "model.kind=hugging",
            "model.kind: expected one of 'attention_only', 'huggingface', 'module', 'task', got 'hugging'",
        ),
        ("model.checkpoints=[]", "model.checkpoints: expected list should have at least 1 item"),
        ("model.checkpoints=[a/b]", "model.checkpoints.0: expected text like ^[A-Za-z0-9*?"),
        ("model.checkpoints=[a, a]", "model.checkpoints: 'a' is listed twice; remove one"),
        ("data.kind=txt", "data.kind: expected one of 'function', 'labelled', 'pairs', 'text', 'tokens', got 'txt'"),
        ("data.context_length=1", "data.context_length: expected a number greater than or equal to 2, got 1"),
        ("data={kind: function, load: mine}", "data.load: expected text like ^[A-Za-z_]"),
        ("training.num_steps=4", "training.batch_size: is missing; add it"),
        ("sampling.sampler.kind=sgd", "sampling.sampler.kind: expected one of 'rmsprop_sgld', 'sgld', 'sgnht', got"),
        (
            "sampling.sampler={kind: sgld, decay: 0.5}",
            "sampling.sampler.decay is a key of kind rmsprop_sgld, and sampling.sampler.kind is sgld; change one of",
        ),
        ("sampling.sampler={kind: sgnht, difusion: 1}", "did you mean sampling.sampler.diffusion?"),
        ("sampling.compute_dtype=float16", "sampling.compute_dtype: expected 'float32' or 'bfloat16', got 'float16'"),
        ("sampling.ranks_per_chain=0", "sampling.ranks_per_chain: expected a number greater than or equal to 1"),
        ("sampling.components.1.name=layer.0.head.1", "sampling.components: 'layer.0.head.1' is listed twice"),
        ("sampling.components.0.num_draws=15", "15 draws are too few for sampling.num_batches = 8"),
        ("sampling.step_size=1", "sampling.step_size: 1 diverges with localization 4"),
        ("sampling.min_chains=5", "sampling.num_chains: 4 is below sampling.min_chains = 5"),
        ("sampling.observables.2.name=prose", "sampling.observables: 'prose' is named twice; rename one"),
        (
            "sampling.observables.0={kind: controlled, name: again, of: norm}",
            "sampling.observables: 'again' needs an observable with a gradient, and 'norm' is no split_loss; set its "
            "`of` to one of",
        ),
        ("sampling.observables.3.name=loss", "'loss' is the name of a column of the traces; rename it"),
        (
            "sampling.observables.0={kind: split_loss, name: all, split: overall}",
            "'llc' of kind llc follows from the loss on the probe; add {kind: component_loss, name: component}",
        ),
        (
            "sampling.observables.1.split=domain:law",
            "no held-out data has the domain of 'domain:law'; the domains are prose",
        ),
        ("data.held_out={}", "sampling.observables.1.split: there is no held-out data; add data.held_out"),
        ("calibration.component=layer.1", "calibration.component: 'layer.1' is not sampled; there are layer.0.head.1,"),
        (
            "calibration.checkpoint=step2",
            "calibration.checkpoint: 'step2' is not there; the checkpoints are step1000, final",
        ),
        ("calibration.step_sizes=[0]", "calibration.step_sizes.0: expected a number greater than 0, got 0"),
        ("calibration.step_sizes=[]", "calibration.step_sizes: expected list should have at least 1 item"),
        ("traces.thin=0", "traces.thin: expected a number greater than or equal to 1, got 0"),
    ],
)
def test_refused(path: Path, override: str, text: str) -> None:
    message = refusal(path, override)
    assert text in message
    assert all(line.startswith(f"{path}: ") for line in message.splitlines())


def test_a_table_of_tokens_cannot_be_the_probe_of_other_samples(path: Path) -> None:
    path.write_text(yaml.safe_dump(STUDY | OWN))
    assert "sampling.probe: a table of tokens is for data of kind text or tokens" in refusal(
        path, "sampling.probe=a.parquet"
    )


def test_samples_of_a_function_have_no_masses_to_keep(path: Path) -> None:
    path.write_text(yaml.safe_dump(STUDY | OWN))
    solve = "solve={component: everything, scores: plain, targets: {x: -1}, strength: 1, keep_mass: domain}"
    assert "solve.keep_mass: data.kind 'function' has no domain; remove it" in refusal(path, solve)


SOLVE = "solve={component: layer.0.head.1, checkpoint: final, scores: plain, targets: {prose: -1}, strength: 1}"
TRAINING = "training={batch_size: 4, optimizer: adamw}"
RETRAIN = "retrain={seeds: [0], num_steps: 4}"


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (
            (SOLVE, "solve.checkpoint=null"),
            "solve.checkpoint: several checkpoints are sampled; name one of step1000, f",
        ),
        (
            (SOLVE, "solve.checkpoint=step2"),
            "solve.checkpoint: 'step2' is not sampled; expected one of step1000, final",
        ),
        ((SOLVE, "solve.scores=response_direction"), "response.direction: is missing, and solve.scores"),
        (
            (SOLVE, "solve.keep_mass=label"),
            "solve.keep_mass: data.kind 'tokens' has no label; expected token or domain",
        ),
        (("check={}",), "check: there are no weights to check; add solve, or remove check"),
        ((SOLVE, "check={strengths: [1, 0]}"), "check.strengths: expected different numbers, none of them 0"),
        ((RETRAIN,), "training: is missing, and retrain takes its optimizer and batch size from it; add it"),
        ((TRAINING, RETRAIN), "retrain.arms: plus takes the weights of stage solve, and there is no section solve"),
        (
            (TRAINING, RETRAIN, "retrain.start=step2"),
            "is no checkpoint; expected one of initialisation, step1000, final",
        ),
        ((TRAINING, "training.optimizer=muon"), "training.optimizer: muon steps on one matrix a head"),
        (
            (TRAINING, RETRAIN, "retrain.engine=stacked", "retrain.num_workers=2"),
            "retrain.num_workers: a stack of networks is trained in one process, without ZeRO; remove it, or set",
        ),
        (
            (TRAINING, RETRAIN, "retrain.engine=stacked", "retrain.deepspeed=configs/deepspeed/zero1.json"),
            "retrain.deepspeed: a stack of networks is trained in one process, without ZeRO; remove it, or set",
        ),
        (("model.architecture={model_type: gpt2}",), "model.path: expected exactly one of path"),
        (("model={kind: attention_only}", TRAINING), "data.kind: 'tokens' is not for model.kind 'attention_only'"),
    ],
)
def test_stages_after_the_chains_are_checked_with_the_file(path: Path, overrides: tuple[str, ...], text: str) -> None:
    assert text in refusal(path, *overrides)


def test_the_attention_only_transformer_takes_one_process() -> None:
    quickstart = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
    assert "sampling.ranks_per_chain: the attention-only transformer is small and takes one" in refusal(
        quickstart, "sampling.ranks_per_chain=2"
    )
    config = load_config(quickstart, ["sampling.sampler={kind: sgnht}", "sampling.compute_dtype=bfloat16"])
    assert config.sampling.sampler.diffusion > 0


ENERGY = SOLVE.replace("plain, targets: {prose: -1}", "first_moment, targets: {free_energy: 1}")


@pytest.mark.parametrize(
    ("solve", "control", "text"),
    [
        (SOLVE, "{kind: ablation, name: c}", "an ablation is compared with solve.scores: first_moment; choose them"),
        (
            SOLVE,
            "{kind: first_moment, name: c, draws: chains}",
            "c is compared with solve.scores: first_moment from other draws; choose them, or remove it",
        ),
        (
            ENERGY,
            "{kind: first_moment, name: c, draws: antithetic}",
            "c has the draws of plus itself, solve.draws: antithetic; choose the other kind, or remove it",
        ),
        (
            SOLVE,
            "{kind: gradient, name: c, split: 'domain:law'}",
            "no held-out data has the domain of 'domain:law'; the domains are prose",
        ),
        (
            SOLVE,
            "{kind: loss_contrast, name: c, checkpoint: step3}",
            "'step3' of c is no checkpoint of this run; expected one of step1000",
        ),
        (
            SOLVE,
            "{kind: loss_contrast, name: c, checkpoint: initialisation}",
            "'initialisation' of c is known of a model that this run trains, and this one was there before; expected "
            "one of step1000",
        ),
        (
            SOLVE,
            "{kind: loss_contrast, name: c, checkpoint: final}",
            "'final' of c is the checkpoint that the weights are of; expected one of step1000",
        ),
        (
            SOLVE,
            "{kind: permuted, name: c, within: label}",
            "solve.controls.0.within: data.kind 'tokens' has no label; expected token or domain",
        ),
        (
            SOLVE.replace("strength: 1", "strength: 1, keep_mass: token"),
            "{kind: permuted, name: c, within: token}",
            "solve.keep_mass makes the arm permuted within each token already; remove c",
        ),
        (
            SOLVE,
            "{kind: minimum_norm, name: c}",
            "c swaps the labels of pairs where weights fall below 0, and data.kind 'tokens' has none; remove it",
        ),
        (SOLVE, "{kind: split, name: plus, split: rest}", "'plus' is the name of other weights too; rename it"),
        (SOLVE, "{kind: permutation, name: c}", "solve.controls.0.kind: expected one of 'ablation', 'first_moment',"),
    ],
)
def test_controls_that_make_no_sense_are_refused(path: Path, solve: str, control: str, text: str) -> None:
    message = refusal(path, solve, f"solve.controls=[{control}]")
    assert text in message and len(message.splitlines()) == 1
    assert "solve.controls" in message


def test_a_gradient_needs_held_out_data(path: Path) -> None:
    control = "solve.controls=[{kind: gradient, name: c, split: overall}]"
    assert load_config(path, [SOLVE, control])
    assert "c is the gradient of a held-out loss, and there is no held-out data; add data.held_out" in refusal(
        path, SOLVE.replace("prose", "llc"), control, "data.held_out={}"
    )


def test_splits_of_text_are_known_before_it_is_read() -> None:
    quickstart, alone = Path(__file__).parents[2] / "configs" / "quickstart.yaml", ("retrain=null", "predict=null")
    held_out = "[{kind: gradient, name: c, split: repeated_sequence}, {kind: gradient, name: d, split: overall}]"
    assert load_config(quickstart, [*alone, f"solve.controls={held_out}"])
    message = refusal(quickstart, *alone, "solve.controls=[{kind: gradient, name: c, split: indution}]")
    assert "there is no split 'indution'; expected domain:NAME, package.module:function or one of indu" in message
    assert "no split 'overall'" in refusal(
        quickstart, *alone, "solve.controls=[{kind: split, name: c, split: overall}]"
    )
    earlier = "solve.controls=[{kind: loss_contrast, name: c, checkpoint: %s}]"
    assert load_config(quickstart, [*alone, earlier % "initialisation"])
    assert "'baseline' of c is the checkpoint that the weights are of; expected one of initialisation" in refusal(
        quickstart, *alone, earlier % "baseline"
    )


def test_draws_that_a_control_reads_are_an_input_of_the_chains(path: Path) -> None:
    """So that a control which is added to a finished run has its positions."""

    def inputs(*overrides: str) -> dict:
        return Loop().inputs(load_config(path, overrides), {}).get("sampling", {})

    control = "solve.controls=[{kind: first_moment, name: c, draws: chains}]"
    assert inputs(ENERGY) == inputs(SOLVE) == inputs() == {}
    assert inputs(ENERGY, control) == {"positions": ["final", "layer.0.head.1", 8]}
    assert inputs(ENERGY, "solve.draws=chains", "solve.num_draws=5") == {"positions": ["final", "layer.0.head.1", 5]}
