"""Functions of the user's own, named in an experiment as ``package.module:function``."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from pathlib import Path
from typing import Any

from patterning_dist.errors import PatterningError
from patterning_dist.storage.files import file_sha256


def find_own_code() -> None:
    """Let modules beside the experiment be imported, as ``python -m`` does."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


def load_function(path: str, what: str = "observable function") -> Any:
    """Import a user's function, such as an observable, model -> Tensor [k].

    Args:
        path: ``package.module:function``.
        what: it is, for the message.

    Raises:
        PatterningError: the path is malformed, the module cannot be imported or has no such function.

    Examples:
        >>> load_function("math:sqrt")(4.0)
        2.0
    """
    module_name, _, function_name = path.partition(":")
    try:
        return getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise PatterningError(f"{what} {path!r} cannot be loaded ({error}); expected package.module:function") from None


def code_fingerprint(path: str) -> list[Any]:
    """A function ``package.module:name`` and the hash of the file that it is in."""
    load_function(path, "function")
    source = inspect.getsourcefile(importlib.import_module(path.partition(":")[0]))
    return [path, file_sha256(Path(source)) if source else None]
