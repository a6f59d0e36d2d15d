"""`in2nect fit | validate | test | predict`: LightningCLI over SegmentationModule and FolderDataModule, with one
folder for all that a run writes.
"""

import os
import shlex
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning
from jsonargparse.typing import NonNegativeInt
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

from in2nect.files import write_text
from in2nect.metrics.protocols import Protocol
from in2nect.models.files import SUFFIX, load_model, read_description
from in2nect.prediction.augmentation import AugmentationName
from in2nect.prediction.submission import SubmissionName
from in2nect.training.batch_norm import SyncBatchNorm
from in2nect.training.callbacks import ScoresTable, SubmissionWriter, progress, quieten
from in2nect.training.checkpoints import AtomicCheckpointIO, checkpoints
from in2nect.training.datamodule import FolderDataModule
from in2nect.training.events import EventLogger, quiet_writer
from in2nect.training.failures import Stopped, TrainingFailure
from in2nect.training.interruption import StopOnSignal
from in2nect.training.module import SegmentationModule
from in2nect.training.out_of_memory import out_of_memory
from in2nect.training.settings import PredictionSettings

_OUTPUT = "runs/fit"
_DESCRIPTION = "Trains, scores and uses segmentation networks. Examples of --config: configs/ of the repository."


def run(arguments: list[str]) -> None:
    """Runs a subcommand with its arguments, as given on the command line.

    Raises:
        ValueError, OSError, ImportError: what was given does not fit together; Lightning's own exception for that
            comes as a ValueError.
        TrainingFailure: the disk or the memory is full.
        FloatingPointError: a loss or a gradient is not finite.
    """
    quieten()
    try:
        TrainingCLI(
            SegmentationModule,
            FolderDataModule,
            args=with_run_config(arguments),
            parser_class=_Parser,
            trainer_defaults={"num_sanity_val_steps": 0, "log_every_n_steps": 5, "enable_model_summary": False},
            save_config_callback=RunConfig,
            parser_kwargs={"prog": "in2nect", "description": _DESCRIPTION},
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,  # the module stores its settings itself, as plain values
        )
    except MisconfigurationException as error:
        raise ValueError(str(error)) from error
    except Stopped as stop:
        rank_zero_only(print)(_how_to_go_on(stop, arguments))
    except SIGTERMException:  # of validate, test and predict, which are not resumed
        print("in2nect: stopped by SIGTERM", file=sys.stderr)
        sys.exit(128 + signal.SIGTERM)


def with_run_config(arguments: list[str]) -> list[str]:
    """Puts the configuration of the run that wrote the checkpoint in front, unless a configuration is given."""
    command, *rest = arguments
    checkpoint = _value(rest, "--ckpt_path")
    if checkpoint is None or _value(rest, "--config") or _value(rest, "-c"):
        return arguments
    path = _checkpoint(checkpoint, _value(rest, "--output") or _OUTPUT)
    folder = path.resolve().parent.parent
    config = folder / "config.yaml"
    return [command, "--config", str(config), "--output", str(folder), *rest] if config.is_file() else arguments


class TrainingCLI(LightningCLI):
    """Adds `output`, `prediction` and the seed to the configuration, and the callbacks and the logger of a run to the
    trainer.
    """

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--seed_everything", type=int, default=0, help="Seed of the weights, the crops and everything random."
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--output",
            type=str,
            default=_OUTPUT,
            help="Folder of the run: config.yaml, checkpoints/, TensorBoard's events, the scores of `test` "
            "(metrics_test.json, metrics_test.csv, confusion_test.png), predictions/, failed_batch.pt where a loss was "
            "not finite.",
        )
        parser.add_argument(
            "--protocol",
            type=Protocol,
            default="all",
            help="Which classes mIoU and AF are taken over: all; loveda, all of its 7; isprs, the 5 of its 6 that are "
            "not clutter (the labels must be the eroded ones). The confusion matrix and OA are always of all classes.",
        )
        parser.add_argument(
            "--tta",
            type=AugmentationName,
            default="none",
            help="Test-time augmentation of `test` and `predict`, averaged probabilities: none; flips, 4 views; paper, "
            "flips at the scales 0.5, 0.75, 1, 1.25 and 1.5, 20 views and 22.5 times the work.",
        )
        parser.add_argument(
            "--submission",
            type=SubmissionName | None,
            default=None,
            help="Of `predict`: also write the zip that a test server takes, to OUTPUT/submission_NAME.zip. loveda: "
            "the whole Test split.",
        )
        parser.add_argument(
            "--checkpoint_every",
            type=NonNegativeInt,
            default=0,
            help="Write last.ckpt also within an epoch, after every so many steps; a run that is killed goes on behind "
            "it. 0: at the end of every epoch alone. SIGTERM or Ctrl-C, once, writes it too, and stops the run.",
        )
        parser.add_argument(
            "--explain",
            action="store_true",
            help="Of `fit`: print what the training would be (data, network, losses, steps, devices, an estimate of "
            "its memory), and end without training. Nothing is written to OUTPUT, and no weights are downloaded.",
        )
        parser.add_class_arguments(PredictionSettings, "prediction")
        parser.link_arguments("seed_everything", "data.seed")

    def before_instantiate_classes(self) -> None:
        config, subcommand = self.config[self.subcommand], self.subcommand
        last = Path(config.output) / "checkpoints" / "last.ckpt"
        if config.explain:
            if subcommand != "fit":
                raise ValueError(f"--explain tells what `fit` would do; {subcommand} has nothing to explain")
            config.model.pretrained = False  # the numbers of the first weights do not matter
        elif subcommand == "fit" and config.ckpt_path is None and last.exists():
            raise ValueError(
                f"{last} is there already. Resume that run with --ckpt_path last, or give another folder with --output"
            )
        if subcommand != "fit":
            if config.ckpt_path is None:
                raise ValueError(f"{subcommand} needs trained weights; give --ckpt_path, for example {last}")
            config.model.pretrained = False  # the checkpoint brings every weight
            warnings.filterwarnings("ignore", ".*The dirpath has changed")  # no checkpoint is written
        for name in ("root", "classes"):  # config.yaml is read from other working directories too
            if config.data[name] is not None:
                config.data[name] = os.path.abspath(config.data[name])
        if config.data.layout.splits is not None:
            config.data.layout.splits = os.path.abspath(config.data.layout.splits)

    def _parse_ckpt_path(self) -> None:
        """Finds the checkpoint. To evaluate or predict, it says what the network is; for `fit` the module compares, so
        that nothing that was asked for is changed silently (as LightningCLI would).
        """
        config = self.config[self.config.subcommand]
        if config.ckpt_path is not None:
            config.ckpt_path = str(_checkpoint(config.ckpt_path, config.output))
        if _is_model_file(config.ckpt_path):
            self._parse_model_file()
        elif self.config.subcommand != "fit":
            super()._parse_ckpt_path()

    def _parse_model_file(self) -> None:
        config = self.config[self.config.subcommand]
        if self.config.subcommand == "fit":
            raise ValueError(
                f"{config.ckpt_path}: a model file holds what predictions need, and no state of a training; resume "
                "from last.ckpt"
            )
        description = read_description(config.ckpt_path)
        config.model.network, config.model.encoder = description.network, description.encoder
        config.model.in_channels = description.in_channels
        if config.data.bands is None:
            config.data.bands = description.bands

    def instantiate_trainer(self, **kwargs: Any) -> lightning.Trainer:
        output = Path(self._get(self.config_init, "output"))
        config = self._get(self.config_init, "trainer")
        kwargs.setdefault("default_root_dir", str(output))
        if config.get("logger") is None:
            kwargs.setdefault("logger", EventLogger(output, name="", version="", default_hp_metric=False))
        own: list[Callback] = [ScoresTable()]
        submission = self._get(self.config_init, "submission")
        if submission is not None and self.subcommand == "predict":
            own.append(SubmissionWriter(submission, output))
        if config.get("enable_progress_bar") is not False:
            own.append(progress())
        checkpointed = config.get("enable_checkpointing") is not False
        if checkpointed:
            own += checkpoints(output / "checkpoints", self._get(self.config_init, "checkpoint_every"))
        if self.subcommand == "fit":
            self._stop = StopOnSignal(output / "checkpoints" / "last.ckpt" if checkpointed else None)
            own.append(self._stop)
        callbacks, plugins = config.get("callbacks") or [], config.get("plugins") or []
        kwargs["callbacks"] = [*(callbacks if isinstance(callbacks, list) else [callbacks]), *own]
        own_plugins: list[Any] = [AtomicCheckpointIO(), *([SyncBatchNorm()] if config.get("sync_batchnorm") else [])]
        kwargs["plugins"] = [*(plugins if isinstance(plugins, list) else [plugins]), *own_plugins]
        if self.subcommand != "fit":
            self.save_config_callback = None  # the configuration that the run was trained with stays
        return super().instantiate_trainer(**kwargs)

    def after_instantiate_classes(self) -> None:
        prediction = self._get(self.config_init, "prediction")
        if prediction.bands is None:  # those that the network was trained on
            prediction = replace(prediction, bands=self.datamodule.bands)
        self.model.prediction = prediction
        self.model.protocol = self._get(self.config_init, "protocol")
        self.model.tta = self._get(self.config_init, "tta")
        path = self._get(self.config_init, "ckpt_path")
        if _is_model_file(path):
            self.model.adopt(*load_model(path))
            self.config_init[self.subcommand].ckpt_path = None  # for the trainer: nothing is left to load

    def fit(self, **options: Any) -> None:
        """Trainer.fit, which signals stop behind a step; or what it would do."""
        if not self._get(self.config_init, "explain"):
            with self._failures_told(), self._stop.listening(self.trainer):
                self.trainer.fit(**options)
        elif self.trainer.is_global_zero:
            from in2nect.training.explain import explain

            on_cpu = self._get(self.config_init, "trainer").get("accelerator") == "cpu"
            print(explain(self.trainer, self.model, self.datamodule, assume_gpu=not on_cpu))

    def validate(self, **options: Any) -> None:
        """Trainer.validate; ScoresTable prints the scores."""
        with self._failures_told():
            self.trainer.validate(**{**options, "verbose": False})

    def test(self, **options: Any) -> None:
        """Trainer.test; ScoresTable prints the scores."""
        with self._failures_told():
            self.trainer.test(**{**options, "verbose": False})

    def predict(self, **options: Any) -> None:
        """Trainer.predict, and the list of what it wrote."""
        with self._failures_told():
            for path in self.trainer.predict(**options) or []:
                print(path)

    @contextmanager
    def _failures_told(self) -> Iterator[None]:
        """Turns an error for lack of memory into advice; ends the other processes, which would wait for this one."""
        try:
            with quiet_writer():
                yield
        except Exception as error:
            launcher = self.trainer.strategy.launcher
            if launcher is not None and not isinstance(error, FloatingPointError):  # which all of them stop at
                launcher.kill(signal.SIGKILL)
            subcommand = self.config.subcommand
            told = out_of_memory(error, subcommand, vars(self.config[subcommand].as_flat()))
            if told is None:
                raise
            raise TrainingFailure(told) from error


class RunConfig(SaveConfigCallback):
    """Writes OUTPUT/config.yaml as the training starts: after a checkpoint was restored, so that a resume that fails
    leaves the file as it was.
    """

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Nothing: it is too early."""

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if trainer.is_global_zero:
            config = self.config.clone()
            config.ckpt_path = None  # where this call resumed from is no setting of the run
            del config["explain"]
            write_text(Path(config.output) / self.config_filename, self.parser.dump(config, skip_none=False))


def _how_to_go_on(stop: Stopped, arguments: list[str]) -> str:
    """What a stopped training has left, and the command line that goes on with it."""
    if stop.checkpoint is None:
        kept = "nothing was saved. Start again with"
        command = ["in2nect", *arguments]
    else:
        kept = f"{stop.checkpoint} holds it. Resume with"
        output = stop.checkpoint.parent.parent.absolute()
        command = ["in2nect", "fit", "--config", str(output / "config.yaml"), "--output", str(output)]
        command += ["--ckpt_path", "last"]
    return f"stopped by {stop.signal} {stop.when}: {kept}\n    {shlex.join(command)}"


class _Parser(LightningArgumentParser):
    def print_usage(self, file: Any = None) -> None:
        """Nothing: an error is told with the way to --help, not with a hundred lines of options."""


def _is_model_file(path: str | None) -> bool:
    return path is not None and Path(path).suffix == SUFFIX


def _checkpoint(given: str, output: str) -> Path:
    """The file that `--ckpt_path` means: a path, or last or best of the run in `output`."""
    path = Path(output) / "checkpoints" / f"{given}.ckpt" if given in ("last", "best") else Path(given)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such checkpoint; a run writes last.ckpt, best.ckpt and best{SUFFIX} to OUTPUT/checkpoints"
        )
    return path


def _value(arguments: list[str], name: str) -> str | None:
    """Value of an option given as `--name value` or `--name=value`; None where it is not given."""
    for position, argument in enumerate(arguments):
        if argument == name and position + 1 < len(arguments):
            return arguments[position + 1]
        if argument.startswith(f"{name}="):
            return argument.split("=", 1)[1]
    return None
