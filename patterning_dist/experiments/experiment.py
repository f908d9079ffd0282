"""What an experiment is: sections of a file, stages in their order, and what they follow from.

A kind is found by its name (``experiment:`` in the file), so that a new one touches no file of the package.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from patterning_dist.config import Root


@dataclass(frozen=True)
class Stage:
    """One step of an experiment.

    Attributes:
        function: ``package.module:function``, (config, run, progress) -> paths of the files it wrote; imported when it
            is its turn.
        sections: of the experiment file that it depends on, besides the stages before it.
        on_ray: whether it runs on Ray.
    """

    function: str
    sections: tuple[str, ...]
    on_ray: bool = True


class Experiment(Protocol):
    """A kind of experiment; without arguments when it is made.

    Attributes:
        schema: of its file.
    """

    schema: type[Root]

    def locate(self, config: Any, folder: Path) -> Any:
        """The experiment with its paths found."""
        ...

    def check(self, config: Any) -> list[str]:
        """Every broken rule between sections, one line each."""
        ...

    def stages(self, config: Any) -> dict[str, Stage]:
        """The stages that this file asks for, in their order."""
        ...

    def inputs(self, config: Any, manifest: dict[str, Any]) -> dict[str, Any]:
        """Section -> JSON of what it names outside the file, such as hashes of a corpus; kept in the manifest.

        Args:
            config: of the run.
            manifest: of the run so far, so that large files are hashed once.

        Raises:
            PatterningError: something is not there.
        """
        ...

    def skeleton(self, config: Any) -> Any:
        """The model's names and shapes, as a torch module; without weights where that can be had."""
        ...

    def preflight(self, config: Any, directory: Path) -> list[str]:
        """Find out now, before hours of work, what would otherwise fail in a stage; what the user should know.

        Raises:
            PatterningError: what the user can put right.
        """
        ...
