"""Files appear complete or not at all."""

import os
from pathlib import Path

import pytest

from in2nect.files import disk_error, replacing, write_json


def fail_half_way(target: Path) -> None:
    before = target.read_text()
    with replacing(target) as partial:
        partial.write_text("half of")
        assert target.read_text() == before and partial.suffix == target.suffix
        raise RuntimeError("half way")


def test_replaces_on_success_and_keeps_the_old_file_on_failure(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "scores.json"
    write_json(target, {"a": [1, None]})
    before = target.read_text()
    with pytest.raises(RuntimeError, match="half way"):
        fail_half_way(target)
    with pytest.raises(ValueError, match="JSON"):
        write_json(target, float("nan"))
    assert target.read_text() == before
    assert [path.name for path in target.parent.iterdir()] == ["scores.json"]


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="no /proc to name an open file by")
def test_a_file_reaches_the_disk_before_its_name_and_the_name_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    sync, rename = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        done.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).suffix or 'folder'}")
        sync(descriptor)

    def renamed(source: Path, target: Path) -> None:
        done.append("rename")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    write_json(tmp_path / "scores.json", {})
    assert done == ["sync .json", "rename", "sync folder"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full, whose every write finds the disk full")
def test_an_error_of_a_full_disk_names_the_file(tmp_path: Path) -> None:
    target = tmp_path / "scores.json"
    (tmp_path / f".scores.{os.getpid()}.partial.json").symlink_to("/dev/full")
    with pytest.raises(OSError, match=f"No space left on device: '{target}'") as raised:
        write_json(target, {})
    wrapped = RuntimeError("torch could not write")
    wrapped.__context__ = raised.value
    assert disk_error(wrapped) is raised.value and disk_error(RuntimeError("half way")) is None
    assert list(tmp_path.iterdir()) == []
