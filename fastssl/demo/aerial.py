"""Synthetic aerial tiles for the five-minute demo: drawings made by a program, no photographs.

Five classes told by texture and shape (crop rows, roofs, roads, water, solar panels) over ground, light,
colors and clutter that all of them share, so that color and layout do not give the class away. They are for
demonstration and tests only: a figure measured on them says nothing about real imagery.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from fastssl.demo.aerial_shapes import (
    PAVING,
    ROOFING,
    WATERS,
    Scene,
    axis,
    cars,
    curve,
    distract,
    grid,
    house,
    new_scene,
    noise,
    panels,
    rectangle,
    ribbon,
    track,
    tree,
)
from shards.errors import UserError

CLASSES = ("fields", "roofs", "roads", "water", "solar")
SETTINGS = "aerial.json"
_MIN_SIZE, _MAX_SIZE = 16, 4096


def _fields(scene: Scene) -> None:
    rng = scene.rng
    x, y = grid(scene.side)
    num_cuts = int(rng.integers(0, 4))
    parcel, edge = np.zeros(x.shape, np.intp), np.ones_like(x)
    for cut in range(num_cuts):
        direction = axis(scene.turn + cut % 2 * np.pi / 2 + rng.normal(0, 0.1)).astype(np.float32)
        away = (x - 0.5) * direction[0] + (y - 0.5) * direction[1] - np.float32(rng.uniform(-0.35, 0.35))
        parcel += (away > 0).astype(np.intp) << cut
        edge = np.minimum(edge, np.abs(away))
    num = 1 << num_cuts
    angle = scene.turn + rng.integers(0, 2, num) * np.pi / 2 + rng.normal(0, 0.2, num)
    waves = 2 * np.pi / (rng.uniform(0.045, 0.105, num) * scene.scale)
    sown = rng.random(num) < 0.82
    sown[parcel[scene.side // 2, scene.side // 2]] = True
    along, across = (waves * np.cos(angle)).astype(np.float32), (waves * np.sin(angle)).astype(np.float32)
    bent = noise(rng, scene.side, 2) * np.float32(rng.uniform(0, 3))
    rows = np.sin(along[parcel] * x + across[parcel] * y + bent)
    rows = np.tanh(rng.uniform(0.8, 4, num).astype(np.float32)[parcel] * rows)
    patchy = noise(rng, scene.side, int(rng.integers(6, 14)), 2)
    depth = np.where(sown, rng.uniform(0.4, 0.7, num), 0).astype(np.float32)[parcel]
    part = (0.5 + 0.5 * rows * (1 + 0.5 * patchy)) * depth + 0.12 * patchy
    crop = np.stack([scene.soil() for _ in range(num)]).astype(np.float32)
    furrow = crop * rng.uniform(0.25, 0.7, (num, 1)).astype(np.float32)
    if rng.random() < 0.4:  # tyre lanes of the sprayer: one furrow in several is wider
        lane = np.sin((along[parcel] * x + across[parcel] * y + bent) / 6) > 0.93
        part = np.where(lane & (depth > 0), 0.9, part)
    image = crop[parcel] + (furrow - crop)[parcel] * part[..., None]
    inside = edge > rng.uniform(0.008, 0.03)
    scene.paste(image, inside, inside & sown[parcel])


def _roofs(scene: Scene) -> None:
    rng = scene.rng
    pitch = rng.uniform(0.31, 0.4) * scene.scale
    along, across = axis(scene.turn), axis(scene.turn + np.pi / 2)
    start = 0.5 + rng.uniform(-0.12, 0.12, 2)
    if rng.random() < 0.6:  # the lane that the houses stand on
        line = start + across * pitch / 2 + along * np.linspace(-1.2, 1.2, 9)[:, None]
        scene.polygon(ribbon(line, -0.035, 0.035), scene.pick(PAVING))
    homes = []
    for column in range(-3, 4):
        for row in range(-3, 4):
            place = start + along * pitch * column + across * pitch * row
            if np.abs(place - 0.5).max() < 0.62 and (column == row == 0 or rng.random() < 0.85):
                homes.append((place, max(abs(column), abs(row))))
    for place, _ in homes:  # gardens lie below all houses
        if rng.random() < 0.7:
            plot = rectangle(
                place, scene.turn, pitch * rng.uniform(0.75, 0.95), pitch * rng.uniform(0.75, 0.95)
            )
            scene.polygon(plot, scene.soil())
        if rng.random() < 0.4:
            yard = rectangle(place + along * pitch * 0.4, scene.turn, pitch * 0.25, pitch * 0.6)
            scene.polygon(yard, scene.pick(PAVING))
    for place, ring in homes:
        jitter = rng.normal(0, 0.06, 2) * pitch * (ring > 0)
        angle = scene.turn + rng.integers(2) * np.pi / 2 + rng.normal(0, 0.08)
        length, width = pitch * rng.uniform(0.6, 0.92), pitch * rng.uniform(0.42, 0.62)
        if rng.random() < 0.25:
            wing = axis(angle + np.pi / 2) * width * 0.5 + axis(angle) * length * 0.25
            house(scene, place + jitter + wing, angle + np.pi / 2, width, width * 0.7)
        house(scene, place + jitter, angle, length, width)
        if rng.random() < 0.5:
            tree(scene, place + rng.choice([-0.5, 0.5], 2) * pitch, rng.uniform(0.02, 0.045) * scene.scale)


def _roads(scene: Scene) -> None:
    rng = scene.rng
    width = rng.uniform(0.15, 0.25) * scene.scale
    lines = [curve(scene, scene.turn, 0.18, rng.choice([0.02, 0.3]))]
    if rng.random() < 0.4:
        lines.append(curve(scene, scene.turn + np.pi / 2 + rng.normal(0, 0.3), 0.3, 0.1))
    verge, asphalt, paint = scene.soil(), scene.pick(PAVING), rng.uniform(185, 250) * np.ones(3)
    paint[2] *= rng.choice([1, 1, 0.6])
    if asphalt.mean() > 150 or abs(asphalt.mean() - verge.mean()) < 20:
        asphalt = asphalt * 0.7
    shoulder = rng.uniform(0.56, 0.8) * width
    for line in lines:
        scene.polygon(ribbon(line, -shoulder, shoulder), verge)
    for line in lines:
        scene.polygon(ribbon(line, -width / 2, width / 2), asphalt, 1)
    num_lanes = 4 if width > 0.23 else 2
    thick = max(0.011, 1 / scene.side)
    edged = rng.random() < 0.8
    for line in lines[::-1]:  # the main road is painted last, over the road that meets it
        worn = rng.uniform(0.88, 1.1)
        scene.polygon(ribbon(line, -width * 0.42, width * 0.42), asphalt * worn)
        for lane in range(1, num_lanes):
            offset = (lane / num_lanes - 0.5) * width
            whole = lane * 2 == num_lanes and num_lanes == 4
            for spot in range(0, 40, 40 if whole else 4):
                piece = line[spot : spot + (41 if whole else 3)]
                scene.polygon(ribbon(piece, offset - thick / 2, offset + thick / 2), paint)
        for offset in (-0.43 * width, 0.43 * width) if edged else ():
            scene.polygon(ribbon(line, offset - thick / 2, offset + thick / 2), paint)
    lanes = ((np.arange(num_lanes) + 0.5) / num_lanes - 0.5) * width
    for line in lines:
        cars(scene, line, lanes, int(rng.integers(0, 4)))


def _water(scene: Scene) -> None:
    rng, side = scene.rng, scene.side
    rough = noise(rng, side, int(rng.integers(3, 6)), 3)
    along, across = scene.frame(0.5 + rng.uniform(-0.2, 0.2, 2), scene.turn)
    if rng.random() < 0.5:
        middle = np.float32(rng.uniform(0.02, 0.12)) * np.sin(along * np.float32(rng.uniform(3, 8)) + 1)
        level = np.abs(across - middle) - 0.2 * scene.scale + 0.03 * rough
    else:
        level = np.hypot(along, across * np.float32(rng.uniform(0.7, 1.6))) + 0.22 * rough
        level -= np.quantile(level[::4, ::4], rng.uniform(0.35, 0.75))
    bank = rng.uniform(0.01, 0.045)
    shore = scene.soil() * rng.uniform(0.65, 1.3)
    depth = np.clip(-level / rng.uniform(0.05, 0.3), 0, 1)
    wind = scene.turn + rng.uniform(0, np.pi)
    phase = noise(rng, side, 5, 2) * np.float32(3.5)
    x, y = grid(side)
    ripple = np.zeros_like(level)
    for turn, weight in zip(rng.normal(0, 0.35, 3), (1.0, 0.8, 0.6), strict=True):
        beat = axis(wind + turn) * 2 * np.pi / (rng.uniform(0.04, 0.085) * scene.scale)
        ripple += np.float32(weight) * np.sin(
            np.float32(beat[0]) * x + np.float32(beat[1]) * y + phase * np.float32(weight)
        )
    gust = np.clip(0.55 + 0.6 * noise(rng, side, 3, 2), 0, 1.2)
    color = scene.pick(WATERS)
    if abs(color.mean() - shore.mean()) < 18:
        shore = shore * float(rng.choice([0.75, 1.3]))
    light = 1 + rng.uniform(0.05, 0.16) * ripple * gust - rng.uniform(0, 0.25) * depth
    image = color * light[..., None] + (rng.uniform(0, 35) * gust)[..., None]
    glint = ripple * gust > rng.uniform(1.2, 2.2)
    image += (glint * rng.uniform(15, 85))[..., None]
    wet = level < 0
    image = np.where(wet[..., None], image, shore * (1 + 0.1 * rough[..., None]))
    scene.paste(image, level < bank, wet)


def _solar(scene: Scene) -> None:
    rng = scene.rng
    center = 0.5 + rng.uniform(-0.12, 0.12, 2)
    if rng.random() < 0.7:
        half = (rng.uniform(0.33, 0.75), rng.uniform(0.3, 0.7))
        pitch = rng.uniform(0.13, 0.24) * scene.scale
        panels(scene, center, scene.turn, half, pitch, rng.uniform(0.5, 0.75), rng.uniform(0.04, 0.09))
        return
    length, width = rng.uniform(0.65, 1.1), rng.uniform(0.45, 0.7)
    roof, corners = scene.pick(ROOFING), rectangle(center, scene.turn, length, width)
    scene.cast(corners, rng.uniform(0.06, 0.16))
    scene.polygon(corners, roof * 0.8)
    scene.polygon(rectangle(center, scene.turn, length - 0.025, width - 0.025), roof)
    sides = (-1, 1) if rng.random() < 0.75 else (int(rng.choice([-1, 1])),)
    for side in sides:
        middle = center + axis(scene.turn + np.pi / 2) * side * width / 4
        half = (length / 2 - rng.uniform(0.04, 0.12), width / 4 - rng.uniform(0.02, 0.04))
        pitch = half[1] * float(rng.choice([1.0, 2.0]))
        panels(scene, middle, scene.turn, half, pitch, rng.uniform(0.8, 0.98), 0)
    ridge = center + axis(scene.turn) * np.array([[-length / 2], [length / 2]])
    scene.polygon(ribbon(ridge, -0.008, 0.008), roof * 1.2, 0)


_PAINTERS = (_fields, _roofs, _roads, _water, _solar)


def _camera(scene: Scene, size: int) -> np.ndarray:
    rng = scene.rng
    picture = scene.canvas.reduce(2)
    if rng.random() < 0.3:
        picture = picture.filter(ImageFilter.BoxBlur(rng.uniform(0.2, 0.6)))
    image = np.asarray(picture, np.float32) / 255
    shade = np.asarray(scene.shade.reduce(2), np.float32) / 255 * rng.uniform(0.3, 0.65)
    if rng.random() < 0.3:  # the shadow of a cloud outside the tile
        shade = np.maximum(shade, np.clip(noise(rng, size, 2, 2) - rng.uniform(-0.1, 0.6), 0, 0.4))
    tilt = axis(rng.uniform(0, 2 * np.pi)) * rng.uniform(0, 0.18)
    x, y = grid(size)
    light = (1 - shade) * (1 + tilt[0] * (x - 0.5) + tilt[1] * (y - 0.5))
    image = image * light[..., None].astype(np.float32)
    gray = image.mean(axis=2, keepdims=True)
    image = gray + (image - gray) * np.float32(rng.uniform(0.5, 1.2))
    image = np.clip(image * (rng.uniform(0.72, 1.35) * rng.normal(1, 0.04, 3)).astype(np.float32), 0, 1)
    image **= np.float32(rng.uniform(0.7, 1.3))
    if rng.random() < 0.5:
        haze = np.float32(rng.uniform(0.05, 0.25))
        image = image * (1 - haze) + haze * rng.uniform(0.5, 0.9, 1).astype(np.float32)
    if rng.random() < 0.07:
        cloud = np.clip((noise(rng, size, 2, 3) - rng.uniform(0.45, 0.9)) * 1.6, 0, 0.8)[..., None]
        image += (0.93 - image) * cloud
    # Only these two depend on the size; as the last draws, they leave the scene the same at every size.
    image *= 1 + rng.uniform(0.02, 0.12) * noise(rng, size, max(8, size // 3))[..., None]
    image += rng.standard_normal(image.shape, np.float32) * np.float32(rng.uniform(0.004, 0.026))
    return np.clip(image * 255 + 0.5, 0, 255).astype(np.uint8)


def draw_tile(label: int, index: int, seed: int, size: int = 96) -> tuple[np.ndarray, np.ndarray]:
    """Draw one tile and its mask, a pure function of the arguments.

    Lengths scale with the size (a tile is about 48 m wide, 0.5 m per pixel at 96), so a tile shows the same scene at every size.

    Args:
        label: index into CLASSES.
        index: number of the tile in its class, 0 to 2**48 - 1.
        seed: 0 to 2**64 - 1.
        size: side in pixels, 16 to 4096.

    Returns:
        The image, uint8 (size, size, 3) RGB, and the mask, uint8 (size, size): 1 where at least half of the pixel is the class's own
        object (fields: parcels under crop rows; roofs: roofs of houses; roads: the carriageway with its paint and cars; water: the
        water within the shore; solar: the panels), 0 elsewhere, also under a tree that hides the object.

    Raises:
        UserError: a label, index, seed or size out of range.
    """
    _check(seed, size)
    if not 0 <= label < len(CLASSES):
        raise UserError(
            f"Label {label} is no class of aerial tiles; use 0 to {len(CLASSES) - 1} ({', '.join(CLASSES)})."
        )
    if not 0 <= index < 2**48:
        raise UserError(f"Tile index {index} is out of range; use 0 to 2**48 - 1.")
    key = np.array([seed, label << 48 | index], np.uint64)
    scene = new_scene(np.random.Generator(np.random.Philox(key=key)), size)
    if scene.rng.random() < 0.25:
        track(scene)
    _PAINTERS[label](scene)
    distract(scene, may_cover=CLASSES[label] == "fields")
    mask = (np.asarray(scene.mask.reduce(2)) >= 128).astype(np.uint8)
    return _camera(scene, size), mask


def write_folder(
    dest: str | os.PathLike[str],
    num_per_class: int,
    seed: int,
    size: int = 96,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Write a folder of tiles, DEST/images/CLASS/CLASS_00012.png and the same names under DEST/masks; return how many were drawn.

    Masks hold 0 and 1, as from `draw_tile`. Give DEST/images, not DEST, to `fastssl shard`. A tile whose two files are there and not
    empty is kept, so an interrupted run continues and a larger `num_per_class` adds tiles. `progress(done, total)` is called after
    every tile.

    Raises:
        UserError: DEST holds tiles of another seed or size, or num_per_class is less than 1.
    """
    _check(seed, size)
    if num_per_class < 1:
        raise UserError(f"Cannot write {num_per_class} tiles per class; ask for at least 1.")
    root, settings = Path(dest), json.dumps({"seed": seed, "size": size})
    marker = root / SETTINGS
    if marker.is_file() and (found := marker.read_text()) != settings:
        raise UserError(
            f"'{marker}' holds {found}, not {settings}: use its seed and size, or write to another folder."
        )
    root.mkdir(parents=True, exist_ok=True)
    _replace(marker, settings.encode())
    names = [(label, index) for label in range(len(CLASSES)) for index in range(num_per_class)]
    num_drawn = 0
    for done, (label, index) in enumerate(names, 1):
        name = CLASSES[label]
        paths = [root / kind / name / f"{name}_{index:05d}.png" for kind in ("images", "masks")]
        if not all(path.is_file() and path.stat().st_size for path in paths):
            for path, pixels in zip(paths, draw_tile(label, index, seed, size), strict=True):
                path.parent.mkdir(parents=True, exist_ok=True)
                buffer = io.BytesIO()
                Image.fromarray(pixels).save(buffer, "PNG", compress_level=3)
                _replace(path, buffer.getvalue())
            num_drawn += 1
        if progress is not None:
            progress(done, len(names))
    return num_drawn


def _check(seed: int, size: int) -> None:
    if not 0 <= seed < 2**64:
        raise UserError(f"Seed {seed} is out of range; use 0 to 2**64 - 1.")
    if not _MIN_SIZE <= size <= _MAX_SIZE:
        raise UserError(f"Tile size {size} is out of range; use {_MIN_SIZE} to {_MAX_SIZE} pixels.")


def _replace(path: Path, content: bytes) -> None:
    # No fsync per file, unlike shards.storage.atomic_files: a tile lost in a crash is empty or missing, and is drawn again.
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)
