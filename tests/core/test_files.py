"""Complete or absent: what happens when a write fails half-way."""

import resource

import pytest

from tunesmith.core.errors import CapacityError
from tunesmith.core.files import atomic_folder, folder_hash, write_text
from tunesmith.core.seed import stream


def fill(folder, text):
    with atomic_folder(folder) as aside:
        (aside / "a.txt").write_text(text)


def test_a_failing_block_leaves_the_older_folder_and_nothing_else(tmp_path):
    folder = tmp_path / "step"
    fill(folder, "old")
    with pytest.raises(ValueError, match="stop"), atomic_folder(folder) as aside:
        (aside / "a.txt").write_text("new")
        raise ValueError("stop")
    assert (folder / "a.txt").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["step"]


def test_a_finished_block_replaces_the_older_folder(tmp_path):
    folder = tmp_path / "step"
    fill(folder, "old")
    fill(folder, "new")
    assert (folder / "a.txt").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["step"]


@pytest.fixture
def small_disk():
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_a_capacity_error_and_the_old_file_stays(tmp_path, small_disk):
    file = tmp_path / "a.json"
    write_text(file, "old")
    with pytest.raises(CapacityError, match="disk is full"):
        write_text(file, "x" * 100_000)
    assert file.read_text() == "old"
    with pytest.raises(CapacityError, match="disk is full"):
        fill(tmp_path / "step", "x" * 100_000)
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_folder_hash_sees_names_and_bytes(tmp_path):
    (tmp_path / "a.py").write_text("1")
    first = folder_hash(tmp_path, (".py",))
    (tmp_path / "b.txt").write_text("not counted")
    assert folder_hash(tmp_path, (".py",)) == first
    (tmp_path / "a.py").rename(tmp_path / "c.py")
    assert folder_hash(tmp_path, (".py",)) != first


def test_streams_are_reproducible_and_independent():
    assert stream(0, "shuffle", 1).integers(1 << 60) == stream(0, "shuffle", 1).integers(1 << 60)
    drawn = {int(stream(s, name, epoch).integers(1 << 60)) for s in (0, 1) for name in ("a", "b") for epoch in (0, 1)}
    assert len(drawn) == 8
