"""`in2nect doctor` tells versions, devices and backends, and notices a backend that computes something else."""

import pytest
import torch

from in2nect.training import doctor


def test_reports_and_is_content(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main() == 0
    printed = capsys.readouterr().out
    assert torch.__version__ in printed
    for name in ("reference", "cpp", "cuda", "triton"):
        assert f"  {name} " in printed
    assert "ok on cpu" in printed


def test_a_backend_that_is_wrong_is_an_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    exact = doctor.functional.intra_class_loss
    monkeypatch.setattr(doctor.functional, "intra_class_loss", lambda *given: 1.01 * exact(*given))
    assert doctor.main() == 1
    assert "DISAGREES" in capsys.readouterr().out
