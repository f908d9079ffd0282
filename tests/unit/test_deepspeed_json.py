"""A DeepSpeed JSON is resolved, or refused, when the experiment is checked: by the experiment, then by DeepSpeed."""

from __future__ import annotations

import json

import pytest
from tiny_run import tiny_config
from torch import nn

from patterning_dist.config.deepspeed import deepspeed_config, read_deepspeed
from patterning_dist.errors import PatterningError
from patterning_dist.measure.preflight import preflight
from patterning_dist.runtime.training.deepspeed_check import check_deepspeed
from patterning_dist.runtime.training.engine import _with_bucket_sizes

BATCHES = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
AUTO = {  # as for the trainer of transformers
    **dict.fromkeys((*BATCHES, "gradient_clipping", "steps_per_print"), "auto"),
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 16},
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": True,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": 1e9,
    },
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "weight_decay": "auto"}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}},
}


@pytest.fixture
def check(tiny_run, tmp_path):
    """What the check of an experiment with these settings says."""
    path = tmp_path / "ds.json"

    def check(settings, *overrides, section="training"):
        path.write_text(json.dumps(settings))
        named = f"{section}.deepspeed={path}"
        return check_deepspeed(tiny_config(tiny_run, "training.optimizer=adamw", named, *overrides))

    return check


def resolved(tmp_path, settings, batch_size=8, num_ranks=1):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(settings))
    return deepspeed_config(path, batch_size, num_ranks)


@pytest.mark.parametrize(
    ("given", "num_ranks", "micro", "steps"),
    [
        ({}, 1, 8, 1),
        (dict.fromkeys(BATCHES, "auto"), 2, 4, 1),
        ({"train_micro_batch_size_per_gpu": 2}, 2, 2, 2),
        ({"gradient_accumulation_steps": 4, "train_micro_batch_size_per_gpu": "auto"}, 1, 2, 4),
        ({"gradient_accumulation_steps": 2, "train_micro_batch_size_per_gpu": 2, "train_batch_size": 8}, 2, 2, 2),
    ],
)
def test_batch_sizes_follow_from_the_experiment(tmp_path, given, num_ranks, micro, steps):
    found = resolved(tmp_path, given, 8, num_ranks)
    assert [found[key] for key in BATCHES] == [8, micro, steps]


def test_nothing_is_left_auto_and_what_has_no_effect_is_taken_out(tmp_path):
    found = resolved(tmp_path, AUTO, 8, 2)
    assert found.keys() & {"optimizer", "scheduler", "gradient_clipping"} == set()
    assert found["bf16"] == {} and found["fp16"] == {"loss_scale": 0, "initial_scale_power": 16}
    model = nn.Sequential(nn.Embedding(100, 16), nn.Linear(16, 64))
    zero = _with_bucket_sizes(found, model)["zero_optimization"]
    names = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")
    assert [zero[name] for name in names] == [256, 230, 160]
    assert "auto" not in json.dumps(_with_bucket_sizes(found, model))


def test_a_file_of_the_trainer_of_transformers_is_taken_and_said(check):
    first, *ignored = check(AUTO)
    assert first == "training.deepspeed: a batch of 8 is 1 ranks x 1 backward passes x 8 samples"
    assert [line.split(" has no effect: ")[1] for line in ignored] == [
        "training.optimizer and its rates are taken",
        "rates follow from training.warmup_steps and anneal_steps",
    ]
    assert check({}, "retrain.num_workers=2", section="retrain") == [
        "retrain.deepspeed: a batch of 8 is 2 ranks x 1 backward passes x 4 samples"
    ]


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"gradient_accumulation_steps": 3}, "gradient_accumulation_steps 3 does not divide the 8 samples of a rank"),
        ({"train_batch_size": 16}, "train_batch_size 16 is not the global batch of the experiment, 8"),
        ({"gradient_accumulation_steps": 2, "train_micro_batch_size_per_gpu": 2}, "is 4, and a rank has 8 samples"),
        ({"gradient_accumulation_steps": "two"}, "expected a number from 1 up or \"auto\", got 'two'"),
        ({"gradient_accumulation_steps": True}, 'expected a number from 1 up or "auto", got True'),
        ({"gradient_accumulation_steps": 8}, "and of training.anneal_batch_size = 4 a rank has 4 samples; raise it"),
        ({"zero_optimization": 3}, "is not a DeepSpeed JSON file (expected an object, with objects for sections)"),
        ([3], "is not a DeepSpeed JSON file (expected an object"),
    ],
)
def test_what_the_experiment_contradicts_is_refused_with_the_file(check, settings, text):
    with pytest.raises(PatterningError) as refusal:
        check(settings, "training.anneal_steps=2", "training.anneal_batch_size=4")
    assert text in str(refusal.value) and "training.deepspeed: " in str(refusal.value)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"gradient_acumulation_steps": 2}, "no gradient_acumulation_steps; did you mean gradient_accumulation_steps?"),
        ({"zero_optimisation": {"stage": 3}}, "no zero_optimisation; did you mean zero_optimization?"),
        ({"zero_optimization": {"stge": 3}}, "DeepSpeed knows no zero_optimization.stge; did you mean stage?"),
        ({"zero_optimization": {"stage": 7}}, "zero_optimization.stage: Input should be 0, 1, 2"),
        ({"bf16": {"enable": True}}, "DeepSpeed knows no bf16.enable; did you mean enabled?"),
        ({"torch_autocast": {"enabled": True, "dtyp": "bfloat16"}}, "no torch_autocast.dtyp; did you mean dtype?"),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "cannot be simultaneously enabled"),
        ({"of_my_own": 1}, "DeepSpeed knows no of_my_own; remove it"),
    ],
)
def test_what_deepspeed_does_not_know_is_refused_with_the_file(check, tmp_path, settings, text):
    with pytest.raises(PatterningError) as refusal:
        check(settings)
    message = str(refusal.value)
    assert message.startswith(f"training.deepspeed: {tmp_path / 'ds.json'}: ") and "\n" not in message
    assert text in message


def test_clipping_that_is_auto_is_deepspeeds_own(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text('{"gradient_clipping": "auto"}')
    assert read_deepspeed(path) == {}
    path.write_text('{"gradient_clipping": 0.5}')
    assert read_deepspeed(path) == {"gradient_clipping": 0.5}


def test_config_check_says_it(tiny_run, tmp_path):
    path = tmp_path / "ds.json"
    path.write_text('{"scheduler": {"type": "WarmupLR", "params": {}}}')
    config = tiny_config(tiny_run, f"retrain.deepspeed={path}")
    assert preflight(config, tiny_run)[1].startswith("retrain.deepspeed: scheduler of ")
    path.write_text('{"zero_optimisation": {}}')
    with pytest.raises(PatterningError, match=r"retrain\.deepspeed: .* did you mean zero_optimization\?"):
        preflight(config, tiny_run)
