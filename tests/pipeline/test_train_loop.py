"""One worker's training, without Ray: what a checkpoint gives back is all that training needs."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from support import a_manifest, write_dataset

from cluster.config import ClusterConfig
from components.data.batches import Batch, BatchPlan
from components.data.order import RowOrder
from components.data.reader import RowReader
from components.data.shards import Manifest
from components.diffusion.config import DiffusionConfig
from components.diffusion.schedule import Schedule
from components.errors import DataError
from components.model.checkpoint import TrainingRecord
from components.model.ema import Ema, warmed_up
from components.networks.unet.config import UNetConfig
from components.spaces.pixels import PixelSpace
from components.storage import Location
from pipeline.artifacts import ShardSet
from pipeline.context import Reporter, StageContext
from pipeline.train import check_labels, report_unfinished
from pipeline.training.config import TrainConfig
from pipeline.training.loop import MetricsWindow
from pipeline.training.plan import TrainPlan
from pipeline.training.trainer import Trainer, make_batch_plan, make_trainer, sample_tiles

MANIFEST = a_manifest(PixelSpace(image_size=8, mode="L"), 0, rows_file="", rows_sha256="", shards=())
LABELLED = MANIFEST.model_copy(update={"labels": {"dog": 1, "cat": 1}})
CPU = torch.device("cpu")
LANES = range(4)


def plan(conditional: bool = False, **changes: object) -> TrainPlan:
    return TrainPlan(
        train=TrainConfig.model_validate({"lr": 1e-2, "warmup_steps": 3, **changes}),
        model=UNetConfig(
            base_channels=8, channel_mults=(1, 2), num_res_blocks=1, attention_resolutions=(4,), num_groups=4, dropout=0.2, conditional=conditional
        ),
        diffusion=DiffusionConfig(),
        dataset="",
        folder="",
        inputs="i",
        threads=1,
        group_timeout_s=60,
    )


def batch(step: int, num_classes: int = 0) -> Batch:
    draw = torch.Generator().manual_seed(step)
    shape = (4, 1, 8, 8)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=draw)
    t, eps = torch.randint(0, 1000, (4,), generator=draw), torch.randn(shape, generator=draw)
    labels = torch.randint(0, num_classes + 1, (4,), generator=draw) if num_classes else None
    return Batch(step, torch.arange(4), pixels, t, eps, labels, keys(range(4), 0, step))


def keys(lanes: range, seed: int, step: int) -> torch.Tensor:
    """Returns the keys of dropout of lanes of one image."""
    found = BatchPlan(RowOrder(4, 4, 4, seed), Schedule(DiffusionConfig()).draw_times, mirrored=None, num_dropouts=plan().model.num_dropouts).keys(step, lanes)
    assert found is not None
    return found


def train(trainer: Trainer, until: int) -> list[float]:
    num_classes = len(trainer.spec.label_names)
    return [float(trainer.update(batch(step, num_classes))[0]) for step in range(trainer.step, until)]


@pytest.mark.parametrize(("settings", "manifest"), [(plan(more_ema_decays=[0.5, 0.1]), MANIFEST), (plan(conditional=True), LABELLED)])
def test_a_resumed_run_is_bit_for_bit_the_undisturbed_one(tmp_path: Path, settings: TrainPlan, manifest: Manifest):
    undisturbed, interrupted = make_trainer(settings, manifest, CPU, None), make_trainer(settings, manifest, CPU, None)
    expected = train(undisturbed, 9)
    losses = train(interrupted, 4)
    interrupted.save(Location.of(tmp_path / "step_000000004"))
    resumed = make_trainer(settings, manifest, CPU, Location.of(tmp_path / "step_000000004"))
    assert resumed.step == 4
    assert losses + train(resumed, 9) == expected
    for name, value in undisturbed.network.state_dict().items():
        assert torch.equal(value, resumed.network.state_dict()[name]), name
    assert list(resumed.more_averages) == [f"ema-{decay}" for decay in settings.train.more_ema_decays]
    for ours, average in zip([undisturbed.ema, *undisturbed.more_averages.values()], [resumed.ema, *resumed.more_averages.values()], strict=True):
        for name, value in ours.weights.items():
            assert torch.equal(value, average.weights[name]), name
    theirs = dict(resumed.everything().state.optimizer)
    assert all(torch.equal(value, theirs[name]) for name, value in undisturbed.everything().state.optimizer.items())


def test_a_checkpoint_of_other_settings_is_refused_with_the_settings_that_differ(tmp_path: Path):
    path = Location.of(tmp_path / "step_000000001")
    there = plan().model_copy(update={"inputs": "a", "settings": {"train.lr": "0.0002", "train.seed": "0", "dataset": "d1"}})
    trainer = make_trainer(there, MANIFEST, CPU, None)
    train(trainer, 1)
    trainer.save(path)
    here = there.model_copy(update={"inputs": "b", "settings": {"train.lr": "0.001", "train.seed": "0", "dataset": "d2"}})
    with pytest.raises(DataError, match=r"\(dataset is d1 there and d2 here, train\.lr is 0\.0002 there and 0\.001 here\)"):
        make_trainer(here, MANIFEST, CPU, path)


def test_a_training_that_begins_anew_says_which_one_stays_and_in_what_it_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    stage = Location.of(tmp_path)
    trainer = make_trainer(plan().model_copy(update={"settings": {"train.lr": "0.0002", "dataset": "d"}}), MANIFEST, CPU, None)
    train(trainer, 3)
    trainer.save(stage / "aaa" / "step_000000003-0001")
    context = StageContext(stage, stage / "bbb", "bbb", "run", ClusterConfig(), Reporter())
    report_unfinished(context, {"train.lr": "0.001", "dataset": "d"})
    said = " ".join(capsys.readouterr().err.split())
    assert f"stopped at step 3 stays in {stage / 'aaa'} (train.lr is 0.0002 there and 0.001 here)" in said
    (stage / "aaa" / "receipt.json").write_text("{}")
    report_unfinished(context, {"train.lr": "0.001", "dataset": "d"})
    assert capsys.readouterr().err == ""


def test_a_point_of_the_curve_is_the_same_where_a_checkpoint_lay_between_its_steps():
    losses, norms = torch.rand(5), torch.rand(5)
    trainer = make_trainer(plan(), MANIFEST, CPU, None)
    straight, before, after = MetricsWindow(1), MetricsWindow(1), MetricsWindow(1)
    for index in range(5):
        straight.add(losses[index], norms[index], 0.0)
    for index in range(3):
        before.add(losses[index], norms[index], 0.0)
    open_losses, open_norms = before.open()
    record = TrainingRecord(step=3, train_digest="", precision="float32", open_losses=tuple(open_losses), open_norms=tuple(open_norms))
    after.resume(TrainingRecord.model_validate_json(record.model_dump_json()), CPU)
    for index in range(3, 5):
        after.add(losses[index], norms[index], 0.0)
    assert [after.line(trainer).metrics[name] for name in ("train/loss", "train/gradient_norm")] == [
        straight.line(trainer).metrics[name] for name in ("train/loss", "train/gradient_norm")
    ]


def test_one_step_is_adams_of_a_plain_optimizer():
    ours, plain = make_trainer(plan(warmup_steps=0), MANIFEST, CPU, None), make_trainer(plan(warmup_steps=0), MANIFEST, CPU, None)
    reference = torch.optim.Adam([parameter.detach().clone().requires_grad_() for parameter in plain.network.parameters()], lr=1e-2, foreach=False)
    for step in range(3):
        ours.update(batch(step))
        for mine, theirs in zip(ours.network.parameters(), reference.param_groups[0]["params"], strict=True):
            assert mine.grad is not None
            theirs.grad = mine.grad.clone()
        reference.step()
    for mine, theirs in zip(ours.network.parameters(), reference.param_groups[0]["params"], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_the_learning_rate_warms_up_from_the_first_step():
    trainer = make_trainer(plan(), MANIFEST, CPU, None)
    rates = []
    for step in range(5):
        rates.append(trainer.learning_rate())
        trainer.update(batch(step))
    assert rates == pytest.approx([1e-2 / 3, 2e-2 / 3, 1e-2, 1e-2, 1e-2])


def test_a_gradient_that_is_not_finite_is_left_out_and_counted_and_stops_past_the_limit():
    trainer = make_trainer(plan(max_nonfinite_steps=1), MANIFEST, CPU, None)
    before = {name: value.clone() for name, value in trainer.network.state_dict().items()}
    broken = Batch(0, torch.arange(4), batch(0).data, batch(0).t, torch.full((4, 1, 8, 8), float("nan")))
    trainer.update(broken)
    assert trainer.nonfinite_steps == 1
    assert all(torch.equal(value, before[name]) for name, value in trainer.network.state_dict().items())
    with pytest.raises(FloatingPointError, match=r"train\.max_nonfinite_steps=1 is exceeded at step 1"):
        trainer.update(broken)


def test_bfloat16_trains_with_float32_weights_and_loss():
    trainer = make_trainer(plan(precision="bfloat16"), MANIFEST, CPU, None)
    exact = make_trainer(plan(precision="float32"), MANIFEST, CPU, None)
    loss, norm = trainer.update(batch(0))
    assert (loss.dtype, norm.dtype, next(trainer.network.parameters()).dtype) == (torch.float32,) * 3
    assert float(loss) == pytest.approx(float(exact.update(batch(0))[0]), rel=0.02)


@pytest.mark.parametrize("parts", [[range(0, 2), range(2, 4)], [range(lane, lane + 1) for lane in LANES], [range(0, 1), range(1, 4)]], ids=str)
def test_with_dropout_loss_and_gradient_are_the_mean_of_those_of_any_workers_weighed_by_their_lanes(parts: list[range]):
    expected_loss, expected = gradient(LANES)
    shares = [gradient(lanes, len(lanes) * len(parts) / len(LANES)) for lanes in parts]
    torch.testing.assert_close(torch.stack([loss for loss, _ in shares]).mean(), expected_loss)
    for whole, *pieces in zip(expected, *(gradients for _, gradients in shares), strict=True):
        torch.testing.assert_close(torch.stack(pieces).mean(dim=0), whole, rtol=1e-3, atol=1e-5)


def test_the_same_batch_meets_the_same_masks_at_the_same_step_and_others_at_another_or_with_another_seed():
    losses = [float(gradient(LANES, step=step, seed=seed)[0]) for step, seed in ((0, 0), (1, 0), (0, 1))]
    assert len(set(losses)) == 3
    assert float(gradient(LANES)[0]) == losses[0]


def gradient(lanes: range, share: float = 1.0, *, step: int = 0, seed: int = 0) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Returns the loss and the gradient of a worker that carries these lanes of one and the same batch, with one and the same weights."""
    trainer, whole, rows = make_trainer(plan(grad_clip=1e9, seed=seed), MANIFEST, CPU, None), batch(0), slice(lanes.start, lanes.stop)
    # Fresh weights leave out what follows dropout: its convolutions start at 0.
    weights = torch.Generator().manual_seed(0)
    for parameter in trainer.network.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=weights)
    trainer.step, trainer.stepper.share = step, share
    part = whole.map(lambda tensor: tensor[rows])
    loss, _ = trainer.update(replace(part, keys=keys(lanes, seed, step)))
    return loss, [parameter.grad for parameter in trainer.network.parameters() if parameter.grad is not None]


def test_each_average_is_the_one_that_its_decay_alone_would_give():
    trainer, alone = make_trainer(plan(more_ema_decays=[0.15, 0.3]), MANIFEST, CPU, None), make_trainer(plan(), MANIFEST, CPU, None)
    emas = [Ema(alone.network, partial(warmed_up, decay)) for decay in (0.9999, 0.15, 0.3)]
    for step in range(6):
        trainer.update(batch(step))
        alone.update(batch(step))
        for ema in emas:
            ema.update(alone.network, torch.tensor(1 - ema.decay_at(step)))
    averages = [trainer.ema, trainer.more_averages["ema-0.15"], trainer.more_averages["ema-0.3"]]
    for ours, expected in zip(averages, emas, strict=True):
        for name, value in expected.weights.items():
            assert torch.equal(ours.weights[name], value), (expected.decay_at(1000), name)
    assert len({float(average.weights["conv_in.weight"].sum()) for average in averages}) == 3


def test_a_conditional_model_draws_the_class_that_it_is_told(tmp_path: Path):
    noise = np.random.default_rng(0).integers(0, 40, (64, 1, 8, 8), dtype=np.uint8)
    manifest = write_dataset(Location.of(tmp_path), [noise[:32], 255 - noise[32:]], ["black", "white"])
    trainer = make_trainer(toy(), manifest, CPU, None)
    reader, batches = RowReader(Location.of(tmp_path), manifest), make_batch_plan(toy(), manifest)
    for step in range(60):
        trainer.update(batches.batch(reader, step, range(8)))
    brightness = sample_tiles(trainer).mean(axis=(1, 2, 3))
    assert brightness[0::2].max() < 90
    assert brightness[1::2].min() > 165


def toy() -> TrainPlan:
    tiny = UNetConfig(base_channels=16, channel_mults=(1,), num_res_blocks=1, attention_resolutions=(), num_groups=4, dropout=0.0, conditional=True)
    diffusion = DiffusionConfig(prediction="v", betas="cosine")
    return plan(warmup_steps=0, ema_decay=0.9, global_batch_size=32).model_copy(update={"model": tiny, "diffusion": diffusion})


def test_labels_are_told_to_conditional_models_only_and_as_often_as_the_settings_say():
    told = make_batch_plan(plan(conditional=True, label_dropout=0.3, global_batch_size=8), LABELLED.model_copy(update={"splits": {"train": 2}}))
    plain = make_batch_plan(plan(label_dropout=0.3, global_batch_size=8), LABELLED.model_copy(update={"splits": {"train": 2}}))
    assert (told.num_classes, told.label_dropout, plain.num_classes) == (2, 0.3, 0)


@pytest.mark.parametrize("num_labels", [0, 1])
def test_a_conditional_model_needs_labels(num_labels: int):
    shards = ShardSet.model_construct(source="images", num_labels=num_labels)
    with pytest.raises(DataError, match=rf"model\.conditional=true needs at least 2 labels, and images has {num_labels}; .*or model\.conditional=false"):
        check_labels(UNetConfig(conditional=True), shards)
