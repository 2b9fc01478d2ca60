import numpy as np
import pytest
from PIL import Image

from fastssl.demo.aerial import CLASSES, SETTINGS, draw_tile, write_folder
from fastssl.demo.aerial_shapes import axis, new_scene, noise, rectangle, ribbon
from shards.errors import UserError

LABELS = range(len(CLASSES))


def mean_colors(num: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    tiles = [(draw_tile(label, index, seed, 32)[0], label) for label in LABELS for index in range(num)]
    return np.stack([tile.mean(axis=(0, 1)) for tile, _ in tiles]), np.array([label for _, label in tiles])


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("size", [16, 33, 64])
def test_a_tile_has_the_promised_shape_type_and_range(label: int, size: int):
    image, mask = draw_tile(label, 3, 7, size)
    assert image.shape == (size, size, 3)
    assert image.dtype == np.uint8
    assert np.ptp(image) > 20
    assert mask.shape == (size, size)
    assert mask.dtype == np.uint8
    assert set(np.unique(mask)) <= {0, 1}


@pytest.mark.parametrize("label", LABELS)
def test_a_tile_depends_on_its_arguments_alone(label: int):
    first = draw_tile(label, 5, 11, 48)
    draw_tile((label + 1) % len(CLASSES), 6, 12, 64)
    second = draw_tile(label, 5, 11, 48)
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("label", LABELS)
def test_index_and_seed_change_the_tile(label: int):
    tiles = [draw_tile(label, index, seed, 32)[0] for index, seed in ((0, 0), (1, 0), (0, 1), (1, 1))]
    assert len({tile.tobytes() for tile in tiles}) == 4


@pytest.mark.parametrize("label", LABELS)
def test_masks_mark_a_part_of_every_tile_of_a_class(label: int):
    shares = np.array([draw_tile(label, index, 0, 32)[1].mean() for index in range(40)])
    assert shares.min() > 0.02
    assert 0.2 < np.median(shares) < 0.95
    assert np.ptp(shares) > 0.1


@pytest.mark.parametrize("label", LABELS)
def test_a_tile_shows_the_same_scene_at_two_sizes(label: int):
    misfits, correlations = [], []
    for index in range(20):
        (small, small_mask), (large, large_mask) = (draw_tile(label, index, 2, size) for size in (32, 64))
        halved = large_mask.reshape(32, 2, 32, 2).mean(axis=(1, 3))
        misfits.append(np.abs(small_mask - halved).mean())
        pixels = large.reshape(32, 2, 32, 2, 3).mean(axis=(1, 3))
        correlations.append(np.corrcoef(small.ravel(), pixels.ravel())[0, 1])
    assert np.median(misfits) < 0.08
    assert np.median(correlations) > 0.8


def test_mean_color_does_not_tell_the_classes_apart():
    colors, labels = mean_colors(60, seed=0)
    centers = np.stack([colors[labels == label].mean(axis=0) for label in LABELS])
    nearest = ((colors[:, None] - centers) ** 2).sum(axis=2).argmin(axis=1)
    assert (nearest == labels).mean() < 0.45
    low = np.stack([np.quantile(colors[labels == label], 0.1, axis=0) for label in LABELS])
    high = np.stack([np.quantile(colors[labels == label], 0.9, axis=0) for label in LABELS])
    assert (low.max(axis=0) < high.min(axis=0)).all()


def test_the_water_of_a_tile_differs_from_its_ground():
    # The mask must lie where the object was drawn: shifted masks would separate two colors less well.
    label, gaps, shifted = CLASSES.index("water"), [], []
    for index in range(20):
        image, mask = draw_tile(label, index, 0, 48)
        gray = image.mean(axis=2)
        gaps.append(abs(gray[mask == 1].mean() - gray[mask == 0].mean()))
        moved = np.roll(mask, 24, axis=(0, 1))
        shifted.append(abs(gray[moved == 1].mean() - gray[moved == 0].mean()))
    assert np.mean(gaps) > 1.5 * np.mean(shifted)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((5, 0, 0, 32), "Label 5"),
        ((-1, 0, 0, 32), "Label -1"),
        ((0, -1, 0, 32), "index -1"),
        ((0, 0, -1, 32), "Seed -1"),
        ((0, 0, 2**64, 32), "Seed"),
        ((0, 0, 0, 8), "size 8"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: tuple[int, int, int, int], message: str):
    with pytest.raises(UserError, match=message):
        draw_tile(*arguments)


def test_the_largest_seed_and_index_work():
    assert draw_tile(4, 2**48 - 1, 2**64 - 1, 16)[0].shape == (16, 16, 3)


def test_write_folder_writes_what_draw_tile_draws(tmp_path):
    calls = []
    assert write_folder(tmp_path, 2, 4, 32, lambda done, total: calls.append((done, total))) == 10
    assert calls == [(done, 10) for done in range(1, 11)]
    names = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*"))
    kinds = [
        f"{kind}/{name}/{name}_{i:05d}.png"
        for kind in ("images", "masks")
        for name in CLASSES
        for i in range(2)
    ]
    assert names == sorted([SETTINGS, *kinds])
    for label, name in enumerate(CLASSES):
        image, mask = draw_tile(label, 1, 4, 32)
        np.testing.assert_array_equal(
            np.asarray(Image.open(tmp_path / "images" / name / f"{name}_00001.png")), image
        )
        np.testing.assert_array_equal(
            np.asarray(Image.open(tmp_path / "masks" / name / f"{name}_00001.png")), mask
        )


def test_write_folder_goes_on_where_it_was_interrupted(tmp_path):
    write_folder(tmp_path, 2, 4, 32)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.png")}
    first, second, third = sorted(before)[:3]
    first.unlink()
    second.write_bytes(b"")
    kept = third.stat().st_mtime_ns
    assert write_folder(tmp_path, 2, 4, 32) == 2
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.png")} == before
    assert third.stat().st_mtime_ns == kept
    assert write_folder(tmp_path, 3, 4, 32) == 5
    assert not list(tmp_path.rglob("*.tmp"))


def test_write_folder_refuses_a_folder_of_other_tiles(tmp_path):
    write_folder(tmp_path, 1, 4, 32)
    with pytest.raises(UserError, match=r'"seed": 4, "size": 32}, not {"seed": 5'):
        write_folder(tmp_path, 1, 5, 32)
    with pytest.raises(UserError, match=r'"size": 32}, not {"seed": 4, "size": 48'):
        write_folder(tmp_path, 1, 4, 48)
    (tmp_path / SETTINGS).write_text("{")
    with pytest.raises(UserError, match=r"holds \{, not"):
        write_folder(tmp_path, 1, 4, 32)
    with pytest.raises(UserError, match="0 tiles per class"):
        write_folder(tmp_path / "none", 0, 4, 32)
    assert not (tmp_path / "none").exists()


def test_a_shadow_falls_away_from_the_sun_and_not_on_its_own_footprint():
    scene = new_scene(np.random.default_rng(0), 50)
    scene.sun = np.array([1.0, 0.0])
    scene.cast(rectangle(np.array([0.4, 0.5]), 0.0, 0.2, 0.2), 0.2)
    rows, columns = np.nonzero(np.asarray(scene.shade))
    # The block spans 0.3 to 0.5 in x and 0.4 to 0.6 in y: its shadow reaches 0.2 further in x.
    assert (columns.min() / 100, columns.max() / 100) == pytest.approx((0.5, 0.7), abs=0.03)
    assert (rows.min() / 100, rows.max() / 100) == pytest.approx((0.4, 0.6), abs=0.03)


def test_a_turned_shadow_is_the_swept_footprint():
    scene = new_scene(np.random.default_rng(0), 100)
    scene.sun = axis(0.7)
    corners, height = rectangle(np.array([0.45, 0.45]), 0.3, 0.3, 0.16), 0.2
    scene.cast(corners, height)
    area = np.count_nonzero(np.asarray(scene.shade)) / 200**2
    # Sweeping a rectangle adds height times its extent across the sun: |sin| of each side's angle to the sun.
    assert area == pytest.approx(height * (0.3 * np.sin(0.4) + 0.16 * np.cos(0.4)), rel=0.05)


def test_rectangle_and_ribbon_have_the_corners_asked_for():
    np.testing.assert_allclose(
        rectangle(np.array([1.0, 2.0]), np.pi / 2, 4, 2), [[2, 0], [0, 0], [0, 4], [2, 4]], atol=1e-12
    )
    line = np.array([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0]])
    expected = [[0, -1], [1, -1], [2, -1], [2, 3], [1, 3], [0, 3]]
    np.testing.assert_allclose(ribbon(line, -1, 3), expected, atol=1e-12)


def test_noise_is_centerd_and_bounded():
    fields = np.stack([noise(np.random.default_rng(seed), 24, 4, 3) for seed in range(50)])
    assert fields.dtype == np.float32
    assert abs(fields.mean()) < 0.03
    assert np.abs(fields).max() < 2.2
