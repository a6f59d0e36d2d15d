"""Training crops: pure in (seed, epoch, index), image and label aligned whatever is done to them, padding ignored."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from in2nect.data.classes import Classes
from in2nect.data.crops import Augmentations, CropDataset, CropLoader, CropSampler, collate
from in2nect.data.folder import split_pairs

PLAIN = Augmentations(scales=(1.0,), horizontal_flip=False, vertical_flip=False, quarter_turns=False)


def crops(root: Path, classes: Classes, augmentations: Augmentations | None = None, **options: int) -> CropDataset:
    options = {"crop_size": 48, "length": 12, "seed": 3, **options}
    return CropDataset(split_pairs(root, "train"), classes, augmentations=augmentations, **options)


def disagreement(image: Tensor, label: Tensor, ignore_index: int) -> float:
    """Share of labelled pixels whose image, which holds 100 * label in band 0, is nearer to another class."""
    seen = label != ignore_index
    return ((image[0].float() / 100).round()[seen] != label[seen]).float().mean().item()


def test_a_crop_is_a_function_of_seed_epoch_and_index(make_folder, classes: Classes) -> None:
    root = make_folder([(120, 150), (90, 70)], ["train", "train"])
    first, second = crops(root, classes), crops(root, classes)
    second[40], second[7]
    torch.manual_seed(99)
    for item in (0, 7, 12, 25):
        for key in ("image", "label", "window"):
            assert torch.equal(first[item][key], second[item][key])
    other_seed = crops(root, classes, seed=4)
    assert not all(torch.equal(first[item]["image"], other_seed[item]["image"]) for item in range(12))
    assert not all(torch.equal(first[item]["image"], first[item + 12]["image"]) for item in range(12))


def test_sample_form(make_folder, classes: Classes) -> None:
    sample = crops(make_folder([(120, 150)], ["train"]), classes)[5]
    assert sample["image"].shape == (3, 48, 48)
    assert sample["image"].dtype == sample["label"].dtype == torch.uint8
    assert sample["label"].shape == (48, 48)
    assert type(sample["image"]) is type(sample["label"]) is Tensor
    assert sample["name"] == "part0"
    batch = collate([sample, sample])
    assert batch["image"].shape == (2, 3, 48, 48)
    assert batch["window"].shape == (2, 4)
    assert batch["name"] == ["part0", "part0"]


@pytest.mark.parametrize(
    ("augmentations", "bound"),
    [
        (PLAIN, 0.0),
        (Augmentations(scales=(1.0,)), 0.0),
        # Resampling blurs the image over the edges of 16-pixel squares; a label one pixel off errs on 6 % and more.
        (Augmentations(scales=(0.5, 0.75, 1.25, 1.5)), 0.05),
        (Augmentations(scales=(1.0,), rotation=45.0), 0.05),
    ],
)
def test_image_and_label_stay_aligned(
    make_folder, classes: Classes, augmentations: Augmentations, bound: float
) -> None:
    dataset = crops(make_folder([(200, 220)], ["train"]), classes, augmentations, crop_size=64)
    errors = [disagreement(dataset[i]["image"], dataset[i]["label"], classes.ignore_index) for i in range(24)]
    assert np.mean(errors) <= bound
    shifted = [disagreement(dataset[i]["image"], dataset[i]["label"].roll(3, 1), 255) for i in range(24)]
    assert np.mean(shifted) > 2 * bound + 0.05


def test_window_names_the_ground_that_was_read(make_folder, classes: Classes) -> None:
    dataset = crops(make_folder([(200, 220)], ["train"]), classes, PLAIN)
    row, col, height, width = dataset[3]["window"].tolist()
    image = dataset[3]["image"]
    assert (height, width) == (48, 48)
    assert image[1, :, 0].tolist() == [r * 255 // 200 for r in range(row, row + 48)]
    assert image[2, 0, :].tolist() == [c * 255 // 220 for c in range(col, col + 48)]


def test_scale_reads_more_or_less_ground(make_folder, classes: Classes) -> None:
    root = make_folder([(200, 220)], ["train"])
    for scale, side in ((0.5, 96), (0.75, 64), (1.5, 32)):
        sample = crops(root, classes, Augmentations(scales=(scale,)))[0]
        assert sample["window"][2:].tolist() == [side, side]
        assert sample["image"].shape == (3, 48, 48)


def test_every_flip_and_turn_occurs(make_folder, classes: Classes) -> None:
    """Rows grow in band 1 and columns in band 2, so their gradients tell the orientation: eight of them."""
    dataset = crops(make_folder([(200, 200)], ["train"]), classes, Augmentations(scales=(1.0,)), length=80)
    orientations = set()
    for item in range(80):
        _, rows, cols = dataset[item]["image"].float()
        change = [(band[-1, -1] - band[0, -1], band[-1, -1] - band[-1, 0]) for band in (rows, cols)]
        orientations.add(tuple(int(torch.sign(value)) for pair in change for value in pair))
    assert len(orientations) == 8


def test_rotation_leaves_no_empty_corner(make_folder, classes: Classes) -> None:
    dataset = crops(make_folder([(400, 400)], ["train"]), classes, Augmentations(scales=(1.0,), rotation=180.0))
    for item in range(12):
        assert (dataset[item]["label"] != classes.ignore_index).all()


@pytest.mark.parametrize("size", [(30, 90), (30, 20), (1, 1)])
def test_padding_is_never_labelled(make_folder, classes: Classes, size: tuple[int, int]) -> None:
    dataset = crops(make_folder([size], ["train"]), classes, PLAIN, length=40)
    for item in range(40):
        label = dataset[item]["label"]
        assert (label != classes.ignore_index).sum() == min(size[0], 48) * min(size[1], 48)
        assert disagreement(dataset[item]["image"], label, classes.ignore_index) == 0


def test_pixels_are_drawn_in_proportion_to_area(make_folder, classes: Classes) -> None:
    dataset = crops(make_folder([(60, 60), (180, 60)], ["train"] * 2), classes, PLAIN, length=600, crop_size=16)
    share = np.mean([dataset[item]["name"] == "part1" for item in range(600)])
    assert share == pytest.approx(0.75, abs=0.055)  # three standard deviations of 600 draws
    rows = [int(dataset[item]["window"][0]) for item in range(600) if dataset[item]["name"] == "part1"]
    assert (min(rows), max(rows)) < (5, 165)
    assert max(rows) > 158


def test_foreign_codes_stop_the_training(make_folder, classes: Classes, write_raster) -> None:
    root = make_folder([(60, 60)], ["train"])
    write_raster(root / "labels" / "part0.png", np.full((60, 60), 9, np.uint8))
    with pytest.raises(ValueError, match=r"part0\.png: code 9 on 3600 pixels, one at row 0, column 0"):
        crops(root, classes)[0]


def test_sampler_counts_on_from_epoch_to_epoch() -> None:
    sampler = CropSampler(5)
    assert (len(sampler), list(sampler)) == (5, [0, 1, 2, 3, 4])
    sampler.set_epoch(3)
    assert list(sampler) == [15, 16, 17, 18, 19]


def test_sampler_deals_an_epoch_out_to_the_processes() -> None:
    shares = []
    for rank in range(3):
        sampler = CropSampler(11, rank=rank, world_size=3)
        sampler.set_epoch(2)
        shares.append(list(sampler))
        assert len(shares[-1]) == len(sampler) == 3
    assert sorted(number for share in shares for number in share) == list(range(22, 31))
    with pytest.raises(ValueError, match="length 2 for 3 processes"):
        CropSampler(2, world_size=3)


def test_the_loader_goes_on_within_the_epoch_of_its_state(make_folder, classes: Classes) -> None:
    dataset = crops(make_folder([(120, 150)], ["train"]), classes, length=11)

    def loader(batch_size: int = 2, epoch: int = 3, processes: int = 1) -> CropLoader:
        sampler = CropSampler(11, world_size=processes)
        sampler.set_epoch(epoch)
        return CropLoader(dataset, sampler=sampler, batch_size=batch_size, collate_fn=collate)

    whole = [batch["image"] for batch in loader()]
    begun = loader()
    batches = iter(begun)
    for _ in range(3):
        next(batches)
    state = begun.state_dict()
    assert state == {"epoch": 3, "batches": 3, "batch_size": 2, "samples_per_epoch": 11, "processes": 1}
    resumed = loader()
    resumed.load_state_dict(state)
    assert all(torch.equal(a, b["image"]) for a, b in zip(whole[3:], resumed, strict=True))
    assert resumed.state_dict()["batches"] == 5
    assert len(list(resumed)) == 5  # the next epoch is whole
    other_epoch = loader(batch_size=4, epoch=4)
    other_epoch.load_state_dict(state)
    assert len(list(other_epoch)) == 2
    for changed, told in ((loader(batch_size=4), "batch_size was 2 and is 4"), (loader(processes=2), "processes was")):
        changed.load_state_dict(state)
        with pytest.raises(ValueError, match=f"within an epoch of other batches: {told}"):
            next(iter(changed))


JITTER = {"brightness": 0.3, "contrast": 0.3, "saturation": 0.3, "hue": 0.1}


def jittered(root: Path, classes: Classes, **jitter: float) -> CropDataset:
    """As PLAIN, with jitter."""
    options = Augmentations((1.0,), horizontal_flip=False, vertical_flip=False, quarter_turns=False, **jitter)
    return crops(root, classes, options)


@pytest.mark.parametrize("name", sorted(JITTER))
def test_jitter_changes_the_image_alone(make_folder, classes: Classes, name: str) -> None:
    root = make_folder([(120, 150)], ["train"])
    plain, changed = crops(root, classes, PLAIN), jittered(root, classes, **{name: JITTER[name]})
    differences = []
    for item in range(12):
        before, after = plain[item], changed[item]
        assert after["image"].dtype == torch.uint8 and torch.equal(after["image"], changed[item]["image"])
        assert torch.equal(before["label"], after["label"]) and torch.equal(before["window"], after["window"])
        differences.append((after["image"].float() - before["image"].float()).mean().item())
    if name == "brightness":
        assert min(differences) < 0 < max(differences)
    assert np.abs(differences).max() > 0.01
    assert len(set(differences)) > 6


def test_brightness_and_contrast_by_hand(make_folder, classes: Classes) -> None:
    """Brightness multiplies, contrast leaves the mean; both where no value is clipped or rounded by much."""
    root = make_folder([(120, 150)], ["train"])
    for item in range(6):
        plain = crops(root, classes, PLAIN)[item]["image"].float()
        bright = jittered(root, classes, brightness=0.2)[item]["image"].float()
        inside = (plain > 50) & (bright < 255)
        factor = (bright[inside] / plain[inside]).median()
        assert 0.79 < factor < 1.21
        assert (bright[inside] - factor * plain[inside]).abs().max() < 2
        flat = jittered(root, classes, contrast=0.2)[item]["image"].float()
        inside = (flat > 0) & (flat < 255)
        slope = np.polyfit(plain[inside].numpy(), flat[inside].numpy(), 1)[0]
        assert 0.79 < slope < 1.21
        assert ((flat - plain.mean()) - slope * (plain - plain.mean()))[inside].abs().max() < 2


def test_jitter_does_not_depend_on_threads(make_folder, classes: Classes) -> None:
    """Workers have one thread, the process itself as many as there are cores."""
    root = make_folder([(400, 420)], ["train"])
    options = Augmentations(rotation=30.0, **JITTER)
    dataset = crops(root, classes, options, crop_size=256, length=6)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = [dataset[item]["image"] for item in range(6)]
        torch.set_num_threads(3)
        assert all(torch.equal(dataset[item]["image"], alone[item]) for item in range(6))
    finally:
        torch.set_num_threads(threads)


def test_colours_take_three_bands(make_folder, classes: Classes, write_raster) -> None:
    root = make_folder([(60, 60)], ["train"])
    write_raster(root / "images" / "part0.tif", np.full((4, 60, 60), 90, np.uint8))
    assert jittered(root, classes, brightness=0.3, contrast=0.3)[0]["image"].shape == (4, 48, 48)
    with pytest.raises(ValueError, match=r"part0\.tif: 4 bands; saturation and hue are of colours"):
        jittered(root, classes, hue=0.1)[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"brightness": -0.1}, r"brightness: -0\.1; expected 0 \(none\) to 1"),
        ({"hue": 0.6}, r"hue: 0\.6; expected 0 \(none\) to 0\.5"),
        ({"scales": ()}, r"scales: \(\); expected at least one"),
        ({"scales": (0.0,)}, r"scales: \(0\.0,\)"),
        ({"rotation": 181.0}, r"rotation: 181\.0; expected degrees in 0\.\.180"),
    ],
)
def test_bad_augmentations(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Augmentations(**options)
