"""The tensors in a model's folder, by the headers of its safetensors files: what is where, and what cannot be read.

Nothing is unpickled. Names lose what wrappers put into them (``torch.compile``, FSDP, DDP).
"""

from __future__ import annotations

import json
import math
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from patterning_dist.errors import PatterningError, first_line

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_SHARDS = "model-*-of-*.safetensors"
# What torch.compile, FSDP and activation checkpointing put into names, and DistributedDataParallel before them.
_INNER = "_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module"
_WRAPPERS = re.compile(rf"^(?:(?:module|{_INNER})\.)+|(?<=\.)(?:{_INNER})\.")
_TO_FILES = "load the model where you trust it and write it with save_pretrained"


class Files(dict[Path, Any]):
    """Files that are read from, opened once: headers of models of many experts take milliseconds to parse."""

    def __missing__(self, path: Path) -> Any:
        self[path] = safe_open(path, framework="pt")
        return self[path]


@dataclass(frozen=True)
class Stored:
    """One tensor in a file.

    Attributes:
        key: its name there.
        path: the file.
        shape: of the tensor.
    """

    key: str
    path: Path
    shape: tuple[int, ...]

    def read(self, files: Files, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows [start, stop) along axis 0, in the file's number format; a single number whole."""
        return files[self.path].get_slice(self.key)[start:stop] if self.shape else files[self.path].get_tensor(self.key)


def read_checkpoint(folder: Path) -> dict[str, Stored]:
    """Every tensor of a folder, by its name without wrappers; empty if there are no safetensors files.

    Raises:
        PatterningError: a shard that is missing or torn, an index that is none, tensors that ZeRO stage 3 left empty.
    """
    keys = _files(folder)
    found: dict[str, Stored] = {}
    for path in sorted({folder / name for name in keys.values()} if keys else set(folder.glob(SINGLE))):
        found |= {stored.key: stored for stored in stored_in(path)}
    if lacking := sorted(keys.keys() - found.keys()):
        raise PatterningError(
            f"{folder}: {INDEX} names {some(lacking)}, not in {keys[lacking[0]]}; copy index and shards together again"
        )
    empty = [key for key, stored in found.items() if math.prod(stored.shape) == 0]
    if empty:
        raise PatterningError(
            f"{folder}: {some(empty)} hold no numbers, as when a model is saved under ZeRO stage 3 without gathering "
            "it; write it with stage3_gather_16bit_weights_on_model_save, or from the training checkpoint with "
            "zero_to_fp32.py"
        )
    bare = {_WRAPPERS.sub("", key): stored for key, stored in found.items()}
    if bare.keys() != found.keys():
        wrapped = next(key for key in found if key not in bare)
        warnings.warn(
            f"{folder}: the names of the weights have prefixes of wrappers, like {wrapped}; they are read without",
            stacklevel=2,
        )
    return bare


def stored_in(path: Path) -> list[Stored]:
    """The tensors of one file.

    Raises:
        PatterningError: it is torn.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return [Stored(key, path, tuple(file.get_slice(key).get_shape())) for key in file.keys()]  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise PatterningError(f"{path}: the weights cannot be read ({first_line(error)}); copy them again") from None


def no_weights(folder: Path) -> PatterningError:
    """Why a folder has no weights that are read, and what to do."""
    if (folder / "latest").is_file() or list(folder.glob("global_step*")):
        return PatterningError(
            f"{folder}: a training checkpoint of DeepSpeed; write its weights with zero_to_fp32.py --safe_serialization"
        )
    pickled = [file.name for kind in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in sorted(folder.glob(kind))]
    what = f"only {some(pickled)}" if pickled else f"neither {SINGLE} nor {INDEX}"
    return PatterningError(
        f"{folder}: no weights in safetensors ({what}); other formats are not read, since they are "
        f"unpickled: {_TO_FILES}"
    )


def read_json(path: Path) -> dict[str, Any]:
    """The keys of a JSON file.

    Raises:
        PatterningError: it is none, or a list or a number.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise PatterningError(f"{path}: not JSON ({first_line(error)}); copy the file again") from None
    if not isinstance(content, dict):
        raise PatterningError(f"{path}: a {type(content).__name__} where keys are expected; copy the file again")
    return content


def some(names: Any) -> str:
    """The first three of them, and how many there are besides."""
    listed = sorted(names)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")


def _files(folder: Path) -> dict[str, str]:
    """Key -> file, as the index has it; empty where there is none."""
    shards = sorted(path.name for path in folder.glob(_SHARDS))
    if (folder / SINGLE).is_file():  # as transformers has it
        return {}
    if not (folder / INDEX).is_file():
        if shards:
            raise PatterningError(f"{folder}: {some(shards)} without {INDEX}, which says what they hold; copy it too")
        return {}
    files = read_json(folder / INDEX).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
        raise PatterningError(f"{folder / INDEX}: no weight_map from names to files; copy the file again")
    outside = [name for name in files.values() if Path(name).name != name]
    if outside:
        raise PatterningError(f"{folder / INDEX}: {outside[0]!r} is no file of this folder; copy the file again")
    if missing := {name for name in files.values() if not (folder / name).is_file()}:
        raise PatterningError(
            f"{folder}: {some(missing)} of {len(set(files.values()))} shards not there, which {INDEX} names; copy the "
            "folder again, whole"
        )
    return files
