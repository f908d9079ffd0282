"""From YAML and `--set` overrides to a checked `Config` or `StudyConfig`, and back."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ValidationError

from patterning_dist.config.checks import check
from patterning_dist.config.schema import Config
from patterning_dist.config.study import HuggingFaceModelConfig, StudyConfig, TokensConfig
from patterning_dist.config.study_checks import check_study
from patterning_dist.errors import PatterningError
from patterning_dist.experiments.two_rules.checks import check_parentheses
from patterning_dist.experiments.two_rules.config import ParenthesesConfig


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

AnyConfig = Config | StudyConfig | ParenthesesConfig

# Sections that only the whole loop has: a file with one of them is not a study, even if `model.kind` is missing.
_RUN_SECTIONS = {"training", "response", "solve", "retrain"}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> AnyConfig:
    """Read an experiment file: of a run (the whole loop), of a study, whose `model` has a `kind`, or of the
    parentheses experiment, which has a `kind` itself.

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
    raw = parse_yaml(text, str(path))
    if not isinstance(raw, dict):
        raise PatterningError(f"{path}: expected sections of `key: value`, got {_show(raw)}")
    for override in overrides:
        apply_override(raw, override)
    schema = _schema_of(raw)
    try:
        config = schema.model_validate(raw)
    except ValidationError as error:
        lines = _explain(error, schema.model_json_schema())
        raise PatterningError("\n".join(f"{path}: {line}" for line in lines)) from None
    config, faults = _checked(config, path.resolve().parent)
    if faults:
        raise PatterningError("\n".join(f"{path}: {line}" for line in faults))
    return config


def _schema_of(raw: dict[str, Any]) -> type[AnyConfig]:
    if "kind" in raw:
        return ParenthesesConfig
    model = raw.get("model")
    is_study = (isinstance(model, dict) and "kind" in model) or (bool(raw) and not _RUN_SECTIONS & raw.keys())
    return StudyConfig if is_study else Config


def _checked(config: AnyConfig, folder: Path) -> tuple[AnyConfig, list[str]]:
    """The experiment with its paths found, and every rule that it breaks."""
    match config:
        case StudyConfig():
            config = _locate_study(config, folder)
            return config, check_study(config)
        case ParenthesesConfig():
            return config, check_parentheses(config)
        case _:
            config = _locate(config, folder)
            return config, check(config)


def dump_config(config: AnyConfig) -> str:
    """The whole experiment, defaults written out, as YAML that `load_config` reads back to the same."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def config_schema(kind: Literal["run", "study", "parentheses"] = "run") -> dict[str, Any]:
    """JSON schema of an experiment file, for editors."""
    kinds: dict[str, type[AnyConfig]] = {"run": Config, "study": StudyConfig, "parentheses": ParenthesesConfig}
    return kinds[kind].model_json_schema()


def parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or str(error)
        line = f" line {mark.line + 1}:" if mark else ""
        raise PatterningError(f"{where}:{line} not valid YAML: {' '.join(problem.split())}") from None


def apply_override(raw: dict[str, Any], override: str) -> None:
    dotted, equals, value = override.partition("=")
    keys = dotted.strip().split(".")
    if not equals or not all(keys):
        raise PatterningError(f"--set {override}: expected section.key=value")
    parsed, node = parse_yaml(value, f"--set {override}"), raw
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


def _find(path: Path | None, folder: Path) -> Path | None:
    if path is None:
        return None
    path = path.expanduser()
    beside = folder / path
    return beside.resolve() if not path.exists() and beside.exists() else path.resolve()


def _find_local(name: str, folder: Path) -> str:
    """The path of something that may also be on a hub, by a name that is not a path here."""
    path = _find(Path(name), folder)
    return str(path) if path.exists() else name


def _locate(config: Config, folder: Path) -> Config:
    sources = [source.model_copy(update={"path": _find(source.path, folder)}) for source in config.data.sources]
    update = {
        "data": config.data.model_copy(update={"sources": sources}),
        "training": config.training.model_copy(update={"deepspeed": _find(config.training.deepspeed, folder)}),
        "sampling": config.sampling.model_copy(update={"probe": _find(config.sampling.probe, folder)}),
        "retrain": config.retrain.model_copy(update={"deepspeed": _find(config.retrain.deepspeed, folder)}),
    }
    return config.model_copy(update=update)


def _locate_study(config: StudyConfig, folder: Path) -> StudyConfig:
    model, data = config.model, config.data
    if isinstance(model, HuggingFaceModelConfig):
        model = model.model_copy(update={"path": _find_local(model.path, folder)})
    if isinstance(data, TokensConfig):
        held_out = {domain: _find_local(path, folder) for domain, path in data.held_out.items()}
        data = data.model_copy(update={"train": _find_local(data.train, folder), "held_out": held_out})
    sampling = config.sampling.model_copy(update={"probe": _find(config.sampling.probe, folder)})
    return config.model_copy(update={"model": model, "data": data, "sampling": sampling})


def _explain(error: ValidationError, schema: dict[str, Any]) -> Iterator[str]:
    for fault in error.errors(include_url=False):
        key, siblings, node = _walk(schema, fault["loc"])
        match fault["type"]:
            case "extra_forbidden":
                yield f"{key} is not a known key{_suggest(schema, key, siblings)}"
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
    return ".".join(keys), siblings, node


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
