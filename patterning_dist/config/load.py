"""From YAML and `--set` overrides to a checked experiment, and back."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from patterning_dist.config.kinds import DEFAULT, find_kind, kind_names
from patterning_dist.config.root import Root
from patterning_dist.errors import PatterningError, first_line
from patterning_dist.functions import find_own_code


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


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Any:
    """Read an experiment file; its ``experiment`` names the kind, without which it is the loop for model and data.

    Args:
        path: of the file.
        overrides: ``section.key=value``, the value in YAML; a list's entries go by number (``retrain.seeds.0=7``).

    Returns:
        The experiment, checked: of the kind's schema, for the loop a ``Config``.

    Raises:
        PatterningError: one line ``file: key: expected, got`` for each fault.

    Examples:
        >>> from patterning_dist import load_config
        >>> load_config("configs/quickstart.yaml", ["sampling.num_chains=8"]).sampling.num_chains
        8
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise PatterningError(f"{path}: cannot be read ({reason}); give an experiment file") from None
    raw = parse_yaml(text, str(path))
    if not isinstance(raw, dict):
        raise PatterningError(f"{path}: expected sections of `key: value`, got {_show(raw)}")
    for override in overrides:
        apply_override(raw, override)
    if "experiment" not in raw and raw.get("kind") in kind_names():
        raise PatterningError(f"{path}: kind is not a known key; write experiment: {raw['kind']}")
    name = DEFAULT if raw.get("experiment") is None else raw["experiment"]
    if not isinstance(name, str):
        raise PatterningError(f"{path}: experiment: expected a name, got {_show(name)}")
    find_own_code()
    kind = find_kind(name)
    try:
        config = kind.schema.model_validate(raw)
    except ValidationError as error:
        lines = _explain(error, kind.schema.model_json_schema())
        raise PatterningError("\n".join(f"{path}: {line}" for line in dict.fromkeys(lines))) from None
    try:
        config = kind.locate(config, path.resolve().parent)
    except PatterningError as error:
        raise PatterningError(f"{path}: {error}") from None
    if faults := kind.check(config):
        raise PatterningError("\n".join(f"{path}: {line}" for line in faults))
    return config


def dump_config(config: Root) -> str:
    """The whole experiment, defaults written out, as YAML that `load_config` reads back to the same."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def config_schema(kind: str = DEFAULT) -> dict[str, Any]:
    """JSON schema of an experiment file of a kind, for editors."""
    return find_kind(kind).schema.model_json_schema()


_MOST_ENTRIES = 10**6  # of a file, aliases written out


def parse_yaml(text: str, where: str) -> Any:
    try:
        loaded = yaml.load(text, Loader=_Loader)
        if _num_entries(loaded, {}) > _MOST_ENTRIES:
            raise PatterningError(f"{where}: its aliases stand for more than {_MOST_ENTRIES:,} entries; write them out")
        return loaded
    except RecursionError:
        raise PatterningError(f"{where}: not valid YAML: lists or sections inside others, hundreds deep") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:  # of words like !!int x, or 2020-13-45
        raise PatterningError(
            f"{where}: not valid YAML: a value that cannot be read ({type(error).__name__}: {first_line(error)})"
        ) from None
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or str(error)
        line = f" line {mark.line + 1}:" if mark else ""
        raise PatterningError(f"{where}:{line} not valid YAML: {' '.join(problem.split())}") from None


def _num_entries(value: Any, known: dict[int, int]) -> int:
    """Entries of a tree, those behind an alias as often as it is used; ``known``: by the id of a value."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in known:
        known[id(value)] = _MOST_ENTRIES + 1  # of one that holds itself
        inside = [*value.keys(), *value.values()] if isinstance(value, dict) else value
        known[id(value)] = min(1 + sum(_num_entries(entry, known) for entry in inside), _MOST_ENTRIES + 1)
    return known[id(value)]


def apply_override(raw: dict[str, Any], override: str) -> None:
    dotted, equals, value = override.partition("=")
    keys = dotted.strip().split(".")
    if not equals or not all(keys):
        raise PatterningError(f"--set {override}: expected section.key=value")
    parsed = parse_yaml(value, f"--set {override}")
    node: Any = raw
    key: str | int
    for depth, name in enumerate(keys):
        key = name
        parent, last = ".".join(keys[:depth]), depth == len(keys) - 1
        if isinstance(node, list):
            if not name.isdigit() or int(name) >= len(node):
                raise PatterningError(
                    f"--set {override}: {parent} has {len(node)} entries, numbered from 0; no '{name}'"
                )
            key = int(name)
        elif not isinstance(node, dict):
            raise PatterningError(f"--set {override}: {parent} is {_show(node)}, which has no keys")
        if last:
            node[key] = parsed
        else:
            # A section left out of the file, or empty, is made; the schema then says what it lacks.
            if isinstance(node, dict) and node.get(key) is None:
                node[key] = {}
            node = node[key]


def find_path(path: Path | None, folder: Path) -> Path | None:
    """A path of an experiment file, which lies in ``folder``: absolute, beside the file, or from the current folder."""
    if path is None:
        return None
    if "\0" in str(path):
        raise PatterningError(f"{str(path)!r} is no path; correct it")
    path = path.expanduser()
    beside = folder / path
    return beside.resolve() if beside.exists() else path.resolve()


def find_local(name: str | None, folder: Path) -> str | None:
    """The path of something that may also be on a hub, by a name that is not a path here."""
    path = find_path(None if name is None else Path(name), folder)
    return name if path is None or not path.exists() else str(path)


def _explain(error: ValidationError, schema: dict[str, Any]) -> Iterator[str]:
    for fault in error.errors(include_url=False):
        key, siblings, node = _walk(schema, fault["loc"])
        match fault["type"]:
            case "extra_forbidden":
                elsewhere = _elsewhere(schema, fault["loc"])
                yield f"{key} is {elsewhere or 'not a known key' + _suggest(schema, key, siblings)}"
            case "missing":
                yield f"{key}: is missing; add it"
            case "union_tag_invalid" | "union_tag_not_found":
                tags = ", ".join(f"'{tag}'" for tag in node["discriminator"]["mapping"])
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


def _walk(schema: dict[str, Any], location: Sequence[str | int]) -> tuple[str, list[str], dict[str, Any]]:
    """The dotted key as the user wrote it, the keys that its mapping may have, and the schema of its value."""
    node, keys, siblings = schema, [], []
    for part in location:
        branches = [_follow(schema, branch) for branch in node.get("anyOf", ()) if branch.get("type") != "null"]
        if len(branches) > 1 and isinstance(part, str) and not any(_has_key(branch, part) for branch in branches):
            continue  # the name that pydantic has for one of several kinds of value
        node = _option(node)
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
    return ".".join(keys), siblings, _option(node)


def _has_key(node: dict[str, Any], name: str) -> bool:
    """Whether a value of this schema may have a key, if only because it may have any."""
    return name in node.get("properties", {}) or bool(node.get("additionalProperties"))


def _option(node: dict[str, Any]) -> dict[str, Any]:
    """Of what may be left out, what it is otherwise."""
    options = [node, *node.get("anyOf", [])]
    return next((option for option in options if option.keys() & {"$ref", "items", "oneOf"}), node)


def _follow(schema: dict[str, Any], node: dict[str, Any]) -> dict[str, Any]:
    return schema["$defs"][node["$ref"].rsplit("/", 1)[1]] if "$ref" in node else node


def _elsewhere(schema: dict[str, Any], location: Sequence[str | int]) -> str | None:
    """What a key that is unknown here belongs to: another kind of this section, or of experiment."""
    *above, here, leaf = ("", *location)
    if not above:
        of_the_loop = leaf in find_kind(DEFAULT).schema.model_fields
        others = ", ".join(schema["properties"])
        return f"a section of the loop, and this experiment has others: {others}; remove it" if of_the_loop else None
    section, _, node = _walk(schema, above[1:])
    mapping = node.get("discriminator", {}).get("mapping", {})
    kinds = [kind for kind, ref in mapping.items() if leaf in _follow(schema, {"$ref": ref})["properties"]]
    named = " and ".join(kinds)
    return f"a key of kind {named}, and {section}.kind is {here}; change one of the two" if kinds else None


def _suggest(schema: dict[str, Any], key: str, siblings: list[str]) -> str:
    prefix, _, leaf = key.rpartition(".")
    for section, node in schema["properties"].items():
        options = [_follow(schema, option) for option in [node, *node.get("anyOf", [])]]
        if any(leaf in option.get("properties", {}) for option in options):
            return f"; did you mean {section}.{leaf}?"
    if close := difflib.get_close_matches(leaf, siblings, n=1):
        return f"; did you mean {prefix + '.' if prefix else ''}{close[0]}?"
    return f"; known keys{' of ' + prefix if prefix else ''}: {', '.join(siblings)}"


def _show(value: Any) -> str:
    text = " ".join(repr(value).split())
    return "nothing" if value is None else text if len(text) <= 60 else text[:57] + "..."
