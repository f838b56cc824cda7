"""The space of latents, and the objective of autoencoders: what is drawn, scaled, mirrored and weighed."""

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from components.diffusion.config import DiffusionConfig
from components.diffusion.objective import losses_by_row, training_loss
from components.diffusion.process import make_process
from components.networks.autoencoder_kl.config import AutoencoderKLConfig
from components.spaces.latents import LatentSpace
from components.spaces.pixels import PixelSpace

SPACE = LatentSpace(pixels=PixelSpace(image_size=8, mode="L"), autoencoder="a", latent=(2, 4, 4))


def rows(count: int, variants: int = 1) -> np.ndarray:
    """Returns posteriors: means about 3 with deviation 2, standard deviations of 1."""
    draw = np.random.default_rng(0)
    parts = [part for _ in range(variants) for part in (3 + 2 * draw.standard_normal((count, 2, 4, 4)), np.ones((count, 2, 4, 4)))]
    return np.concatenate(parts, axis=1).astype(np.float16)


def test_the_scale_takes_draws_to_variance_one():
    data = rows(4000)
    space = SPACE.fitted(lambda: iter(np.split(data, 4)))
    assert space.scale == pytest.approx(5**-0.5, rel=0.01)  # variance of the means 4, of the posteriors 1
    drawn = space.to_x_0(torch.from_numpy(space.drawn(data, np.random.default_rng(1))))
    assert float(drawn.var()) == pytest.approx(1, rel=0.02)
    assert space.to_x_0(torch.from_numpy(data)).shape == (4000, 2, 4, 4)


def test_draws_follow_their_posterior():
    one = np.repeat(rows(1), 20_000, axis=0)
    drawn = SPACE.drawn(one, np.random.default_rng(2))
    np.testing.assert_allclose(drawn.mean(axis=0), one[0, :2], atol=0.05)
    np.testing.assert_allclose(drawn.std(axis=0), 1, atol=0.05)


def test_mirrored_rows_are_the_other_posterior_and_twice_mirrored_the_first():
    both = LatentSpace(pixels=SPACE.pixels, autoencoder="a", latent=(2, 4, 4), mirrors=True)
    data = rows(3, variants=2)
    assert both.row_shape == (8, 4, 4)
    assert (both.mirrored(data)[:, :4] == data[:, 4:]).all()
    assert (both.mirrored(both.mirrored(data)) == data).all()
    with pytest.raises(ValueError, match=r"encode them with train\.flip=true"):
        SPACE.mirrored(rows(3))


def test_shifted_copies_are_encoded_by_what_an_image_is_and_drawn_alike_often():
    space = LatentSpace(pixels=SPACE.pixels, autoencoder="a", latent=(1, 8, 8), mirrors=True, copies=3, jitter=2)
    images = np.random.default_rng(0).integers(0, 256, (6, 1, 8, 8), dtype=np.uint8)
    encoded = space.encoded(images, lambda part: np.concatenate([part, np.zeros_like(part)], axis=1).astype(np.float16))
    assert encoded.shape == (6, *space.row_shape) == (6, 16, 8, 8)
    assert (space.encoded(images[3:], lambda part: np.concatenate([part, np.zeros_like(part)], axis=1)) == encoded[3:]).all()
    around = np.pad(images, ((0, 0), (0, 0), (2, 2), (2, 2)), mode="symmetric")
    windows = [around[:, 0, down : down + 8, right : right + 8] for down in range(5) for right in range(5)]
    found = {
        number: [next(at for at, window in enumerate(windows) if (window[row] == encoded[row, 2 * number]).all()) for row in range(6)] for number in range(4)
    }
    assert set(found[0]) == {12}  # as it is
    assert len({at for number in (1, 2, 3) for at in found[number]}) > 5
    assert (encoded[:, 8:] == encoded[:, :8, :, ::-1]).all()
    assert (space.mirrored(encoded) == np.concatenate([encoded[:, 8:], encoded[:, :8]], axis=1)).all()
    drawn = space.drawn(np.repeat(encoded[:1], 4000, axis=0), np.random.default_rng(1))
    chosen = [int((drawn[:, 0] == encoded[0, 2 * number].astype(np.float32)).all(axis=(1, 2)).sum()) for number in range(4)]
    assert sum(chosen) == 4000
    assert min(chosen) > 900


def test_the_loss_is_the_absolute_error_and_the_weighted_divergence():
    network = AutoencoderKLConfig(base_channels=8, num_groups=4, latent_channels=2).build((1, 8, 8))
    process = make_process(DiffusionConfig(process="reconstruction", kl_weight=0.25))
    x, eps = torch.rand(3, 1, 8, 8) * 2 - 1, torch.randn(3, 1, 8, 8)
    found = training_loss(process)(network, process, x, eps, torch.zeros(3))
    reconstructed, mean, logvar = network(x, eps)
    divergence = kl_divergence(Normal(mean, torch.exp(0.5 * logvar)), Normal(0.0, 1.0)).sum() / x.numel()
    torch.testing.assert_close(found, (reconstructed - x).abs().mean() + 0.25 * divergence)


def test_the_noise_of_an_image_says_where_in_its_posterior_it_is_drawn():
    network = AutoencoderKLConfig(base_channels=8, num_groups=4, latent_channels=2).build((1, 8, 8))
    x = torch.rand(2, 1, 8, 8)
    at_mean, _, _ = network(x, torch.zeros(2, 1, 8, 8))
    torch.testing.assert_close(at_mean, network(x, torch.zeros(2)))
    elsewhere, _, _ = network(x, torch.ones(2, 1, 8, 8))
    assert not torch.allclose(elsewhere, at_mean)


def test_what_is_measured_on_held_out_images_is_the_squared_error_of_the_reconstruction():
    network = AutoencoderKLConfig(base_channels=8, num_groups=4, latent_channels=2).build((1, 8, 8)).eval()
    process, x = make_process(DiffusionConfig(process="reconstruction")), torch.rand(5, 1, 8, 8)
    found = losses_by_row(network, process, x, process.times(8))
    assert found.shape == (1, 5)
    with torch.inference_mode():
        expected = (network(x, torch.zeros(5)) - x).square().flatten(1).mean(dim=1)
    torch.testing.assert_close(found[0], expected.double(), rtol=1e-5, atol=1e-7)


def test_latents_larger_than_the_image_are_refused():
    with pytest.raises(ValueError, match=r"model\.latent_channels=5 makes latents larger than the image; use up to 4"):
        AutoencoderKLConfig(latent_channels=5).check_shape((1, 8, 8))
