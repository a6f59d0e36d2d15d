"""predict_raster: no seams, the georeference and nodata kept, memory bounded by a row of windows, errors that say
what to do.
"""

from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from rasterio.control import GroundControlPoint
from rasterio.transform import from_origin
from torch import Tensor

from in2nect.data.classes import Classes
from in2nect.prediction.scene import blend_weight, predict_raster

CLASSES = Classes(("low", "middle", "high"), ((255, 0, 0), (0, 255, 0), (0, 0, 255)))


def pixelwise(images: Tensor) -> Tensor:
    """Logits that depend on the pixel alone: brightness against three levels."""
    levels = torch.tensor([20.0, 128.0, 230.0], device=images.device).view(1, 3, 1, 1)
    return -(images.float().mean(1, keepdim=True) - levels).abs() / 10


def contextual(images: Tensor) -> Tensor:
    """Logits that depend on the position in the window: classes 0 and 1 are told apart at the rim alone."""
    logits = torch.zeros(len(images), 3, *images.shape[2:])
    logits[:, 0], logits[:, 1] = 1, 2
    logits[:, 0, :, 0] = 9
    return logits


def write(path: Path, image: np.ndarray, **profile: object) -> Path:
    count, height, width = image.shape
    shape = {"width": width, "height": height, "count": count, "dtype": image.dtype}
    with rasterio.open(path, "w", driver="GTiff", **shape, **profile) as raster:
        raster.write(image)
    return path


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (3, 123, 205), dtype=np.uint8)


@pytest.mark.parametrize(("window", "overlap"), [(64, 16), (64, 0), (50, 49), (512, 128), (123, 7)])
@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_pixelwise_model_predicts_as_on_the_whole_image(
    tmp_path: Path, image: np.ndarray, window: int, overlap: int
) -> None:
    source = write(tmp_path / "scene.tif", image)
    target = predict_raster(
        pixelwise, source, tmp_path / "codes.tif", classes=CLASSES, window=window, overlap=overlap, batch_size=3
    )
    with rasterio.open(target) as codes:
        found = codes.read(1)
    assert np.array_equal(found, pixelwise(torch.from_numpy(image)[None]).argmax(1)[0].numpy())


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_constant_model_gives_a_constant_and_rims_do_not_show(tmp_path: Path, image: np.ndarray) -> None:
    source = write(tmp_path / "scene.tif", image)
    target = predict_raster(
        contextual, source, tmp_path / "codes.tif", classes=CLASSES, window=64, overlap=16, batch_size=2
    )
    with rasterio.open(target) as codes:
        found = codes.read(1)
    assert (found[:, 1:] == 1).all()  # wrong at the left rim of every window; outvoted by the neighbour everywhere ...
    assert (found[:, 0] == 0).all()  # ... but at the left edge of the image, which has none


@pytest.mark.parametrize(("size", "overlap"), [(64, 16), (7, 3), (8, 0), (9, 8)])
def test_blend_weight_is_positive_and_symmetric(size: int, overlap: int) -> None:
    weight = blend_weight(size, size + 1, overlap)
    assert weight.min() > 0 and weight.max() <= 1
    assert torch.equal(weight, weight.flip(0, 1))


def test_neighbouring_weights_sum_to_one_at_the_nominal_stride() -> None:
    weight = blend_weight(64, 64, 16)[:, 32]
    torch.testing.assert_close(weight[-16:] + weight[:16], torch.ones(16), rtol=0, atol=1e-6)


def test_georeference_palette_and_nodata_are_kept(tmp_path: Path, image: np.ndarray) -> None:
    image[:, :30, :40] = 0
    transform = from_origin(792988.0, 2050382.0, 5.0, 5.0)
    source = write(tmp_path / "scene.tif", np.maximum(image, 1), crs="EPSG:32618", transform=transform)
    with rasterio.open(source, "r+") as raster:
        raster.nodata = 0
        raster.write(image)
    target = tmp_path / "deep" / "codes.tif"
    predict_raster(pixelwise, source, target, classes=CLASSES, window=64, overlap=16, colour_png=True)
    with rasterio.open(target) as codes:
        assert codes.crs == "EPSG:32618" and codes.transform == transform
        assert codes.nodata == 255 and codes.dtypes == ("uint8",)
        assert codes.block_shapes == [(256, 256)] and codes.compression.name == "deflate"
        assert codes.colormap(1)[2][:3] == (0, 0, 255)
        found = codes.read(1)
    black = (image == 0).all(0)
    assert (found[black] == 255).all() and black.sum() >= 1200
    assert (found[(image != 0).all(0)] != 255).all()
    assert sorted(path.name for path in target.parent.iterdir()) == ["codes.png", "codes.tif"]


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_jpeg_without_crs_and_chosen_bands(tmp_path: Path, image: np.ndarray) -> None:
    smooth = np.broadcast_to(np.linspace(0, 255, image.shape[2]).astype(np.uint8), image.shape)
    source = tmp_path / "photo.jpg"
    with rasterio.open(source, "w", driver="JPEG", width=205, height=123, count=3, dtype="uint8") as raster:
        raster.write(smooth)
    seen: list[int] = []

    def spy(images: Tensor) -> Tensor:
        seen.append(images.shape[1])
        return pixelwise(images)

    target = predict_raster(spy, source, tmp_path / "codes.tif", classes=CLASSES, window=64, overlap=16, bands=[3, 1])
    assert set(seen) == {2}
    with rasterio.open(target) as codes:
        assert codes.crs is None
        assert codes.read(1)[60, [2, 100, 202]].tolist() == [0, 1, 2]


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_memory_is_bounded_by_a_row_of_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor made on the way is larger than the scores of one row of windows, however tall the raster."""
    source = write(tmp_path / "tall.tif", np.zeros((3, 2000, 80), dtype=np.uint8))
    allocated: list[int] = []
    zeros = torch.zeros

    def counting(*size: int, **options: object) -> Tensor:
        tensor = zeros(*size, **options)  # type: ignore[call-overload]
        allocated.append(tensor.numel())
        return tensor

    monkeypatch.setattr(torch, "zeros", counting)
    written: list[tuple[int, int]] = []
    predict_raster(
        pixelwise,
        source,
        tmp_path / "codes.tif",
        classes=CLASSES,
        window=64,
        overlap=16,
        progress=lambda *done: written.append(done),
    )
    assert max(allocated) == 3 * 64 * 80
    assert written[-1] == (len(written), len(written)) and len(written) == 42


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_errors_say_what_to_do_and_leave_nothing_behind(tmp_path: Path, image: np.ndarray) -> None:
    source = write(tmp_path / "scene.tif", image)
    deep = write(tmp_path / "deep.tif", image.astype(np.uint16))
    target = tmp_path / "out" / "codes.tif"
    with pytest.raises(ValueError, match="overlap"):
        predict_raster(pixelwise, source, target, classes=CLASSES, window=64, overlap=64)
    with pytest.raises(ValueError, match="both source and target"):
        predict_raster(pixelwise, source, source, classes=CLASSES)
    with pytest.raises(ValueError, match="uint16; expected uint8"):
        predict_raster(pixelwise, deep, target, classes=CLASSES)
    with pytest.raises(ValueError, match="3 bands, and band 4"):
        predict_raster(pixelwise, source, target, classes=CLASSES, bands=[1, 4])
    with pytest.raises(ValueError, match=r"expected logits \(1, 3, 123, 205\)"):
        predict_raster(lambda images: images[:, :1, ::2], source, target, classes=CLASSES)
    assert list(target.parent.iterdir()) == []


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
def test_a_scene_without_georeference_gets_none(tmp_path: Path, image: np.ndarray) -> None:
    source = write(tmp_path / "scene.tif", image)
    predict_raster(pixelwise, source, tmp_path / "codes.tif", classes=CLASSES, window=64, overlap=16)
    with rasterio.open(tmp_path / "codes.tif") as codes:
        assert codes.crs is None and codes.transform == rasterio.Affine.identity()


def test_a_scene_that_is_cut_short_is_named_and_leaves_nothing(tmp_path: Path, image: np.ndarray) -> None:
    source = write(tmp_path / "scene.tif", image, crs="EPSG:32650", transform=from_origin(5e5, 3e6, 1, 1))
    source.write_bytes(source.read_bytes()[:-9000])
    target = tmp_path / "out" / "codes.tif"
    with pytest.raises(OSError, match=r"scene\.tif: cannot be read to its end \(.*fetch it anew, or take it out"):
        predict_raster(pixelwise, source, target, classes=CLASSES, window=64, overlap=16)
    assert list(target.parent.iterdir()) == []


def test_ground_control_points_are_kept(tmp_path: Path, image: np.ndarray) -> None:
    corners = [(0, 0), (0, 205), (123, 0)]
    points = [GroundControlPoint(row, col, 5e5 + col + 0.5 * row, 3e6 - row) for row, col in corners]
    source = write(tmp_path / "scene.tif", image, crs="EPSG:32650", gcps=points)
    target = predict_raster(pixelwise, source, tmp_path / "codes.tif", classes=CLASSES)
    with rasterio.open(target) as codes:
        found, system = codes.gcps
    assert system.to_string() == "EPSG:32650"
    assert [(p.row, p.col, p.x, p.y) for p in found] == [(p.row, p.col, p.x, p.y) for p in points]
