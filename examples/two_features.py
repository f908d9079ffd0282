"""Which of two features does a network rely on? An experiment of one's own: the loop, with one stage more.

    patterning run examples/two_features.yaml

Both features say the same of nine samples in ten. Of the others half were labelled by the first, half by the second:
their weights decide which one a network follows.
"""

import json

import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset

from patterning_dist.experiments.experiment import Stage
from patterning_dist.experiments.loop import Loop
from patterning_dist.storage.files import write_json


class TwoFeatures(Loop):  # found by `experiment: examples.two_features:TwoFeatures`
    def stages(self, config):
        return super().stages(config) | {"verdict": Stage("examples.two_features:verdict", ("name",), on_ray=False)}


def verdict(config, run, progress):  # a stage: files in, files out
    found = {}
    for arm in config.retrain.arm_list:
        reports = (run.path / "retrain" / arm.name).glob("seed-*/evaluation.json")
        found[arm.name] = float(np.mean([json.loads(file.read_text())["follows_first"] for file in reports]))
        progress.say(f"{arm.name}: {100 * found[arm.name]:.0f} % of the conflicts are decided by the first feature")
    write_json(run.path / "verdict.json", found)
    return [run.path / "verdict.json"]


def samples(seed, agreeing, by_first, by_second):  # (features, label); the two features are the signs, with noise
    rng = np.random.default_rng(seed)
    signs = rng.choice([-1.0, 1.0], size=(agreeing + by_first + by_second, 1))
    second = np.repeat([1.0, -1.0], [agreeing, by_first + by_second])[:, None]
    labels = signs[:, 0] * np.repeat([1.0, -1.0], [agreeing + by_first, by_second])
    features = np.hstack([signs, signs * second]) + 0.3 * rng.normal(size=(len(signs), 2))
    return TensorDataset(torch.from_numpy(features).float(), torch.from_numpy(labels > 0).float())


held_out = {"first": samples(1, 0, 200, 0), "second": samples(2, 0, 0, 200)}


def load():
    return samples(0, 360, 20, 20), held_out


def initialise(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))


def per_sample_loss(model, batch):  # [sample], nats
    return nn.functional.binary_cross_entropy_with_logits(model(batch[0])[:, 0], batch[1], reduction="none")


def evaluate(model):
    features, labels = held_out["first"].tensors
    return {"follows_first": ((model(features)[:, 0] > 0) == (labels > 0)).float().mean().item()}
