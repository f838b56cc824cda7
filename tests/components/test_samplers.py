import math
from dataclasses import replace
from itertools import pairwise, product
from typing import Any

import pytest
import torch

from components.diffusion.config import DiffusionConfig, Prediction
from components.diffusion.levels import visits
from components.diffusion.noise import initial_noise, interpolated_noise
from components.diffusion.recipe import MONITORING, SAMPLERS, Recipe, Threshold
from components.diffusion.samplers import Estimate, Level, ddim, dpmpp_2m, noise_levels, spaced_timesteps, unipc
from components.diffusion.sampling import sample, thresholded
from components.diffusion.schedule import Schedule

PREDICTIONS: tuple[Prediction, ...] = ("eps", "x_0", "v")
SHAPE = (1, 8, 8)
NULL_LABEL = 10
RECIPES = [
    *(Recipe(sampler, 12) for sampler in SAMPLERS),
    Recipe(steps=12, eta=0.5),
    Recipe(steps=12, eta=1.0),
    Recipe(steps=12, spacing="quadratic"),
    Recipe("ancestral", 12, variance="large"),
    Recipe("unipc", 12, threshold="dynamic"),
    Recipe("dpmpp_2m", 12, threshold="none"),
]
by_recipe = pytest.mark.parametrize("recipe", RECIPES, ids=Recipe.describe)


def make_schedule(prediction: Prediction = "eps") -> Schedule:
    return Schedule(DiffusionConfig(prediction=prediction))


def toy_network(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return torch.tanh(x_t * 1.3 + t.view(-1, 1, 1, 1) / 1000)


def labelled_network(x_t: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return toy_network(x_t, t) + labels.view(-1, 1, 1, 1) / 20


@by_recipe
def test_a_sample_depends_on_its_seed_only(recipe: Recipe):
    seeds = [7, 3, 11, 20]
    together = sample(toy_network, make_schedule(), seeds, SHAPE, recipe)
    turned = sample(toy_network, make_schedule(), seeds[::-1], SHAPE, recipe).flip(0)
    alone = torch.cat([sample(toy_network, make_schedule(), [seed], SHAPE, recipe) for seed in seeds])
    assert torch.equal(together, alone)
    assert torch.equal(together, turned)
    assert len(torch.unique(together.flatten(1), dim=0)) == len(seeds)


@by_recipe
def test_every_sampler_evaluates_the_network_as_often_as_asked(recipe: Recipe):
    schedule = Schedule(DiffusionConfig(num_steps=40))
    for steps in (1, 2, 3, 39, 40):
        visited: list[int] = []
        shown: list[torch.Tensor] = []

        def watched(x_t: torch.Tensor, t: torch.Tensor, visited: list[int] = visited) -> torch.Tensor:
            visited.append(int(t))
            return toy_network(x_t, t)

        x_0 = sample(watched, schedule, [5], SHAPE, replace(recipe, steps=steps), on_step=lambda level, x_t, x_0, shown=shown: shown.insert(level.index, x_0))
        assert len(visited) == len(shown) == (steps if recipe.sampler != "heun" else 2 * ((steps + 1) // 2) - 1)
        assert recipe.sampler == "heun" or len(visited) == len(set(visited))
        assert visited == sorted(visited, reverse=True)
        assert torch.equal(shown[-1], x_0)
        assert torch.isfinite(x_0).all()


@pytest.mark.parametrize("prediction", PREDICTIONS)
@by_recipe
def test_a_perfect_denoiser_of_one_image_draws_that_image(recipe: Recipe, prediction: Prediction):
    schedule = make_schedule(prediction)
    image = torch.linspace(-0.9, 0.9, 64).view(1, *SHAPE)

    def perfect(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return schedule.target(image, schedule.eps_from_x_0(image, x_t, t), t)

    x_0 = sample(perfect, schedule, [4, 9], SHAPE, recipe)
    torch.testing.assert_close(x_0, image.expand_as(x_0), rtol=0, atol=2e-4)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@by_recipe
def test_a_network_that_answers_in_the_same_memory_draws_the_same(recipe: Recipe, prediction: Prediction):
    memory = torch.empty(2, *SHAPE)

    def reusing(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return memory.copy_(toy_network(x_t, t))

    recipe = replace(recipe, threshold="none")
    shown: list[torch.Tensor] = []
    expected: list[torch.Tensor] = []
    sample(reusing, make_schedule(prediction), [1, 2], SHAPE, recipe, on_step=lambda level, x_t, x_0: shown.append(x_0))
    sample(toy_network, make_schedule(prediction), [1, 2], SHAPE, recipe, on_step=lambda level, x_t, x_0: expected.append(x_0))
    assert torch.equal(torch.stack(shown), torch.stack(expected))


def test_ddim_with_all_its_noise_is_ancestral_sampling():
    by_ddim = sample(toy_network, make_schedule(), [1, 2], SHAPE, Recipe(steps=30, eta=1.0))
    by_ancestral = sample(toy_network, make_schedule(), [1, 2], SHAPE, Recipe("ancestral", 30))
    torch.testing.assert_close(by_ddim, by_ancestral, rtol=0, atol=1e-5)


@pytest.mark.parametrize("recipe", [Recipe("ancestral", 50), Recipe("ancestral", 50, variance="large"), Recipe(steps=50, eta=1.0)], ids=Recipe.describe)
def test_stochastic_samplers_differ_by_more_than_their_start(recipe: Recipe):
    start = initial_noise([1], SHAPE)
    one, other = (sample(toy_network, make_schedule(), [seed], SHAPE, recipe, x_T=start) for seed in (1, 2))
    assert not torch.equal(one, other)
    assert torch.equal(one, sample(toy_network, make_schedule(), [1], SHAPE, recipe))


def levels_between(first: float, last: float, steps: int) -> list[Level]:
    """Returns levels evenly spaced in the logarithm of alpha / sigma."""
    log_snr = torch.linspace(first, last, steps + 1, dtype=torch.float64)
    return [Level(index, 0, alpha_bar) for index, alpha_bar in enumerate(torch.sigmoid(2 * log_snr).tolist())]


def error_at_the_last_level(sampler: Any, steps: int) -> float:
    """Returns how far a sampler is from the probability-flow ODE of data ~ N(0.4, 0.3^2), float64, at the last of its levels."""
    mean, variance = 0.4, 0.3**2
    levels = levels_between(-3.0, 3.0, steps)
    reached: list[torch.Tensor] = []

    def spread(level: Level) -> float:
        return level.alpha_bar * variance + 1 - level.alpha_bar

    def posterior_mean(x_t: torch.Tensor, level: Level) -> torch.Tensor:
        reached.append(x_t)
        return mean + level.alpha * variance / spread(level) * (x_t - level.alpha * mean)

    x_t = torch.linspace(-2, 2, 9, dtype=torch.float64)
    first, last = levels[0], levels[-1]
    exact = last.alpha * mean + math.sqrt(spread(last) / spread(first)) * (x_t - first.alpha * mean)
    sampler(posterior_mean, x_t, levels)
    return float((reached[-1] - exact).abs().max())


def ddim_without_noise(estimate: Estimate, x_t: torch.Tensor, levels: list[Level]) -> torch.Tensor:
    return ddim(estimate, x_t, levels, lambda _: torch.full_like(x_t, torch.nan))


@pytest.mark.parametrize(("sampler", "order"), [(ddim_without_noise, 1), (dpmpp_2m, 2), (unipc, 3)])
def test_errors_shrink_with_the_order_of_the_method(sampler: Any, order: int):
    errors = [error_at_the_last_level(sampler, steps) for steps in (20, 40, 80, 160)]
    orders = [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]
    assert abs(orders[-1] - order) < 0.2, (errors, orders)
    assert all(orders[i] > order - 0.5 for i in range(len(orders))), (errors, orders)


@by_recipe
def test_guidance_of_one_is_no_guidance_and_of_zero_no_label(recipe: Recipe):
    def labelled(labels: torch.Tensor, **changes: Any) -> torch.Tensor:
        return sample(labelled_network, make_schedule(), [1, 2], SHAPE, replace(recipe, **changes), labels=labels, null_label=NULL_LABEL)

    labels, unlabelled = torch.tensor([3, 7]), torch.full((2,), NULL_LABEL)
    alone = torch.cat([sample(labelled_network, make_schedule(), [s], SHAPE, recipe, labels=labels[i : i + 1]) for i, s in enumerate((1, 2))])
    assert torch.equal(labelled(labels, guidance=1.0), alone)
    assert torch.equal(labelled(labels, guidance=0.0), labelled(unlabelled))
    assert not torch.equal(labelled(labels), labelled(unlabelled))


@pytest.mark.parametrize("guidance", [0.5, 2.0, 7.5])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_guidance_of_a_network_linear_in_its_label_scales_the_label(prediction: Prediction, guidance: float):
    def linear(x_t: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return toy_network(x_t, t) + labels.view(-1, 1, 1, 1) * 0.125

    def scaled(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        away = guidance * (torch.tensor([3, 7]) - NULL_LABEL)
        return toy_network(x_t, t) + (NULL_LABEL + away).view(-1, 1, 1, 1) * 0.125

    schedule, recipe = make_schedule(prediction), Recipe("unipc", 8)
    guided = sample(linear, schedule, [1, 2], SHAPE, replace(recipe, guidance=guidance), labels=torch.tensor([3, 7]), null_label=NULL_LABEL)
    torch.testing.assert_close(guided, sample(scaled, schedule, [1, 2], SHAPE, recipe), rtol=0, atol=1e-4)


def test_guidance_without_labels_is_refused():
    with pytest.raises(ValueError, match=r"guidance=2\.0 needs labels"):
        sample(toy_network, make_schedule(), [1], SHAPE, Recipe(guidance=2.0), null_label=NULL_LABEL)
    with pytest.raises(ValueError, match=r"guidance=2\.0 needs a null label"):
        sample(labelled_network, make_schedule(), [1], SHAPE, Recipe(guidance=2.0), labels=torch.tensor([1]))


def test_labels_and_noise_come_one_for_each_seed():
    with pytest.raises(ValueError, match="labels has 1 rows for 2 seeds"):
        sample(labelled_network, make_schedule(), [1, 2], SHAPE, Recipe(), labels=torch.tensor([1]))
    with pytest.raises(ValueError, match="x_T has 3 rows for 2 seeds"):
        sample(toy_network, make_schedule(), [1, 2], SHAPE, Recipe(), x_T=torch.zeros(3, *SHAPE))


@pytest.mark.parametrize("threshold", ["clip", "dynamic"])
def test_thresholds_keep_an_estimate_in_range_and_leave_alone_what_is(threshold: Threshold):
    within = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert torch.equal(thresholded(within, threshold), within)
    assert thresholded(within * 40, threshold).abs().max() == 1


def test_dynamic_thresholding_scales_each_image_by_its_own_quantile():
    images = torch.linspace(-1, 1, 1001).view(1, 1, 7, 143) * torch.tensor([1.0, 4.0, 10.0]).view(3, 1, 1, 1)
    scaled = thresholded(images, "dynamic")
    limits = torch.tensor([1.0, 0.995 * 4, 0.995 * 10]).view(3, 1, 1, 1)
    inside = images.abs() < limits * 0.99
    torch.testing.assert_close(scaled[inside], (images / limits)[inside], rtol=3e-3, atol=0)
    assert torch.equal(thresholded(images[1:2], "dynamic"), scaled[1:2])


def test_interpolation_starts_and_ends_at_the_seeds_own_noise():
    ends = interpolated_noise(3, 8, [0, 1], SHAPE)
    assert torch.equal(ends, initial_noise([3, 8], SHAPE))
    assert torch.equal(interpolated_noise(5, 5, [0, 0.3, 1], SHAPE), initial_noise([5, 5, 5], SHAPE))


def test_interpolation_moves_along_the_arc_at_an_even_pace():
    fractions = torch.linspace(0, 1, 9).tolist()
    path = interpolated_noise(3, 8, fractions, (3, 16, 16)).flatten(1).double()
    directions = path / path.norm(dim=1, keepdim=True)
    angles = torch.arccos((directions[1:] * directions[:-1]).sum(1))
    assert angles.std() < 0.02 * angles.mean()
    assert path.norm(dim=1).min() > 0.97 * path[[0, -1]].norm(dim=1).min()


def test_an_interpolated_start_takes_the_place_of_the_seeds_noise():
    start = interpolated_noise(3, 8, [0, 0.5, 1], SHAPE)
    between = sample(toy_network, make_schedule(), [3, 3, 3], SHAPE, Recipe(steps=5), x_T=start)
    ends = sample(toy_network, make_schedule(), [3, 8], SHAPE, Recipe(steps=5))
    assert torch.equal(between[[0, 2]], ends)
    assert not torch.equal(between[1], ends[0])


def test_a_fraction_beyond_the_ends_is_refused():
    with pytest.raises(ValueError, match=r"fraction=1\.5 is out of range"):
        interpolated_noise(1, 2, [0.5, 1.5], SHAPE)


def test_stochastic_steps_use_fresh_noise_of_the_same_seed():
    noises = torch.stack([initial_noise([5], SHAPE, draw) for draw in range(4)])
    assert len(torch.unique(noises.flatten(1), dim=0)) == 4
    assert abs(float(initial_noise(range(200), (1, 16, 16)).std()) - 1) < 0.01


def test_a_negative_seed_is_refused():
    with pytest.raises(ValueError, match="seed=-1"):
        initial_noise([-1], (1, 4, 4))


def test_time_steps_run_from_the_last_to_the_first():
    assert spaced_timesteps(Recipe(steps=1000), 1000) == list(reversed(range(1000)))
    assert spaced_timesteps(Recipe(steps=4), 1000) == [999, 666, 333, 0]
    assert spaced_timesteps(Recipe(steps=4, spacing="quadratic"), 1000) == [999, 444, 111, 0]
    assert spaced_timesteps(Recipe("dpmpp_2m", 3), 1000) == [999, 666, 333]


@pytest.mark.parametrize("num_steps", [2, 3, 60])
def test_all_time_steps_differ_whatever_their_number(num_steps: int):
    recipes = [Recipe(sampler) for sampler in SAMPLERS] + [Recipe(spacing="quadratic")]
    for recipe, steps in product(recipes, range(1, num_steps + 1)):
        timesteps = spaced_timesteps(replace(recipe, steps=steps), num_steps)
        assert (len(timesteps), timesteps[0]) == (visits(replace(recipe, steps=steps))[0], num_steps - 1)
        assert all(above > below >= 0 for above, below in pairwise(timesteps))


def test_levels_hold_the_numbers_of_the_schedule():
    schedule = make_schedule()
    level = noise_levels(Recipe(steps=4), schedule)[1]
    assert (level.index, level.t, level.alpha_bar) == (1, 666, float(schedule.alpha_bar[666]))
    assert math.isclose(level.alpha**2 + level.sigma**2, 1)
    assert math.isclose(level.log_snr, 0.5 * math.log(level.alpha_bar / (1 - level.alpha_bar)))


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (Recipe(steps=0), r"steps=0 is out of range; use 1 to 1000"),
        (Recipe("unipc", steps=1001), r"steps=1001 is out of range; use 1 to 1000"),
        (Recipe(eta=1.5), r"eta=1\.5 is out of range"),
        (Recipe(eta=math.nan), r"eta=nan is out of range"),
        (Recipe("ancestral", eta=0.5), r"eta=0\.5 means nothing to sampler=ancestral"),
        (Recipe("dpmpp_2m", spacing="quadratic"), r"spacing=quadratic means nothing to sampler=dpmpp_2m"),
        (Recipe(variance="large"), r"variance=large means nothing to sampler=ddim"),
        (Recipe(guidance=-1.0), r"guidance=-1\.0 is out of range"),
        (Recipe(guidance=math.inf), r"guidance=inf is out of range"),
        (Recipe("euler"), r"sampler=euler is unknown; use ddim, ancestral, dpmpp_2m, unipc or heun"),  # pyrefly: ignore[bad-argument-type]
        (Recipe(threshold="hard"), r"threshold=hard is unknown; use clip, dynamic or none"),  # pyrefly: ignore[bad-argument-type]
    ],
)
def test_a_recipe_that_makes_no_sense_is_refused(recipe: Recipe, message: str):
    with pytest.raises(ValueError, match=message):
        recipe.check(1000)
    with pytest.raises(ValueError, match=message):
        sample(toy_network, make_schedule(), [1], SHAPE, recipe)


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        (Recipe(), "ddim, 50 steps"),
        (Recipe(steps=1), "ddim, 1 step"),
        (Recipe(eta=0.5, spacing="quadratic"), "ddim eta 0.5, 50 quadratic steps"),
        (Recipe("ancestral", 1000, variance="large"), "ancestral of large variance, 1000 steps"),
        (Recipe("unipc", 12, guidance=2.5, threshold="dynamic"), "unipc, 12 steps, guidance 2.5, dynamic thresholding"),
        (Recipe("dpmpp_2m", 16, threshold="none"), "dpmpp_2m, 16 steps, no clipping"),
    ],
)
def test_a_recipe_reads_as_a_few_words(recipe: Recipe, words: str):
    assert recipe.describe() == words


def test_monitoring_takes_few_steps_of_a_deterministic_multistep_sampler():
    MONITORING.check(1000)
    assert MONITORING.sampler in ("unipc", "dpmpp_2m")
    assert 10 <= MONITORING.steps <= 20
