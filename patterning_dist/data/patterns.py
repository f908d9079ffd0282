"""What kind of token a token is, by its text: the colours of maps and the columns of heat maps."""

from __future__ import annotations

import re

import numpy as np

INDUCTION = "induction"  # completes a bigram that came before, whatever it looks like
# The first that matches the whole text; tokens of byte-level vocabularies carry the space before a word.
_PATTERNS = (
    ("new line", r"\s*\n\s*"),
    ("space", r"\s+"),
    ("number", r"\s*\d[\d.,:]*"),
    ("word start", r"\s+[^\W\d_][\w'’-]*"),
    ("word part", r"[^\W\d_][\w'’-]*"),
    ("opening bracket", r"\s*[(\[{<]+\s*"),
    ("closing bracket", r"\s*[)\]}>]+[.,;:]?\s*"),
    ("punctuation", r"\s*[^\w\s]+\s*"),
)
OTHER = "other"
PATTERNS = (INDUCTION, *(name for name, _ in _PATTERNS), OTHER)


def token_patterns(texts: np.ndarray) -> np.ndarray:
    """Pattern of every token of a vocabulary, names of ``PATTERNS``, objects [token].

    Args:
        texts: of the tokens [token]; bytes that are no text alone, U+FFFD, count as other.
    """
    found = (
        OTHER if "\ufffd" in text else next((name for name, rule in _PATTERNS if re.fullmatch(rule, text)), OTHER)
        for text in texts
    )
    return np.array(list(found), dtype=object)
