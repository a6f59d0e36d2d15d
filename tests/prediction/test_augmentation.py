"""Test-time augmentation: what networks that do not mind it give, the mean as it is defined, any size, whole scenes."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from torch import Tensor

from in2nect.data.classes import Classes
from in2nect.models import create_model
from in2nect.prediction.augmentation import AugmentationName, View, class_probabilities, cost, views
from in2nect.prediction.scene import predict_raster
from in2nect.prediction.sizes import any_size, mirrored

CLASSES = Classes(("low", "middle", "high"), ((255, 0, 0), (0, 255, 0), (0, 0, 255)))
LEVELS = torch.tensor([20.0, 128.0, 230.0]).view(1, 3, 1, 1)


def pixelwise(images: Tensor) -> Tensor:
    """Depends on the pixel alone, so mirroring the image mirrors the logits."""
    return -(images.float().mean(1, keepdim=True) - LEVELS).abs() / 10


def lopsided(images: Tensor) -> Tensor:
    """Depends on the place too: nothing but the mean over the views makes it symmetric."""
    height, width = images.shape[2:]
    slope = torch.linspace(0, 2, height).view(1, 1, -1, 1) + torch.linspace(0, 3, width).view(1, 1, 1, -1)
    return pixelwise(images) + slope * torch.tensor([0.0, 1.0, -1.0]).view(1, 3, 1, 1)


@pytest.fixture
def images() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, 3, 37, 52), generator=generator, dtype=torch.uint8)


def test_sets_are_what_they_are_called() -> None:
    assert views("none") == (View(),)
    assert len(set(views("flips"))) == 4 and {view.scale for view in views("flips")} == {1.0}
    assert len(set(views("paper"))) == 20 and {view.scale for view in views("paper")} == {0.5, 0.75, 1.0, 1.25, 1.5}
    assert [cost(name) for name in ("none", "flips", "paper")] == [1, 4, 22.5]
    with pytest.raises(ValueError, match="'rotations'; expected one of none, flips, paper"):
        views("rotations")  # type: ignore[arg-type]


def test_without_augmentation_it_is_the_softmax(images: Tensor) -> None:
    assert torch.equal(class_probabilities(lopsided, images, 3), lopsided(images).softmax(1))


def test_flips_leave_an_equivariant_network_as_it_is(images: Tensor) -> None:
    assert torch.equal(class_probabilities(pixelwise, images, 3, "flips"), pixelwise(images).softmax(1))


@pytest.mark.parametrize("size", [(37, 52), (64, 64), (1, 1), (3, 200)])
def test_scales_leave_an_equivariant_network_as_it_is(size: tuple[int, int]) -> None:
    """On images of one colour scaling changes nothing, at any size."""
    colors = torch.tensor([[10, 20, 40], [200, 240, 250]], dtype=torch.uint8)
    images = colors.view(2, 3, 1, 1).expand(2, 3, *size)
    plain = pixelwise(images).softmax(1)
    torch.testing.assert_close(class_probabilities(pixelwise, images, 3, "paper"), plain, rtol=0, atol=1e-5)


def test_scales_find_the_same_classes_where_no_border_is_near() -> None:
    image = torch.full((1, 3, 64, 64), 20, dtype=torch.uint8)
    image[..., 32:] = 230
    found = class_probabilities(pixelwise, image, 3, "paper").argmax(1)
    assert (found[..., :30] == 0).all() and (found[..., 34:] == 2).all()


def test_flips_are_exactly_the_mean_of_the_four(images: Tensor) -> None:
    parts = [lopsided(images.flip(axes)).flip(axes).softmax(1) for axes in ((), (3,), (2,), (2, 3))]  # as added
    expected = (parts[0] + parts[1] + parts[2] + parts[3]) / 4
    found = class_probabilities(lopsided, images, 3, "flips")
    assert torch.equal(found, expected)
    assert not torch.allclose(found, parts[0])
    torch.testing.assert_close(found.sum(1), torch.ones(2, 37, 52))


def test_paper_sees_every_scale_and_flip_as_uint8(images: Tensor) -> None:
    seen: list[tuple[int, ...]] = []

    def spy(view: Tensor) -> Tensor:
        assert view.dtype == torch.uint8
        seen.append(tuple(view.shape[2:]))
        return pixelwise(view)

    found = class_probabilities(spy, images, 3, "paper")
    assert sorted(set(seen)) == [(18, 26), (28, 39), (37, 52), (46, 65), (56, 78)] and len(seen) == 20
    torch.testing.assert_close(found.sum(1), torch.ones(2, 37, 52))


@pytest.mark.parametrize("name", ["flips", "paper"])
def test_the_mean_is_symmetric_where_the_network_is_not(name: AugmentationName, images: Tensor) -> None:
    plain = class_probabilities(lopsided, images, 3, name)
    level = 1e-6 if name == "flips" else 1e-3  # a scaled pixel between two levels may be rounded to either
    for axes in ([2], [3], [2, 3]):
        found = class_probabilities(lopsided, images.flip(axes), 3, name).flip(axes)
        torch.testing.assert_close(found, plain, rtol=0, atol=level)


@pytest.mark.parametrize(("size", "multiple"), list(itertools.product([(1, 1), (37, 52), (64, 3)], [1, 8, 32])))
def test_any_size_mirrors_and_cuts(size: tuple[int, int], multiple: int) -> None:
    images = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8)

    def strict(view: Tensor) -> Tensor:
        assert view.shape[2] % multiple == 0 and view.shape[3] % multiple == 0
        return pixelwise(view)

    assert torch.equal(any_size(strict, multiple)(images), pixelwise(images))
    found = class_probabilities(any_size(strict, multiple), images, 3, "paper")
    assert found.shape == (2, 3, *size) and found.isfinite().all()


def test_reflection_is_numpys() -> None:
    images = torch.arange(7, dtype=torch.uint8).view(1, 1, 1, 7).expand(1, 1, 5, 7)
    expected = np.pad(images.numpy(), [(0, 0), (0, 0), (0, 11), (0, 9)], mode="reflect")
    assert np.array_equal(mirrored(images, 16).numpy(), expected)
    assert mirrored(images, 1) is images
    with pytest.raises(ValueError, match="a multiple of 0; expected 1 or more"):
        any_size(pixelwise, 0)


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
@pytest.mark.parametrize("window", [48, 512])
def test_windows_on_a_whole_scene(window: int, tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (3, 123, 205), dtype=np.uint8)
    with rasterio.open(
        tmp_path / "scene.tif", "w", driver="GTiff", width=205, height=123, count=3, dtype="uint8"
    ) as raster:
        raster.write(image)
    options = {"classes": CLASSES, "window": window, "overlap": 16, "batch_size": 3}
    found = {}
    for name in ("none", "flips", "paper"):
        target = predict_raster(pixelwise, tmp_path / "scene.tif", tmp_path / f"{name}.tif", tta=name, **options)  # type: ignore[arg-type]
        with rasterio.open(target) as codes:
            found[name] = codes.read(1)
    assert np.array_equal(found["flips"], found["none"])
    assert found["paper"].shape == (123, 205) and found["paper"].max() < 3
    whole = class_probabilities(pixelwise, torch.from_numpy(image)[None], 3, "paper").argmax(1)[0].numpy()
    assert (found["paper"] == whole).mean() > (0.95 if window == 48 else 0.999)  # the rims of windows see less
    with pytest.raises(ValueError, match="expected one of none, flips, paper"):
        predict_raster(pixelwise, tmp_path / "scene.tif", tmp_path / "x.tif", classes=CLASSES, tta="all")  # type: ignore[arg-type]


def test_a_real_network_takes_every_view() -> None:
    torch.manual_seed(0)
    network = create_model("unetformer", 3, encoder="test_efficientnet").eval()
    images = torch.randint(0, 256, (1, 3, 61, 90), dtype=torch.uint8)
    with torch.inference_mode():
        found = class_probabilities(lambda view: network(view / 255), images, 3, "paper")
    assert found.shape == (1, 3, 61, 90) and found.isfinite().all()


def test_logits_of_another_shape_are_an_error(images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"expected logits \(2, 4, 37, 52\)"):
        class_probabilities(pixelwise, images, 4, "flips")
