"""From blocks to HTML: whole pages, and the blocks of one figure."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from patterning_dist.report.blocks import FLAG, Section
from patterning_dist.report.figures import own_colours
from patterning_dist.storage.files import write_text


@cache
def environment() -> Environment:
    """Of the templates beside this module; what they are given is escaped."""
    found = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.globals["FLAG"] = FLAG
    return found


def write_page(
    path: Path, *, kind: str, name: str, created: str, status: str, warnings: list[str], sections: list[Section]
) -> None:
    """Write one self-contained page.

    Args:
        path: of the file.
        kind: of page, over the heading.
        name: the heading.
        created: when, and status: how far; both under it.
        warnings: in a box at the top.
        sections: the rest.
    """
    page = (
        environment()
        .get_template("template.html")
        .render(kind=kind, name=name, created=created, status=status, warnings=warnings, sections=sections)
    )
    write_text(path, page.replace("</style>", f"{own_colours(page)}\n</style>", 1))
