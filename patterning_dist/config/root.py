"""What every kind of experiment has at the top of its file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import AfterValidator, Field, PlainSerializer

from patterning_dist.config.section import Section
from patterning_dist.storage.store import path_or_url

if TYPE_CHECKING:
    from patterning_dist.config.sampling import SamplingConfig

Device = Literal["cpu", "cuda", "auto"]
RunLocation = Annotated[str, AfterValidator(path_or_url), PlainSerializer(str)]  # a Path, or a URL as it is


class Root(Section):
    """Name, seed, device and location of a run."""

    experiment: str | None = Field(
        None,
        description="kind of experiment: a name, or package.module:Class; default: the loop",
    )
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.\-]*$", description="name of the run, and of its directory")
    seed: int = Field(ge=0, lt=2**63, description="every random number of the run follows from it")
    device: Device = Field("auto", description="cpu, cuda, or auto: cuda if there is one")
    run_dir: RunLocation | None = Field(None, description="path or URL where the run is kept; default: runs/<name>")

    if TYPE_CHECKING:  # a section of every experiment with stages on Ray, at a location of its own in the file
        sampling: SamplingConfig

    @property
    def run_directory(self) -> Path | str:
        """Where the run is kept."""
        return self.run_dir or Path("runs") / self.name
