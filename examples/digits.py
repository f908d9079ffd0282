"""Which handwritten digits does a small classifier owe its eights to? A model of your own, from Python.

    python examples/digits.py

A model takes part through `per_sample_loss`, and through any number of observables like `loss_on_eights`. The same
functions serve `patterning study configs/study-own-model.yaml`, which runs the chains on Ray and writes tables.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

from patterning_dist import Posterior, llc, sample_chains, susceptibility

pixels, digits = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
pixels, eights = (pixels / 16).float(), digits[1400:] == 8
train, test = (TensorDataset(pixels[part], digits[part]) for part in (slice(0, 1400), slice(1400, None)))


def build(checkpoint="final"):  # a study calls it with names of checkpoints; training here takes less than a second
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=1e-3)
    for _ in range({"early": 100, "final": 400}[checkpoint]):
        optimizer.zero_grad()
        per_sample_loss(model, train[torch.randint(len(train), (128,))]).mean().backward()
        optimizer.step()
    return model


def per_sample_loss(model, batch):  # [sample], nats
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def loss_on_eights(model):  # an observable: any numbers that follow from the model
    return per_sample_loss(model, test[eights]).mean()


def load():  # what a study samples from: training samples, and held-out ones by domain
    return train, {"test": test}


if __name__ == "__main__":
    settings = dict(posterior=Posterior(300, 100), step_size=1e-3, burn_in=200, num_draws=100, steps_between_draws=10)
    sampled = sample_chains(build(), per_sample_loss, train, train, observables={"eights": loss_on_eights}, **settings)
    measured = susceptibility(sampled.chains)  # rows: the loss on the probe, then the observables
    most = torch.from_numpy(measured.chi[1]).argsort()[:20]  # chi < 0: more of this sample, less loss on eights
    print("local learning coefficient: {:.1f} +- {:.1f}".format(*llc(sampled.losses, inverse_temperature=300)))
    print("the 20 training samples that lower the loss on eights most are", digits[most].tolist())
