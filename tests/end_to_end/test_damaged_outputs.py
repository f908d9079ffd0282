"""A finished output of which a bit has flipped: noticed wherever it is used, named, and made again."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner
from whole_run import events, invoke

from patterning_dist import open_run
from patterning_dist.cli import app
from patterning_dist.errors import PatterningError
from patterning_dist.storage.run import RunDirectory

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.usefixtures("local_ray")]


def flip(file: Path) -> None:
    """One bit, with size and time as they were: as disks do it."""
    stat, content = file.stat(), bytearray(file.read_bytes())
    rng = random.Random(file.name)
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.fixture
def flip_for_now(finished: Path) -> Iterator[Callable[[str], None]]:
    """Flips a bit in an output; other tests get it back as it was."""
    kept: dict[Path, bytes] = {}

    def flip_and_keep(name: str) -> None:
        kept[finished / name] = (finished / name).read_bytes()
        flip(finished / name)

    yield flip_and_keep
    for file, content in kept.items():
        file.write_bytes(content)


def test_a_bit_in_any_output_is_noticed(finished: Path, flip_for_now: Callable[[str], None]) -> None:
    manifest = json.loads((finished / "manifest.json").read_text())
    stages = manifest["stages"]
    assert list(stages) == ["prepare", "train", "sample", "solve", "retrain", "report"]
    for stage, entry in stages.items():
        # A file of every kind: of chains, arms and parts of the tree one each.
        kinds = {(Path(name).suffix or Path(name).name.split(".")[0], len(Path(name).parts)): name
                 for name in entry["outputs"] if (finished / name).stat().st_size}  # fmt: skip
        assert entry["sha256"].keys() == entry["outputs"].keys()
        for name in kinds.values():
            flip_for_now(name)
        assert set(RunDirectory(finished).changed_outputs(stage)) == set(kinds.values())
        assert not RunDirectory(finished).is_done(stage, entry["fingerprint"])
    written = {path.relative_to(finished).as_posix() for path in finished.rglob("*") if path.is_file()}
    known = {name for stage in stages for name in stages[stage]["outputs"]}
    rest = {name for name in written - known if not name.startswith("scores/")}  # which have digests of their own
    assert rest == {".lock", "config.yaml", "events.jsonl", "live.json", "manifest.json", "sampling/starts.json"}


def test_who_reads_results_in_python_or_exports_them_hears_of_it(
    finished: Path, flip_for_now: Callable[[str], None], tmp_path: Path
) -> None:
    for name in ("response.zarr/.zmetadata", "response/diagnostics.json", "weights/plus.parquet", "summary.json"):
        flip_for_now(name)
    flip_for_now("retrain/plus/seed-0/metrics.parquet")
    run = open_run(finished)
    for what in ("susceptibilities", "llc", "weights", "summary", "arms"):
        with pytest.raises(PatterningError, match=r"damaged since written; `patterning run .* runs stage \w+ again"):
            getattr(run, what)

    def export(arm: str, to: Path) -> Result:
        return CliRunner().invoke(app, ["export", str(finished), arm, "--to", str(to)], catch_exceptions=False)

    refused = export("plus", tmp_path / "out")
    assert refused.exit_code == 2 and not (tmp_path / "out").exists()
    assert "weights/plus.parquet is gone, or damaged since written" in refused.stderr
    assert export("minus", tmp_path / "other").exit_code == 0


def test_only_what_is_damaged_is_made_again(finished: Path, tiny_run: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(finished, tmp_path / "run"))
    chain = next(directory.glob("sampling/everything/shard-0/chain-1.*")).relative_to(directory)
    model = Path("retrain/plus/seed-1/model.safetensors")
    for file in (chain, model):
        flip(directory / file)
    alone = invoke("retrain", tiny_run / "config.yaml", directory)
    assert alone.exit_code == 2 and f"needs stage sample: {chain} is gone, or damaged" in alone.stderr
    expected = (finished / model).read_bytes()
    before = events(directory)
    config = directory / "manifest.json"
    manifest = json.loads(config.read_text())
    manifest["versions"]["torch"] = "1.0"
    config.write_text(json.dumps(manifest))
    again = invoke("run", tiny_run / "config.yaml", directory)
    assert again.exit_code == 0, again.output
    said = events(directory)[len(before) :]
    assert ("prepare", "kept") in said and ("train", "kept") in said
    assert [said.count(("sample", kind)) for kind in ("damaged", "subject_resumed", "subject_finished")] == [1, 1, 1]
    assert said.count(("train", "job_kept")) == 7  # of eight
    assert (directory / model).read_bytes() == expected
    assert f"sample: {chain} is gone, or damaged since written; it is run again" in " ".join(again.output.split())
    assert "the run goes on with torch" in again.output and "(was 1.0)" in again.output
    chains = [json.loads((root / "sampling/everything/chains.json").read_text()) for root in (directory, finished)]
    assert [[c["healthy"] for c in part] for part in chains] == [[True] * 3] * 2
    for name in ("response/pool.parquet", "weights/plus.parquet"):
        assert (directory / name).read_bytes() == (finished / name).read_bytes()


def test_a_run_of_an_earlier_version_goes_by_sizes(finished: Path, tiny_run: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(finished, tmp_path / "run"))
    manifest = json.loads((directory / "manifest.json").read_text())
    for entry in manifest["stages"].values():
        del entry["sha256"]
    (directory / "manifest.json").write_text(json.dumps(manifest))
    again = invoke("run", tiny_run / "config.yaml", directory)
    assert again.exit_code == 0 and again.output.count("done before, inputs unchanged") == 6
    assert "damaged" not in again.output
