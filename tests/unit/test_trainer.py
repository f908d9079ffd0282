"""The trainer of one rank takes the steps of a loop by hand, for arms as an experiment file has them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import points_task
import pytest
import torch
import torch.distributed as dist
import yaml
from safetensors.torch import load_file, save_file
from swapped_pairs import swapped_pairs
from tiny_run import SETTINGS

from patterning_dist.config import HuggingFaceConfig, load_config
from patterning_dist.config.deepspeed import deepspeed_config
from patterning_dist.data.sampler import epoch_batch
from patterning_dist.data.weights import write_sample_weights
from patterning_dist.errors import PatterningError
from patterning_dist.measure.preflight import preflight
from patterning_dist.models.filling import _fill_piece, _rows
from patterning_dist.runtime.training.engine import initialize, model_in_pieces
from patterning_dist.runtime.training.stacked_trainer import StackedTrainer, stackable_optimizer
from patterning_dist.runtime.training.trainer import Trainer
from patterning_dist.runtime.training.weights import load_shares, own_share, save_weights
from patterning_dist.sampling.ranks import Ranks
from patterning_dist.stages.train import arm_jobs, baseline_job
from patterning_dist.storage.run import RunDirectory
from patterning_dist.tasks.held_out import held_out_ids
from patterning_dist.tasks.huggingface import HuggingFace
from patterning_dist.tasks.open import open_task
from patterning_dist.training.job import JobGroup

# Of libraries that DeepSpeed calls.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")

NUM_STEPS = 6
ZERO_3 = Path(__file__).parents[2] / "configs" / "deepspeed" / "zero3.json"


@pytest.fixture(scope="module")
def alone():
    """A process group of this process and no other."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1")):
            patch.setenv(name, value)
        for name in ("DS_ACCELERATOR", "LOCAL_SIZE"):  # which DeepSpeed is told by
            patch.setenv(name, "cpu" if name == "DS_ACCELERATOR" else "1")
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        yield
        dist.destroy_process_group()


@pytest.fixture
def run(tmp_path):
    """A run whose baseline has some weights, beside a table of the user's own."""
    run = RunDirectory(tmp_path / "run")
    (run.path / "baseline").mkdir()
    save_file(points_task.initialise(7).state_dict(), run.path / "baseline" / "model.safetensors")
    weight = np.linspace(0.6, 1.6, points_task.NUM_TRAIN)  # whose mean is not 1
    write_sample_weights(tmp_path / "mine.parquet", np.arange(len(weight)), None, weight, {}, key="sample_id")
    return run


def experiment(run, *arms, **training):
    """The module as an experiment, with these arms."""
    observables = [{"kind": "split_loss", "name": n, "split": s} for n, s in (("all", "overall"), ("l", "domain:left"))]
    sampling = SETTINGS["sampling"] | {"components": [{"name": "everything"}], "observables": observables}
    training = {
        "num_steps": NUM_STEPS, "batch_size": 8, "optimizer": "adamw", "learning_rate": 0.01, "weight_decay": 0.1,
        "warmup_steps": 2,
    } | training  # fmt: skip
    functions = {key: f"points_task:{key}" for key in ("initialise", "per_sample_loss", "evaluate")}
    sections = {
        **{key: SETTINGS[key] for key in ("name", "seed", "device")},
        "data": {"kind": "function", "load": "points_task:load"},
        "model": {"kind": "module", **functions},
        "training": training,
        "sampling": sampling | {"evaluation_sequences": 100},
        "retrain": {"arms": list(arms), "seeds": [1], "num_steps": NUM_STEPS, "start": "baseline"},
    }
    path = run.path.parent / "experiment.yaml"
    path.write_text(yaml.safe_dump(sections))
    return load_config(path)


def by_hand(config, model, rho):
    """A loop without engine, ranks or task: losses by rho of mean 1, gradients clipped as DeepSpeed does."""
    train, settings = points_task.load()[0], config.training
    matrices, vectors = ([p for p in model.parameters() if (p.dim() > 1) == two] for two in (True, False))
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.98),
    )
    for step in range(NUM_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * min(1, (step + 1) / settings.warmup_steps)
        ids = torch.from_numpy(epoch_batch(1, step, 8, points_task.NUM_TRAIN))
        weights = (rho(step) / rho(step).mean())[ids]
        optimizer.zero_grad()
        (weights * points_task.per_sample_loss(model, train[ids])).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return dict(model.named_parameters())


def trained(config, run, job):
    trainer = Trainer(config, open_task(config, run.path, "cpu"), job, Ranks(), "cpu")
    for step in range(job.total_steps):
        trainer.step(step)
    return trainer


def test_arms_are_trainings_by_hand(alone, run):
    table = str(run.path.parent / "mine.parquet")
    config = experiment(
        run,
        "base",
        {"name": "mine", "weights": table, "strength": 2.0},
        {"name": "part", "weights": table, "weighted_share": 0.5},
        {"name": "fresh", "start": "initialisation"},
    )
    jobs = arm_jobs(config, run)
    assert [job.name for job in jobs] == [f"{arm} seed 1" for arm in ("base", "mine", "part", "fresh")]
    (run.path.parent / "mine.parquet").unlink()  # the run has a copy
    h, ones = np.linspace(-0.4, 0.6, points_task.NUM_TRAIN), torch.ones(points_task.NUM_TRAIN)
    weight, stretched = (torch.from_numpy((1 + s * h).astype(np.float32)) for s in (1, 2))
    start = load_file(run.path / "baseline" / "model.safetensors")
    baseline = points_task.initialise(0)
    found = {}
    for job, rho in zip(
        jobs,
        (lambda _: ones, lambda _: stretched, lambda step: weight if step < 3 else ones, lambda _: ones),
        strict=True,
    ):
        baseline.load_state_dict(start)
        model = points_task.initialise(1) if job.start is None else baseline
        expected = by_hand(config, model, rho)
        parameters = found[job.name] = {
            name: p.detach().clone() for name, p in trained(config, run, job).engine.module.named_parameters()
        }
        for name, value in expected.items():
            torch.testing.assert_close(parameters[name], value, rtol=1e-5, atol=1e-6, msg=f"{job.name} {name}")
    base, *others = (parameters["0.weight"] for parameters in found.values())
    assert all((base - other).abs().max() > 1e-4 for other in others)


def test_a_training_under_swapped_labels_is_that_of_exchanged_pairs_while_it_is_weighted(alone, tmp_path):
    found = []
    for exchanged in (False, True):
        config, run = swapped_pairs(tmp_path / str(exchanged), exchanged)
        (job,) = arm_jobs(config, run)
        trainer = Trainer(config, open_task(config, run.path, "cpu"), job, Ranks(), "cpu")
        found.append([])
        for step in range(job.num_steps):
            trainer.step(step)
            found[-1].append(torch.cat([p.detach().flatten().clone() for p in trainer.engine.module.parameters()]))
    (_, ours, _, ends), (_, theirs, _, other_ends) = found
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert (ends - other_ends).abs().max() > 1e-4  # the second half is plain, on the data as they are


@pytest.mark.parametrize("accumulation", [1, 2])
def test_micro_batches_change_nothing_but_rounding(alone, run, tmp_path, accumulation):
    settings = tmp_path / "deepspeed.json"
    settings.write_text(f'{{"gradient_accumulation_steps": {accumulation}}}')
    table = str(run.path.parent / "mine.parquet")
    config = experiment(run, {"name": "mine", "weights": table})
    config = config.model_copy(update={"retrain": config.retrain.model_copy(update={"deepspeed": settings})})
    (job,) = arm_jobs(config, run)
    weight = torch.linspace(0.6, 1.6, points_task.NUM_TRAIN)
    baseline = points_task.initialise(7)
    expected = by_hand(config, baseline, lambda _: weight)
    parameters = dict(trained(config, run, job).engine.module.named_parameters())
    for name, value in expected.items():
        torch.testing.assert_close(parameters[name], value, rtol=1e-5, atol=1e-6)


def test_the_loss_of_a_step_is_that_of_its_batch_over_the_mean_weight_of_the_table(alone, run):
    config = experiment(run, {"name": "mine", "weights": str(run.path.parent / "mine.parquet")})
    (job,) = arm_jobs(config, run)
    trainer = Trainer(config, open_task(config, run.path, "cpu"), job, Ranks(), "cpu")
    ids, rho, expected_weight = trainer.batches(0)
    assert expected_weight == pytest.approx(8 * 1.1, rel=1e-6)
    with torch.no_grad():
        losses = points_task.per_sample_loss(points_task.initialise(7), points_task.load()[0][torch.from_numpy(ids)])
    assert trainer.step(0) == pytest.approx([rho @ losses.numpy() / (8 * 1.1)], rel=1e-6)


def test_metrics_and_observables_are_those_of_the_model_that_is_written(alone, run):
    config = experiment(run, "base")
    (job,) = arm_jobs(config, run)
    trainer = trained(config, run, job)
    save_weights(trainer.engine, run.path / "after" / "model.safetensors")
    task = open_task(config, run.path, "cpu")
    model = task.load("after", Ranks())
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), trainer.engine.module.parameters(), strict=True))
    metrics = trainer.evaluate()
    assert metrics == task.evaluate(model, Ranks())
    assert metrics.keys() == {"left_loss", "right_loss", "accuracy"}
    # All samples of the part are taken: the split of a domain is the mean of its set.
    left, right = map(len, held_out_ids(task, config.seed, 100, "realised").values())
    overall = (left * metrics["left_loss"] + right * metrics["right_loss"]) / (left + right)
    observables, _ = trainer.observables()
    assert observables == pytest.approx({"all": overall, "l": metrics["left_loss"]}, rel=1e-6)
    assert trained(config, run, baseline_job(config, run.path)).observables() == ({}, {})


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_stack_of_seeds_is_the_trainings_of_each(alone, run, optimizer):
    """But for rounding: batched products, and norms, sum in another order. Of some steps the gradients are clipped."""
    mine = {"name": "mine", "weights": str(run.path.parent / "mine.parquet"), "start": "initialisation"}
    config = experiment(run, mine | {"seeds": [1, 2, 5]}, optimizer=optimizer, learning_rate=0.05)
    jobs = arm_jobs(config, run)
    task = open_task(config, run.path, "cpu")
    stack = StackedTrainer(config, task, JobGroup(tuple(jobs)), "cpu")
    engines = [Trainer(config, task, job, Ranks(), "cpu") for job in jobs]
    for step in range(NUM_STEPS):
        alone_losses = [loss for trainer in engines for loss in trainer.step(step)]
        assert stack.step(step) == pytest.approx(alone_losses, rel=1e-5)
    weights = []
    for member, trainer in zip(stack.members, engines, strict=True):
        save_weights(member.engine, run.path / "stacked" / "model.safetensors")
        expected = dict(trainer.engine.module.named_parameters())
        found = load_file(run.path / "stacked" / "model.safetensors")
        assert found.keys() == expected.keys()
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)
        assert member.evaluate() == pytest.approx(trainer.evaluate(), rel=1e-5)
        values, columns = member.observables()
        assert values == pytest.approx(trainer.observables()[0], rel=1e-5)
        np.testing.assert_allclose(columns["all"], trainer.observables()[1]["all"], rtol=1e-4, atol=1e-7)
        weights.append(found["0.weight"])
    assert (weights[0] - weights[1]).abs().max() > 1e-2


def test_every_network_of_a_stack_is_clipped_by_its_own_length(alone, run):
    config = experiment(run, {"name": "base", "seeds": [1, 2], "start": "initialisation"}, optimizer="sgd")
    stack = StackedTrainer(config, open_task(config, run.path, "cpu"), JobGroup(tuple(arm_jobs(config, run))), "cpu")
    for p in stack.engine.module.parameters():
        p.grad = torch.stack([torch.full_like(p[0], 1e-3), torch.full_like(p[0], 1.0)])
    stack._clip()
    lengths = sum(p.grad.flatten(1).square().sum(dim=1) for p in stack.engine.module.parameters()).sqrt()
    num_parameters = sum(p[0].numel() for p in stack.engine.module.parameters())
    torch.testing.assert_close(lengths, torch.tensor([1e-3 * num_parameters**0.5, 1.0]), rtol=1e-5, atol=0)


def test_what_cannot_be_stacked_is_refused_in_a_sentence(alone, run):
    config = experiment(run, {"name": "base", "start": "initialisation"})
    task, settings = open_task(config, run.path, "cpu"), config.training
    model = task.build(0)

    class Task:
        train = task.train

        def optimizer(self, model, settings):
            return torch.optim.Adagrad(model.parameters())

        def losses(self, model, batch):
            return task.losses(model, batch) * (1 if batch[0].sum().item() > 0 else 2)

    with pytest.raises(PatterningError, match=r"retrain\.engine: Adagrad may take the weights of stacked networks for"):
        stackable_optimizer(Task(), model, settings)
    Task.optimizer = lambda self, model, settings: task.optimizer(model, settings)
    with pytest.raises(
        PatterningError, match=r"retrain\.engine: torch\.func\.vmap cannot map .*item\(\).*to deepspeed"
    ):
        stackable_optimizer(Task(), model, settings)
    assert isinstance(stackable_optimizer(task, model, settings), torch.optim.AdamW)


def test_what_cannot_be_stacked_is_found_when_the_file_is_checked(run, monkeypatch):
    config = experiment(run, {"name": "base", "start": "initialisation"})
    config = config.model_copy(update={"retrain": config.retrain.model_copy(update={"engine": "stacked"})})
    assert preflight(config, run.path) == []
    loss = points_task.per_sample_loss
    monkeypatch.setattr(points_task, "per_sample_loss", lambda m, b: loss(m, b) * (2 if b[0].sum().item() > 0 else 1))
    with pytest.raises(
        PatterningError, match=r"retrain\.engine: torch\.func\.vmap cannot map over this model's losses"
    ):
        preflight(config, run.path)


def test_checkpointing_without_layers_is_refused_when_the_file_is_checked(run):
    with pytest.raises(PatterningError, match="gradient_checkpointing: Sequential has no layers"):
        preflight(experiment(run, "base", gradient_checkpointing=True), run.path)


def test_an_arm_whose_table_is_not_there_or_goes_below_zero_is_refused(alone, run):
    config = experiment(run, {"name": "mine", "weights": str(run.path.parent / "mine.parquet"), "strength": 3.0})
    (job,) = arm_jobs(config, run)
    with pytest.raises(PatterningError, match=r"mine/weights\.parquet row 0: 1 \+ strength .* is -0\.19.*; expected 0"):
        Trainer(config, open_task(config, run.path, "cpu"), job, Ranks(), "cpu")
    config = experiment(run, {"name": "lost", "weights": str(run.path / "nowhere.parquet")})
    with pytest.raises(PatterningError, match=r"retrain\.arms: .*nowhere\.parquet, the weights of lost, is not there"):
        arm_jobs(config, run)


def engine_of(model):
    """As far as it is needed to write weights; no pass has left parameters on their way."""
    return SimpleNamespace(module=model, zero_optimization_stage=lambda: 0)


@pytest.mark.parametrize("tied", [True, False])
def test_models_of_transformers_come_in_pieces_under_zero_3_and_are_the_same(alone, tmp_path, tied):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    architecture = {"model_type": "gpt_neox", "tie_word_embeddings": tied, **sizes}
    config = HuggingFaceConfig(kind="huggingface", architecture=architecture)
    model = HuggingFace(config, 30, 8, "cpu", None)
    whole = model.build(4)
    settings = deepspeed_config(ZERO_3, 8, 1)
    with model_in_pieces(settings, "cpu"):
        in_pieces = model.build(4)
    parameters = dict(whole.named_parameters())
    for made in (in_pieces, None):
        if made is None:  # read from a checkpoint
            save_weights(engine_of(whole), tmp_path / "model.safetensors")
            model.describe(tmp_path)
            with model_in_pieces(settings, "cpu"):
                made = model.load(tmp_path, Ranks())
        assert all(p.numel() == 0 for p in made.parameters())
        save_weights(engine_of(made), tmp_path / "pieces" / "model.safetensors")
        stored = load_file(tmp_path / "pieces" / "model.safetensors")
        assert stored.keys() == parameters.keys()
        assert all(torch.equal(stored[name], p) for name, p in parameters.items())
    assert all(p.numel() > 0 for p in model.build(4).parameters())


def test_only_the_rows_of_a_piece_are_read(alone, tmp_path, monkeypatch):
    """As the second of three ranks would: experts that are stored one by one are put together by transformers."""
    import transformers

    sizes = {"vocab_size": 31, "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 8}
    kinds = {"llama": (transformers.LlamaConfig, {}), "mixtral": (transformers.MixtralConfig, {"num_local_experts": 3})}
    for kind, (config, more) in kinds.items():
        torch.manual_seed(0)
        saved = transformers.AutoModelForCausalLM.from_config(config(**sizes, **heads, **more))
        saved.save_pretrained(tmp_path / kind)
        with model_in_pieces(deepspeed_config(ZERO_3, 8, 1), "cpu"):
            made = HuggingFace(HuggingFaceConfig(kind="huggingface", path=str(tmp_path)), None, 8, "cpu", None).load(
                tmp_path / kind, Ranks()
            )
        expected = dict(saved.named_parameters())
        assert made.state_dict().keys() == saved.state_dict().keys()
        for name, p in made.named_parameters():
            assert torch.equal(p.ds_tensor.view(p.ds_shape), expected[name]), name
    weight = SimpleNamespace(
        ds_tensor=torch.full((130,), -1.0), ds_shape=torch.Size([31, 12]), ds_numel=372, ds_process_group=None
    )
    stored = load_file(tmp_path / "llama" / "model.safetensors")["model.embed_tokens.weight"]
    for rank, rows, last in ((0, (0, 11), 130), (1, (10, 22), 130), (2, (21, 31), 112)):
        monkeypatch.setattr(dist, "get_rank", lambda group, rank=rank: rank)
        assert _rows(weight) == rows
        _fill_piece(weight, stored[slice(*rows)])
        assert torch.equal(weight.ds_tensor[:last], stored.flatten()[130 * rank :][:last])


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_masters_of_a_module_in_bfloat16_begin_at_its_weights(alone, tmp_path, stage):
    settings = tmp_path / "deepspeed.json"
    settings.write_text(json.dumps({"zero_optimization": {"stage": stage}, "bf16": {"enabled": True}}))
    model = points_task.initialise(7)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters())
    engine = initialize(model, optimizer, deepspeed_config(settings, 8, 1), "cpu")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    save_weights(engine, tmp_path / "model.safetensors")
    stored = load_file(tmp_path / "model.safetensors")
    assert stored.keys() == before.keys() and all(torch.equal(stored[name], w) for name, w in before.items())
    load_shares(engine, {name: 2 * share for name, share in own_share(engine).items()})
    save_weights(engine, tmp_path / "model.safetensors")
    assert all(torch.equal(w, 2 * before[name]) for name, w in load_file(tmp_path / "model.safetensors").items())
