"""Names that others have for the parts of a language model, and ours: ``l0h1``, and those of TransformerLens."""

from __future__ import annotations

import re
from typing import Any

_NUMBER = r"([\d*?]+)"
_OTHERS = [
    (re.compile(pattern), name)
    for pattern, name in (
        (rf"[lL]{_NUMBER}\.?[hH]{_NUMBER}", r"layer.\1.head.\2"),
        (rf"blocks\.{_NUMBER}\.attn\.(?:(?:h|head|heads)\.)?{_NUMBER}", r"layer.\1.head.\2"),
        (rf"blocks\.{_NUMBER}\.attn", r"layer.\1.attention"),
        (rf"blocks\.{_NUMBER}\.mlp", r"layer.\1.mlp"),
        (rf"blocks\.{_NUMBER}", r"layer.\1"),
        (r"embed|(?:embed\.)?W_E", "embedding"),
        (r"pos_embed|(?:pos_embed\.)?W_pos", "position_embedding"),
        (r"unembed|(?:unembed\.)?W_U", "unembedding"),
    )
]
_KEYS = ("sampling.components.*.name", "solve.component", "response.direction.component", "calibration.component",
         "validation.component")  # fmt: skip


def canonical_name(name: str) -> str:
    """Our name of a component, or of several joined by ``+``; what is no name of others stays.

    >>> canonical_name("l0h1+blocks.2.attn.h.3+embed")
    'layer.0.head.1+layer.2.head.3+embedding'
    """
    return "+".join(map(_canonical, name.split("+")))


def with_canonical_names(raw: dict[str, Any]) -> dict[str, Any]:
    """The sections of an experiment with our names of components; what is not as expected stays."""
    for key in _KEYS:
        raw = _replace(raw, key.split("."))
    return raw


def _canonical(part: str) -> str:
    for pattern, name in _OTHERS:
        if found := pattern.fullmatch(part):
            return found.expand(name)
    return part


def _replace(node: Any, keys: list[str]) -> Any:
    if not keys:
        return canonical_name(node) if isinstance(node, str) else node
    key, *rest = keys
    if key == "*" and isinstance(node, list):
        return [_replace(one, rest) for one in node]
    if isinstance(node, dict) and key in node:
        return node | {key: _replace(node[key], rest)}
    return node
