"""Token sequences as Megatron reads them: ``<prefix>.bin`` with the tokens end to end, ``<prefix>.idx`` with lengths.

The layout is that of ``IndexedDataset`` (github.com/NVIDIA/Megatron-LM, megatron/core/datasets/indexed_dataset.py),
version 1, which GPT-NeoX reads as well: magic, version, code of the number type, number of sequences, number of
documents + 1; then lengths int32 [sequence], first byte in the .bin int64 [sequence], first sequence of every document
and their number int64 [document + 1]. Here every sequence is a document.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from patterning_dist.storage.files import atomic_path

_MAGIC = b"MMIDIDX\x00\x00"
_CODES = {np.dtype(np.uint16): 8, np.dtype(np.int32): 4}


def write_megatron(prefix: Path, sequences: Iterable[np.ndarray], vocabulary_size: int) -> list[Path]:
    """Write both files; returns them.

    Args:
        prefix: path without suffix.
        sequences: token ids of every sequence.
        vocabulary_size: up to 65,500 tokens are 16 bits wide, as Megatron's own preparation has them.
    """
    dtype = np.dtype(np.uint16 if vocabulary_size < 65_500 else np.int32)
    lengths = []
    tokens, index = prefix.with_name(prefix.name + ".bin"), prefix.with_name(prefix.name + ".idx")
    with atomic_path(tokens) as temporary, open(temporary, "wb") as stream:
        for sequence in sequences:
            stream.write(np.asarray(sequence).astype(dtype).tobytes())
            lengths.append(len(sequence))
    begins = np.cumsum([0, *lengths[:-1]], dtype=np.int64) * dtype.itemsize
    with atomic_path(index) as temporary, open(temporary, "wb") as stream:
        stream.write(_MAGIC + struct.pack("<QBQQ", 1, _CODES[dtype], len(lengths), len(lengths) + 1))
        stream.write(np.array(lengths, "<i4").tobytes() + begins[: len(lengths)].astype("<i8").tobytes())
        stream.write(np.arange(len(lengths) + 1, dtype="<i8").tobytes())
    return [tokens, index]
