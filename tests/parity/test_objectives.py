"""Our objectives against diffusers' schedulers, the authors' formulae written out, and identities."""

import math
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from diffusers.training_utils import compute_snr

from components.diffusion.bound import bits_per_dimension, gaussian_kl, log_variance
from components.diffusion.config import DiffusionConfig
from components.diffusion.edm import Edm
from components.diffusion.flow import RectifiedFlow
from components.diffusion.objective import hybrid_loss, simple_loss, training_loss, weighted_loss
from components.diffusion.recipe import Recipe
from components.diffusion.sampling import sample
from components.diffusion.schedule import Schedule


def rows(count: int = 8, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, 4, 4, generator=generator) * 2 - 1, torch.randn(count, 3, 4, 4, generator=generator)


def small_network(outputs: int = 1) -> torch.nn.Conv2d:
    torch.manual_seed(1)
    return torch.nn.Conv2d(3, 3 * outputs, 3, padding=1)


def gradient(network: torch.nn.Module, loss: torch.Tensor) -> torch.Tensor:
    return torch.cat([each.flatten() for each in torch.autograd.grad(loss, list(network.parameters()))])


@pytest.mark.parametrize(("ours", "theirs"), [("sigmoid", "sigmoid"), ("quadratic", "scaled_linear"), ("linear", "linear"), ("cosine", "squaredcos_cap_v2")])
def test_schedules_are_those_of_diffusers(ours: Any, theirs: str):
    reference: Any = DDPMScheduler(1000, beta_schedule=theirs)
    torch.testing.assert_close(Schedule(DiffusionConfig(betas=ours)).betas, reference.betas.double(), rtol=2e-5, atol=1e-8)


@pytest.mark.parametrize("betas", ["linear", "cosine", "sigmoid", "quadratic"])
def test_zero_terminal_snr_is_that_of_diffusers_and_leaves_nothing(betas: Any):
    plain, ours = (Schedule(DiffusionConfig(betas=betas, prediction="v", zero_terminal_snr=zero)) for zero in (False, True))
    torch.testing.assert_close(ours.betas, rescale_zero_terminal_snr(plain.betas), rtol=1e-6, atol=1e-9)
    assert ours.alpha_bar[-1] == 0
    assert torch.isclose(ours.alpha_bar[0], plain.alpha_bar[0])


@pytest.mark.parametrize("sampler", ["ddim", "ancestral", "dpmpp_2m", "unipc", "heun"])
@pytest.mark.parametrize("config", [DiffusionConfig(prediction="v", zero_terminal_snr=True), DiffusionConfig(process="flow"), DiffusionConfig(process="edm")])
@pytest.mark.parametrize("steps", [1, 2, 7, 20])
def test_every_sampler_draws_one_image_from_its_perfect_denoiser(sampler: Any, config: DiffusionConfig, steps: int):
    from components.diffusion.process import make_process

    process = make_process(config)
    image = torch.linspace(-0.9, 0.9, 16).view(1, 4, 4)

    def perfect(shown: torch.Tensor, told: torch.Tensor) -> torch.Tensor:
        t = told if config.process == "ddpm" else told / 1000 if config.process == "flow" else (4 * told).exp()
        if isinstance(process, Edm):
            x_t = shown / process.preconditioning(t.view(-1, 1, 1, 1))[2]
            c_skip, c_out, _ = process.preconditioning(t.view(-1, 1, 1, 1))
            return (image - c_skip * x_t) / c_out
        if isinstance(process, RectifiedFlow):
            return (shown - image) / t.view(-1, 1, 1, 1)
        assert isinstance(process, Schedule)
        return process.target(image.expand_as(shown), process.eps_from_x_0(image, shown, t), t)

    drawn = sample(perfect, process, [0, 5], (1, 4, 4), Recipe(sampler, steps))
    torch.testing.assert_close(drawn, image.expand(2, 1, 4, 4), rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize(("prediction", "gamma"), list(product(["eps", "x_0", "v"], [1.0, 5.0])))
def test_min_snr_has_the_gradient_of_diffusers_weights(prediction: Any, gamma: float):
    """As diffusers' training script computes it: min(SNR, gamma) / SNR for eps, / (SNR + 1) for v, and min(SNR, gamma) for x_0."""
    config = DiffusionConfig(prediction=prediction, loss_weight="min_snr", min_snr_gamma=gamma)
    process, network = Schedule(config), small_network()
    x_0, eps = rows()
    t = torch.tensor([0, 1, 50, 200, 400, 700, 900, 999])
    snr = compute_snr(DDPMScheduler(trained_betas=process.betas.numpy()), t)  # type: ignore[no-untyped-call]
    weight = torch.stack([snr, gamma * torch.ones_like(snr)], dim=1).min(dim=1)[0] / {"eps": snr, "x_0": 1, "v": snr + 1}[prediction]
    error = network(process.add_noise(x_0, eps, t)) - process.target(x_0, eps, t)
    expected = gradient(network, (weight.float().view(-1, 1, 1, 1) * error**2).mean())
    torch.testing.assert_close(gradient(network, weighted_loss(lambda x, t: network(x), process, x_0, eps, t)), expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("weight", "gamma"), [("min_snr", 5.0), ("p2", 1.0), ("p2", 0.5)])
def test_a_weight_means_the_same_for_every_prediction(weight: Any, gamma: float):
    """Networks whose outputs follow from one estimate of x_0 have one loss, whatever they predict."""
    x_0, eps = rows()
    t = torch.tensor([5, 60, 120, 300, 500, 700, 850, 950])
    losses = []
    for prediction in ("eps", "x_0", "v", "posterior_mean"):
        process = Schedule(DiffusionConfig(prediction=prediction, loss_weight=weight, min_snr_gamma=gamma, p2_gamma=gamma, betas="linear"))
        x_t = process.add_noise(x_0, eps, t)
        guess = 0.7 * x_0 + 0.1
        output = process.target(guess, process.eps_from_x_0(guess, x_t, t), t)
        losses.append(float(weighted_loss(lambda x, t, output=output: output, process, x_0, eps, t)))
    assert np.allclose(losses, losses[0], rtol=2e-3)


def test_p2_of_gamma_0_is_the_simple_loss_and_of_1_weighs_eps_by_one_over_1_plus_snr():
    x_0, eps = rows()
    t, network = torch.arange(0, 800, 100), small_network()
    plain = Schedule(DiffusionConfig())
    zero = Schedule(DiffusionConfig(loss_weight="p2", p2_gamma=0.0))
    given = (lambda x, t: network(x), x_0, eps, t)
    torch.testing.assert_close(weighted_loss(given[0], zero, *given[1:]), simple_loss(given[0], plain, *given[1:]))
    weight = Schedule(DiffusionConfig(loss_weight="p2")).loss_weight(t)
    torch.testing.assert_close(weight, (1 - plain.alpha_bar[t]).float())


def test_flow_matching_is_that_of_diffusers():
    process, network = RectifiedFlow(DiffusionConfig(process="flow")), small_network()
    x_0, eps = rows()
    theirs: Any = FlowMatchEulerDiscreteScheduler(1000)
    theirs.set_timesteps(8)
    t = theirs.sigmas[:8]
    x_t = theirs.scale_noise(x_0, theirs.timesteps, eps)
    torch.testing.assert_close(process.add_noise(x_0, eps, t), x_t)
    torch.testing.assert_close(process.network_inputs(x_t, t)[1], theirs.timesteps)
    expected = gradient(network, ((network(x_t) - (eps - x_0)) ** 2).mean())  # the target of diffusers' train_dreambooth_lora_sd3.py
    torch.testing.assert_close(gradient(network, simple_loss(lambda x, t: network(x), process, x_0, eps, t)), expected)
    level, then = process.level_at(float(t[2])), process.level_at(float(t[3]))
    output = network(x_t[2:3]).detach()
    theirs._step_index = 2
    stepped = theirs.step(output, theirs.timesteps[2], x_t[2:3]).prev_sample
    x_0_hat = process.predict_x_0(output, x_t[2:3], t[2:3])
    eps_hat = (x_t[2:3] / level.scale - level.alpha * x_0_hat) / level.sigma
    torch.testing.assert_close(then.scale * (then.alpha * x_0_hat + then.sigma * eps_hat), stepped, rtol=1e-4, atol=1e-5)


def test_times_of_a_flow_are_logit_normal():
    process = RectifiedFlow(DiffusionConfig(process="flow", noise_mean=0.5, noise_deviation=0.7))
    t = process.draw_times(np.random.default_rng(0), 100_000).astype(np.float64)
    logits = np.log(t / (1 - t))
    assert abs(logits.mean() - 0.5) < 0.01
    assert abs(logits.std() - 0.7) < 0.01


def test_edm_is_the_paper_s_loss_and_diffusers_preconditioning():
    process, network = Edm(DiffusionConfig(process="edm")), small_network()
    x_0, eps = rows()
    sigma = torch.tensor([0.002, 0.01, 0.1, 0.5, 1.0, 5.0, 30.0, 80.0])
    wide = sigma.view(-1, 1, 1, 1)
    # EDM's loss as the paper has it: lambda(sigma) ||D(x_0 + n; sigma) - x_0||^2, D of Eq. 7.
    c_skip, c_out, c_in = 0.25 / (wide**2 + 0.25), wide * 0.5 / (wide**2 + 0.25) ** 0.5, 1 / (wide**2 + 0.25) ** 0.5
    noisy = x_0 + wide * eps
    denoised = c_skip * noisy + c_out * network(c_in * noisy)
    expected = gradient(network, ((wide**2 + 0.25) / (wide * 0.5) ** 2 * (denoised - x_0) ** 2).mean())
    told: list[torch.Tensor] = []
    ours = simple_loss(lambda x, t: (told.append(t), network(x))[1], process, x_0, eps, sigma)
    torch.testing.assert_close(gradient(network, ours), expected, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(told[0], sigma.log() / 4)
    theirs: Any = EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5)
    torch.testing.assert_close(theirs.precondition_inputs(noisy[3:4], sigma[3]), process.network_inputs(noisy, sigma)[0][3:4])
    output = network(c_in * noisy).detach()
    torch.testing.assert_close(theirs.precondition_outputs(noisy[3:4], output[3:4], sigma[3]), process.predict_x_0(output, noisy, sigma)[3:4])
    theirs.set_timesteps(18)
    levels = process.levels(Recipe(steps=18))
    torch.testing.assert_close(torch.tensor([level.t for level in levels]), theirs.sigmas[:18].float(), rtol=1e-4, atol=1e-5)


def test_sigmas_of_edm_are_log_normal():
    drawn = np.log(Edm(DiffusionConfig(process="edm")).draw_times(np.random.default_rng(0), 100_000).astype(np.float64))
    assert abs(drawn.mean() + 1.2) < 0.02
    assert abs(drawn.std() - 1.2) < 0.02


def test_learned_variance_is_that_of_diffusers():
    config = DiffusionConfig(learned_variance=True)
    process = Schedule(config)
    theirs: Any = DDPMScheduler(trained_betas=Schedule(config).betas.numpy(), variance_type="learned_range", clip_sample=False)
    x_0, _ = rows(1)
    fraction = torch.linspace(-1, 1, 48).view(1, 3, 4, 4)
    for step in (1, 2, 500, 999):
        t = torch.tensor([step])
        expected: Any = theirs._get_variance(step, predicted_variance=fraction, variance_type="learned_range")
        torch.testing.assert_close(log_variance(process, t, x_0, "learned", fraction), expected.float(), rtol=1e-3, atol=1e-4)


def test_hybrid_loss_trains_the_mean_by_the_simple_loss_alone_and_the_variance_by_the_bound_alone():
    process, network = Schedule(DiffusionConfig(learned_variance=True)), small_network(outputs=2)
    x_0, eps = rows()
    t = torch.tensor([0, 1, 20, 100, 300, 500, 800, 999])
    assert training_loss(process).func is hybrid_loss  # type: ignore[union-attr]
    whole = torch.autograd.grad(hybrid_loss(lambda x, t: network(x), process, x_0, eps, t, bin_width=2 / 255), network.weight)[0]
    mean_only = torch.autograd.grad(((network(process.add_noise(x_0, eps, t))[:, :3] - eps) ** 2).mean(), network.weight)[0]
    torch.testing.assert_close(whole[:3], mean_only[:3], rtol=1e-4, atol=1e-6)
    assert whole[3:].abs().max() > 0


_ALL = [(betas, prediction) for betas in ("linear", "cosine") for prediction in ("eps", "x_0", "v", "posterior_mean")]
_QUICK = (("linear", "eps"), ("cosine", "v"))


@pytest.mark.parametrize(("betas", "prediction"), [pytest.param(*pair, marks=[] if pair in _QUICK else pytest.mark.slow) for pair in _ALL])
def test_the_bound_with_the_true_variance_is_the_exact_likelihood_of_gaussian_data(prediction: Any, betas: Any):
    """Of data N(0, s^2) every q(x_{t-1} | x_t) is Gaussian: a network that says its mean and variance has a tight bound, the entropy of the data."""
    deviation, num_steps = 0.6, 60
    config = DiffusionConfig(num_steps=num_steps, betas=betas, prediction=prediction, learned_variance=True)
    process = Schedule(config)

    def exact(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        alpha_bar = process.alpha_bar[t].view(-1, 1)
        total = alpha_bar * deviation**2 + 1 - alpha_bar
        x_0 = (alpha_bar.sqrt() * deviation**2 / total * x_t).float()
        spread = deviation**2 * (1 - alpha_bar) / total  # variance of x_0 given x_t
        of_x_0, _ = process.posterior_mean_weights(t, x_t)
        own = torch.where(t.view(-1, 1) > 0, process.posterior_variances(t)[0].view(-1, 1), 0.0)  # of q(x_{t-1} | x_t, x_0), 0 at t = 0
        wanted = (own + of_x_0.double() ** 2 * spread).log()
        small, large = (bound.log().view(-1, 1) for bound in process.posterior_variances(t))
        fraction = (2 * (wanted - small) / (large - small) - 1).float().expand_as(x_t)
        return torch.cat([process.target(x_0, process.eps_from_x_0(x_0, x_t, t), t), fraction], dim=1)

    x_0 = deviation * torch.randn(20_000, 2, generator=torch.Generator().manual_seed(0))
    found = bits_per_dimension(exact, process, x_0, bin_width=None, variance="learned")
    truth = 0.5 * math.log2(2 * math.pi * math.e * deviation**2)
    error = float(found.std()) / len(x_0) ** 0.5
    assert abs(float(found.mean()) - truth) < 4 * error + 2e-3, (float(found.mean()), truth, error)
    fixed = bits_per_dimension(exact, process, x_0, bin_width=None, variance="large")
    assert fixed.mean() > found.mean()


def test_kl_of_equal_gaussians_is_0_and_of_others_that_of_torch():
    mean, spread = torch.tensor([0.1, -0.4]), torch.tensor([0.3, 1.2])
    assert float(gaussian_kl(mean, spread, mean, spread).abs().max()) == 0
    one, other = (torch.distributions.Normal(centre, (0.5 * log).exp()) for centre, log in ((mean, spread), (mean + 1, spread - 0.5)))
    torch.testing.assert_close(gaussian_kl(mean, spread, mean + 1, spread - 0.5), torch.distributions.kl_divergence(one, other))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"zero_terminal_snr": True}, "zero_terminal_snr=true needs a prediction"),
        ({"process": "flow", "loss_weight": "min_snr"}, "loss_weight=min_snr means nothing to process=flow"),
        ({"process": "edm", "learned_variance": True}, "learned_variance=True means nothing to process=edm"),
        ({"noise_mean": 1.0}, "mean nothing to process=ddpm"),
        ({"process": "edm", "sigma_min": 90.0}, "sigma_min=90 is not below sigma_max=80"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        DiffusionConfig.model_validate(settings)
