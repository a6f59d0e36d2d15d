"""What a training does when it is stopped, killed, out of disk or memory, or meets a number that is not finite."""

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from in2nect.training import reproduce
from in2nect.training.cli import main
from in2nect.training.out_of_memory import out_of_memory

HERE = Path(__file__).parent
# Eight batches an epoch, two a step; a validation of two batches after every fourth. Dropout is on.
SETTINGS = [
    "--data.crop_size=64",
    "--data.batch_size=2",
    "--data.samples_per_epoch=16",
    "--data.eval_window=48",
    "--data.eval_overlap=16",
    "--data.sampling=dominance",
    "--model.encoder=test_efficientnet",
    "--model.tuning.estimator=sampled",
    "--model.tuning.per_class=50",
    "--model.tuning.projection=8",
    "--trainer.accumulate_grad_batches=2",
    "--trainer.val_check_interval=4",
    "--trainer.gradient_clip_val=1",
    "--trainer.max_epochs=3",
    "--trainer.accelerator=cpu",
]
Fault = dict[str, Any]


def fit(dataset: Path, output: Path, *more: str) -> list[str]:
    return ["fit", f"--data.root={dataset}", f"--output={output}", *SETTINGS, *more]


def callbacks(*faults: tuple[str, Fault]) -> list[str]:
    arguments = ["--trainer.callbacks=null"]
    for name, options in faults:
        arguments.append(f"--trainer.callbacks+=kill.{name}")
        arguments += [f"--trainer.callbacks.{option}={value}" for option, value in options.items()]
    return arguments


def diary(target: Path) -> tuple[str, Fault]:
    return "Diary", {"target": target}


@pytest.fixture(autouse=True)
def _callbacks_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(HERE)


@pytest.fixture(scope="module")
def whole(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happens to."""
    output = tmp_path_factory.mktemp("runs") / "whole"
    sys.path.insert(0, str(HERE))
    assert main(fit(dataset, output, *callbacks(diary(output.parent / "diary")))) == 0
    sys.path.remove(str(HERE))
    return output


def test_stopped_anywhere_a_run_ends_as_if_it_had_not_been(
    whole: Path, dataset: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Seven stops, each of the run that the one before was resumed to: among accumulated batches, before and within a
    validation in an epoch and at its end, between two epochs, and by Ctrl-C.
    """
    output, written = tmp_path / "a run", tmp_path / "diary"
    stops: list[tuple[Fault, int]] = [
        ({"hook": "train", "epoch": 0, "batch": 0}, 1),
        ({"hook": "train", "epoch": 0, "batch": 3}, 2),
        ({"hook": "validation", "epoch": 0, "batch": 0}, 2),
        ({"hook": "train", "epoch": 0, "batch": 7, "name": "SIGINT"}, 4),
        ({"hook": "validation", "epoch": 0, "batch": 0}, 4),
        ({"hook": "epoch_end", "epoch": 0}, 4),
        ({"hook": "train", "epoch": 1, "batch": 4}, 7),
    ]
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    arguments = fit(dataset, output)
    for place, step in stops:
        assert main([*arguments, *callbacks(diary(written), ("SignalAt", place))]) == 0
        told = capfd.readouterr()
        assert "stopping behind this step" in told.err
        assert f"stopped by {place.get('name', 'SIGTERM')} after step {step} " in told.out
        line = told.out.splitlines()[-1].strip()
        assert line == f"in2nect fit --config '{output}/config.yaml' --output '{output}' --ckpt_path last"
        assert load(output)["global_step"] == step
        arguments = shlex.split(line)[1:]
    assert main([*arguments, *callbacks(diary(written))]) == 0
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert written.read_text() == (whole.parent / "diary").read_text()
    assert_same_end(output, whole)


def test_killed_in_a_validation_and_among_accumulated_batches(whole: Path, dataset: Path, tmp_path: Path) -> None:
    """kill -9 among accumulated batches, behind the first of which nothing may be written, also not by a run that is
    resumed there; then in a validation, which last.ckpt says is still to come.
    """
    output, written = tmp_path / "run", tmp_path / "diary"
    arguments = fit(dataset, output, "--checkpoint_every=1")
    for hook, batch, step in (("train", 3, 1), ("train", 3, 1), ("validation", 1, 2)):
        place = {"hook": hook, "epoch": 0, "batch": batch, "name": "SIGKILL"}
        killed = command([*arguments, *callbacks(diary(written), ("SignalAt", place))])
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert load(output)["global_step"] == step
        lines = written.read_text().splitlines(keepends=True)
        written.write_text("".join(lines[: 2 * step]))  # up to the batch of last.ckpt
        arguments = ["fit", f"--output={output}", "--ckpt_path=last"]
    assert main([*arguments, *callbacks(diary(written))]) == 0
    assert written.read_text() == (whole.parent / "diary").read_text()
    assert_same_end(output, whole)


def test_a_stop_before_the_first_step_has_nothing_to_save(
    dataset: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = [*fit(dataset, tmp_path / "run"), *callbacks(("SignalAt", {"hook": "setup", "epoch": 0}))]
    assert main(arguments) == 0
    told = capfd.readouterr().out
    assert "stopped by SIGTERM before the first step: nothing was saved. Start again with" in told
    assert shlex.split(told.splitlines()[-1]) == ["in2nect", *arguments]


def test_a_signal_to_the_group_stops_it_and_a_second_one_kills(dataset: Path, tmp_path: Path) -> None:
    """Workers that read ahead do not die of it: the step is ended with what they have read."""
    output = tmp_path / "run"
    workers = ["--data.num_workers=1", "--trainer.limit_val_batches=0"]
    group = callbacks(("SignalAt", {"hook": "train", "epoch": 0, "batch": 2, "to": "group"}))
    stopped = command([*fit(dataset, output, *workers), *group])
    assert stopped.returncode == 0, stopped.stderr
    assert "stopped by SIGTERM after step 2 (epoch 1)" in stopped.stdout and load(output)["global_step"] == 2
    twice = callbacks(("SignalAt", {"hook": "train", "epoch": 0, "batch": 5, "to": "twice"}))
    killed = command(["fit", f"--output={output}", "--ckpt_path=last", *twice])
    assert killed.returncode == -signal.SIGTERM and load(output)["global_step"] == 2


def test_processes_stop_together(dataset: Path, tmp_path: Path) -> None:
    """Two of them: the second is told to stop; resumed, it meets a weight that is not finite."""
    output, two = tmp_path / "run", "--trainer.devices=2"
    stop = callbacks(("SignalAt", {"hook": "train", "epoch": 0, "batch": 0, "rank": 1}))
    stopped = command([*fit(dataset, output, two), *stop])
    assert stopped.returncode == 0, stopped.stderr
    assert stopped.stdout.count("--ckpt_path last") == 1 and load(output)["global_step"] == 1
    poison = {"step": 1, "weight": "criterion.projection.0.weight", "value": ".nan", "rank": 1}
    failed = command(["fit", f"--output={output}", "--ckpt_path=last", *callbacks(("PoisonAt", poison))])
    assert failed.returncode == 1, failed.stderr
    assert "step 1 (epoch 1, batch 3, process 1): total is nan, inter is nan" in failed.stderr
    # The class means are those of both processes, and so is what is not finite; each keeps its own batch.
    assert "step 1 (epoch 1, batch 3, process 0): total is nan, inter is nan" in failed.stderr
    assert {path.name for path in output.glob("failed_batch*")} == {"failed_batch.pt", "failed_batch_1.pt"}


@pytest.mark.parametrize("kind", ["tmpfs", "largest file"])
def test_a_full_disk_leaves_the_last_good_checkpoint(kind: str, whole: Path, dataset: Path, tmp_path: Path) -> None:
    """In the second epoch there is no room for a checkpoint; with the limit, not for TensorBoard's events either."""
    output = tmp_path / "run"
    less = ["--trainer.val_check_interval=1.0", "--trainer.log_every_n_steps=1"]
    if kind == "tmpfs":
        size = (whole / "checkpoints" / "last.ckpt").stat().st_size
        done = command(fit(dataset, output, *less), mounted=output, size=int(2.5 * size))
    else:
        limit = callbacks(("SmallFiles", {"epoch": 1, "most": 200}))
        done = command([*fit(dataset, output, *less), *limit])
        assert done.stderr.count("TensorBoard's events could not be written: File too large") == 1
    assert done.returncode == 1, done.stderr
    why = {"tmpfs": "No space left on device", "largest file": "File too large"}[kind]
    refused = rf"(best|last)\.ckpt: the checkpoint of step 8 could not be written: {why}\. It takes [\d.]+ MB, beside"
    assert re.search(refused, done.stderr), done.stderr
    assert f"The last good checkpoint is {output}/checkpoints/last.ckpt of step 4. Make room, then go on" in done.stderr
    assert "Traceback" not in done.stderr
    kept = {"best.ckpt", "best.json", "best.safetensors", "last.ckpt"}
    assert {path.name for path in (output / "checkpoints").iterdir()} == kept
    assert load(output)["global_step"] == load(output, "best")["global_step"] == 4


def test_a_loss_that_is_not_finite_is_told_with_its_batch_and_computed_again(
    whole: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    poison = {"step": 7, "weight": "criterion.projection.0.weight", "value": "1e38"}
    assert main([*fit(dataset, output), *callbacks(("PoisonAt", poison))]) == 1
    told = capsys.readouterr().err
    assert "step 7 (epoch 2, batch 7): total is nan" in told
    file = output / "failed_batch.pt"
    assert f"{dataset}/images/scene" in told and f"python -m in2nect.training.reproduce {file}`" in told
    assert load(output)["global_step"] == 4
    content = torch.load(file, weights_only=True)
    assert content["failed_batch"]["image"].dtype == torch.uint8 and len(content["failed_batch"]["files"]) == 2
    assert file.stat().st_size < 1e7
    assert reproduce.main([str(file)]) == 0
    told = capsys.readouterr().out
    assert "step 7 (epoch 2, batch 7, process 0)" in told
    seen = content["failed_batch"]["terms"]["seg"]
    assert f"seg    {seen:.6g} in training, {seen:.6g} here" in told  # dropout was drawn as in training
    assert "first not finite: the output of criterion.projection." in told
    assert reproduce.main([str(output / "checkpoints" / "last.ckpt")]) == 2
    assert "not a batch that a training stopped at" in capsys.readouterr().err


def test_a_gradient_that_is_not_finite_does_not_reach_the_weights(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    poison = {"step": 1, "weight": "criterion.projection.0.weight", "value": ".inf", "gradient": "true"}
    assert main([*fit(dataset, tmp_path / "run"), *callbacks(("PoisonAt", poison))]) == 1
    told = capsys.readouterr().err
    assert "step 1 (epoch 1, batch 4): the norm of the gradient is inf" in told
    weights = torch.load(tmp_path / "run" / "failed_batch.pt", weights_only=True)["state_dict"]
    assert all(torch.isfinite(value).all() for value in weights.values())
    assert reproduce.main([str(tmp_path / "run" / "failed_batch.pt")]) == 1  # the hook is not in the file


@pytest.mark.parametrize(
    ("fault", "messages"),
    [
        (
            ("RaiseAt", {"kind": "device"}),
            (
                "Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.00 GiB of which 1.21 GiB is free.",
                "data.batch_size (now 2), with trainer.accumulate_grad_batches (now 2) raised as much; "
                "trainer.precision=bf16-mixed; ",
                "data.crop_size (now 64)",
            ),
        ),
        (("RaiseAt", {"kind": "host"}), ("the memory of the machine ran out", "9000000000 bytes", "data.batch_size")),
        (("KillWorker", {}), ("DataLoader worker (pid", "Lower data.num_workers (now 1)")),
    ],
)
def test_memory_that_runs_out_is_answered_with_what_to_lower(
    fault: tuple[str, Fault],
    messages: tuple[str, ...],
    dataset: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([*fit(dataset, tmp_path / "run", "--data.num_workers=1"), *callbacks(fault)]) == 1
    told = capsys.readouterr().err
    assert all(message in told for message in messages) and "Traceback" not in told, told


def test_what_to_lower_is_that_of_the_subcommand() -> None:
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.")
    config = {"data.batch_size": 8, "data.eval_window": 1024, "prediction.batch_size": 4, "prediction.window": 512}
    told = out_of_memory(error, "predict", config)
    assert told is not None and told.endswith("prediction.batch_size (now 4); prediction.window (now 512)")
    told = out_of_memory(error, "test", config)
    assert told is not None and told.endswith("data.batch_size (now 8); data.eval_window (now 1024)")
    assert out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"), "fit", config) is None


def load(output: Path, name: str = "last") -> dict[str, Any]:
    return torch.load(output / "checkpoints" / f"{name}.ckpt", weights_only=True)


def assert_same_end(output: Path, whole: Path) -> None:
    """Bit for bit: weights, optimiser, schedule, and what is known of the best checkpoint."""
    for name in ("last", "best"):
        found, expected = load(output, name), load(whole, name)
        assert found["global_step"] == expected["global_step"]
        torch.testing.assert_close(found["state_dict"], expected["state_dict"], rtol=0, atol=0)
        for ours, theirs in zip(found["optimizer_states"], expected["optimizer_states"], strict=True):
            assert ours["param_groups"] == theirs["param_groups"]
            torch.testing.assert_close(ours["state"], theirs["state"], rtol=0, atol=0)
        assert found["lr_schedulers"] == expected["lr_schedulers"]
        best = [
            next(state for key, state in checkpoint["callbacks"].items() if "val/mean_iou" in key)["best_model_score"]
            for checkpoint in (found, expected)
        ]
        assert torch.equal(*best)
    assert found["global_step"] == load(whole, "best")["global_step"]


def command(arguments: list[str], *, mounted: Path | None = None, size: int = 0) -> subprocess.CompletedProcess[str]:
    """`in2nect ...` in a process group of its own; `mounted` is a file system of `size` bytes for it alone, which the
    test finds copied there.
    """
    line = [sys.executable, "-m", "in2nect.training.cli", *arguments]
    if mounted is not None:
        mounted.mkdir()
        kept = mounted.with_name("kept")
        mount = f"mount -t tmpfs -o size={size} tmpfs {shlex.quote(str(mounted))}"
        if subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True).returncode:
            pytest.skip("a user may not mount a file system here (unshare -rm)")
        script = f"{mount} && {{ {shlex.join(line)}; code=$?; cp -a {mounted} {kept}; exit $code; }}"
        line = ["unshare", "-rm", "sh", "-c", script]
    path = os.pathsep.join([str(HERE.parents[1]), str(HERE), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=240, start_new_session=True)
    if mounted is not None:
        mounted.rmdir()
        kept.rename(mounted)
    return done
