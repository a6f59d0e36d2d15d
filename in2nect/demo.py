"""`in2nect demo`: UNetFormer trained on a synthetic, long-tailed land cover with In2NeCT's losses and without, from
the same weights on the same crops, then scored, applied to a whole georeferenced scene, and shown in one picture and
one table.

On two CPU cores about five minutes, of which the two trainings take nine tenths. What is finished is kept: a second
call with the same settings trains nothing, and an interrupted training resumes from its last epoch.
"""

import json
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from in2nect.training.settings import TuningSettings

if TYPE_CHECKING:
    from in2nect.report.figures import RunFigures
    from in2nect.training.datamodule import FolderDataModule
    from in2nect.training.module import SegmentationModule

_STEPS_PER_EPOCH = 50  # what an interruption costs at most
_SCENES = {"train": 5, "val": 1, "test": 2}
# At label resolution, the paper's, the losses see 16 times as many rows and a step on a CPU takes twice as long.
_ARMS = {"without": TuningSettings(enabled=False), "with": TuningSettings(resolution="feature")}


@dataclass(frozen=True)
class DemoSettings:
    """Trains with and without In2NeCT's losses on synthetic scenes, and compares.

    Attributes:
        output: folder for everything that is written.
        steps: training steps of each of the two runs.
        batch_size: crops a step.
        crop_size: side of a crop in pixels.
        scene_size: side of a synthetic scene in pixels.
        encoder: timm name of the encoder.
        pretrained: the encoder's first weights, as `model.pretrained` of `in2nect fit`.
        lr: highest learning rate.
        seed: of the scenes, the weights and the crops.
    """

    output: str = "runs/demo"
    steps: int = 150
    batch_size: int = 8
    crop_size: int = 256
    scene_size: int = 1024
    encoder: str = "tf_efficientnet_lite0"
    pretrained: bool | str = "bundled"
    lr: float = 5e-4
    seed: int = 0


def main(arguments: Sequence[str] = ()) -> int:
    """Runs the demo with command-line arguments; returns 0."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog="in2nect demo", description=DemoSettings.__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_class_arguments(DemoSettings)
    run(DemoSettings(**vars(parser.parse_args([_with_underscores(argument) for argument in arguments]))))
    return 0


def run(settings: DemoSettings) -> dict[str, Any]:
    """Trains, scores, predicts and reports; returns what metrics.json holds."""
    from rich.console import Console

    from in2nect.data.synthetic import write_synthetic_dataset
    from in2nect.files import write_json, write_text
    from in2nect.report.tables import comparison_table
    from in2nect.training.callbacks import quieten

    quieten()
    started, output = time.monotonic(), Path(settings.output)
    print(f"{sum(_SCENES.values())} synthetic scenes in {output / 'data'} ...", flush=True)
    write_synthetic_dataset(output / "data", seed=settings.seed, size=settings.scene_size, **_SCENES)
    data = _data(settings)
    folders = {f"{name} In2NeCT": _train(settings, data, name, tuning) for name, tuning in _ARMS.items()}
    scores, figures = {}, {}
    for name, folder in folders.items():
        print(f"scoring and predicting {name} ...", flush=True)
        scores[name], figures[name] = _assess(folder, data, output / "predictions")
    _draw(output / "report.png", figures, scores, data)
    result = {"settings": asdict(settings), "runs": scores, "seconds": round(time.monotonic() - started, 1)}
    write_json(output / "metrics.json", result)
    write_text(output / "report.md", _markdown(settings, scores))
    Console().print(comparison_table(scores, "test scenes, %; collapse degrees: lower is nearer to full collapse"))
    for name in ("report.png", "report.md", "metrics.json", "predictions"):
        print(output / name)
    print(f"{result['seconds']} s")
    return result


def _with_underscores(argument: str) -> str:
    """--batch-size=8 is as good as --batch_size=8."""
    name, equals, value = argument.partition("=")
    return (name.replace("-", "_").replace("__", "--", 1) if name.startswith("--") else name) + equals + value


def _data(settings: DemoSettings) -> "FolderDataModule":
    from in2nect.training.datamodule import FolderDataModule

    return FolderDataModule(
        Path(settings.output) / "data",
        batch_size=settings.batch_size,
        crop_size=settings.crop_size,
        samples_per_epoch=min(settings.steps, _STEPS_PER_EPOCH) * settings.batch_size,
        seed=settings.seed,
    )


def _train(settings: DemoSettings, data: "FolderDataModule", name: str, tuning: TuningSettings) -> Path:
    """Trains one arm, or goes on with it, or leaves it as it is if it is finished; returns its folder."""
    import lightning
    from lightning.pytorch.loggers import TensorBoardLogger

    from in2nect import __version__
    from in2nect.files import write_json
    from in2nect.training.callbacks import progress
    from in2nect.training.checkpoints import AtomicCheckpointIO, last_checkpoint

    folder = Path(settings.output) / name
    marker, last = folder / "arm.json", folder / "checkpoints" / "last.ckpt"
    wanted = {"in2nect": __version__, "tuning": asdict(tuning), **asdict(settings)}
    del wanted["output"]  # a folder may be moved
    found = json.loads(marker.read_text()) if marker.is_file() else {}
    if found == {**wanted, "finished": True} and last.is_file():
        print(f"{folder}: trained already", flush=True)
        return folder
    if found != {**wanted, "finished": False}:
        _remove_arm(folder)
    write_json(marker, {**wanted, "finished": False})
    lightning.seed_everything(settings.seed, workers=True, verbose=False)
    trainer = lightning.Trainer(
        accelerator="auto",
        devices=1,
        max_steps=settings.steps,
        max_epochs=math.ceil(settings.steps / _STEPS_PER_EPOCH),
        limit_val_batches=0,
        log_every_n_steps=1,
        enable_model_summary=False,
        logger=TensorBoardLogger(folder, name="", version="", default_hp_metric=False),
        plugins=[AtomicCheckpointIO()],
        callbacks=[progress(), last_checkpoint(folder / "checkpoints")],
    )
    trainer.fit(_module(settings, tuning), datamodule=data, ckpt_path=last if last.is_file() else None)
    write_json(marker, {**wanted, "finished": True})
    return folder


def _remove_arm(folder: Path) -> None:
    """Removes what the demo itself trained with other settings, and nothing else."""
    if (folder / "arm.json").is_file():
        shutil.rmtree(folder)
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(
            f"{folder} is not empty and holds no arm.json, so the demo did not write it; give another --output or "
            "move it away"
        )


def _module(settings: DemoSettings, tuning: TuningSettings) -> "SegmentationModule":
    from in2nect.training.module import SegmentationModule
    from in2nect.training.settings import OptimizerSettings

    return SegmentationModule(
        encoder=settings.encoder,
        pretrained=settings.pretrained,
        tuning=tuning,
        optimizer=OptimizerSettings(lr=settings.lr),
    )


def _assess(folder: Path, data: "FolderDataModule", predictions: Path) -> tuple[dict[str, Any], "RunFigures"]:
    """Scores and collapse degrees over the test scenes, and the first of them predicted as a whole."""
    import rasterio
    import torch

    from in2nect.prediction import predict_raster
    from in2nect.report.figures import RunFigures
    from in2nect.report.history import read_scalars
    from in2nect.training.module import SegmentationModule

    module = SegmentationModule.load_from_checkpoint(folder / "checkpoints" / "last.ckpt", weights_only=True)
    module.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    scores, cosines = _score(module, data)
    target = predictions / f"{folder.name}.tif"
    predict_raster(module, _first_scene(data), target, classes=module.classes, device=module.device, colour_png=True)
    with rasterio.open(target) as raster:
        codes = raster.read(1)
    curves = {name.removeprefix("train/"): curve for name, curve in read_scalars(folder).items()}
    iou = [float("nan") if row["iou"] is None else row["iou"] for row in scores["classes"].values()]
    delta = scores["collapse"]["delta_inter"]
    return scores, RunFigures(codes, iou, scores["mean_iou"], curves, cosines, delta)


def _score(module: "SegmentationModule", data: "FolderDataModule") -> tuple[dict[str, Any], Any]:
    """Scores and collapse degrees, and the cosines between centred class means (K, K), over every test pixel."""
    import torch
    from torch.nn.functional import normalize

    from in2nect.functional import class_means
    from in2nect.metrics import CollapseMetrics, SegmentationMetrics

    names, ignored = module.classes.names, module.classes.ignore_index
    metrics = SegmentationMetrics(len(names), names, ignored).to(module.device)
    width = module.model.representation.width
    collapse = CollapseMetrics(len(names), width, ignore_index=ignored)
    sums, pixels = torch.zeros(len(names), width), torch.zeros(len(names))
    data.setup("test")
    with torch.inference_mode():
        for batch in data.test_dataloader():
            label = batch["label"].to(module.device)
            output = module.model.forward_training(module.normalise(batch["image"].to(module.device)))
            metrics.update(output.logits.argmax(1), label)
            collapse.update(output.features, label)
            means, counts = class_means(output.features, label, len(names), ignore_index=ignored, resolution="feature")
            sums += (means * counts[:, None]).cpu()
            pixels += counts.cpu()
    means = sums / pixels[:, None]
    directions = normalize(means - means.nanmean(0), dim=1)
    degrees = collapse.compute()
    return {**metrics.compute().to_dict(names), "collapse": degrees}, (directions @ directions.T).numpy()


def _first_scene(data: "FolderDataModule") -> Path:
    from in2nect.data.folder import split_images

    return split_images(data.root, "test")[0]


def _draw(
    target: Path, runs: "dict[str, RunFigures]", scores: dict[str, dict[str, Any]], data: "FolderDataModule"
) -> None:
    import rasterio

    from in2nect.data.folder import split_pairs
    from in2nect.report.figures import comparison_figure

    pair = split_pairs(data.root, "test")[0]
    with rasterio.open(pair.image) as image, rasterio.open(pair.label) as label:
        picture, codes = image.read().transpose(1, 2, 0), label.read(1)
    pixels = [row["pixels"] for row in next(iter(scores.values()))["classes"].values()]
    comparison_figure(
        target,
        image=picture,
        label=codes,
        runs=runs,
        frequencies=[count / sum(pixels) for count in pixels],
        classes=data.classes,
        title="Neural-collapse tuning on a synthetic, long-tailed land cover",
    )


def _markdown(settings: DemoSettings, scores: dict[str, dict[str, Any]]) -> str:
    from in2nect import __version__
    from in2nect.report.tables import comparison_markdown

    made = ", ".join(f"{name} {value}" for name, value in asdict(settings).items() if name != "output")
    return (
        "# With and without In2NeCT's losses\n\n![comparison](report.png)\n\n"
        "Per cent over all labelled pixels of the test scenes; a lower collapse degree is nearer to full collapse.\n\n"
        f"{comparison_markdown(scores)}\nin2nect {__version__}: {made}.\n"
    )
