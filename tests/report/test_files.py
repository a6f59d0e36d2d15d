"""Files appear complete or not at all."""

from pathlib import Path

import pytest

from in2nect.report.files import replacing, write_json


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
