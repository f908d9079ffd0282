"""The skeletons of CONTRIBUTING.md do what is said of them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from matrix_kinds import SAMPLING
from safetensors.torch import save_model
from torch.utils.data import TensorDataset

from patterning_dist import Posterior, sample_chains
from patterning_dist.config import load_config
from patterning_dist.driver import experiment_of, run_stages
from patterning_dist.errors import PatterningError
from patterning_dist.sampling.ranks import Ranks
from patterning_dist.stages.sample import open_subjects
from patterning_dist.storage.mirror import Location
from patterning_dist.tasks.open import open_task

CONTRIBUTING = Path(__file__).parents[2] / "CONTRIBUTING.md"


def skeleton(title: str) -> str:
    """The first Python block under ``**title**``."""
    found = re.search(rf"\*\*{title}\*\*.*?```python\n(.*?)```", CONTRIBUTING.read_text(), re.DOTALL)
    assert found is not None, title
    return found[1]


def stamps(directory: Path) -> tuple[str, int]:
    file = directory / "count.txt"
    return file.read_text(), file.stat().st_mtime_ns


def test_an_experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_experiment.py").write_text(skeleton("An experiment"))
    file, directory = tmp_path / "words.yaml", tmp_path / "run"
    file.write_text("experiment: my_experiment:Words\nname: words\nseed: 0\ntext: a rose is a rose\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    run_stages(load_config(file), None, directory)
    first = stamps(directory)
    assert first[0] == "5"
    run_stages(load_config(directory / "config.yaml"), None, directory)
    assert stamps(directory) == first, "from its own directory, and not run again"
    run_stages(load_config(file, ["least=2"]), None, directory)
    assert stamps(directory)[0] == "3"
    import my_experiment

    monkeypatch.setattr(my_experiment.Words, "preflight", lambda *_: ["words.txt: 2 lines are left out"])
    run_stages(load_config(file), None, directory)
    assert json.loads((directory / "manifest.json").read_text())["remarks"] == ["words.txt: 2 lines are left out"]
    with pytest.raises(PatterningError, match=r"words.yaml: text: there are no words; write some"):
        load_config(file, ["text=' '"])
    with pytest.raises(PatterningError, match=r"words.yaml: lest is not a known key; did you mean least\?"):
        load_config(file, ["lest=2"])


def test_a_statistic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_statistic.py").write_text(skeleton("A statistic"))
    monkeypatch.syspath_prepend(str(tmp_path))
    import my_statistic

    data = TensorDataset(torch.linspace(-1, 1, 20))

    def loss(model: torch.nn.Module, batch: tuple[torch.Tensor]) -> torch.Tensor:
        return (model.weight[0, 0] - batch[0]) ** 2

    sampled = sample_chains(
        torch.nn.Linear(1, 1, bias=False),
        loss,
        data,
        data,
        posterior=Posterior(10, 10),
        step_size=1e-2,
        num_draws=16,
        num_chains=2,
        statistics={"largest_move": my_statistic.LargestMove},
    )
    largest = [found["largest"][0] for found in sampled.statistics["largest_move"]]
    assert len(largest) == 2
    assert 0 < min(largest) < max(largest) < 3


def test_a_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_task.py").write_text(skeleton("A task"))
    monkeypatch.syspath_prepend(str(tmp_path))
    observables = [{"kind": "split_loss", "name": "far", "split": "domain:far"}]
    settings = {
        "name": "lines",
        "seed": 0,
        "device": "cpu",
        "model": {"kind": "task", "open": "my_task:open_lines"},
        "training": {"num_steps": 5, "batch_size": 8, "optimizer": "adamw"},
        "sampling": SAMPLING | {"components": [{"name": "everything"}], "observables": observables},
        "response": {"direction": {"component": "everything"}},
        "solve": {"component": "everything", "targets": {"far": -1}, "effective_sample_share": 0.8},
        "retrain": {"seeds": [0], "num_steps": 5},
    }
    (tmp_path / "lines.yaml").write_text(yaml.safe_dump(settings))
    config, directory = load_config(tmp_path / "lines.yaml"), tmp_path / "run"
    assert list(experiment_of(config).stages(config)) == ["train", "sample", "solve", "retrain", "report"]
    task = open_task(config, directory, "cpu")
    (directory / "baseline").mkdir(parents=True)
    save_model(task.build(3), directory / "baseline" / "model.safetensors")
    assert experiment_of(config).preflight(config, directory) == []
    subjects = open_subjects(config, Location.at(directory), "cpu")("cpu", Ranks())
    draws = list(subjects.chain("everything", 0).draws())
    assert len(draws) == 8
    assert len(draws[-1].losses) == 6
    assert draws[-1].observables[0] != 0
    assert task.evaluate(task.load("baseline", Ranks()), Ranks())["far_loss"] > 0
    gradient = subjects.target("everything").split_gradients()[0]
    assert gradient["weight"].abs().item() > 0
    assert task.fingerprint("baseline") != task.fingerprint()
