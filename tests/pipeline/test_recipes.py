"""What training can be told to do: optimisers, rates, averages, augmentation, guards. Each goes on from a checkpoint as if nothing had happened."""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import write_dataset

from components.data.augment import Augmentation, augmented
from components.data.reader import RowReader
from components.data.shards import Manifest, read_manifest
from components.diffusion.config import DiffusionConfig
from components.errors import DataError
from components.model.ema import Ema, half_life, power_decay
from components.model.initialise import initialise
from components.model.post_hoc import coefficients, combined, exponent_of, width_of
from components.networks.autoencoder_kl.config import AutoencoderKLConfig
from components.networks.dit.config import DiTConfig
from components.networks.unet.config import UNetConfig
from components.storage import Location
from pipeline.training.config import TrainConfig
from pipeline.training.desync import checksum
from pipeline.training.muon import Muon, orthogonalised, split_matrices
from pipeline.training.optimizer import learning_rate, make_optimizer, parameters_of
from pipeline.training.plan import TrainPlan
from pipeline.training.spikes import WINDOW, SpikeGuard
from pipeline.training.trainer import Trainer, make_batch_plan, make_trainer
from pipeline.training.validation import has_stopped

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
AUGMENTED = {"rotation": 20.0, "translation": 0.2, "scaling": 0.3, "crop_jitter": 1, "augment_probability": 0.5, "augment_conditioning": True}
SETTINGS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"optimizer": "sgd", "momentum": 0.9, "lr": 0.05}, {"prediction": "x_0"}),
    ({"lr_schedule": "cosine", "decay_steps": 20, "weight_decay": 0.1, "decay_all": False}, {"prediction": "v", "loss_weight": "min_snr"}),
    ({"lr_schedule": "inverse_sqrt", "decay_steps": 4, "ema_half_life": 40}, {"loss_weight": "p2"}),
    ({"ema_widths": [0.05, 0.1]}, {"prediction": "posterior_mean", "betas": "sigmoid"}),
    (AUGMENTED, {"betas": "quadratic"}),
    ({"spike_deviations": 0.5, "skip_spikes": True}, {"prediction": "v", "zero_terminal_snr": True}),
    ({"freeze": ["time.*", "conv_in.*"]}, {}),
    ({}, {"learned_variance": True}),
    ({}, {"process": "flow"}),
    ({}, {"process": "edm"}),
    ({"optimizer": "muon", "weight_decay": 0.1}, {"process": "flow"}),
    ({"model": DiTConfig(depth=2, hidden_size=16, num_heads=2, checkpointing=True)}, {"process": "flow"}),
    ({"model": AutoencoderKLConfig(base_channels=8, num_groups=4)}, {"process": "reconstruction", "kl_weight": 0.01}),
]
IDS = [",".join([*train, *(f"{key}={value}" for key, value in diffusion.items())]) or "defaults" for train, diffusion in SETTINGS]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> tuple[Location, Manifest]:
    folder = Location.of(tmp_path_factory.mktemp("data") / "dataset")
    write_dataset(folder, [np.random.default_rng(0).integers(0, 256, (64, 1, 8, 8), dtype=np.uint8)], ["noise"])
    return folder, read_manifest(folder)


def plan(train: dict[str, Any] | None = None, diffusion: dict[str, Any] | None = None) -> TrainPlan:
    settings = dict(train or {})
    unet = UNetConfig(base_channels=8, channel_mults=(1, 2), num_res_blocks=1, attention_resolutions=(4,), num_groups=4, dropout=0.1)
    return TrainPlan(
        model=settings.pop("model", unet),
        train=TrainConfig.model_validate({"steps": 100, "lr": 1e-2, "warmup_steps": 3, "global_batch_size": 8, "lanes": 4, **settings}),
        diffusion=DiffusionConfig.model_validate({"num_steps": 50, **(diffusion or {})}),
        dataset="",
        folder="",
        inputs="i",
        threads=1,
        group_timeout_s=60,
    )


def go_on(trainer: Trainer, told: TrainPlan, data: tuple[Location, Manifest], until: int) -> list[float]:
    batches, reader = make_batch_plan(told, data[1]), RowReader(*data)
    return [float(trainer.update(batches.batch(reader, step, range(told.train.lanes)))[0]) for step in range(trainer.step, until)]


def state(trainer: Trainer) -> dict[str, torch.Tensor]:
    found = trainer.everything()
    averages = {"ema": found.ema, **found.more_averages}
    named = {f"{average}/{name}": value for average, weights in averages.items() for name, value in weights.items()}
    return {name: value.clone() for name, value in (*found.state.weights.items(), *found.state.optimizer.items(), *named.items())}


@pytest.mark.parametrize(("train", "diffusion"), SETTINGS, ids=IDS)
def test_every_recipe_goes_on_from_a_checkpoint_bit_for_bit(
    train: dict[str, Any], diffusion: dict[str, Any], dataset: tuple[Location, Manifest], tmp_path: Path
):
    told, place = plan(train, diffusion), Location.of(tmp_path / "step_000000006-0001")
    straight = make_trainer(told, dataset[1], CPU, None)
    expected = go_on(straight, told, dataset, 12)
    assert all(map(math.isfinite, expected))
    interrupted = make_trainer(told, dataset[1], CPU, None)
    losses = go_on(interrupted, told, dataset, 6)
    interrupted.save(place)
    resumed = make_trainer(told, dataset[1], CPU, place)
    assert losses + go_on(resumed, told, dataset, 12) == expected
    ours, theirs = state(straight), state(resumed)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert resumed.everything().state.record == straight.everything().state.record


@pytest.mark.parametrize(("train", "diffusion"), SETTINGS, ids=IDS)
def test_two_halves_of_the_lanes_have_the_gradient_of_the_whole(train: dict[str, Any], diffusion: dict[str, Any], dataset: tuple[Location, Manifest]):
    told = plan(train, diffusion)
    batches, reader = make_batch_plan(told, dataset[1]), RowReader(*dataset)

    def gradients(lanes: range) -> torch.Tensor:
        trainer = make_trainer(told, dataset[1], CPU, None)
        go_on(trainer, told, dataset, 2)
        trainer.stepper.gradient(batches.batch(reader, 2, lanes))
        return torch.cat([each.grad.flatten() for each in trainer.network.parameters() if each.grad is not None])

    halves = (gradients(range(2)) + gradients(range(2, 4))) / 2
    torch.testing.assert_close(halves, gradients(range(4)), rtol=1e-3, atol=1e-5)


def test_augmentation_changes_neither_rows_nor_noise_nor_mirrors_nor_what_is_dropped(dataset: tuple[Location, Manifest]):
    reader = RowReader(*dataset)
    plain, changed = (make_batch_plan(plan(train), dataset[1]).batch(reader, 5, range(4)) for train in ({}, AUGMENTED))
    for name in ("rows", "data", "t", "eps", "keys"):
        assert torch.equal(getattr(plain, name), getattr(changed, name)), name
    assert plain.augmentation is None
    assert changed.augmentation is not None
    mirrored = [bool((dataset_row != row).any()) for dataset_row, row in zip(reader.rows(changed.rows.numpy()), changed.data.numpy(), strict=True)]
    assert changed.augmentation[:, 0].bool().tolist() == mirrored


def test_a_turn_of_180_degrees_is_two_mirrors_and_a_whole_shift_moves_pixels_and_nothing_is_nothing():
    x_0 = torch.randn(1, 3, 6, 10, generator=torch.Generator().manual_seed(0))
    turned = augmented(x_0, torch.tensor([[0.0, -2.0, 0.0, 0.0, 0.0, 0.0]]))
    torch.testing.assert_close(turned, x_0.flip(2, 3), rtol=1e-4, atol=1e-5)
    shifted = augmented(x_0, torch.tensor([[0.0, 0.0, 0.0, 2 / 10, -1 / 6, 0.0]]))
    torch.testing.assert_close(shifted[:, :, :5, 2:], x_0[:, :, 1:, :8], rtol=1e-4, atol=1e-5)
    assert torch.equal(augmented(x_0, torch.tensor([[1.0, 0.0, 0.0, 0.0, 0.0, 0.0]])), x_0)
    square = x_0[..., :6]
    quarter = augmented(square, torch.tensor([[0.0, -1.0, 1.0, 0.0, 0.0, 0.0]]))
    assert any(torch.allclose(quarter, square.rot90(times, (2, 3)), atol=1e-5) for times in (1, 3))
    twice = augmented(torch.ones(1, 1, 4, 4), torch.tensor([[0.0, 0.0, 0.0, 0.3, 0.0, 1.0]]))
    torch.testing.assert_close(twice, torch.ones(1, 1, 4, 4))


def test_what_is_off_takes_its_draws_so_that_the_rest_stays():
    one, both = (Augmentation(1.0, rotation, 0.2, 0.5, 2, (8, 8)).draw(np.random.default_rng(3), 500) for rotation in (0.0, 30.0))
    assert np.array_equal(one[:, 3:], both[:, 3:])
    assert not one[:, 1:3].any()
    assert np.degrees(np.abs(np.arcsin(both[:, 2]))).max() <= 30.001
    assert np.abs(both[:, 5]).max() <= 0.5


@pytest.mark.parametrize("settings", [{"optimizer": "sgd", "momentum": 0.8}, {"weight_decay": 0.1, "decay_all": False}, {"adam_betas": [0.8, 0.95]}])
def test_the_optimiser_is_torchs_own(settings: dict[str, Any], dataset: tuple[Location, Manifest]):
    told = plan({"warmup_steps": 0, "grad_clip": 1e9, **settings})
    ours, plain = (make_trainer(told, dataset[1], CPU, None) for _ in range(2))
    named = dict(plain.network.named_parameters())
    if told.train.optimizer == "sgd":
        reference: torch.optim.Optimizer = torch.optim.SGD(named.values(), lr=1e-2, momentum=0.8, foreach=False)
    else:
        matrices = [value for value in named.values() if value.ndim > 1]
        vectors = [value for value in named.values() if value.ndim < 2]
        betas = told.train.adam_betas
        groups = [{"params": matrices, "weight_decay": told.train.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        reference = torch.optim.AdamW(groups, lr=1e-2, betas=betas, foreach=False)
    batches, reader = make_batch_plan(told, dataset[1]), RowReader(*dataset)
    for step in range(4):
        batch = batches.batch(reader, step, range(4))
        ours.update(batch)
        reference.zero_grad()
        plain.stepper._loss_of(batch).backward()
        reference.step()
    for name, value in ours.network.named_parameters():
        torch.testing.assert_close(value, named[name], rtol=1e-3, atol=5e-5)


def test_muon_is_torchs_own_on_matrices_and_takes_a_convolution_for_one():
    """torch iterates in bfloat16, which is as near as this comparison is; gram matrices tell how near to orthogonal a step is."""
    draw = torch.Generator().manual_seed(0)
    start, kernels = torch.randn(6, 10, generator=draw), torch.randn(4, 3, 3, 3, generator=draw)
    ours, flat, theirs = (torch.nn.Parameter(each.clone()) for each in (start, kernels, start))
    convolution = torch.nn.Parameter(kernels.flatten(1).clone())
    mine = Muon([{"params": [ours, flat], "weight_decay": 0.1, "matrices": True}], lr=0.02, betas=(0.9, 0.999), capturable=False)
    reference = torch.optim.Muon([theirs, convolution], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(5):
        gradients = torch.randn(6, 10, generator=draw), torch.randn(4, 3, 3, 3, generator=draw)
        ours.grad, theirs.grad, flat.grad, convolution.grad = gradients[0], gradients[0].clone(), gradients[1], gradients[1].flatten(1).clone()
        mine.step()
        reference.step()
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=2e-3)
    torch.testing.assert_close(flat.flatten(1), convolution, rtol=0.02, atol=2e-3)
    values = torch.linalg.svdvals(orthogonalised(torch.randn(32, 64, generator=draw)))
    assert 0.6 < float(values.min()) <= float(values.max()) < 1.3


def test_muon_leaves_everything_alone_in_a_step_that_is_skipped():
    weight, bias = torch.nn.Parameter(torch.ones(3, 3)), torch.nn.Parameter(torch.ones(3))
    optimizer: Any = Muon(split_matrices([{"params": [weight, bias], "weight_decay": 0.1}], set()), lr=0.1, betas=(0.9, 0.999), capturable=False)
    weight.grad, bias.grad, optimizer.grad_scale = torch.full((3, 3), math.nan), torch.full((3,), math.nan), None
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert torch.equal(weight, torch.ones(3, 3))
    assert torch.equal(bias, torch.ones(3))
    assert not optimizer.state[weight]["momentum_buffer"].any()


def test_rates_are_those_of_torchs_schedulers():
    weight = torch.nn.Parameter(torch.zeros(1))
    config = TrainConfig(steps=50, lr=0.3, warmup_steps=10, lr_schedule="cosine")
    optimizer = torch.optim.SGD([weight], lr=0.3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40)
    for step in range(10, 50):
        assert math.isclose(learning_rate(config, step), optimizer.param_groups[0]["lr"], rel_tol=1e-6, abs_tol=1e-9)
        optimizer.step()
        scheduler.step()
    optimizer = torch.optim.SGD([weight], lr=0.3)
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=9)
    for step in range(10):
        assert math.isclose(learning_rate(TrainConfig(lr=0.3, warmup_steps=10), step), optimizer.param_groups[0]["lr"], rel_tol=1e-6)
        optimizer.step()
        warm.step()
    falling = TrainConfig(lr=1.0, warmup_steps=0, lr_schedule="inverse_sqrt", decay_steps=100)
    assert [learning_rate(falling, step) for step in (0, 99, 399)] == [1.0, 1.0, 0.5]


def test_only_matrices_decay_where_norms_and_biases_are_spared(dataset: tuple[Location, Manifest]):
    told = plan({"weight_decay": 0.1, "decay_all": False})
    network = make_trainer(told, dataset[1], CPU, None).network
    decays = {id(each): group["weight_decay"] for group in make_optimizer(network, told.train).param_groups for each in group["params"]}
    for name, parameter in network.named_parameters():
        assert decays[id(parameter)] == (0.1 if parameter.ndim > 1 else 0.0), name


def test_frozen_parameters_stay_and_have_no_state(dataset: tuple[Location, Manifest]):
    told = plan({"freeze": ["down.*", "time.hidden.*"], "weight_decay": 0.1})
    trainer = make_trainer(told, dataset[1], CPU, None)
    before = {name: value.clone() for name, value in trainer.network.named_parameters()}
    go_on(trainer, told, dataset, 3)
    frozen = [name for name in before if name.startswith(("down.", "time.hidden."))]
    assert frozen
    for name, value in trainer.network.named_parameters():
        assert torch.equal(value, before[name]) == (name in frozen), name
    assert len(trainer.optimizer.state) == len(parameters_of(trainer.optimizer)) == len(before) - len(frozen)
    with pytest.raises(DataError, match=r"train\.freeze: 'mid\.\*' matches no parameter; they begin with conv_in"):
        make_trainer(plan({"freeze": ["mid.*"]}), dataset[1], CPU, None)
    with pytest.raises(DataError, match="leaves nothing to train"):
        make_trainer(plan({"freeze": ["*"]}), dataset[1], CPU, None)


def test_weights_that_do_not_fit_are_named_and_taken_as_far_as_they_do_where_that_is_asked_for():
    ours = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 3), "b": torch.nn.Linear(3, 3), "c": torch.nn.Linear(1, 1)})
    given = {"a.weight": torch.ones(3, 2), "a.bias": torch.ones(3), "b.weight": torch.ones(4, 3), "b.bias": torch.ones(3), "d.weight": torch.ones(1)}
    with pytest.raises(DataError) as refused:
        initialise(ours, given, strict=True, where="here")
    assert "2 missing: c.weight, c.bias; 1 not in the network: d.weight; 1 of another shape: b.weight ([4, 3], not [3, 3])" in str(refused.value)
    kept = {name: value.clone() for name, value in ours.state_dict().items()}
    fit = initialise(ours, given, strict=False, where="here")
    assert fit.fitting == ("a.weight", "a.bias", "b.bias")
    for name, value in ours.state_dict().items():
        assert torch.equal(value, given[name] if name in fit.fitting else kept[name])
    with pytest.raises(DataError, match="no tensor that fits"):
        initialise(ours, {"d.weight": torch.ones(1)}, strict=False, where="here")


def weights_of(decay: Any, steps: int) -> np.ndarray:
    """Returns how much each step counts in an average."""
    counts = np.zeros(steps)
    for step in range(steps):
        kept = decay(step)
        counts *= kept
        counts[step] += 1 - kept
    return counts


def test_an_image_counts_half_after_the_half_life():
    counts = weights_of(lambda step: half_life(1000, 10, None, step), 500)
    assert math.isclose(counts[300] / counts[400], 0.5, rel_tol=1e-6)
    early = half_life(1_000_000, 10, 0.05, 100)
    assert math.isclose(early, 0.5 ** (10 / (100 * 10 * 0.05)), rel_tol=1e-9)
    assert half_life(1_000_000, 10, 0.05, 0) == 0


@pytest.mark.parametrize("width", [0.02, 0.05, 0.1, 0.2])
def test_a_power_function_average_has_its_width_and_its_profile(width: float):
    assert math.isclose(width_of(exponent_of(width)), width, rel_tol=1e-9)
    steps = 4000
    counts, places = weights_of(lambda step: power_decay(exponent_of(width), step), steps), np.arange(1, steps + 1) / steps
    mean = (counts * places).sum()
    assert math.isclose(math.sqrt((counts * (places - mean) ** 2).sum()), width, rel_tol=2e-2)
    profile = (exponent_of(width) + 1) * places ** exponent_of(width) / steps
    np.testing.assert_allclose(counts, profile, atol=1e-2 * profile.max())


@pytest.mark.parametrize("width", [0.03, 0.06, 0.08, 0.12, 0.15])
def test_an_average_rebuilt_from_snapshots_is_the_one_that_was_tracked(width: float):
    """Weights that wander: rebuilt averages of widths that nobody kept, against those followed step by step (EDM2 figure 15)."""
    steps, kept_widths = 2000, (0.05, 0.1)
    module = torch.nn.Linear(64, 1, bias=False)
    draw = torch.Generator().manual_seed(0)
    averages = {each: Ema(module, lambda step, each=each: power_decay(exponent_of(each), step)) for each in (*kept_widths, width)}
    snapshots: list[tuple[float, float, dict[str, torch.Tensor]]] = []
    for step in range(steps):
        with torch.no_grad():
            module.weight += 0.05 * torch.randn(module.weight.shape, generator=draw)
        for average in averages.values():
            average.update(module, torch.tensor(1 - average.decay_at(step)))
        if (step + 1) % 100 == 0:
            snapshots += [(step + 1.0, each, {"weight": averages[each].weights["weight"].clone()}) for each in kept_widths]
    shares = coefficients([(at, each) for at, each, _ in snapshots], steps, width)
    rebuilt = combined([weights for _, _, weights in snapshots], shares.tolist())["weight"]
    tracked = averages[width].weights["weight"]
    nearest = min((averages[each].weights["weight"] - tracked).norm() for each in kept_widths)
    assert (rebuilt - tracked).norm() < 0.2 * nearest, ((rebuilt - tracked).norm(), nearest)


def test_a_width_that_was_kept_is_given_back_as_it_was():
    shares = coefficients([(100, 0.05), (200, 0.05), (200, 0.1)], 200, 0.1)
    np.testing.assert_allclose(shares, [0, 0, 1], atol=1e-6)


def judged(guard: SpikeGuard, losses: Sequence[float]) -> list[float]:
    norm, ignored = torch.tensor(1.0), torch.tensor(0.0)
    return [float(guard.judge(torch.tensor(loss), norm, ignored)) for loss in losses]


def test_a_spike_is_counted_and_left_out_where_asked_and_one_that_is_not_finite_says_nothing():
    usual = [1 + 0.1 * math.sin(step) for step in range(WINDOW)]
    for skips in (False, True):
        guard = SpikeGuard(4.0, skips=skips, device=CPU)
        assert judged(guard, [50.0, *usual[1:]]) == [0.0] * WINDOW  # nothing is known yet
        judged(guard, usual)
        assert judged(guard, [1.05, 9.0, float("nan"), 1.0]) == [0.0, float(skips), 0.0, 0.0]
        assert int(guard.spikes) == 1
        other = SpikeGuard(4.0, skips=skips, device=CPU)
        losses, norms = guard.recent.tolist()
        other.load(losses, norms, int(guard.seen), int(guard.spikes))
        assert torch.equal(other.recent, guard.recent)


def test_a_step_that_is_a_spike_leaves_weights_and_averages_alone(dataset: tuple[Location, Manifest]):
    told = plan({"spike_deviations": 1e-9, "skip_spikes": True})
    trainer = make_trainer(told, dataset[1], CPU, None)
    assert trainer.guard is not None
    trainer.guard.load([0.0] * WINDOW, [0.0] * WINDOW, WINDOW, 0)
    before = state(trainer)
    go_on(trainer, told, dataset, 1)
    assert trainer.spike_steps == 1
    assert trainer.nonfinite_steps == 0
    after = state(trainer)
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_training_ends_after_measurements_without_a_gain():
    config = TrainConfig(early_stop=2, validate_every=10, early_stop_gain=0.1)

    def stopped(*values: float) -> bool:
        return has_stopped(config, [(10 * (index + 1), value) for index, value in enumerate(values)])

    assert not stopped(1.0, 0.95)
    assert stopped(1.0, 0.95, 0.91)  # below, but by less than a tenth
    assert not stopped(1.0, 0.95, 0.8, 0.79)
    assert stopped(1.0, float("inf"), float("inf"))
    assert not has_stopped(TrainConfig(validate_every=10), [(10, 1.0), (20, 2.0), (30, 3.0)])


def test_the_checksum_of_weights_tells_any_bit_and_place():
    network = torch.nn.Linear(4, 4)
    first = checksum(network)
    with torch.no_grad():
        network.weight[0, 0], network.weight[0, 1] = network.weight[0, 1].clone(), network.weight[0, 0].clone()
    swapped = checksum(network)
    with torch.no_grad():
        network.bias.view(torch.int32)[2] ^= 1
    assert len({int(first), int(swapped), int(checksum(network))}) == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"decay_steps": 5}, "decay_steps=5 means nothing to lr_schedule=constant"),
        ({"lr_schedule": "inverse_sqrt"}, "needs decay_steps"),
        ({"lr_schedule": "cosine", "steps": 10, "warmup_steps": 10}, "leaves lr_schedule=cosine no step to fall in"),
        ({"early_stop": 3}, "early_stop=3 needs measurements; set validate_every"),
        ({"early_stop": 3, "validate_every": 5, "early_stop_on": "distance"}, "early_stop_on=distance needs samples"),
        ({"validate_samples": 1, "validate_every": 5}, "validate_samples=1 is no distribution"),
        ({"skip_spikes": True}, "skip_spikes=true needs spike_deviations"),
        ({"ema_snapshot_every": 5}, "has nothing to keep; set ema_widths"),
        ({"ema_widths": [0.1, 0.1]}, "holds a width twice"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        TrainConfig.model_validate(settings)


def test_all_combinations_of_rates_and_optimisers_start_at_a_rate_above_0():
    for optimizer, schedule in itertools.product(("adamw", "sgd"), ("constant", "cosine", "inverse_sqrt")):
        config = TrainConfig.model_validate({"optimizer": optimizer, "lr_schedule": schedule, "decay_steps": None if schedule == "constant" else 9000})
        assert 0 < learning_rate(config, 0) <= learning_rate(config, config.warmup_steps)
