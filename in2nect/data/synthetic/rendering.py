"""Paints a planned scene as a camera would see it from above: reflectance by class, a surface model for shading and
cast shadows, haze, blur and sensor noise. Colours of different classes overlap on purpose: bare plots, dirt roads and
dry fields; grass, crops and trees.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from in2nect.data.synthetic.layout import (
    AGRICULTURE,
    BARREN,
    BUILDING,
    ROAD,
    WATER,
    Layout,
    Mask,
    Road,
    house_axes,
)
from in2nect.data.synthetic.noise import Field, blur, smooth_noise

# Reflectances as sRGB values in full sun on level ground.
LUSH_GRASS, GRASS, DRY_GRASS, SOIL = (88, 106, 62), (116, 126, 78), (156, 148, 106), (150, 130, 102)
YARD_SURFACES = ((166, 163, 156), (138, 126, 106), (104, 118, 70), (128, 128, 92), (146, 138, 120), (134, 134, 130))
CROPS = (  # (crop, ground between the rows)
    ((104, 134, 66), (124, 124, 78)),
    ((74, 106, 56), (100, 112, 66)),
    ((134, 148, 80), (148, 142, 96)),
    ((190, 170, 108), (170, 152, 104)),
    ((172, 158, 118), (154, 140, 106)),
    ((140, 114, 88), (122, 98, 76)),
    ((114, 94, 76), (98, 82, 68)),
    ((96, 122, 84), (112, 122, 92)),
)
CROP_ODDS = (0.2, 0.17, 0.12, 0.15, 0.12, 0.1, 0.05, 0.09)
ROOFS = (
    (156, 92, 74),
    (172, 112, 88),
    (138, 82, 70),
    (150, 146, 142),
    (118, 118, 122),
    (186, 182, 174),
    (96, 118, 146),
    (160, 140, 118),
)
ROOF_ODDS = (0.22, 0.18, 0.12, 0.14, 0.1, 0.08, 0.08, 0.08)
SHED_ROOFS = ((206, 206, 202), (112, 140, 172), (176, 178, 180), (150, 92, 82))
CAR_COLORS = ((232, 232, 230), (40, 42, 46), (150, 152, 156), (150, 40, 36), (52, 74, 120))
TREE_GREENS = ((62, 84, 46), (84, 102, 54), (52, 74, 48), (98, 106, 60))

SHADOW_DIRECTION = 2.15
"""Where shadows point, in radians from the column axis towards the row axis: to the lower left."""
SUN_SLOPE = 0.95
"""Height, in pixels, that casts a shadow one pixel long."""
BRIDGE_HEIGHT = 6.0
"""Height of bridges over the water, in pixels."""


@dataclass
class Surface:
    """What stands on the ground: height in pixels, for shadows; slope along rows and columns, for shading."""

    height: Field
    slope_row: Field
    slope_col: Field


def render(rng: np.random.Generator, layout: Layout) -> NDArray[np.uint8]:
    """(size, size, 3) uint8, the picture of a layout."""
    surface = Surface(*(np.zeros((layout.size, layout.size), np.float32) for _ in range(3)))
    color = _grass(rng, layout)
    _tracks(rng, layout, color)
    _yards(rng, layout, color)
    _crops(rng, layout, color)
    _bare_ground(rng, layout, color)
    _water(rng, layout, color)
    _pavement(rng, layout, color, surface)
    _trees(rng, layout, color, surface)
    _roofs(rng, layout, color, surface)
    _light(rng, layout, color, surface)
    return _camera(rng, color)


def _grass(rng: np.random.Generator, layout: Layout) -> Field:
    """Meadows: lush to dry, patch by patch, each parcel a little different."""
    size = layout.size
    count = int(layout.parcel.max()) + 1
    dryness = 0.5 * rng.standard_normal(count).astype(np.float32)[layout.parcel]
    dryness += 0.45 * smooth_noise(rng, size, 240, 3)
    dryness += 0.22 * smooth_noise(rng, size, 14, 2)
    color = _ramp(dryness, (-1.2, 0.0, 1.0, 2.0), (LUSH_GRASS, GRASS, DRY_GRASS, SOIL))
    color += (4.5 * smooth_noise(rng, size, 5, 2))[..., None]
    mown = (rng.random(count) < 0.35)[layout.parcel]
    swath = np.sin(layout.u * np.float32(2 * np.pi / 22)) * mown
    color += (3.0 * swath)[..., None]
    return color


def _tracks(rng: np.random.Generator, layout: Layout, color: Field) -> None:
    """Two-rutted farm tracks along some of the cuts that are no road, and worn verges."""
    paved = [road.cut for road in layout.roads]
    for cut in layout.cuts:
        if cut in paved or cut.depth > 4 or rng.random() < 0.4:
            continue
        across, along = layout.across(cut), layout.along(cut)
        rut = np.exp(-((np.abs(across) - 2.6) ** 2) / 1.6) * ((along > cut.low) & (along < cut.high))
        _blend(color, (168, 152, 122), 0.7 * rut)
    verge = np.exp(-np.maximum(layout.road_distance, 0) / 3.5)
    _blend(color, (158, 148, 124), 0.55 * verge)


def _yards(rng: np.random.Generator, layout: Layout, color: Field) -> None:
    """Around houses the ground is a patchwork of paving, soil and gardens."""
    size = layout.size
    plot_u = np.floor((layout.u + 6 * smooth_noise(rng, size, 90)) / 37).astype(np.int64)
    plot_v = np.floor((layout.v + 6 * smooth_noise(rng, size, 90)) / 29).astype(np.int64)
    table = rng.integers(len(YARD_SURFACES), size=4096)
    kind = table[(plot_u * 71 + plot_v * 37) % 4096]
    yard = np.asarray(YARD_SURFACES, np.float32)[kind]
    yard = yard + (5 * smooth_noise(rng, size, 9, 3))[..., None]
    inside = np.clip((layout.village - 0.07) / 0.05 + 0.5 * smooth_noise(rng, size, 40), 0, 1) * 0.8
    color += (yard - color) * inside[..., None]


def _crops(rng: np.random.Generator, layout: Layout, color: Field) -> None:
    """Each field has a crop, rows in some direction, wheel tracks, a headland along its edge, and uneven growth."""
    size = layout.size
    fields = layout.label == AGRICULTURE
    growth = 0.7 * smooth_noise(rng, size, 110, 3)
    grain = smooth_noise(rng, size, 3.2, 1)
    per_row = rng.standard_normal(4096).astype(np.float32)
    for number in np.unique(layout.parcel[fields]):
        where = np.nonzero(fields & (layout.parcel == number))
        crop, ground = (np.asarray(c, np.float32) for c in CROPS[rng.choice(len(CROPS), p=CROP_ODDS)])
        tint = rng.normal(0, 4, 3).astype(np.float32) + np.float32(rng.normal(0, 7))
        period, contrast = rng.uniform(4.5, 9.0), rng.uniform(0.25, 0.75)
        along_u = bool(rng.random() < 0.5)
        phase = (layout.v if along_u else layout.u)[where]
        if rng.random() < 0.2:
            phase = (0.8 * layout.u[where] + 0.6 * layout.v[where]) * (1 if along_u else -1)
        edge = layout.parcel_edge[where]
        phase = np.where(edge < 17, edge, phase)
        row = np.floor(phase / period).astype(np.int64)
        wave = 0.5 + 0.5 * np.sin(phase * np.float32(2 * np.pi / period))
        share = contrast * wave + 0.16 * per_row[row % 4096] + 0.3 * growth[where] + 0.13 * grain[where]
        spacing = period * round(66 / period)
        wheel = np.abs(np.abs((phase % spacing) - spacing / 2) - 5.0) < 1.1
        share = np.where(wheel & (edge >= 17), share + 0.7, share)
        color[where] = crop + tint + np.clip(share, -0.35, 1.4)[:, None] * (ground - crop)


def _bare_ground(rng: np.random.Generator, layout: Layout, color: Field) -> None:
    """Sand and bare soil with tyre marks and rubble."""
    size = layout.size
    tone = smooth_noise(rng, size, 130, 4)
    sand = _ramp(tone, (-1.6, 0.0, 1.6), ((156, 130, 98), (194, 168, 128), (216, 196, 160)))
    sand += (7.0 * smooth_noise(rng, size, 6, 3))[..., None]
    bend = smooth_noise(rng, size, 160) * 30
    tyre = np.exp(-((np.abs((layout.u + bend) % 46 - 23) - 4) ** 2) / 1.5)
    sand -= (9 * tyre)[..., None]
    bare = _soft(layout.label == BARREN, 1.2)
    color += (sand - color) * bare[..., None]


def _water(rng: np.random.Generator, layout: Layout, color: Field) -> None:
    """Darker and bluer with the distance from the bank; faint ripples; a strip of mud on the bank."""
    size = layout.size
    clear, muddy = np.asarray((46, 68, 80), np.float32), np.asarray((70, 86, 74), np.float32)
    deep = clear + np.float32(rng.uniform(0, 1)) * (muddy - clear)
    shallow = np.asarray((108, 112, 86), np.float32)
    bank = layout.bank_distance
    depth = 1 - np.exp(np.minimum(bank, 0) / 9)
    water = shallow + depth[..., None] * (deep - shallow)
    water = water + (3.0 * smooth_noise(rng, size, 180, 2) + 1.3 * smooth_noise(rng, size, 5, 2))[..., None]
    _blend(color, (132, 118, 92), 0.6 * np.exp(-((bank - 2) ** 2) / 7))
    wet = 1 / (1 + np.exp(np.clip(bank / 0.5, -30, 30)))
    color += (water - color) * wet[..., None]


def _pavement(rng: np.random.Generator, layout: Layout, color: Field, surface: Surface) -> None:
    """Asphalt, concrete and dirt, lane by lane, with markings on wide roads and a few cars."""
    size = layout.size
    grain = 2.2 * smooth_noise(rng, size, 2.5) + 3.5 * smooth_noise(rng, size, 40, 3)
    crossings = np.zeros((size, size), np.int8)
    for road in layout.roads:
        crossings += _on(layout, road, 4.0)
    for road in reversed(layout.roads):
        across, along = layout.across(road.cut), layout.along(road.cut)
        inside = _on(layout, road, 0.0)
        if road.width > 14:
            base = np.asarray(((116, 116, 117), (132, 131, 128), (148, 146, 140))[rng.integers(3)], np.float32)
        else:
            base = np.asarray(((172, 164, 148), (168, 150, 122), (156, 152, 144))[rng.integers(3)], np.float32)
        lane = np.abs(across) / (road.width / 2)
        worn = 5 * np.cos(lane * 2 * np.pi) - 7 * (lane > 0.86)
        paint = base + (grain + worn)[..., None] + (4 * np.sin(along / 130 + rng.uniform(0, 6)))[..., None]
        alone = crossings < 2
        if road.width > 14:
            dash = _line(across, 0.75) * np.clip(7.5 - np.abs(along % 30 - 15), 0, 1)
            rim = _line(np.abs(across) - (road.width / 2 - 2.2), 0.4) * (road.width > 19)
            paint += ((58.0 * dash + 34.0 * rim) * alone)[..., None]
        soft = np.clip(road.width / 2 - np.abs(across) + 0.5, 0, 1) * inside
        color += (paint - color) * soft[..., None]
        bridge = inside & (layout.bank_distance < 1)
        _blend(color, (196, 192, 184), 0.8 * bridge * _line(np.abs(across) - road.width / 2 + 0.6, 0.7))
        if road.width > 14:
            _cars(rng, road, across, along, inside & alone, color, surface)


def _cars(
    rng: np.random.Generator, road: Road, across: Field, along: Field, inside: Mask, color: Field, surface: Surface
) -> None:
    """A car every 60 m or so on its own side of the road."""
    for side in (-1, 1):
        at = road.cut.low + rng.uniform(0, 200)
        while at < road.cut.high:
            lane, ahead = across - side * road.width / 4, along - at
            car = (np.abs(lane) < 3.0) & (np.abs(ahead) < 7.5) & inside
            if car.any():
                paint = np.asarray(CAR_COLORS[rng.integers(len(CAR_COLORS))], np.float32)
                glass = (np.abs(np.abs(ahead[car]) - 3.6) < 1.0)[:, None]
                color[car] = np.where(glass, 0.45 * paint + 20, paint)
                surface.height[car] = 5.0
            at += rng.uniform(130, 600)


def _trees(rng: np.random.Generator, layout: Layout, color: Field, surface: Surface) -> None:
    """Round crowns of many greens, higher in the middle, with dark gaps between them."""
    trees = layout.crown >= 0
    if not trees.any():
        return
    number = layout.crown[trees]
    count = int(number.max()) + 1
    greens = np.asarray(TREE_GREENS, np.float32)[rng.choice(4, count, p=(0.4, 0.3, 0.2, 0.1))]
    greens = greens + rng.normal(0, 6, (count, 1)).astype(np.float32) + rng.normal(0, 3, (count, 3)).astype(np.float32)
    tall = rng.uniform(11, 20, count).astype(np.float32)
    depth = layout.crown_depth[trees]
    leaves = smooth_noise(rng, layout.size, 4.5, 2)[trees]
    color[trees] = greens[number] * (0.72 + 0.36 * np.sqrt(depth) + 0.075 * leaves)[:, None]
    surface.height[trees] = tall[number] * (0.35 + 0.65 * np.sqrt(depth)) + 0.7 * leaves
    slopes = np.gradient(blur(surface.height, 0.6))
    surface.slope_row[trees], surface.slope_col[trees] = 0.7 * slopes[0][trees], 0.7 * slopes[1][trees]


def _roofs(rng: np.random.Generator, layout: Layout, color: Field, surface: Surface) -> None:
    """Gabled roofs with tiles and a ridge, flat ones with a parapet and some equipment."""
    size = layout.size
    stain = smooth_noise(rng, size, 18, 3)
    for house in layout.houses:
        place, along, across = house_axes(house, size)
        mask = (np.abs(along) < house.half_length) & (np.abs(across) < house.half_width)
        mask &= layout.label[place] == BUILDING
        shed = house.half_length * house.half_width > 45 * 20
        palette, odds = (SHED_ROOFS, (0.4, 0.3, 0.2, 0.1)) if shed else (ROOFS, ROOF_ODDS)
        base = np.asarray(palette[rng.choice(len(palette), p=odds)], np.float32) + rng.normal(0, 6)
        paint = np.broadcast_to(base, (*along.shape, 3)) + (4.5 * stain[place])[..., None]
        rim = np.minimum(house.half_length - np.abs(along), house.half_width - np.abs(across))
        height: Field = np.full(along.shape, house.height, np.float32)
        if house.gabled:
            height = height + 0.42 * (house.half_width - np.abs(across))
            tiles = np.sin(across * np.float32(2 * np.pi / 3.4))
            paint = paint + (2.5 * tiles + 16 * (np.abs(across) < 0.9))[..., None]
        elif shed:
            paint = paint + (5 * (np.sin(along * np.float32(2 * np.pi / 9)) > 0.7))[..., None]
            height = height + 0.12 * (house.half_width - np.abs(across))
        else:
            paint = paint + (14 * (rim < 2.0))[..., None]
            height = height + 2.0 * (rim < 2.0)
            for _ in range(int(rng.integers(1, 4))):
                a, b = rng.uniform(-0.7, 0.7) * house.half_length, rng.uniform(-0.6, 0.6) * house.half_width
                box = (np.abs(along - a) < rng.uniform(2, 5)) & (np.abs(across - b) < rng.uniform(2, 4))
                height = height + 3.5 * box
                paint = np.where(box[..., None], 0.5 * paint + 90, paint)
        slope_row, slope_col = np.gradient(height, axis=0), np.gradient(height, axis=1)
        surface.height[place][mask] = height[mask]
        surface.slope_row[place][mask], surface.slope_col[place][mask] = slope_row[mask], slope_col[mask]
        coverage: Field = np.clip(rim + 0.5, 0, 1) * (mask | (layout.label[place] != BUILDING))
        color[place] += (paint - color[place]) * coverage[..., None]


def _light(rng: np.random.Generator, layout: Layout, color: Field, surface: Surface) -> None:
    """Sun from one side: slopes brighter or darker, cast shadows, and light that varies slowly over the scene."""
    direction = SHADOW_DIRECTION + rng.normal(0, 0.08)
    step_row, step_col = np.sin(direction), np.cos(direction)
    height = surface.height
    shadow = np.zeros(height.shape, bool)
    water = layout.label == WATER
    bridges = ((layout.label == ROAD) & (layout.bank_distance < 1)) * np.float32(BRIDGE_HEIGHT)
    for distance in range(1, int(max(height.max(), BRIDGE_HEIGHT) / SUN_SLOPE) + 2):
        shift = round(float(step_row) * distance), round(float(step_col) * distance)
        shadow |= _shifted(height, *shift) - SUN_SLOPE * distance > height + 0.6
        shadow |= water & (_shifted(bridges, *shift) > SUN_SLOPE * distance)
    shade = blur(shadow.astype(np.float32), 0.7)
    away = surface.slope_row * np.float32(step_row) + surface.slope_col * np.float32(step_col)
    light = 1 + 0.3 * np.clip(away, -0.9, 0.9) + 0.045 * smooth_noise(rng, layout.size, 700)
    color *= light[..., None]
    color *= 1 - shade[..., None] * np.asarray((0.60, 0.56, 0.48), np.float32)


def _camera(rng: np.random.Generator, color: Field) -> NDArray[np.uint8]:
    """Haze, exposure, colour balance, the lens's blur and the sensor's noise."""
    balance = 1 + rng.normal(0, 0.018, 3).astype(np.float32)
    seen = color * balance * np.float32(rng.uniform(0.95, 1.07))
    seen = 8 + 0.97 * blur(seen, 0.62)
    seen += rng.standard_normal(seen.shape, dtype=np.float32) * 2.0
    return np.clip(np.rint(seen), 0, 255).astype(np.uint8)


def _on(layout: Layout, road: Road, margin: float) -> Mask:
    """Where a road is, its ends included, grown by `margin` pixels."""
    along = layout.along(road.cut)
    inside = (along > road.cut.low - road.width / 2) & (along < road.cut.high + road.width / 2)
    return inside & (np.abs(layout.across(road.cut)) < road.width / 2 + 0.5 + margin)


def _ramp(value: Field, stops: tuple[float, ...], colors: tuple[tuple[int, int, int], ...]) -> Field:
    """Colours interpolated between stops: (size, size) -> (size, size, 3)."""
    channels = [np.interp(value, stops, [color[channel] for color in colors]) for channel in range(3)]
    return np.stack(channels, axis=-1).astype(np.float32)


def _blend(color: Field, paint: tuple[int, int, int], share: Field) -> None:
    color += (np.asarray(paint, np.float32) - color) * share[..., None].astype(np.float32)


def _line(distance: Field, half_width: float) -> Field:
    """How much of each pixel a line covers."""
    return np.clip(half_width + 0.5 - np.abs(distance), 0, 1)


def _soft(mask: Mask, sigma: float) -> Field:
    return blur(mask.astype(np.float32), sigma)


def _shifted(surface: Field, rows: int, cols: int) -> Field:
    """The surface moved by whole pixels, zero where nothing comes in."""
    moved = np.zeros_like(surface)
    height, width = surface.shape
    target = slice(max(rows, 0), height + min(rows, 0)), slice(max(cols, 0), width + min(cols, 0))
    source = slice(max(-rows, 0), height + min(-rows, 0)), slice(max(-cols, 0), width + min(-cols, 0))
    moved[target] = surface[source]
    return moved
