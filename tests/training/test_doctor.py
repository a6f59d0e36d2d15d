"""`in2nect doctor` tells versions, devices and backends, and notices a backend that computes something else."""

import pytest
import torch

from in2nect import native
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
    monkeypatch.setattr(doctor.functional, "intra_class_loss", lambda *given, **named: 1.01 * exact(*given, **named))
    assert doctor.main() == 1
    assert "DISAGREES" in capsys.readouterr().out


needs_cpp = pytest.mark.skipif(not native.available("cpp"), reason="the cpp operators are not built")


@needs_cpp
def test_tells_which_instructions_the_cpu_operators_use(capsys: pytest.CaptureFixture[str]) -> None:
    doctor.main()
    printed = capsys.readouterr().out
    assert f"runs as {native.cpu_capability()}; tested as {', '.join(native.available_cpu_capabilities())}" in printed


@needs_cpp
def test_names_the_estimator_and_the_build_that_are_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    exact = doctor.functional.intra_class_loss

    def wrong_as_portable(*given, estimator, **named):
        factor = float("nan") if estimator == "sampled" and native.cpu_capability() == "portable" else 1.0
        return factor * exact(*given, estimator=estimator, **named)

    monkeypatch.setattr(doctor.functional, "intra_class_loss", wrong_as_portable)
    monkeypatch.setattr(doctor, "BACKENDS", ("cpp",))
    monkeypatch.setattr(native, "available_cpu_capabilities", lambda: ["portable"])
    assert doctor.main() == 1
    assert "DISAGREES with the reference: sampled as portable in float32 (nan), sampled as" in capsys.readouterr().out


def test_tells_the_chips_of_the_cuda_operators(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "BACKENDS", ("cuda",))
    monkeypatch.setattr(doctor, "why_not", lambda name: None)
    monkeypatch.setattr(doctor, "self_test", lambda *given: {"exact": 0.0})
    monkeypatch.setattr(native, "cuda_targets", lambda: ["sm_86", "compute_90"])
    assert doctor.main() == 0
    assert "built for sm_86 compute_90" in capsys.readouterr().out
