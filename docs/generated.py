"""Pages that mkdocs makes from the package itself, and from files beside `docs/`: a hook of `mkdocs.yml`."""

from __future__ import annotations

import importlib
import json
import os
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from typer.main import get_command

import patterning_dist
from patterning_dist.cli import app
from patterning_dist.config import config_schema

ROOT = Path(__file__).parents[1]
# page of the site -> file of the repository
INCLUDED = {
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "benchmarks.md": "benchmarks/README.md",
    "how_to/clusters.md": "cluster/README.md",
    "corpora.md": "corpora/README.md",
}
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    pages = {page: (ROOT / source).read_text(encoding="utf-8") for page, source in INCLUDED.items()}
    pages |= {
        "reference/configuration.md": configuration(),
        "reference/command.md": commands(),
        "reference/python.md": public_names(),
    }
    for name, content in pages.items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links to files of the repository lead to their page; of those that have none the words stay."""
    here = page.file.src_uri
    source = ROOT / INCLUDED.get(here, f"docs/{here}")
    pages = {str(ROOT / file): name for name, file in INCLUDED.items()}
    pages |= {str(ROOT / "docs" / name): name for name in files.src_uris}

    def relinked(found: re.Match[str]) -> str:
        image, text, target, anchor = found.groups()
        if "://" in target:
            return found[0]
        path = os.path.normpath(source.parent / target)
        if path not in pages:
            return text if Path(path).exists() else found[0]
        return f"{image}[{text}]({os.path.relpath(pages[path], os.path.dirname(here))}{anchor or ''})"

    return _LINK.sub(relinked, markdown)


def configuration() -> str:
    """The experiment file, a table a section, from its JSON schema."""
    schema = config_schema()
    lines = [
        "# Configuration",
        "",
        "The experiment file, key by key. Units stand in brackets, [1] is a pure number. `patterning config check` "
        "says what is wrong with a file, `patterning config schema` prints the JSON schema that this page is made of.",
        "",
        *_section("The file", schema),
    ]
    for name, section in sorted(schema["$defs"].items()):
        lines += _section(_title(name), section)
    return "\n".join(lines)


def _section(title: str, section: dict[str, Any]) -> list[str]:
    lines = [f"## {title}", ""]
    if "properties" not in section:
        return []
    if description := section.get("description"):
        lines += [description.partition("\n")[0].replace("``", "`"), ""]
    lines += ["| key | takes | default | meaning |", "| --- | --- | --- | --- |"]
    required = section.get("required", [])
    for key, value in section["properties"].items():
        default = "required" if key in required else _default(value.get("default"))
        cells = [f"`{key}`", _takes(value), default, _escaped(value.get("description", ""))]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def _title(name: str) -> str:
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", name.removesuffix("Config"))
    return words[0] + words[1:].lower()


def _default(value: object) -> str:
    if value is None:
        return ""
    return "its own" if isinstance(value, dict) else f"`{_escaped(json.dumps(value))}`"


def _takes(value: dict[str, Any]) -> str:
    if reference := value.get("$ref"):
        title = _title(reference.rpartition("/")[2])
        return f"[{title}](#{title.lower().replace(' ', '-')})"
    if "const" in value:
        return f"`{value['const']}`"
    if "enum" in value:
        return ", ".join(f"`{one}`" for one in value["enum"])
    for several in ("anyOf", "oneOf"):
        if several in value:
            return ", ".join(dict.fromkeys(_takes(one) for one in value[several] if one.get("type") != "null"))
    kind = value.get("type", "")
    if kind == "array":
        return f"list of {_takes(value['items'])}" if "items" in value else "list"
    if kind == "object":
        inner = value.get("additionalProperties")
        return f"names: {_takes(inner)}" if isinstance(inner, dict) and inner else "names"
    words = {"integer": "whole number", "string": "text", "boolean": "`true`, `false`"}.get(kind, kind)
    bounds = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = [f"{sign} {value[name]:g}" for name, sign in bounds.items() if name in value and abs(value[name]) < 1e15]
    return " ".join([words, *limits])


def _escaped(text: str) -> str:
    return re.sub(r"([|_*\[\]])", r"\\\1", text.replace("<", "&lt;"))


def commands() -> str:
    """Help of every command."""
    lines = [
        "# Command",
        "",
        "What you can put right is one line on stderr and exit code 2; SIGTERM ends a run with 143, Ctrl-C with 130, "
        "and the same command resumes it.",
        "",
    ]
    for path, command in _leaves("patterning", get_command(app)):
        context = command.make_context(path, [], resilient_parsing=True, max_content_width=100)
        text = command.get_help(context)
        lines += [f"## {path}", "", "```text", text.rstrip(), "```", ""]
    return "\n".join(lines)


def _leaves(path: str, command: Any) -> list[tuple[str, Any]]:
    """Paths and commands below a command of typer's, which bring click with them."""
    if not hasattr(command, "commands"):
        return [(path, command)]
    return [leaf for name, one in command.commands.items() for leaf in _leaves(f"{path} {name}", one)]


def public_names() -> str:
    """What ``patterning_dist`` exports, from its docstrings."""
    lines = [
        "# Python",
        "",
        "All of it is imported from `patterning_dist` itself. Examples take `np` and `torch` as imported.",
        "",
    ]
    for name in sorted(set(patterning_dist.__all__) - {"__version__"}):
        value = getattr(patterning_dist, name)
        defined = importlib.import_module(value.__module__)
        lines += [f"::: {defined.__name__}.{value.__name__}", ""]
    return "\n".join(lines)
