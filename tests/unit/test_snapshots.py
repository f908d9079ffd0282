"""A snapshot is whole or not there, and damage is seen when it is read."""

from __future__ import annotations

import numpy as np
import pytest

from patterning_dist.errors import PatterningError
from patterning_dist.storage.snapshots import Snapshots, pack, unpack
from patterning_dist.storage.store import LocalStorage


@pytest.fixture
def kept(tmp_path):
    """Snapshots 3 and 7 of one thing, what is said of damage, and the folder they are in."""
    said = []
    snapshots = Snapshots(LocalStorage(tmp_path), "shard-0", "chain-1", said.append)
    for number in (3, 7):
        snapshots.write(number, f"snapshot {number}".encode() * 100)
    return snapshots, said, tmp_path / "shard-0"


def file_of(folder, number):
    (file,) = folder.glob(f"chain-1.{number:012d}.*")
    return file


def test_what_was_written_is_read_by_another_process_of_the_same_folder(kept):
    snapshots, said, folder = kept
    other = Snapshots(LocalStorage(folder.parent), "shard-0", "chain-1")
    assert other.numbers() == [3, 7]
    assert other.newest() == (7, b"snapshot 7" * 100)
    assert snapshots.read(3) == b"snapshot 3" * 100
    assert said == []


def truncated(content):
    return content[:-1]


def emptied(content):
    return b""


def bit_flipped(content):
    return content[:500] + bytes([content[500] ^ 4]) + content[501:]


def lengthened(content):
    return content + b"\0"


@pytest.mark.parametrize("damage", [truncated, emptied, bit_flipped, lengthened])
def test_a_damaged_snapshot_is_said_and_the_one_before_is_used(kept, damage):
    snapshots, said, folder = kept
    file = file_of(folder, 7)
    file.write_bytes(damage(file.read_bytes()))
    assert snapshots.newest() == (3, b"snapshot 3" * 100)
    assert snapshots.read(7) is None
    assert said[0] == f"shard-0/{file.name} is damaged (its contents have another digest); it is not used"


def test_nothing_is_left_when_all_are_damaged(kept):
    snapshots, said, folder = kept
    for number in (3, 7):
        file_of(folder, number).write_bytes(b"nonsense")
    assert snapshots.newest() is None
    assert len(said) == 2


def test_a_missing_snapshot_is_no_damage(kept):
    snapshots, said, folder = kept
    assert snapshots.read(5) is None
    file_of(folder, 7).unlink()
    assert snapshots.newest() == (3, b"snapshot 3" * 100)
    assert Snapshots(LocalStorage(folder.parent), "nowhere", "chain-1").newest() is None
    assert said == []


def test_a_snapshot_takes_the_place_of_another_of_its_number_even_of_a_damaged_one(kept):
    snapshots, said, folder = kept
    file_of(folder, 7).write_bytes(b"nonsense")
    snapshots.write(7, b"again")
    assert snapshots.newest() == (7, b"again")
    assert file_of(folder, 7).read_bytes() == b"again"
    assert said == []


def test_of_two_of_one_number_a_damaged_one_does_not_hide_the_other(kept):
    snapshots, said, folder = kept
    left_over = folder / f"chain-1.{7:012d}.{'0' * 32}"  # a process died before it could delete it
    left_over.write_bytes(b"nonsense")
    assert snapshots.newest() == (7, b"snapshot 7" * 100)
    assert said == [f"shard-0/{left_over.name} is damaged (its contents have another digest); it is not used"]


def test_what_is_half_written_or_belongs_to_others_is_not_looked_at(kept):
    snapshots, _, folder = kept
    Snapshots(LocalStorage(folder.parent), "shard-0", "chain-11").write(9, b"another chain")
    (folder / f".chain-1.{9:012d}.{'0' * 32}.abc.tmp").write_bytes(b"half")
    (folder / "chain-1.note.txt").write_bytes(b"by hand")
    assert snapshots.numbers() == [3, 7]
    snapshots.delete()
    assert sorted(path.name[:8] for path in folder.iterdir()) == [".chain-1", "chain-1.", "chain-11"]


def test_older_ones_are_deleted_below_a_number(kept):
    snapshots, _, _ = kept
    snapshots.delete(below=7)
    assert snapshots.numbers() == [7]
    snapshots.delete()
    assert snapshots.newest() is None


def test_numbers_are_compared_as_numbers(kept):
    snapshots, _, _ = kept
    snapshots.write(10**12, b"large")  # one digit more than the names have
    assert snapshots.newest() == (10**12, b"large")


def test_a_folder_that_cannot_be_written_is_the_users_to_mend(tmp_path):
    (tmp_path / "shard-0").write_text("a file in the way")
    snapshots = Snapshots(LocalStorage(tmp_path), "shard-0", "chain-1")
    with pytest.raises(PatterningError, match=r"shard-0.*cannot be written.*run the same command again"):
        snapshots.write(1, b"content")


def test_packed_arrays_keep_their_bits():
    arrays = {
        "moments/mean": np.array([[np.pi, -0.0, np.inf, np.nan]]),
        "losses": np.arange(6, dtype=np.float32).reshape(2, 3),
        "empty": np.zeros((0, 4)),
        "header": np.array('{"run": "ü"}'),
    }
    found = unpack(pack(arrays))
    assert list(found) == list(arrays)
    for name, array in arrays.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        assert found[name].tobytes() == array.tobytes()


def test_nothing_is_unpickled():
    with pytest.raises(ValueError, match="allow_pickle"):
        unpack(pack({"code": np.array([print], dtype=object)}))
