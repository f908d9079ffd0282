"""What goes to a cluster with an experiment: enough, no more, and the same bytes for the same files."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_run import SETTINGS

from patterning_dist.config import Config, load_config
from patterning_dist.errors import PatterningError
from patterning_dist.runtime.jobs.files import pack_job
from patterning_dist.runtime.jobs.inputs import files_to_send

OBSERVABLE = {"kind": "function", "names": ["norm"], "path": "own.parts:norm"}


@pytest.fixture
def folder(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder: an experiment in a folder of its own, a corpus, a package and a module that it imports."""
    for name, text in {
        "corpus/fables/00.txt": "A fox.",
        "corpus/.notes.txt": "hidden, and so no part of the text",
        "zero.json": "{}",
        "own/__init__.py": "",
        "own/parts.py": "import json\nfrom torch import nn\nfrom helper.numbers import half\nfrom . import other",
        "own/other.py": "",
        "own/table.csv": "1,2",
        "own/__pycache__/parts.pyc": "",
        "helper.py": "import unused_but_named",
        "unused_but_named.py": "",
        "unused.py": "raise SystemExit",
        "torch.py": "raise SystemExit('the installed one goes before it')",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    write(tmp_path, {})
    monkeypatch.chdir(tmp_path)
    # Reading an experiment adds the current folder: those of other tests are not this user's.
    others = tmp_path_factory.getbasetemp()
    monkeypatch.setattr(sys, "path", [path for path in sys.path if not Path(path).is_relative_to(others)])
    return tmp_path


def write(folder: Path, changes: dict[str, Any]) -> None:
    sampling = SETTINGS["sampling"] | {"observables": [OBSERVABLE]}
    settings = SETTINGS | {"sampling": sampling, "solve": SETTINGS["solve"] | {"targets": {"norm": -1}}}
    settings |= {"data": SETTINGS["data"] | {"sources": [{"path": "../corpus"}, {"path": "/shared/text"}]}}
    settings["solve"] = settings["solve"] | {"scores": "regression"}
    (folder / "configs").mkdir(exist_ok=True)
    (folder / "configs" / "tiny.yaml").write_text(yaml.safe_dump(settings | changes))


def pack(folder: Path, *overrides: str) -> tuple[Config, dict[str, bytes]]:
    archive = folder / "job.zip"
    config, _ = pack_job(Path("configs/tiny.yaml"), overrides, archive)
    with zipfile.ZipFile(archive) as packed:
        return config, {name: packed.read(name) for name in packed.namelist()}


def test_relative_files_and_own_modules_go_along_and_nothing_else(folder: Path) -> None:
    _, files = pack(folder, "training.deepspeed=zero.json")
    own = {name for name in files if not name.startswith("patterning_dist/")}
    assert own == {
        "tiny.yaml",
        "inputs/0/corpus/fables/00.txt",
        "inputs/2/zero.json",
        "own/__init__.py",
        "own/parts.py",
        "own/other.py",
        "own/table.csv",
        "helper.py",
        "unused_but_named.py",
    }
    package = Path(pack_job.__code__.co_filename).parents[2]
    assert files["patterning_dist/cli.py"] == (package / "cli.py").read_bytes()
    assert "patterning_dist/report/template.html" in files


def test_of_a_folder_that_is_named_only_what_is_read_goes_along(folder: Path, tmp_path_factory: Any) -> None:
    outside = tmp_path_factory.mktemp("outside")
    (outside / "private.txt").write_text("PRIVATE")
    secrets = (
        ".env",
        ".git/config",
        ".git/objects/00.txt",
        "id_rsa",
        "server.key",
        "notes.docx",
        "sub/.aws/credentials",
    )
    for name in secrets:
        for place in ("corpus", "own"):
            (folder / place / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / place / name).write_text("PRIVATE")
    (folder / "own/notes.docx").unlink()  # a package goes as a whole
    for place in ("corpus", "own"):
        (folder / place / "away.txt").symlink_to(outside / "private.txt")
        (folder / place / "all").symlink_to(outside)
        (folder / place / "up").symlink_to("..")
    (folder / "corpus/again.txt").symlink_to("fables/00.txt")
    _, said = pack_job(Path("configs/tiny.yaml"), [], folder / "job.zip")
    with zipfile.ZipFile(folder / "job.zip") as packed:
        files = {name: packed.read(name) for name in packed.namelist()}
    assert [name for name in files if name.startswith("inputs/")] == [
        "inputs/0/corpus/again.txt", "inputs/0/corpus/fables/00.txt"
    ]  # fmt: skip
    assert {name for name in files if name.startswith("own/")} == {
        "own/__init__.py", "own/parts.py", "own/other.py", "own/table.csv"
    }  # fmt: skip
    assert not any(b"PRIVATE" in content for name, content in files.items() if not name.startswith("patterning_dist/"))
    own = [name for name in files if not name.startswith("patterning_dist/") and name != "tiny.yaml"]
    assert said[0].startswith(f"goes to the cluster, besides this package and the experiment: {len(own)} files, ")
    assert [line.split(":")[0].strip() for line in said[1:-1]] == sorted(own)
    assert all(
        str(folder / "corpus" / name) in said[-1] for name in (".env", ".git", "id_rsa", "away.txt", "all", "up")
    )


def test_of_a_model_its_weights_and_tokenizer_go_along(folder: Path) -> None:
    read = ("config.json", "model.safetensors", "tokenizer.json", "vocab.json", "step10/model.safetensors")
    for name in (*read, "optimizer.pt", "training_args.bin", "run.log", "hub-token.json", ".cache/x.json"):
        (folder / "model" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "model" / name).write_text("{}")
    found = files_to_send(("model", "path"), folder / "model")[0]
    assert {file.relative_to(folder / "model").as_posix() for file in found} == set(read)


def test_the_packed_experiment_is_the_same_but_for_its_places(folder: Path, tmp_path_factory: Any) -> None:
    config, files = pack(folder, "seed=9", "training.deepspeed=zero.json", "sampling.step_size=1e-4")
    there = tmp_path_factory.mktemp("there")
    for name, content in files.items():
        (there / name).parent.mkdir(parents=True, exist_ok=True)
        (there / name).write_bytes(content)
    found = load_config(there / "tiny.yaml").model_dump(mode="json")
    wanted = config.model_dump(mode="json")
    assert [source.pop("path") for source in found["data"]["sources"]] == [
        str(there / "inputs/0/corpus"),
        "/shared/text",
    ]
    assert found["training"].pop("deepspeed") == str(there / "inputs/2/zero.json")
    for source in wanted["data"]["sources"]:
        del source["path"]
    del wanted["training"]["deepspeed"]
    assert found == wanted
    assert (found["seed"], found["sampling"]["step_size"]) == (9, 1e-4)


def test_the_same_files_are_the_same_archive(folder: Path) -> None:
    pack(folder)
    before = (folder / "job.zip").read_bytes()
    for file in folder.rglob("*.py"):
        file.touch()
    pack(folder)
    assert (folder / "job.zip").read_bytes() == before
    (folder / "own" / "table.csv").write_text("1,3")
    pack(folder)
    assert (folder / "job.zip").read_bytes() != before


def test_a_study_keeps_its_names_on_the_hub_and_takes_its_folders_along(folder: Path) -> None:
    study = {
        "name": "study",
        "seed": 0,
        "model": {"kind": "huggingface", "path": "someone/model"},
        "data": {
            "kind": "tokens",
            "train": "tokens",
            "held_out": {"en.web": "tokens/held_out.parquet", "code": "someone/code"},
            "context_length": 8,
        },
        "sampling": SETTINGS["sampling"] | {"observables": [OBSERVABLE]},
    }
    (folder / "tokens").mkdir()
    (folder / "tokens" / "held_out.parquet").write_bytes(b"rows")
    (folder / "configs" / "tiny.yaml").write_text(yaml.safe_dump(study))
    _, files = pack(folder)
    packed = yaml.safe_load(files["tiny.yaml"])
    assert packed["model"]["path"] == "someone/model"
    assert packed["data"]["train"] == "inputs/1/tokens"
    assert packed["data"]["held_out"] == {"en.web": "inputs/3/held_out.parquet", "code": "someone/code"}
    assert files["inputs/1/tokens/held_out.parquet"] == files["inputs/3/held_out.parquet"] == b"rows"


def test_what_cannot_go_along_is_said_before_anything_is_sent(folder: Path) -> None:
    def fault(*overrides: str) -> str:
        with pytest.raises(PatterningError) as error:
            pack(folder, *overrides)
        return str(error.value)

    assert fault("data.sources.0.path=none") == (
        f"configs/tiny.yaml: data.sources.0.path: {folder}/none is not there; correct it"
    )
    observable = "sampling.observables=[{kind: function, names: [norm], path: 'owm:norm'}]"
    assert fault(observable) == (
        f"configs/tiny.yaml: sampling.observables.0.path: module owm is neither in {folder} nor installed; "
        "submit from the folder that it is in"
    )
    (folder / "helper.py").write_text("def half(:")
    assert "helper.py: is not valid Python (invalid syntax" in fault()
    (folder / "helper.py").write_text("")
    with open(folder / "corpus" / "large.txt", "wb") as file:
        file.truncate(60 << 20)
    assert fault() == (
        f"configs/tiny.yaml: data.sources.0.path: {folder}/corpus has 60 MB, more than the 50 MB that are uploaded; "
        "put it on storage that all nodes share, and give its absolute path there"
    )
    (folder / "corpus" / "large.txt").rename(folder / "own" / "large.bin")
    assert "the files and modules that it names have 6" in fault()
    _, files = pack(folder, f"data.sources.0.path={folder}/corpus", "sampling.observables.0.path=helper:norm")
    assert not [name for name in files if name.startswith("inputs/")]
