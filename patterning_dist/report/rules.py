"""Style rules of a figure that stands alone: below a class of its own, and for files without variables."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

SCOPE = ".patterning-figure"


def scoped_rules() -> list[tuple[str, str]]:
    """Rules of figures.css in its light theme, each below a class of their own: nothing around a figure is touched."""
    css = (Path(__file__).parent / "figures.css").read_text(encoding="utf-8")
    light = re.sub(r"^@media.*?^}\n", "", css, flags=re.MULTILINE | re.DOTALL)
    found = re.findall(r"([^{}]+)\{([^{}]*)\}", light)

    def scoped(selector: str) -> str:
        return ", ".join(
            SCOPE if part == ":root" else f"{SCOPE} {part}" for part in map(str.strip, selector.split(","))
        )

    return [(scoped(selector), body) for selector, body in found]


def plain_rules(drawn: str) -> str:
    """Rules of what is drawn without variables, which drawing programs do not know.

    A style that sets variables (``.group-1 { --arm: ... }``) becomes rules of its own for all that use them.
    """
    rules, there = scoped_rules(), {style for found in re.findall(r'class="([^"]*)"', drawn) for style in found.split()}
    setters = [(selector, dict(re.findall(r"--([\w-]+): ([^;]+);", body))) for selector, body in rules if "--" in body]
    root = next(values for selector, values in setters if selector == SCOPE)
    styles = [(s.rpartition(" ")[2], values) for s, values in setters if s != SCOPE and s.count(".") == 2]
    styles = [(style, values) for style, values in styles if style[1:] in there]
    plain = [f"{SCOPE} {{ font: 12px sans-serif; }}", f"{SCOPE} .title {{ font-weight: 600; font-size: 14px; }}"]
    for selector, body in rules:
        if not any(_is_drawn(part, there) for part in selector.split(", ")) or not _resolved(body, root):
            continue
        plain.append(f"{selector} {{{_resolved(body, root)}}}")
        used = set(re.findall(r"var\(--([\w-]+)", body)) - root.keys()
        for style, values in styles:
            if used & values.keys():
                own = ", ".join(part + style for part in selector.split(", "))
                plain.append(f"{own} {{{_resolved(body, root | values)}}}")
    return "\n".join(plain)


def _is_drawn(selector: str, there: set[str]) -> bool:
    """Whether a rule is of text or of a mark that is there; pages have others."""
    classes = set(re.findall(r"\.([\w-]+)", selector)) - {SCOPE[1:]}
    return classes <= there and (bool(classes) or selector == f"{SCOPE} svg text")


def _resolved(body: str, values: Mapping[str, str]) -> str:
    """Declarations with the values of their variables, else what they fall back on; without those that have neither."""
    kept = []
    for declaration in filter(None, map(str.strip, body.split(";"))):
        for _ in range(3):  # a variable may be another one, and fall back on a third
            declaration = re.sub(
                r"var\(--([\w-]+)(?:, ((?:[^()]|\([^()]*\))*))?\)",
                lambda found: values.get(found[1], found[2] or "?"),
                declaration,
            )
        if "?" not in declaration and not declaration.startswith("--"):
            kept.append(declaration)
    return " ".join(f"{declaration};" for declaration in kept)
