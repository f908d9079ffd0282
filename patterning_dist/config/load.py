"""From YAML and `--set` overrides to a checked `Config`, and back."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from patterning_dist.config.checks import check
from patterning_dist.config.schema import Config
from patterning_dist.errors import PatterningError


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice and reads 1e-3 as a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.MarkedYAMLError(problem=f"'{key}' is given twice; remove one",
                                           problem_mark=key_node.start_mark)  # fmt: skip
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


# YAML 1.1, and so PyYAML, takes 1e-3 for a string unless there is a dot in it.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read an experiment file.

    overrides: `section.key=value`, the value in YAML; a list's entries go by number (`retrain.seeds.0=7`).
    Relative paths are looked up from the current directory, then from the file's own folder.
    Raises PatterningError with one line `file: key: expected, got` for each fault.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise PatterningError(f"{path}: cannot be read ({reason}); give an experiment file") from None
    raw = _parse(text, str(path))
    if not isinstance(raw, dict):
        raise PatterningError(f"{path}: expected sections of `key: value`, got {_show(raw)}")
    for override in overrides:
        _apply(raw, override)
    try:
        config = _locate(Config.model_validate(raw), path.resolve().parent)
    except ValidationError as error:
        raise PatterningError("\n".join(f"{path}: {line}" for line in _explain(error))) from None
    if faults := check(config):
        raise PatterningError("\n".join(f"{path}: {line}" for line in faults))
    return config


def dump_config(config: Config) -> str:
    """The whole experiment, defaults written out, as YAML that `load_config` reads back to the same."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def config_schema() -> dict[str, Any]:
    """JSON schema of the experiment file, for editors."""
    return Config.model_json_schema()


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or str(error)
        line = f" line {mark.line + 1}:" if mark else ""
        raise PatterningError(f"{where}:{line} not valid YAML: {' '.join(problem.split())}") from None


def _apply(raw: dict[str, Any], override: str) -> None:
    dotted, equals, value = override.partition("=")
    keys = dotted.strip().split(".")
    if not equals or not all(keys):
        raise PatterningError(f"--set {override}: expected section.key=value")
    parsed, node = _parse(value, f"--set {override}"), raw
    for depth, key in enumerate(keys):
        parent, last = ".".join(keys[:depth]), depth == len(keys) - 1
        if isinstance(node, list):
            if not key.isdigit() or int(key) >= len(node):
                raise PatterningError(
                    f"--set {override}: {parent} has {len(node)} entries, numbered from 0; no '{key}'"
                )
            key = int(key)
        elif not isinstance(node, dict):
            raise PatterningError(f"--set {override}: {parent} is {_show(node)}, which has no keys")
        if last:
            node[key] = parsed
        else:
            # A section left out of the file, or empty, is made; the schema then says what it lacks.
            if isinstance(node, dict) and node.get(key) is None:
                node[key] = {}
            node = node[key]


def _locate(config: Config, folder: Path) -> Config:
    def find(path: Path | None) -> Path | None:
        if path is None:
            return None
        path = path.expanduser()
        beside = folder / path
        return beside.resolve() if not path.exists() and beside.exists() else path.resolve()

    sources = [source.model_copy(update={"path": find(source.path)}) for source in config.data.sources]
    update = {
        "data": config.data.model_copy(update={"sources": sources}),
        "training": config.training.model_copy(update={"deepspeed": find(config.training.deepspeed)}),
        "sampling": config.sampling.model_copy(update={"probe": find(config.sampling.probe)}),
        "retrain": config.retrain.model_copy(update={"deepspeed": find(config.retrain.deepspeed)}),
    }
    return config.model_copy(update=update)


def _explain(error: ValidationError) -> Iterator[str]:
    schema = config_schema()
    for fault in error.errors(include_url=False):
        key, siblings = _walk(schema, fault["loc"])
        match fault["type"]:
            case "extra_forbidden":
                yield f"{key} is not a known key{_suggest(schema, key, siblings)}"
            case "missing":
                yield f"{key}: is missing; add it"
            case "union_tag_invalid" | "union_tag_not_found":
                tags = fault["ctx"].get("expected_tags", "'component_loss', 'split_loss', 'function'")
                yield f"{key}.kind: expected one of {tags}, got {_show(fault['ctx'].get('tag'))}"
            case "model_type" | "model_attributes_type":
                yield f"{key}: expected a section of `key: value`, got {_show(fault['input'])}"
            case "string_pattern_mismatch":
                yield f"{key}: expected text like {fault['ctx']['pattern']}, got {_show(fault['input'])}"
            case "greater_than" | "greater_than_equal" | "less_than" | "less_than_equal":
                bound = fault["msg"].removeprefix("Input should be ")
                yield f"{key}: expected a number {bound}, got {_show(fault['input'])}"
            case _:
                expected = fault["msg"].removeprefix("Input should be ")
                expected = expected[:1].lower() + expected[1:]
                yield f"{key}: expected {expected}, got {_show(fault['input'])}"


def _walk(schema: dict[str, Any], location: Sequence[str | int]) -> tuple[str, list[str]]:
    """The dotted key as the user wrote it, and the keys that its mapping may have."""
    node, keys, siblings = schema, [], []
    for part in location:
        options = [node, *node.get("anyOf", [])]
        node = next((option for option in options if option.keys() & {"$ref", "items", "oneOf"}), node)
        if "oneOf" in node:  # pydantic puts the tag of the union, which is no key, in between
            node = _follow(schema, {"$ref": node["discriminator"]["mapping"][part]})
            continue
        node = _follow(schema, node)
        keys.append(str(part))
        if isinstance(part, int):
            node = node.get("items", {})
        else:
            siblings = list(node.get("properties", {}))
            node = node.get("properties", {}).get(part, {})
    return ".".join(keys), siblings


def _follow(schema: dict[str, Any], node: dict[str, Any]) -> dict[str, Any]:
    return schema["$defs"][node["$ref"].rsplit("/", 1)[1]] if "$ref" in node else node


def _suggest(schema: dict[str, Any], key: str, siblings: list[str]) -> str:
    prefix, _, leaf = key.rpartition(".")
    for section in schema["properties"]:
        if leaf in _follow(schema, schema["properties"][section]).get("properties", {}):
            return f"; did you mean {section}.{leaf}?"
    if close := difflib.get_close_matches(leaf, siblings, n=1):
        return f"; did you mean {prefix + '.' if prefix else ''}{close[0]}?"
    return f"; known keys{' of ' + prefix if prefix else ''}: {', '.join(siblings)}"


def _show(value: Any) -> str:
    text = " ".join(repr(value).split())
    return "nothing" if value is None else text if len(text) <= 60 else text[:57] + "..."
