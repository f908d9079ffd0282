"""Which files of a folder that an experiment names go to a cluster: those that are read there, and no secret."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from patterning_dist.data.corpus import corpus_files
from patterning_dist.data.row_files import files_in

if TYPE_CHECKING:  # which imports this
    from patterning_dist.runtime.jobs.modules import Key

_TOKENIZER = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*", "vocab.*", "vocab-*", "merges.txt",
    "*.model", "*.tiktoken", "spiece*", "config.json",
)  # fmt: skip
_MODEL = (*_TOKENIZER, "*.safetensors", "*.safetensors.index.json", "generation_config.json", "adapter_config.json")
_SCORES = ("info.json", "scores.bin", "offsets.npy", "candidates.npy")
_BANK = ("*.csv", "*.yaml", "*.json", "*.npy", "*.safetensors")
# Never meant to be sent, whatever a folder is for.
_SECRETS = (
    "*.pem", "*.key", "*.p12", "*.pfx", "*.jks", "*.keystore", "*.kdbx", "*.ppk", "*.asc", "*.gpg", "id_rsa*",
    "id_dsa*", "id_ecdsa*", "id_ed25519*", "credentials", "credentials.json", "*service-account*.json", "kubeconfig*",
    "*.tfstate",
)  # fmt: skip


def files_to_send(key: Key, folder: Path) -> tuple[list[Path], list[Path]]:
    """Files of a folder that is named under a key of the experiment: those to be sent, and what stays here.

    Of a folder that stays as a whole, the folder.
    """
    kept, left = visible_files(folder)
    read = {folder / name for name in _read(key, folder, kept)}
    unread = [file for file in kept if file not in read]
    return [file for file in kept if file in read], sorted([*left, *unread])


def visible_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """Files of a folder that are neither hidden, nor secrets, nor links that lead outside of it; and what is."""
    kept: list[Path] = []
    left: list[Path] = []
    for here, folders, names in os.walk(folder):
        hidden = sorted(name for name in folders if not _may_go(Path(here) / name, folder))
        left += (Path(here) / name for name in hidden)
        folders[:] = sorted(name for name in folders if name not in hidden and not (Path(here) / name).is_symlink())
        for file in (Path(here) / name for name in sorted(names)):
            (kept if _may_go(file, folder) and file.is_file() else left).append(file)
    return sorted(kept), left


def _may_go(path: Path, folder: Path) -> bool:
    name = path.name.lower()
    if name.startswith(".") or any(fnmatch.fnmatchcase(name, pattern) for pattern in _SECRETS):
        return False
    return not path.is_symlink() or path.resolve().is_relative_to(folder.resolve())


def _read(key: Key, folder: Path, files: list[Path]) -> Iterator[str]:
    """Names of what is read of a folder, by the key that names it."""
    if key[:2] == ("data", "sources"):
        yield from (file.relative_to(folder).as_posix() for file in corpus_files(folder))
    elif key[:2] in (("data", "train"), ("data", "held_out")) and not _is_dataset(folder):
        yield from (file.relative_to(folder).as_posix() for file in files_in(folder))
    else:
        patterns = _PATTERNS.get(".".join(map(str, key[:2])), ("*",))
        names = (file.relative_to(folder).as_posix() for file in files)
        yield from (name for name in names if _matches(Path(name).name, patterns))


_PATTERNS = {
    "data.tokenizer": _TOKENIZER,
    "model.path": _MODEL,
    "validation.scores": _SCORES,
    "validation.bank": _BANK,
}


def _is_dataset(folder: Path) -> bool:
    """Whether ``datasets`` wrote it: its files are named by what is in there."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
