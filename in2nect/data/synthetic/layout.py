"""Where things are in a synthetic scene: parcels, roads, water, houses, trees and fields, at 0.3 m a pixel, to
LoveDA's class frequencies.

The ground is cut into parcels again and again along one slightly bent pair of axes; the first cuts become roads, so
that fields, roads and houses line up as they do on the ground. Every class has a budget of pixels, which its
threshold or its number of objects meets.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from in2nect.data.synthetic.noise import Field, smooth_noise, wide_blur

Mask = NDArray[np.bool_]

BACKGROUND, BUILDING, ROAD, WATER, BARREN, FOREST, AGRICULTURE = range(7)

# Shares of the visible pixels; what is left, about 40 %, is background: grass, yards, verges.
ROAD_SHARE, WATER_SHARE, BUILDING_SHARE, FOREST_SHARE, BARREN_SHARE, FIELD_SHARE = 0.047, 0.06, 0.08, 0.12, 0.026, 0.27

CROWN_SPACING = 17.0
"""Mean distance of neighbouring trees, in pixels (5 m)."""


@dataclass(frozen=True)
class Cut:
    """A line between parcels: coordinate `axis` (0: u, 1: v) is `at`, the other one is in low..high, in pixels."""

    axis: int
    at: float
    low: float
    high: float
    depth: int


@dataclass(frozen=True)
class Road:
    """A cut that is paved, `width` pixels wide."""

    cut: Cut
    width: float


@dataclass(frozen=True)
class House:
    """A rectangle: centre, half its length along `angle` (radians from the column axis), half its width; pixels."""

    row: float
    col: float
    half_length: float
    half_width: float
    angle: float
    height: float
    gabled: bool


@dataclass
class Layout:
    """A scene before it is painted. Fields are (size, size); `u`, `v` are the bent axes the parcels follow."""

    size: int
    angle: float
    u: Field
    v: Field
    u_slope: Field
    v_slope: Field
    label: NDArray[np.uint8]
    parcel: NDArray[np.int32]
    parcel_edge: Field
    cuts: list[Cut]
    roads: list[Road] = field(default_factory=list)
    houses: list[House] = field(default_factory=list)
    road_distance: Field = field(init=False)
    bank_distance: Field = field(init=False)
    village: Field = field(init=False)
    crown: NDArray[np.int32] = field(init=False)
    crown_depth: Field = field(init=False)

    def across(self, cut: Cut) -> Field:
        """Signed distance to the line of a cut, in pixels."""
        return (self.u - cut.at) / self.u_slope if cut.axis == 0 else (self.v - cut.at) / self.v_slope

    def along(self, cut: Cut) -> Field:
        """Position along a cut, in pixels."""
        return self.v if cut.axis == 0 else self.u


def plan(rng: np.random.Generator, size: int) -> Layout:
    """Lay out a scene of size x size pixels."""
    layout = _parcels(rng, size)
    _water(rng, layout)
    _roads(rng, layout)
    _houses(rng, layout)
    _trees(rng, layout)
    _barren(rng, layout)
    _fields(rng, layout)
    return layout


def _parcels(rng: np.random.Generator, size: int) -> Layout:
    angle = float(rng.uniform(0, np.pi))
    row, col = np.mgrid[:size, :size].astype(np.float32) - np.float32(size / 2)
    bend = 24.0
    u = np.cos(angle) * col + np.sin(angle) * row + bend * smooth_noise(rng, size, 800)
    v = -np.sin(angle) * col + np.cos(angle) * row + bend * smooth_noise(rng, size, 800)
    u, v = u.astype(np.float32), v.astype(np.float32)
    half = 0.72 * size + 2 * bend
    parcel = np.zeros(size * size, np.int32)
    edge = np.zeros(size * size, np.float32)
    cuts: list[Cut] = []
    flat_u, flat_v = u.ravel(), v.ravel()
    waiting = [((-half, half, -half, half), np.arange(size * size), 0)]
    count = 0
    while waiting:
        (left, right, low, high), inside, depth = waiting.pop(0)
        if max(right - left, high - low) < rng.uniform(170, 300):
            parcel[inside] = count
            pu, pv = flat_u[inside], flat_v[inside]
            edge[inside] = np.minimum(np.minimum(pu - left, right - pu), np.minimum(pv - low, high - pv))
            count += 1
            continue
        if right - left > (high - low) * rng.uniform(0.8, 1.25):
            at = left + (right - left) * rng.uniform(0.36, 0.64)
            cuts.append(Cut(0, at, low, high, depth))
            first = flat_u[inside] < at
            boxes = (left, at, low, high), (at, right, low, high)
        else:
            at = low + (high - low) * rng.uniform(0.36, 0.64)
            cuts.append(Cut(1, at, left, right, depth))
            first = flat_v[inside] < at
            boxes = (left, right, low, at), (left, right, at, high)
        waiting += [(boxes[0], inside[first], depth + 1), (boxes[1], inside[~first], depth + 1)]
    return Layout(
        size=size,
        angle=angle,
        u=u,
        v=v,
        u_slope=np.hypot(*np.gradient(u)).astype(np.float32),
        v_slope=np.hypot(*np.gradient(v)).astype(np.float32),
        label=np.zeros((size, size), np.uint8),
        parcel=parcel.reshape(size, size),
        parcel_edge=np.abs(edge).reshape(size, size),
        cuts=cuts,
    )


def _water(rng: np.random.Generator, layout: Layout) -> None:
    """A meandering river, or ponds; `bank_distance` is negative in the water."""
    size = layout.size
    row, col = np.mgrid[:size, :size].astype(np.float32)
    bank = 0.10 * smooth_noise(rng, size, 120, 3)
    if rng.random() < 0.6:
        angle = layout.angle + rng.uniform(0.3, 1.2)
        along = np.cos(angle) * (col - size / 2) + np.sin(angle) * (row - size / 2)
        across = -np.sin(angle) * (col - size / 2) + np.cos(angle) * (row - size / 2)
        phase = rng.uniform(0, 2 * np.pi, 3)
        offset = rng.uniform(-0.28, 0.28) * size
        waves = ((85.0, 900.0, phase[0]), (26.0, 370.0, phase[1]))
        course = offset + sum(a * np.sin(2 * np.pi * along / w + p) for a, w, p in waves)
        slope = sum(2 * np.pi * a / w * np.cos(2 * np.pi * along / w + p) for a, w, p in waves)
        swell = 1 + 0.22 * np.sin(2 * np.pi * along / 520 + phase[2])
        distance = np.abs(across - course) / np.sqrt(1 + slope**2) / swell
        distance = distance * (1 + bank)
    else:
        count = int(rng.integers(2, 4))
        distance = np.full((size, size), np.inf, np.float32)
        for _ in range(count):
            centre, stretch, turn = rng.uniform(0.12, 0.88, 2) * size, rng.uniform(1.0, 1.8), rng.uniform(0, np.pi)
            a = np.cos(turn) * (col - centre[0]) + np.sin(turn) * (row - centre[1])
            b = -np.sin(turn) * (col - centre[0]) + np.cos(turn) * (row - centre[1])
            distance = np.minimum(distance, np.hypot(a / stretch, b * stretch) * rng.uniform(0.8, 1.5))
        distance = distance * (1 + 2 * bank)
    shore = np.quantile(distance, WATER_SHARE * rng.uniform(0.9, 1.25))
    layout.bank_distance = (distance - shore).astype(np.float32)
    layout.label[layout.bank_distance < 0] = WATER


def _roads(rng: np.random.Generator, layout: Layout) -> None:
    """Pave cuts, the longest first, until the share of roads is reached; bridges cross the water."""
    budget = ROAD_SHARE * layout.label.size
    layout.road_distance = np.full(layout.label.shape, 1e4, np.float32)
    paved = np.zeros(layout.label.shape, bool)
    for cut in layout.cuts:
        width = (24.0, 17.0, 11.0)[min(cut.depth, 2)] * rng.uniform(0.85, 1.15)
        across, along = np.abs(layout.across(cut)), layout.along(cut)
        beyond = np.maximum(np.maximum(cut.low - along, along - cut.high), 0)
        distance = np.hypot(across, beyond) - width / 2
        surface = paved | (distance < 0)
        if surface.sum() > budget * 1.08:
            continue
        visible = int(surface.sum() - paved.sum())
        if visible < 40 * width and cut.depth > 1:
            continue
        layout.roads.append(Road(cut, width))
        layout.road_distance = np.minimum(layout.road_distance, distance)
        paved = surface
        if paved.sum() > 0.93 * budget:
            break
    layout.label[paved] = ROAD


def _houses(rng: np.random.Generator, layout: Layout) -> None:
    """Rows of houses along the roads, densest where a village is, and some sheds."""
    size = layout.size
    settled = smooth_noise(rng, size, 480)
    candidates: list[tuple[float, House]] = []
    for road in layout.roads:
        cut, reach = road.cut, road.width / 2
        for side in (-1, 1):
            for line in (0, 1, 2):
                along = max(cut.low, -size) + rng.uniform(0, 30)
                while along < min(cut.high, size):
                    house, length = _house(rng, layout, cut, along, side, reach, line)
                    along += length + rng.uniform(7, 26)
                    if house is not None:
                        score = settled[int(house.row), int(house.col)] - 0.25 * line + 0.25 * rng.standard_normal()
                        candidates.append((float(score), house))
    candidates.sort(key=lambda entry: -entry[0])
    taken = (layout.label == ROAD) | (layout.bank_distance < 8)
    budget, built = BUILDING_SHARE * layout.label.size, 0
    for _, house in candidates:
        if built > budget:
            break
        place, mask = footprint(house, size, margin=6.0)
        if (taken[place] & mask).any():
            continue
        place, mask = footprint(house, size)
        taken[place] |= mask
        layout.label[place][mask] = BUILDING
        built += int(mask.sum())
        layout.houses.append(house)
    layout.village = wide_blur((layout.label == BUILDING).astype(np.float32), 26)


def _house(
    rng: np.random.Generator, layout: Layout, cut: Cut, along: float, side: int, reach: float, line: int
) -> tuple[House | None, float]:
    """A house on one side of a road, in the first, second or third line; None where it is outside the image."""
    shed = rng.random() < 0.10
    length = rng.uniform(90, 150) if shed else rng.uniform(34, 64)
    width = rng.uniform(42, 62) if shed else rng.uniform(25, 38)
    if rng.random() < 0.25:
        length, width = width, length
    setback = reach + rng.uniform(9, 20) + width / 2 + line * rng.uniform(58, 74)
    at = cut.at + side * setback
    row, col, angle = _ground(layout, *((at, along) if cut.axis == 0 else (along, at)))
    angle += (np.pi / 2 if cut.axis == 0 else 0.0) + rng.normal(0, 0.03)
    height = rng.uniform(12, 18) if shed else rng.uniform(9, 20)
    house = House(row, col, length / 2, width / 2, angle, height, gabled=not shed and rng.random() < 0.75)
    inside = 0 <= row < layout.size and 0 <= col < layout.size
    return (house if inside else None), length


def _ground(layout: Layout, u: float, v: float) -> tuple[float, float, float]:
    """Where (u, v) lies in the image, (row, col), and the direction of u there."""
    cos, sin, size = np.cos(layout.angle), np.sin(layout.angle), layout.size
    row = sin * u + cos * v + size / 2
    col = cos * u - sin * v + size / 2
    for _ in range(4):
        r, c = int(np.clip(row, 0, size - 1)), int(np.clip(col, 0, size - 1))
        du, dv = u - layout.u[r, c], v - layout.v[r, c]
        row, col = r + sin * du + cos * dv, c + cos * du - sin * dv
    r, c = int(np.clip(row, 1, size - 2)), int(np.clip(col, 1, size - 2))
    slope = np.arctan2(layout.u[r + 1, c] - layout.u[r - 1, c], layout.u[r, c + 1] - layout.u[r, c - 1])
    return float(row), float(col), float(slope)


def footprint(house: House, size: int, margin: float = 0.0) -> tuple[tuple[slice, slice], Mask]:
    """The box of the image a house lies in, and its mask there, grown by `margin` pixels."""
    place, along, across = house_axes(house, size, margin)
    return place, (np.abs(along) < house.half_length + margin) & (np.abs(across) < house.half_width + margin)


def house_axes(house: House, size: int, margin: float = 0.0) -> tuple[tuple[slice, slice], Field, Field]:
    """The box of the image a house lies in, and there the coordinates along and across the house from its centre."""
    reach = int(np.hypot(house.half_length, house.half_width) + margin) + 2
    rows = slice(max(0, int(house.row) - reach), max(0, min(size, int(house.row) + reach)))
    cols = slice(max(0, int(house.col) - reach), max(0, min(size, int(house.col) + reach)))
    row, col = np.mgrid[rows, cols].astype(np.float32)
    row, col = row - np.float32(house.row), col - np.float32(house.col)
    cos, sin = np.float32(np.cos(house.angle)), np.float32(np.sin(house.angle))
    return (rows, cols), cos * col + sin * row, -sin * col + cos * row


def _trees(rng: np.random.Generator, layout: Layout) -> None:
    """Woods, hedges, riverside and garden trees; `crown_depth` is 1 in the middle of a crown and 0 at its rim."""
    size = layout.size
    own = rng.standard_normal(int(layout.parcel.max()) + 1).astype(np.float32)[layout.parcel]
    riverside = np.exp(-np.maximum(layout.bank_distance, 0) / 45)
    wood = smooth_noise(rng, size, 330) + 0.35 * own + 0.9 * riverside + 0.22 * smooth_noise(rng, size, 60, 2)
    wood -= 2.5 * (layout.village > 0.08)
    free = (layout.road_distance > 7) & (layout.bank_distance > 3) & (layout.label == BACKGROUND)
    hedged = rng.random(int(layout.parcel.max()) + 1)[layout.parcel] < 0.3
    hedge = hedged & (layout.parcel_edge < 9) & (smooth_noise(rng, size, 150) > -0.2)
    garden = (layout.village > 0.10) & (smooth_noise(rng, size, 24) > 1.1)
    single = smooth_noise(rng, size, 24) > 2.3
    scattered = free & (hedge | garden | single)
    missing = FOREST_SHARE * 1.02 * layout.label.size - scattered.sum()
    free_wood = np.where(free, wood, -np.inf)
    threshold = np.partition(free_wood.ravel(), -int(missing))[-int(missing)]
    planted = scattered | (free & (free_wood >= threshold))
    layout.crown, layout.crown_depth = _crowns(rng, planted)
    layout.label[(layout.crown >= 0) & (layout.label == BACKGROUND)] = FOREST
    layout.crown[layout.label != FOREST] = -1


def _crowns(rng: np.random.Generator, planted: Mask) -> tuple[NDArray[np.int32], Field]:
    """The tree over each pixel, or -1, and how deep in the crown it lies; trees stand on a jittered grid."""
    size = planted.shape[0]
    count = int(size / CROWN_SPACING) + 3
    jitter = rng.uniform(-0.42, 0.42, (2, count, count))
    rows = ((np.arange(count)[:, None] - 0.5 + jitter[0]) * CROWN_SPACING).astype(np.float32)
    cols = ((np.arange(count)[None, :] - 0.5 + jitter[1]) * CROWN_SPACING).astype(np.float32)
    radius = rng.uniform(8.5, 14, (count, count)).astype(np.float32)
    r, c = rows.astype(int).clip(0, size - 1), cols.astype(int).clip(0, size - 1)
    radius[~planted[r, c]] = 0
    near = np.flatnonzero(wide_blur(planted.astype(np.float32), 6).ravel() > 0.01)
    y, x = (near // size).astype(np.float32), (near % size).astype(np.float32)
    cell_r, cell_c = (y / CROWN_SPACING + 1).astype(int), (x / CROWN_SPACING + 1).astype(int)
    depth, owner = np.zeros(near.size, np.float32), np.full(near.size, -1, np.int32)
    for dr in (-1, 0, 1):
        for dc in (-1, 0, 1):
            i, j = (cell_r + dr).clip(0, count - 1), (cell_c + dc).clip(0, count - 1)
            reach = radius[i, j]
            inside = 1 - ((y - rows[i, j]) ** 2 + (x - cols[i, j]) ** 2) / np.maximum(reach, 1e-3) ** 2
            better = inside > depth
            depth[better], owner[better] = inside[better], (i * count + j)[better]
    crown, crown_depth = np.full(size * size, -1, np.int32), np.zeros(size * size, np.float32)
    crown[near], crown_depth[near] = owner, depth
    return crown.reshape(size, size), crown_depth.reshape(size, size)


def _barren(rng: np.random.Generator, layout: Layout) -> None:
    """Building plots and sand by the water: bare ground in patches with partly straight edges."""
    size = layout.size
    own = rng.standard_normal(int(layout.parcel.max()) + 1).astype(np.float32)[layout.parcel]
    score = smooth_noise(rng, size, 230, 2) + 0.8 * own + 1.2 * np.exp(-np.maximum(layout.bank_distance, 0) / 18)
    score += 6 * np.clip(layout.village, 0, 0.12)
    free = (layout.label == BACKGROUND) & (layout.road_distance > 3) & (layout.parcel_edge > 3)
    score = np.where(free, score, -np.inf)
    wanted = int(BARREN_SHARE * layout.label.size)
    layout.label[score >= np.partition(score.ravel(), -wanted)[-wanted]] = BARREN


def _fields(rng: np.random.Generator, layout: Layout) -> None:
    """Plough parcels, the emptiest first, up to the share of agriculture; cells of ground around houses stay out."""
    count = int(layout.parcel.max()) + 1
    cell = np.floor(layout.u / 52).astype(np.int64) * 512 + np.floor(layout.v / 52).astype(np.int64)
    cell = np.unique(cell * count + layout.parcel, return_inverse=True)[1].reshape(layout.parcel.shape)
    lived_in = np.bincount(cell[layout.village > 0.07], minlength=int(cell.max()) + 1) > 0
    free = (layout.label == BACKGROUND) & (layout.parcel_edge > 3.5) & (layout.road_distance > 6)
    free &= (layout.bank_distance > 6) & ~lived_in[cell]
    area = np.bincount(layout.parcel[free], minlength=count)
    share = area / np.maximum(np.bincount(layout.parcel.ravel(), minlength=count), 1)
    order = np.argsort(-share + rng.uniform(0, 0.6, count))
    budget, ploughed = FIELD_SHARE * layout.label.size, 0
    chosen = np.zeros(count, bool)
    for number in order:
        if area[number] and ploughed + area[number] < 1.01 * budget:
            chosen[number] = True
            ploughed += int(area[number])
    layout.label[free & chosen[layout.parcel]] = AGRICULTURE
