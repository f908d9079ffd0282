"""What a job needs on a cluster, as one archive: the experiment, the files and modules that it names, this package."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

import patterning_dist
from patterning_dist.config import Config, HuggingFaceConfig, Root, TableConfig, TextConfig, load_config
from patterning_dist.config.load import apply_override, parse_yaml
from patterning_dist.errors import PatterningError
from patterning_dist.runtime.jobs.inputs import files_to_send
from patterning_dist.runtime.jobs.modules import Key, leaves, own_modules, python_package

LARGEST_UPLOAD = 50 << 20  # bytes; Ray keeps uploads in the memory of the head node
_LISTED = 40  # files by name


def pack_job(experiment: Path, overrides: Sequence[str], archive: Path) -> tuple[Root, list[str]]:
    """Check an experiment and pack it for a cluster.

    Relative paths of the experiment are packed with it. Absolute ones, and names that are no files here, are left for
    the cluster to find. Of the user's own modules, those in the current folder are packed, with what they import from
    there; a package goes as a whole.

    Args:
        experiment: the file. It is at the top of the archive under its own name, overrides and paths filled in.
        overrides: as of ``load_config``.
        archive: ZIP file to write; the same files give the same bytes.

    Returns:
        The experiment, and lines that say what goes along of the user's own, and what is left here.

    Raises:
        PatterningError: a fault in the experiment, a file or module that is missing, or more than ``LARGEST_UPLOAD``.
    """
    config = load_config(experiment, overrides)
    written = parse_yaml(experiment.read_text(encoding="utf-8"), str(experiment))
    for override in overrides:
        apply_override(written, override)
    files: dict[str, Path] = {}
    left: list[Path] = []
    for number, (key, path, required) in enumerate(named_paths(config)):
        *parents, last = key
        section = written
        for name in parents:
            section = section[name]
        if last not in section:  # filled in while the file was read
            continue
        if Path(section[last]).expanduser().is_absolute() or not (path.exists() or required):
            continue
        name = ".".join(map(str, key))
        if not path.exists():
            raise PatterningError(f"{experiment}: {name}: {path} is not there; correct it")
        section[last] = f"inputs/{number}/{path.name}"
        found = {section[last]: path}
        if path.is_dir():
            sent, others = files_to_send(key, path)
            found = {f"{section[last]}/{file.relative_to(path).as_posix()}": file for file in sent}
            left += others
        if (size := _size(found)) > LARGEST_UPLOAD:
            raise PatterningError(
                f"{experiment}: {name}: {path} has {size >> 20} MB, more than the {LARGEST_UPLOAD >> 20} MB that are "
                "uploaded; put it on storage that all nodes share, and give its absolute path there"
            )
        files |= found
    files |= own_modules(experiment, config)
    contents = _contents(files, left)
    files |= python_package(Path(patterning_dist.__file__).parent)
    if (size := _size(files)) > LARGEST_UPLOAD:
        raise PatterningError(
            f"{experiment}: the files and modules that it names have {size >> 20} MB, more than the "
            f"{LARGEST_UPLOAD >> 20} MB that are uploaded; put data on storage that all nodes share, and give absolute "
            "paths there"
        )
    text = yaml.safe_dump(written, sort_keys=False, allow_unicode=True)
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
        # ZipInfo's own date, not the file's: what has not changed is not uploaded again.
        packed.writestr(zipfile.ZipInfo(experiment.name), text)
        for name, file in sorted(files.items()):
            packed.writestr(zipfile.ZipInfo(name), file.read_bytes(), zipfile.ZIP_DEFLATED)
    return config, contents


def named_paths(config: Root) -> Iterator[tuple[Key, Path, bool]]:
    """Key, path and whether it must be one, of all that may be a file: what is not may be on a hub."""
    for key, path in leaves(config):
        if isinstance(path, Path) and key != ("run_dir",):
            yield key, path, True
    if isinstance(config, Config):
        if isinstance(config.model, HuggingFaceConfig) and config.model.path is not None:
            yield ("model", "path"), Path(config.model.path), False
        if isinstance(config.data, TableConfig):
            yield ("data", "train"), Path(config.data.train), False
            for domain, table in config.data.held_out.items():
                yield ("data", "held_out", domain), Path(table), False
        if isinstance(config.data, TextConfig | TableConfig) and config.data.tokenizer is not None:
            yield ("data", "tokenizer"), Path(config.data.tokenizer), False


def _contents(files: dict[str, Path], left: Sequence[Path]) -> list[str]:
    size = f"{len(files)} files, {_size(files):,} bytes"
    lines = [f"goes to the cluster, besides this package and the experiment: {size}"]
    lines += [f"  {name}: {file}" for name, file in sorted(files.items())[:_LISTED]]
    if len(files) > _LISTED:
        lines.append(f"  and {len(files) - _LISTED} more of these folders")
    if left:
        more = f" and {len(left) - _LISTED} more" if len(left) > _LISTED else ""
        lines.append(
            f"stays here (hidden, a secret by its name, a link that leads outside, or not read): "
            f"{', '.join(map(str, left[:_LISTED]))}{more}"
        )
    return lines


def _size(files: dict[str, Path]) -> int:
    return sum(file.stat().st_size for file in files.values())
