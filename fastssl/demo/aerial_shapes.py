"""What the synthetic aerial tiles of `fastssl.demo.aerial` are drawn with: ground, houses, panels, cars, trees.

Lengths are fractions of the tile's side, so that a tile shows the same scene at every size. Everything is
drawn on a canvas of twice the tile's side and reduced afterwards, because pillow's polygons are not anti-
aliased.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

# Ground light, ground dark, patches, trees; one row per season. All classes draw from all seasons.
_SEASONS = np.array(
    [
        [[116, 134, 82], [88, 110, 62], [142, 142, 96], [50, 72, 42]],
        [[150, 126, 94], [118, 96, 70], [100, 106, 68], [72, 78, 48]],
        [[192, 176, 124], [164, 148, 100], [138, 136, 88], [84, 92, 54]],
        [[142, 140, 132], [112, 111, 106], [122, 122, 98], [70, 74, 64]],
        [[222, 226, 230], [192, 197, 202], [160, 158, 152], [86, 86, 80]],
    ],
    np.float32,
)
# The same materials cover roofs, water, roads and panels, so that a color alone names no class.
_DARK = ((44, 48, 56), (56, 60, 66), (40, 54, 62), (36, 44, 74), (62, 58, 54))
_GRAY = ((96, 98, 102), (122, 122, 120), (146, 144, 140), (104, 112, 122))
_WARM = ((158, 86, 64), (134, 76, 60), (146, 118, 92), (176, 156, 126))
_COOL = ((70, 96, 128), (88, 116, 124), (96, 112, 92), (66, 88, 78))
_PALE = ((196, 198, 200), (184, 190, 198))
ROOFING = np.array(_WARM * 3 + _DARK + _GRAY + _COOL[:1] + _PALE, np.float32)
PAVING = np.array(_GRAY * 3 + _DARK[:3] + _WARM[2:] + _PALE[:1], np.float32)
WATERS = np.array(_COOL * 3 + _DARK + _GRAY[2:] + _WARM[2:] + _PALE[1:], np.float32)
PANELS = np.array(_DARK * 2 + _GRAY[:1] + _GRAY[3:] + _COOL[:2] + ((58, 72, 116),) * 3, np.float32)
_CORNERS = np.array([[-1.0, -1.0], [-1.0, 1.0], [1.0, 1.0], [1.0, -1.0]])


@lru_cache(maxsize=4)
def grid(side: int) -> tuple[np.ndarray, np.ndarray]:
    """The x and y of the pixel centers of a square canvas: two float32 arrays (side, side) in (0, 1)."""
    centers = (np.arange(side, dtype=np.float32) + np.float32(0.5)) / np.float32(side)
    x, y = np.meshgrid(centers, centers)
    x.setflags(write=False)
    y.setflags(write=False)
    return x, y


def noise(rng: np.random.Generator, side: int, cells: int, octaves: int = 1) -> np.ndarray:
    """Multi-octave value noise: float32 (side, side), mean about 0, each octave half the last."""
    total = np.zeros((side, side), np.float32)
    for octave in range(octaves):
        # Two more cells than are shown and a random offset: else the lattice would lie the same in every
        # tile.
        knots = Image.fromarray(rng.random((cells + 2, cells + 2), np.float32) * 2 - 1)
        left, top = rng.random(2)
        box = (left, top, left + cells, top + cells)
        total += np.asarray(knots.resize((side, side), Image.Resampling.BICUBIC, box)) * 0.5**octave
        cells *= 2
    return total


def axis(angle: float) -> np.ndarray:
    """The unit vector (x, y) at `angle` radians."""
    return np.array([math.cos(angle), math.sin(angle)])


def rectangle(center: np.ndarray, angle: float, length: float, width: float) -> np.ndarray:
    """The corners (4, 2) of a rectangle, in turn: the first two at the end that `angle` points away from."""
    x, y = math.cos(angle) / 2, math.sin(angle) / 2
    return center + _CORNERS @ np.array([[x * length, y * length], [-y * width, x * width]])


def _ink(color: Sequence[float] | np.ndarray) -> tuple[int, int, int]:
    red, green, blue = color  # thousands of calls per second: plain arithmetic beats np.clip on three numbers
    return min(max(int(red), 0), 255), min(max(int(green), 0), 255), min(max(int(blue), 0), 255)


@dataclass
class Scene:
    """One tile while it is drawn: the picture, the mask and the shadows, with what all its objects share.

    `scale` multiplies the sizes of objects, `turn` (radians) is the main direction of what people built,
    `sun` (2,) is the shadow that an object casts per unit of height, `ground` (4, 3) is the season's palette
    (0..255).
    """

    rng: np.random.Generator
    side: int
    scale: float
    turn: float
    sun: np.ndarray
    ground: np.ndarray
    canvas: Image.Image
    mask: Image.Image
    shade: Image.Image

    def __post_init__(self) -> None:
        self._pens = tuple(ImageDraw.Draw(image) for image in (self.canvas, self.mask, self.shade))

    def _flat(self, points: np.ndarray) -> list[float]:
        return (points * self.side).ravel().tolist()

    def polygon(
        self, points: np.ndarray, color: Sequence[float] | np.ndarray, mark: int | None = None
    ) -> None:
        """Fill a polygon (n, 2) with a color (0..255, clipped); `mark` also writes it into the mask."""
        corners = self._flat(points)
        self._pens[0].polygon(corners, fill=_ink(color))
        if mark is not None:
            self._pens[1].polygon(corners, fill=255 * mark)

    def disc(self, center: np.ndarray, radius: float, color: np.ndarray) -> None:
        """Fill a disc, which hides the marked object below it and the shadows that fall there."""
        box = self._box(center, radius)
        self._pens[0].ellipse(box, fill=_ink(color))
        self._pens[1].ellipse(box, fill=0)
        self._pens[2].ellipse(box, fill=0)

    def _box(self, center: np.ndarray, radius: float) -> list[float]:
        x, y = (center * self.side).tolist()
        reach = radius * self.side
        return [x - reach, y - reach, x + reach, y + reach]

    def cast(self, corners: np.ndarray, height: float) -> None:
        """The shadow of an upright block over a footprint (4, 2) of `rectangle`, which stays lit itself."""
        shift = self.sun * height
        after = corners[[1, 2, 3, 0]]
        edges = after - corners
        # The shadow leaves the footprint over the edges on the lee side, so these quads make the whole of it.
        lee = edges[:, 0] * shift[1] > edges[:, 1] * shift[0]
        for here, there in zip(corners[lee], after[lee], strict=True):
            self._pens[2].polygon(self._flat(np.array([here, there, there + shift, here + shift])), fill=255)
        self._pens[2].polygon(self._flat(corners), fill=0)

    def cast_disc(self, center: np.ndarray, radius: float, height: float) -> None:
        """The shadow of something round, such as a tree."""
        self._pens[2].ellipse(self._box(center + self.sun * height, radius), fill=255)

    def paste(self, rgb: np.ndarray, where: np.ndarray, marked: np.ndarray | None = None) -> None:
        """Lay a (side, side, 3) image (0..255, clipped) over the pixels `where`; `marked` joins the mask."""
        layer = Image.fromarray(np.clip(rgb, 0, 255).astype(np.uint8))
        self.canvas.paste(layer, mask=Image.fromarray(where.astype(np.uint8) * 255))
        if marked is not None:
            self.mask.paste(255, mask=Image.fromarray(marked.astype(np.uint8) * 255))

    def paste_shade(self, where: np.ndarray) -> None:
        """Shadow the pixels `where` (side, side, bool)."""
        self.shade.paste(255, mask=Image.fromarray(where.astype(np.uint8) * 255))

    def occupied(self, center: np.ndarray) -> bool:
        """Whether the class's own object lies at a point (2,) of the tile."""
        column, row = np.clip(center * self.side, 0, self.side - 1).astype(int).tolist()
        return bool(self.mask.getpixel((column, row)))

    def frame(self, center: np.ndarray, angle: float) -> tuple[np.ndarray, np.ndarray]:
        """Coordinates along and across `angle` from `center`: two float32 arrays (side, side)."""
        x, y = grid(self.side)
        cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
        dx, dy = x - np.float32(center[0]), y - np.float32(center[1])
        return dx * cos + dy * sin, dy * cos - dx * sin

    def soil(self) -> np.ndarray:
        """A random ground color, float32 (3,), of this season."""
        first, second = self.rng.integers(0, 3, 2)
        part = self.rng.random()
        return (self.ground[first] * part + self.ground[second] * (1 - part)) * self.rng.uniform(0.85, 1.15)

    def pick(self, materials: np.ndarray) -> np.ndarray:
        """A random color, float32 (3,), of a table of materials (n, 3), a little varied."""
        color = materials[self.rng.integers(len(materials))]
        return color * self.rng.uniform(0.85, 1.2) + self.rng.uniform(-6, 6, 3).astype(np.float32)


def new_scene(rng: np.random.Generator, size: int) -> Scene:
    """An empty stretch of ground for a tile of `size` pixels, with its season, sun, scale and direction."""
    side = 2 * size
    first, second = rng.integers(0, len(_SEASONS), 2)
    blend = rng.uniform(0, 0.45)
    ground = (_SEASONS[first] * (1 - blend) + _SEASONS[second] * blend) * rng.normal(1, 0.025, 3).astype(
        np.float32
    )
    sun = axis(rng.uniform(0, 2 * np.pi)) * rng.uniform(0.35, 1.1)
    turn, scale = rng.uniform(0, 2 * np.pi), rng.uniform(0.78, 1.3)
    part = np.clip(0.5 + 0.45 * noise(rng, size, 3, 4), 0, 1)[..., None]
    image = ground[0] * part + ground[1] * (1 - part)
    spots = noise(rng, size, int(rng.integers(2, 7)), 2)
    cover = np.clip((spots - rng.uniform(-0.2, 0.9)) * rng.uniform(1.5, 8), 0, 1)[..., None]
    image += (ground[2] * rng.uniform(0.75, 1.05) - image) * cover
    x, y = grid(size)
    if rng.random() < 0.4:  # mowing or tyre marks: fine lines on the ground are no privilege of the fields
        angle = turn + rng.normal(0, 0.3)
        wave = np.sin((x * np.cos(angle) + y * np.sin(angle)) * (2 * np.pi / rng.uniform(0.035, 0.1)) + spots)
        image *= (1 + rng.uniform(0.02, 0.07) * wave * (spots > rng.uniform(-1, 0.4)))[..., None]
    if rng.random() < 0.4:  # a second plot of land
        angle = turn + rng.normal(0, 0.1)
        beyond = (x - 0.5) * np.cos(angle) + (y - 0.5) * np.sin(angle) > rng.uniform(-0.4, 0.4)
        image = np.where(
            beyond[..., None], image * 0.35 + ground[rng.integers(0, 3)] * rng.uniform(0.5, 0.75), image
        )
    base = Image.fromarray(np.clip(image, 0, 255).astype(np.uint8)).resize(
        (side, side), Image.Resampling.NEAREST
    )
    blank = Image.new("L", (side, side))
    return Scene(rng, side, scale, turn, sun, ground, base, blank, blank.copy())


def ribbon(middle: np.ndarray, low: float | np.ndarray, high: float | np.ndarray) -> np.ndarray:
    """The outline (2n, 2) of the strip between two offsets to the side of a curve (n, 2)."""
    ahead = np.gradient(middle, axis=0)
    side = np.stack([-ahead[:, 1], ahead[:, 0]], axis=1) / np.linalg.norm(ahead, axis=1, keepdims=True)
    return np.concatenate(
        [middle + side * np.reshape(low, (-1, 1)), (middle + side * np.reshape(high, (-1, 1)))[::-1]]
    )


def curve(scene: Scene, angle: float, spread: float, bend: float) -> np.ndarray:
    """A gently bent line (41, 2) across the whole tile, which passes at most `spread` from its center."""
    rng = scene.rng
    t = np.linspace(-1, 1, 41)[:, None]
    center = 0.5 + axis(angle + np.pi / 2) * rng.uniform(-spread, spread)
    sway = rng.uniform(-bend, bend) * t**2 + rng.uniform(-bend, bend) * np.sin(2.5 * t)
    return center + axis(angle) * t * 0.95 + axis(angle + np.pi / 2) * sway


def tree(scene: Scene, center: np.ndarray, radius: float) -> None:
    """A tree crown of a few overlapping discs, with its shadow."""
    rng = scene.rng
    color = scene.ground[3] * rng.uniform(0.75, 1.3)
    scene.cast_disc(center, radius * 1.05, radius * 1.5)
    scene.disc(center, radius, color * 0.85)
    lit = -scene.sun / np.linalg.norm(scene.sun)
    for shift, light in zip(rng.normal(0, 0.35, (4, 2)), (0.8, 1.0, 1.12, 1.25), strict=True):
        scene.disc(center + (shift + lit * (light - 0.8)) * radius, radius * 0.5, color * light)


def house(scene: Scene, center: np.ndarray, angle: float, length: float, width: float, own: int = 1) -> None:
    """A gabled, hipped or flat roof with ridge, shadow, tile courses, chimney; `own` goes into the mask."""
    rng = scene.rng
    color, height = scene.pick(ROOFING), width * rng.uniform(0.35, 0.7)
    corners = rectangle(center, angle, length, width)
    scene.cast(corners, height)
    along, across = axis(angle), axis(angle + np.pi / 2)
    sun = scene.sun / np.linalg.norm(scene.sun)
    steep, shape = rng.uniform(0.12, 0.34), rng.random()
    scene.polygon(corners, color * 0.8, own)
    if shape < 0.15:
        scene.polygon(rectangle(center, angle, length - 0.02, width - 0.02), color)
        scene.polygon(rectangle(center + along * length * 0.2, angle, width * 0.3, width * 0.2), color * 0.7)
        return
    half = length / 2 if shape < 0.65 else max(length - width, 0) / 2
    ridge = np.stack([center - along * half, center + along * half])
    for direction, eaves, top in (
        (-across, corners[[0, 3]], ridge[[1, 0]]),
        (across, corners[[1, 2]], ridge[[1, 0]]),
        (-along, corners[[0, 1]], ridge[:1]),
        (along, corners[[2, 3]], ridge[1:]),
    ):
        face = color * (1 - steep * float(direction @ sun)) * (1 - 0.3 * steep)
        scene.polygon(np.concatenate([eaves, top]), face)
        if len(top) == 2:
            for part in (0.3, 0.6):
                ends = eaves * (1 - part) + top[::-1] * part
                scene.polygon(np.concatenate([ends, ends[::-1] + direction * 0.008]), face * 0.9)
    scene.polygon(rectangle(center, angle, 2 * half + 0.012, 0.012), color * 1.25)
    if rng.random() < 0.6:
        place = center + along * length * rng.uniform(-0.3, 0.3) + across * width * rng.choice([-0.15, 0.15])
        block = rectangle(place, angle, 0.025, 0.025)
        scene.cast(block, 0.03)
        scene.polygon(block, color * 0.6)


def distract(scene: Scene, may_cover: bool) -> None:
    """Trees, a hedge or a hut for any class; they keep off the class's own object unless `may_cover`."""
    rng = scene.rng
    if rng.random() < 0.3:
        width = rng.uniform(0.07, 0.12) * scene.scale
        place, length, angle = (
            rng.uniform(0.08, 0.92, 2),
            width * rng.uniform(1, 1.6),
            rng.normal(scene.turn, 0.3),
        )
        reach = rectangle(place, angle, length, width)
        if may_cover or not any(scene.occupied(point) for point in (place, *reach)):
            house(scene, place, angle, length, width, own=0)
    if rng.random() < 0.35:
        line = curve(scene, scene.turn + rng.integers(2) * np.pi / 2, 0.45, 0.06)
        start, radius = int(rng.integers(0, 25)), rng.uniform(0.014, 0.026) * scene.scale
        bushes = [
            p for p in line[start : start + int(rng.integers(8, 16))] if may_cover or not scene.occupied(p)
        ]
        for point in bushes:
            scene.cast_disc(point, radius, radius * 1.5)
        for point in bushes:
            scene.disc(
                point + rng.normal(0, 0.005, 2),
                radius * rng.uniform(0.9, 1.3),
                scene.ground[3] * rng.uniform(0.8, 1.25),
            )
    for _ in range(int(rng.integers(0, 7))):
        place = rng.uniform(0, 1, 2)
        if not scene.occupied(place) or (may_cover and rng.random() < 0.3):
            tree(scene, place, rng.uniform(0.025, 0.06) * scene.scale)


def track(scene: Scene) -> None:
    """An unpaved track with two ruts, below whatever else is drawn."""
    rng = scene.rng
    line = curve(scene, scene.turn + rng.integers(2) * np.pi / 2, 0.5, 0.12)
    width, color = rng.uniform(0.03, 0.055) * scene.scale, scene.soil() * rng.uniform(0.9, 1.15)
    scene.polygon(ribbon(line, -width / 2, width / 2), color)
    for rut in (-0.5, 0.25):
        scene.polygon(ribbon(line, rut * width, (rut + 0.25) * width), color * 0.82)


def cars(scene: Scene, line: np.ndarray, lanes: np.ndarray, num: int) -> None:
    """Cars on a road along the curve (41, 2), at the offsets `lanes` to its side."""
    rng = scene.rng
    ahead = np.gradient(line, axis=0)
    length = 0.085 * scene.scale
    for spot in rng.permutation(np.arange(8, 33, 4))[:num]:
        angle = float(np.arctan2(ahead[spot, 1], ahead[spot, 0]))
        place = line[spot] + axis(angle + np.pi / 2) * rng.choice(lanes)
        body, color = (
            rectangle(place, angle, length, length * 0.48),
            scene.pick(ROOFING) * rng.choice([0.7, 1.25]),
        )
        scene.cast(body, 0.03)
        scene.polygon(body, color)
        scene.polygon(rectangle(place, angle, length * 0.55, length * 0.4), color * 0.45)
        scene.polygon(rectangle(place, angle, length * 0.3, length * 0.38), color * 1.1)


def panels(
    scene: Scene,
    center: np.ndarray,
    angle: float,
    half: tuple[float, float],
    pitch: float,
    fill: float,
    height: float,
) -> None:
    """Rows of solar modules in a rectangle of `half` length and width around `center`, also in the mask.

    `pitch` is the distance of the rows, `fill` the part of it that modules cover, `height` that of their
    shadow.
    """
    rng = scene.rng
    along, across = scene.frame(center, angle)
    cell, thick = rng.uniform(0.055, 0.095) * scene.scale, max(0.012, 1 / scene.side)
    within = (across + np.float32(half[1])) / np.float32(pitch)
    row = np.clip(np.floor(within), 0, 63).astype(np.intp)
    within = within - row.astype(np.float32)
    ends = half[0] - rng.integers(0, 3, 64) * cell * (rng.random(64) < 0.35)
    inside = (np.abs(along) < ends.astype(np.float32)[row]) & (np.abs(across) < half[1]) & (within < fill)
    column = along / np.float32(cell) + 32
    number = np.clip(np.floor(column), 0, 63).astype(np.intp)
    if rng.random() < 0.5:  # a path for the fitters between blocks of modules
        inside &= number % int(rng.integers(4, 8)) != 0
    color = scene.pick(PANELS)
    frame = color + (rng.uniform(150, 235) - color) * rng.uniform(0.45, 0.9)
    sheen = rng.uniform(-0.35, 0.35) * (within / fill - 0.5)
    light = 1 + sheen + rng.normal(0, 0.05, (64, 64)).astype(np.float32)[row, number]
    image = color * light[..., None]
    line = (column - number.astype(np.float32)) * cell < thick
    deep = float(fill * pitch)
    num_high = max(1, round(deep / cell))
    line |= within * (num_high / fill) % 1 < thick * num_high / deep
    scene.paste(np.where(line[..., None], frame, image), inside, inside)
    if height:
        down, right = np.round(scene.sun[::-1] * height * scene.side).astype(int).tolist()
        scene.paste_shade(np.roll(inside, (down, right), (0, 1)) & ~inside)
