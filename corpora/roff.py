"""Manual pages (man(7) and mdoc(7)) to readable text, without groff: the same result everywhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from extract import Extracted, read_text, title_of

_HEADINGS = {"Sh", "Ss", "SH", "SS"}
_PARAGRAPHS = {"Pp", "PP", "P", "LP", "Lp", "sp"}
_ITEMS = {"It", "TP", "IP", "TQ"}
_LITERAL_ENDS = {"Ed", "fi", "EE"}
_FONTS = {"B", "I", "R", "SM", "SB", "An"}
_ALTERNATING = {"BR", "RB", "IR", "RI", "BI", "IB"}
# fmt: off
_SILENT = {
    "Dd", "Dt", "Os", "TH", "Bl", "El", "Bk", "Ek", "so", "RS", "RE", "ad", "na", "nh", "hy", "in", "ti",
    "ta", "ne", "PD", "de", "ds", "if", "ie", "el", "ft", "br", "rm", "ig", "nr", "TS", "TE", "\\}", "ce",
    "UE", "ME", "SY", "YS", "OP", "Rs", "Re", "Sm", "St", "Rv", "Ex"
}
# fmt: on
# fmt: off
_MDOC_INLINE = {
    "Ac", "Ad", "Ao", "Ap", "Ar", "At", "Bc", "Bo", "Bq", "Brc", "Bro", "Brq", "Bx", "Cd", "Cm", "Dc",
    "Do", "Dq", "Dv", "Ec", "Em", "Eo", "Er", "Es", "Ev", "Fa", "Fl", "Fn", "Fr", "Ft", "Fx", "Ic", "Li",
    "Lk", "Ms", "Mt", "Nm", "No", "Ns", "Nx", "Oc", "Oo", "Op", "Ot", "Ox", "Pa", "Pc", "Pf", "Po", "Pq",
    "Qc", "Ql", "Qo", "Qq", "Sc", "So", "Sq", "Sy", "Ta", "Tn", "Ux", "Va", "Vt", "Xc", "Xo", "Xr"
}
# fmt: on
_BRACKETS = {"Op": "[]", "Pq": "()", "Dq": '""', "Qq": '""', "Sq": "''", "Ql": "''", "Aq": "<>", "Bq": "[]"}
_NAMED = {"Bx": "BSD", "Fx": "FreeBSD", "Nx": "NetBSD", "Ox": "OpenBSD", "Ux": "UNIX", "At": "AT&T UNIX"}
_ESCAPES = [
    (r"\\f(\[[^\]]*\]|\(..|.)", ""),
    (r"\\s[-+]?\d+", ""),
    (r"\\\".*", ""),
    (r"\\\*\(lq|\\\(lq|\\\*\(Lq", '"'),
    (r"\\\*\(rq|\\\(rq|\\\*\(Rq", '"'),
    (r"\\\(aq", "'"),
    (r"\\\(dq", '"'),
    (r"\\\(em", "--"),
    (r"\\\(en", "-"),
    (r"\\\(bu", "*"),
    (r"\\\(co", "(C)"),
    (r"\\\(ha", "^"),
    (r"\\\(ti", "~"),
    (r"\\\(\*\(..|\\\(..|\\\[[^\]]*\]|\\\*\[[^\]]*\]", ""),
    (r"\\[&|^/,%)c:]", ""),
    (r"\\[ 0~]", " "),
    (r"\\-", "-"),
    (r"\\['`]", "'"),
    (r"\\[hvwlo]'[^']*'", ""),
    (r"\\e|\\\\", r"\\"),
]
_CLOSING = re.compile(r" +([.,;:)\]?!])")


def _unescape(text: str) -> str:
    for pattern, replacement in _ESCAPES:
        text = re.sub(pattern, replacement, text)
    return text


def _arguments(rest: str) -> list[str]:
    try:
        lexer = shlex.shlex(rest, posix=True)
        lexer.whitespace_split, lexer.quotes, lexer.escape, lexer.commenters = True, '"', "", ""
        return list(lexer)
    except ValueError:  # an unpaired quotation mark
        return rest.replace('"', "").split()


def _inline(words: list[str], name: str) -> str:
    """One mdoc line: macro words vanish or turn into the characters they stand for."""
    pieces: list[str] = []
    closers: list[str] = []
    glue = ""
    for index, word in enumerate(words):
        if word in _BRACKETS:
            pieces.append(f"{glue}{_BRACKETS[word][0]}\x01")
            closers.append(_BRACKETS[word][1])
            glue = ""
        elif word in _NAMED:
            pieces.append(glue + _NAMED[word])
            glue = ""
        elif word == "Fl":
            glue += "-"
        elif word == "Ns":
            glue = "\x02" + glue
        elif word == "Nm" and (index + 1 == len(words) or not words[index + 1][:1].isalnum()):
            pieces.append(glue + name)
            glue = ""
        elif word not in _MDOC_INLINE:
            pieces.append(glue + word)
            glue = ""
    text = " ".join(pieces + ["\x02" + mark for mark in reversed(closers)])
    return _CLOSING.sub(r"\1", text.replace("\x01 ", "").replace(" \x02", "").replace("\x02", ""))


def _macro(macro: str, words: list[str], name: str) -> str:
    if macro in _HEADINGS:
        return " ".join(words)
    if macro in _ITEMS:
        return _inline(words[:-1] if macro == "IP" and len(words) > 1 else words, name)
    if macro in _FONTS:
        return _CLOSING.sub(r"\1", " ".join(word for word in words if word not in {"-nosplit", "-split", "Aq", "Mt"}))
    if macro in _ALTERNATING:
        return "".join(words)
    if macro == "Xr" and len(words) >= 2:
        return f"{words[0]}({words[1]}){_inline(words[2:], name)}"
    if macro == "In" and words:
        return f"#include <{words[0]}>"
    if macro == "Fn" and words:
        return _CLOSING.sub(
            r"\1",
            f"{words[0]}({', '.join(w for w in words[1:] if w not in '.,;:')})"
            + "".join(w for w in words[1:] if w in ".,;:"),
        )
    if macro == "Nd":
        return "- " + " ".join(words)
    return _inline([macro, *words], name)


def manual(path: Path) -> Extracted:
    """One manual page, its paragraphs on one line each; literal displays keep their lines."""
    name = ""
    lines: list[str] = []  # every line with what goes in front of it: "\n", or " " inside a paragraph
    literal, in_table, gap = False, False, "\n"
    pending: list[str] | None = None  # the function name and arguments between .Fo and .Fc
    for line in read_text(path).replace("\\\n", " ").splitlines():
        if in_table or line.startswith(".TS"):
            in_table = not line.startswith(".TE")
            continue
        if not line.startswith((".", "'")):
            text = _unescape(line)
            lines.append(("\n" if literal else gap) + text)
            gap = " " if text.strip() else "\n\n"
            continue
        macro, _, rest = line[1:].strip().partition(" ")
        if not macro or macro.startswith(('\\"', '"')):
            continue
        if macro in _LITERAL_ENDS | {"nf", "EX"} or (macro == "Bd" and ("-lit" in rest or "-unf" in rest)):
            literal, gap = macro not in _LITERAL_ENDS, "\n\n"
            continue
        if macro in _PARAGRAPHS:
            gap = "\n\n"
            continue
        if macro in _SILENT:
            gap = "\n" if macro in {"Bl", "El", "br"} else gap
            continue
        words = [_unescape(word) for word in _arguments(re.sub(r'(^|\s)\\".*', "", rest))]
        if macro == "Nm" and words and not name and words[0][:1].isalnum():
            name = words[0]
        if macro == "Fo" and words:
            pending = words[:1]
        elif macro == "Fa" and pending is not None:
            pending += words
        elif macro != "Fc" or pending is not None:
            if macro == "Fc" and pending is not None:
                text, pending = f"{pending[0]}({', '.join(pending[1:])})", None
            else:
                text = _macro(macro, words, name)
            starts_line = macro in _HEADINGS | _ITEMS | {"In", "Ft", "Fd"}
            lines.append(("\n\n" if macro in _HEADINGS else "\n" if starts_line or literal else gap) + text)
            gap = "\n" if macro in _HEADINGS | {"In", "Fd", "TP", "TQ", "IP", "It"} else " "
    yield title_of(path), "".join(lines)
