"""Do predictions come true? Windows of fresh small models, predicted on one set of samples and realised on another.

Every case is a model that nothing was chosen on: data and initialisation from its own seed, a baseline trained and
annealed, one of three kinds (classifier, regression, transformer), an optimizer, a rate, a length, a batch size, and
weights that move the loss of a group of samples, of a class, or of samples by chance. ``training.walk`` predicts
on part B of the held-out samples, in process and without Ray; loops of plain torch train arm and base on eight data
orders, and part C measures them.

    OMP_NUM_THREADS=1 python benchmarks/windows.py --seeds 4 --rows rows.jsonl
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils.data import TensorDataset

from patterning_dist.config import PredictConfig, SamplingConfig, TrainingConfig
from patterning_dist.data.sampler import epoch_batch
from patterning_dist.measure.subject import Subject
from patterning_dist.measure.subjects import Subjects
from patterning_dist.stages.windows import predicted_change
from patterning_dist.tasks.base import PlainTask
from patterning_dist.tasks.held_out import held_out_ids, held_out_splits
from patterning_dist.tasks.optimizers import learning_rate_factor, set_learning_rate_factor
from patterning_dist.training.walk import DEFAULT_CLIPPING, Window, walk

NUM_TRAIN = 2048
EVALUATED = {"classifier": 10000, "regression": 10000, "transformer": 2000}  # held-out samples of each of three parts
STRENGTHS, DATA_ORDERS = (0.25, 0.5, 1.0), range(11, 19)
TRAININGS = {  # optimizer -> (rate, steps, batch size)
    "sgd": [(0.05, 20, 64), (0.1, 60, 32), (0.1, 150, 128), (0.3, 60, 64), (0.2, 150, 16)],
    "adamw": [(2e-3, 20, 64), (1e-3, 60, 32), (2e-3, 60, 128), (1e-3, 150, 64), (1e-3, 150, 16)],
}
SPLITS = {"first": "domain:first", "second": "domain:second", "overall": "overall"}
VOCABULARY, LENGTH, WIDTH = 16, 24, 16


class Transformer(nn.Module):
    """One causal layer of attention and an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(VOCABULARY, WIDTH), nn.Parameter(0.1 * torch.randn(LENGTH, WIDTH))
        self.projections, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
        self.norms, self.head = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3)), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position[: tokens.shape[1]]
        q, k, v = self.projections(self.norms[0](x)).view(*x.shape[:2], 3, 2, -1).permute(2, 0, 3, 1, 4)
        # Written out: the fused kernels have no second derivative.
        scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(
            torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1), -torch.inf
        )
        x = x + self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return self.head(self.norms[2](x + self.mlp(self.norms[1](x))))


class Fresh(PlainTask):
    """A task whose data follow from a seed; samples are of two groups, in turn."""

    mean_counted = compute_dtype = None
    metrics: ClassVar[dict[str, Any]] = {}

    def __init__(self, kind: str, seed: int) -> None:
        self.kind, self.seed, self.tables = kind, seed, dict[str, np.ndarray]()
        self.num_positions = LENGTH - 1 if kind == "transformer" else None
        self.rule = np.random.default_rng([seed, 0])
        self.directions = torch.from_numpy(self.rule.normal(size=(2, 6))).float()
        self.chains = torch.from_numpy(self.rule.dirichlet(np.full(VOCABULARY, 0.15), (2, VOCABULARY)))
        self.train = self.draw(1, NUM_TRAIN, None)
        self.held_out = {name: self.draw(2 + k, 3 * EVALUATED[kind], k) for k, name in enumerate(("first", "second"))}
        self.model = self.trained()

    def draw(self, stream: int, number: int, group: int | None) -> TensorDataset:
        g = torch.Generator().manual_seed(1000 * self.seed + stream)
        groups = torch.arange(number) % 2 if group is None else torch.full((number,), group)
        if self.kind == "transformer":
            columns = [torch.randint(VOCABULARY, (number,), generator=g)]
            for _ in range(LENGTH - 1):
                columns.append(torch.multinomial(self.chains[groups, columns[-1]], 1, generator=g)[:, 0])
            return TensorDataset(torch.stack(columns, dim=1))
        x = torch.randn(number, 7, generator=g)
        signal = (x[:, :6] * self.directions[groups]).sum(dim=1)
        x[:, 6] = groups
        if self.kind == "regression":
            return TensorDataset(x, signal.sin() + 0.5 * torch.randn(number, generator=g))
        return TensorDataset(x, ((signal > 0) ^ (torch.rand(number, generator=g) < 0.25)).long())

    def build(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        if self.kind == "transformer":
            return Transformer()
        return nn.Sequential(nn.Linear(7, 24), nn.Tanh(), nn.Linear(24, 1 if self.kind == "regression" else 2))

    def skeleton(self) -> nn.Module:
        return self.build(0)

    def trained(self) -> nn.Module:
        """The baseline: AdamW to rate 0."""
        model, steps = self.build(self.seed), 400
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
        for step in range(steps):
            set_learning_rate_factor(optimizer, learning_rate_factor(step, steps // 2, 10, steps // 2))
            self.losses(model, self.train[epoch_batch(self.seed, step, 64, NUM_TRAIN)]).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return model

    def load(self, checkpoint: str, ranks: Any) -> nn.Module:
        model = self.build(0)
        model.load_state_dict(self.model.state_dict())
        return model.eval()

    def losses(self, model: nn.Module, batch: Any) -> Tensor:
        found = model(batch[0])
        if self.kind == "regression":
            return 0.5 * (found[:, 0] - batch[1]).square()
        if self.kind == "classifier":
            return nn.functional.cross_entropy(found, batch[1], reduction="none")
        return nn.functional.cross_entropy(found[:, :-1].mT, batch[0][:, 1:], reduction="none")

    def index(self, samples: Any, ids: np.ndarray) -> dict[str, np.ndarray]:
        return {self.key: np.asarray(ids)}

    def evaluate(self, model: nn.Module, ranks: Any) -> dict[str, float]:
        return {}

    def read_weights(self, path: Path, strength: float) -> np.ndarray:
        return (1 + strength * (self.tables[path.name] - 1)).astype(np.float32)

    def weightings(self) -> Iterator[str]:
        """Names of tables: a group up, a class (or a token) up, samples up or down by chance."""
        groups, shape = np.arange(NUM_TRAIN) % 2, (NUM_TRAIN, 1) if self.num_positions else (NUM_TRAIN,)
        rng, every = np.random.default_rng([self.seed, 1]), np.ones((NUM_TRAIN, self.num_positions or 1))
        kinds = {"group": np.where(groups == self.seed % 2, 0.9, -0.9).reshape(shape)}
        if self.kind == "classifier":
            kinds["class"] = np.where(self.train.tensors[1].numpy() == 1, 0.9, -0.9)
        if self.kind == "transformer":
            kinds["token"] = np.where(np.isin(self.train.tensors[0].numpy()[:, 1:], rng.permutation(16)[:4]), 0.9, -0.3)
        kinds["chance"] = rng.uniform(-1, 1, NUM_TRAIN).reshape(shape)
        for name, h in kinds.items():
            rho = 1 + h * (every if self.num_positions else 1)
            self.tables[name] = rho / rho.mean()
            yield name


@dataclass
class Case:
    """A training of a task."""

    task: Fresh
    optimizer: str
    rate: float
    steps: int
    batch: int

    def training(self) -> TrainingConfig:
        return TrainingConfig(
            batch_size=self.batch, optimizer=self.optimizer, learning_rate=self.rate, weight_decay=0.01
        )

    def realised(self, rho: np.ndarray | None) -> np.ndarray:
        """Split losses on part C after the training [order, observable]; all data orders are trained at once."""
        task, number = self.task, len(DATA_ORDERS)
        shell, names = task.load("", None), [name for name, _ in task.model.named_parameters()]
        for parameter in shell.parameters():
            parameter.ds_shape = parameter.shape  # what the optimizer takes for the shape of one model's
            parameter.data = parameter.data.expand(number, *parameter.shape).clone()
        stacked, optimizer = dict(shell.named_parameters()), task.optimizer(shell, self.training())

        def losses(weights: dict[str, Tensor], batch: list[Tensor]) -> Tensor:
            def model(inputs: Tensor) -> Tensor:
                return functional_call(task.model, weights, (inputs,))

            return task.losses(model, batch)

        def mean_loss(weights: dict[str, Tensor], batch: list[Tensor], share: Tensor) -> Tensor:
            return (share * losses(weights, batch)).mean()

        gradients = vmap(grad(mean_loss))
        for step in range(self.steps):
            ids = np.stack([epoch_batch(order, step, self.batch, NUM_TRAIN) for order in DATA_ORDERS])
            plain = torch.ones(*ids.shape, *[1] * bool(task.num_positions))
            share = plain if rho is None else torch.from_numpy(rho[ids])
            live = {name: stacked[name].detach() for name in names}
            found = gradients(live, [column[torch.from_numpy(ids)] for column in task.train.tensors], share)
            norms = sum(g.flatten(1).square().sum(dim=1) for g in found.values()).sqrt()
            factors = (DEFAULT_CLIPPING / (norms + 1e-6)).clamp(max=1.0)
            for name, g in found.items():
                stacked[name].grad = g * factors.view(-1, *[1] * (g.dim() - 1))
            optimizer.step()
        ids = held_out_ids(task, task.seed, EVALUATED[task.kind], "realised")
        held_out = held_out_splits(task, ids, SPLITS, "realised")
        samples = held_out.samples[torch.arange(len(held_out.samples))]
        with torch.no_grad():
            ends = ({name: stacked[name][k] for name in names} for k in range(number))
            sums = [(held_out.coefficients * losses(end, samples)).flatten(1).sum(dim=1).numpy() for end in ends]
        return np.stack(sums)


def sampling(kind: str) -> SamplingConfig:
    observables = [{"kind": "split_loss", "name": name, "split": split} for name, split in SPLITS.items()]
    return SamplingConfig.model_validate(
        dict(components=[{"name": "everything"}], observables=observables, num_draws=16, burn_in=0,
             inverse_temperature=1, localization=1, step_size=1e-6, probe_sequences=8,
             evaluation_sequences=EVALUATED[kind], micro_batch_size=512)
    )  # fmt: skip


def rows(case: Case, setting: PredictConfig) -> Iterator[dict[str, Any]]:
    """One row a weighting, strength and observable: what was predicted, and what came, with its error over orders."""
    task, names = case.task, ["base"]
    subjects = {"base": Subject("", "everything", "predict")}
    for name in task.weightings():
        for strength in STRENGTHS:
            names.append(f"{name} {strength:g}")
            subjects[names[-1]] = Subject("", "everything", "predict", weights=name, strength=strength)
    opened = Subjects(task, sampling(task.kind), task.seed, Path(), subjects, part="predicted")
    window = Window(case.training(), (1.0,) * case.steps, DEFAULT_CLIPPING, setting)
    walks = {name: walk(opened, name, window) for name in names}
    done = {}
    for name in names:
        subject = subjects[name]
        rho = None if subject.weights is None else task.read_weights(Path(subject.weights), subject.strength)
        done[name] = case.realised(rho)
    for name in names[1:]:
        num_seen = case.steps * case.batch * len(DATA_ORDERS)
        entry = predicted_change(opened, window, walks[name], walks["base"], num_seen)
        change = done[name] - done["base"]
        for j, observable in enumerate(SPLITS):
            found, came = entry.get("observables", {}).get(observable), float(change[:, j].mean())
            # The rule of one segment: |theta_min| tau of the whole window.
            whole = max(walks[w]["growth"][: setting.segments // 2].max() for w in (name, "base")) * (
                setting.segments // 2
            )
            yield {
                "kind": task.kind, "seed": task.seed, "optimizer": case.optimizer, "rate": case.rate,
                "steps": case.steps, "batch": case.batch, "arm": name, "strength": subjects[name].strength,
                "observable": observable, "growth": "below 1.5" if whole < 1.5 else "1.5 and more",
                "predicted": found, "realised": came,
                "covered": found and bool(found["interval"][0] < came < found["interval"][1]),
                "realised_error": change[:, j].std(ddof=1) / len(DATA_ORDERS) ** 0.5,
            }  # fmt: skip


MEASURED = 0.1  # of an effect: what the choice of samples on both sides and the data orders leave open, at most


def summary(found: list[dict[str, Any]]) -> None:
    """Shares and quantiles by what the cases are of."""
    inside = [row for row in found if row["predicted"]]
    print(f"{len(found)} predictions asked for, {len(inside)} inside the window")
    print(
        "| | number | in interval | well measured | in interval | within 20 % | 5, 50, 95 % of realised / predicted |"
    )
    print("| --- | --: | --: | --: | --: | --: | --- |")
    chosen = {"all": inside}
    for keys in (["optimizer"], ["growth"], ["optimizer", "growth"], ["kind"], ["strength"], ["batch"]):
        for values in sorted({tuple(row[key] for key in keys) for row in inside}):
            some = [row for row in inside if tuple(row[key] for key in keys) == values]
            chosen[", ".join(f"{key} {value}" for key, value in zip(keys, values, strict=True))] = some
    for name, some in chosen.items():
        known = [row for row in some if _noise(row) < MEASURED]
        shares = [np.mean([row["covered"] for row in part]) if part else np.nan for part in (some, known)]
        ratios = np.array([row["realised"] / row["predicted"]["value"] for row in known])
        within = np.mean(abs(ratios - 1) < 0.2) if known else np.nan
        quantiles = " ".join(f"{q:.2f}" for q in np.quantile(ratios, [0.05, 0.5, 0.95])) if known else ""
        print(
            f"| {name} | {len(some)} | {shares[0]:.3f} | {len(known)} | {shares[1]:.3f} | {within:.3f} | {quantiles} |"
        )


def _noise(row: dict[str, Any]) -> float:
    """Relative to the prediction: sampling of parts B and C, and the data orders of the trainings."""
    predicted = row["predicted"]
    return math.hypot(2**0.5 * predicted["sampling_error"], row["realised_error"]) / abs(predicted["value"])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--first", type=int, default=100)
    parser.add_argument("--kinds", nargs="+", default=["classifier", "regression", "transformer"])
    parser.add_argument("--segments", type=int, default=PredictConfig().segments)
    parser.add_argument(
        "--rows", type=Path, nargs="+", help="tables of earlier runs to sum up; one to be written first"
    )
    parser.add_argument("--read", action="store_true", help="sum up only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.read:
        with options.rows[0].open("a") as file:
            for seed in range(options.first, options.first + options.seeds):
                for task in (Fresh(kind, seed) for kind in options.kinds):
                    for optimizer, trainings in TRAININGS.items():
                        for training in trainings:
                            setting = PredictConfig(segments=options.segments)
                            for row in rows(Case(task, optimizer, *training), setting):
                                file.write(json.dumps(row) + "\n")
                            file.flush()
    summary([json.loads(line) for path in options.rows for line in path.read_text().splitlines()])


if __name__ == "__main__":
    main()
