"""Names of the checkpoints of a model of `transformers`, and the globs that stand for several of them."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field

from patterning_dist.errors import PatterningError, first_line

INITIALISATION = "initialisation"  # fresh weights, where a training begins
FINAL = "final"  # of a folder or a name on the hub, the model itself
_CONFIGS = ("config.json", "adapter_config.json")  # of a model, or of an adapter
# Names of checkpoints become folders of the run.
_NAME = r"^[A-Za-z0-9][A-Za-z0-9_.\-]*$"
CheckpointName = Annotated[str, Field(pattern=_NAME)]
CheckpointGlob = Annotated[str, Field(pattern=r"^[A-Za-z0-9*?\[][A-Za-z0-9_.\-*?\[\]!]*$")]


def is_glob(name: str) -> bool:
    """Whether a name stands for all that match it."""
    return any(character in name for character in "*?[")


def is_on_hub(path: str) -> bool:
    """Whether a model's path is a name on the hub: no folder, and nothing that only a folder is called."""
    return not Path(path).is_dir() and not Path(path).is_absolute() and not path.startswith(".")


def checkpoints_in(folder: Path) -> list[str]:
    """Checkpoints of a model's folder, the folder itself included if it is one, in the order of its training."""
    itself = [FINAL] if any((folder / name).is_file() for name in _CONFIGS) else []
    return training_order([*itself, *(file.parent.name for name in _CONFIGS for file in folder.glob(f"*/{name}"))])


def training_order(names: Iterable[str]) -> list[str]:
    """Each name once, by the numbers in it (step-2 before step-10); ``final`` last."""

    def key(name: str) -> tuple[bool, list[str | int]]:
        parts = re.split(r"(\d+)", name)  # text and digits in turn
        return name == FINAL, [int(part) if odd % 2 else part for odd, part in enumerate(parts)]

    return sorted(set(names), key=key)


def expand_globs(path: str, names: Sequence[str]) -> list[str]:
    """Checkpoints of a model, each glob (``step*``) replaced by those that match it, in the order of the training.

    Args:
        path: folder of the model, or its name on the hub. A folder that is not here leaves the names as they are.
        names: as in the experiment.

    Raises:
        PatterningError: a glob that matches nothing, or a hub that does not say what it has.
    """
    if not any(map(is_glob, names)) or not (Path(path).is_dir() or is_on_hub(path)):
        return list(names)
    there, found = _revisions(path) if is_on_hub(path) else checkpoints_in(Path(path)), list[str]()
    for name in names:
        matches = [one for one in there if fnmatch.fnmatchcase(one, name)] if is_glob(name) else [name]
        if not matches:
            raise PatterningError(
                f"model.checkpoints: nothing in {path} matches '{name}'; there are {', '.join(there) or 'none'}"
            )
        found += matches
    return found


def _revisions(name: str) -> list[str]:
    """Branches and tags of a model on the hub that may name a folder; its main branch is ``final``."""
    from huggingface_hub import HfApi  # takes half a second

    try:
        refs = HfApi().list_repo_refs(name)
    except Exception as error:  # of huggingface_hub, of the HTTP library that it happens to use, or of the network
        raise PatterningError(
            f"model.checkpoints: the revisions of {name} on the hub cannot be listed ({first_line(error)}); write "
            "their names instead of a glob"
        ) from None
    names = [FINAL if ref.name == "main" else ref.name for ref in [*refs.branches, *refs.tags]]
    return training_order(one for one in names if re.match(_NAME, one))
