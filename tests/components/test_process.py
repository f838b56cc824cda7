"""Pictures of the process: they show what they say, at a size that can be sent."""

import io
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageSequence

from components import process
from components.diffusion.config import DiffusionConfig
from components.diffusion.schedule import Schedule
from components.figures import grid
from components.process import Moment, all_schedules, colours_by_place, forward_picture, gif_bytes, posterior_variance, reverse_frames, snr
from components.spaces.pixels import PixelSpace
from components.spaces.points import PointSpace
from components.spaces.scatter import scatter_tile
from components.spaces.space import Space

POINTS = np.random.default_rng(0).normal(size=(2000, 2)).astype(np.float32)
LIMITS = (-1.0, 1.0, -1.0, 1.0)


@pytest.mark.parametrize("place", [(0.5, 0.5), (-0.5, 0.25), (0.0, -0.9)])
def test_a_point_leaves_ink_where_it_lies_with_y_upwards(place: tuple[float, float]):
    tile = scatter_tile(np.array([place]), LIMITS, 100)
    rows, columns = np.nonzero((tile != 255).any(axis=0))
    assert (columns.mean() + 0.5) / 50 - 1 == pytest.approx(place[0], abs=0.02)
    assert 1 - (rows.mean() + 0.5) / 50 == pytest.approx(place[1], abs=0.02)


def test_points_outside_and_points_that_are_none_are_not_drawn():
    assert (scatter_tile(np.array([[5.0, 0], [np.nan, 0], [np.inf, 1]]), LIMITS, 50) == 255).all()


def test_equal_places_have_equal_colours_and_opposite_ones_differ():
    ends = np.array([[1.0, 0], [1, 0], [-1, 0], [0, 1], [0, -1]])
    colours = colours_by_place(ends).astype(int)
    assert np.array_equal(colours[0], colours[1])
    luma = colours @ [0.299, 0.587, 0.114]
    assert all(np.abs(colours[one] - colours[other]).max() > 60 for one, other in product(range(1, 5), repeat=2) if one != other)
    assert np.ptp(luma) > 40  # told apart without colour, too


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_signal_to_noise_ratio_and_posterior_variance_are_those_of_the_paper(kind: str):
    schedule = Schedule(DiffusionConfig(num_steps=50, betas=kind))  # pyrefly: ignore[bad-argument-type]
    alpha_bar, betas = schedule.alpha_bar.numpy(), schedule.betas.numpy()
    variance = posterior_variance(alpha_bar)
    assert variance[0] == 0
    np.testing.assert_allclose(variance[1:], (1 - alpha_bar[:-1]) / (1 - alpha_bar[1:]) * betas[1:], rtol=1e-9)
    np.testing.assert_allclose(snr(alpha_bar) * (1 - alpha_bar), alpha_bar)
    assert np.array_equal(all_schedules(50)[kind], alpha_bar)


def test_every_schedule_is_in_the_figure_and_the_figure_is_small(tmp_path: Path):
    process.save_schedules(tmp_path / "schedules.png", all_schedules(1000))
    assert (tmp_path / "schedules.png").stat().st_size < process.MOST_BYTES
    with Image.open(tmp_path / "schedules.png") as picture:
        assert picture.width > 800


@pytest.mark.parametrize("space", [PointSpace(), PixelSpace(image_size=(8, 16), mode="RGBA"), PixelSpace(image_size=8, mode="L")])
def test_what_noise_does_is_shown_for_every_space(space: Space):
    rows = POINTS if isinstance(space, PointSpace) else np.random.default_rng(0).integers(0, 256, (4, *space.shape), dtype=np.uint8)
    schedule = Schedule(DiffusionConfig(num_steps=100))
    data, last = process.noised(space, schedule, rows, [-1, 99])
    np.testing.assert_allclose(data, rows, atol=1e-6)
    assert np.abs(last.astype(float) - rows).mean() > (0.3 if isinstance(space, PointSpace) else 20)
    picture = forward_picture(space, schedule, rows, "title")
    file = io.BytesIO()
    picture.save(file, "PNG")
    assert file.tell() < process.MOST_BYTES


@pytest.mark.parametrize("space", [PointSpace(), PixelSpace(image_size=(8, 16))])
def test_the_way_back_has_a_frame_for_each_moment_and_ends_with_the_samples(space: Space):
    draw = np.random.default_rng(0)
    rows = [POINTS * scale if isinstance(space, PointSpace) else draw.integers(0, 256, (6, *space.shape), dtype=np.uint8) for scale in (3, 2, 1)]
    frames = reverse_frames(space, [Moment(t, 0.5, x, x) for t, x in zip((99, 50, -1), rows, strict=True)], 3)
    assert len(frames) == 3
    if isinstance(space, PointSpace):
        tile = scatter_tile(rows[-1], space.limits(), 360, colours_by_place(rows[-1]))
        assert np.array_equal(np.asarray(frames[-1])[1:359, 1:359], tile.transpose(1, 2, 0)[1:359, 1:359])
    else:
        assert frames[0].width > 2 * frames[0].height  # x_t beside the estimate of x_0


def test_an_animation_of_noise_is_made_small_enough_and_rests_on_its_last_frame():
    draw = np.random.default_rng(0)
    frames = [grid(draw.integers(0, 256, (16, 3, 64, 64), dtype=np.uint8), 4) for _ in range(30)]
    content = gif_bytes(frames)
    assert len(content) <= process.MOST_BYTES
    shown = [frame.info["duration"] for frame in ImageSequence.Iterator(Image.open(io.BytesIO(content)))]
    assert shown[-1] > 5 * shown[0]
