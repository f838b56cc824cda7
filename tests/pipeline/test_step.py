"""One step of one worker, without Ray: the same gradient however the batch is cut, no waiting for the device, the same compiled."""

from typing import Any

import numpy as np
import pytest
import torch
from support import a_manifest
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from components.data.batches import Batch, BatchPlan
from components.data.order import RowOrder
from components.diffusion.config import DiffusionConfig
from components.diffusion.schedule import Schedule
from components.networks.unet.config import UNetConfig
from components.spaces.pixels import PixelSpace
from pipeline.training.arithmetic import Arithmetic, choose, threads_that_pay
from pipeline.training.config import TrainConfig
from pipeline.training.plan import TrainPlan
from pipeline.training.trainer import Trainer, make_trainer

CPU = torch.device("cpu")
LANES, ROWS = 8, 4
MANIFEST = a_manifest(PixelSpace(image_size=8, mode="L"), 0, rows_file="", rows_sha256="", shards=())


def plan(dropout: float = 0.2, **changes: object) -> TrainPlan:
    tiny = UNetConfig(base_channels=8, channel_mults=(1, 2), num_res_blocks=1, attention_resolutions=(4,), num_groups=4, dropout=dropout)
    settings: dict[str, object] = {"lr": 1e-2, "warmup_steps": 3, "global_batch_size": LANES * ROWS, "lanes": LANES, **changes}
    train = TrainConfig.model_validate(settings)
    return TrainPlan(train=train, model=tiny, diffusion=DiffusionConfig(), dataset="", folder="", inputs="i", threads=1, group_timeout_s=60)


def batch(step: int) -> Batch:
    draw, count = np.random.default_rng(step), LANES * ROWS
    keys = BatchPlan(RowOrder(64, count, LANES, 0), Schedule(DiffusionConfig()).draw_times, mirrored=None, num_dropouts=plan().model.num_dropouts).keys(
        step, range(LANES)
    )
    pixels, eps = draw.integers(0, 256, (count, 1, 8, 8), dtype=np.uint8), draw.standard_normal((count, 1, 8, 8), dtype=np.float32)
    t = torch.from_numpy(draw.integers(0, 1000, count))
    return Batch(step, torch.arange(count), torch.from_numpy(pixels), t, torch.from_numpy(eps), keys=keys)


def fresh(settings: TrainPlan) -> Trainer:
    """Returns a trainer whose weights let everything through; fresh ones have convolutions of zeros."""
    trainer, draw = make_trainer(settings, MANIFEST, CPU, None), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainer.network.parameters():
            parameter.normal_(std=0.1, generator=draw)
    return trainer


@pytest.mark.parametrize("part", [16, 8, 4, 12])
def test_the_gradient_is_that_of_the_whole_batch_however_it_is_cut(part: int):
    whole, cut = fresh(plan(grad_clip=1e9)), fresh(plan(grad_clip=1e9, micro_batch_size=part))
    cut.stepper.cut(part, batch(0), ROWS)
    passes = []
    cut.network.register_forward_pre_hook(lambda module, given: passes.append(len(given[0])))
    (loss, norm), (of_parts, norm_of_parts) = whole.update(batch(0)), cut.update(batch(0))
    assert passes == {16: [16, 16], 8: [8] * 4, 4: [4] * 8, 12: [12, 12, 8]}[part]
    torch.testing.assert_close(of_parts, loss)
    torch.testing.assert_close(norm_of_parts, norm)
    for one, other in zip(whole.network.parameters(), cut.network.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-4, atol=1e-6)


def test_two_workers_with_micro_batches_have_the_gradient_of_one_without():
    whole = fresh(plan(grad_clip=1e9))
    whole.update(batch(0))
    found = []
    for rows in (slice(0, 16), slice(16, 32)):
        worker = fresh(plan(grad_clip=1e9))
        worker.stepper.part = 8
        worker.update(batch(0).map(lambda tensor, rows=rows: tensor[rows]))
        found.append([parameter.grad for parameter in worker.network.parameters() if parameter.grad is not None])
    for parameter, one, other in zip(whole.network.parameters(), *found, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close((one + other) / 2, parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("size", [-4, 6, 1])
def test_a_micro_batch_that_splits_a_lane_is_refused_with_what_would_do(size: int):
    with pytest.raises(ValueError, match=rf"micro_batch_size={size} is no whole number of lanes.*use a multiple of 4, auto, or 0"):
        plan(micro_batch_size=size)


class _NoWaiting(TorchDispatchMode):
    """Fails where a value of a tensor is asked for, which on a GPU waits for all that was launched before."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert "_local_scalar_dense" not in str(func), "the step asked for a value"
        assert "nonzero" not in str(func), "the step asked for a size"
        return func(*args, **(kwargs or {}))


def broken(step: int) -> Batch:
    return batch(step).map(lambda tensor: tensor * float("nan") if tensor.is_floating_point() else tensor)


def state_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    now = trainer.everything()
    return {**now.state.weights, **{f"ema {name}": value for name, value in now.ema.items()}, **{f"adam {name}": v for name, v in now.state.optimizer.items()}}


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted_without_waiting():
    trainer, decays = fresh(plan(more_ema_decays=[0.5])), (0.9, 0.5)
    trainer.update(batch(0))
    before = {name: value.clone() for name, value in state_of(trainer).items()}
    with _NoWaiting():
        loss, norm = trainer.stepper(broken(1), 1e-2, decays)
    assert not torch.isfinite(loss)
    assert not torch.isfinite(norm)
    assert trainer.nonfinite_steps == 1
    assert all(torch.equal(value, before[name]) for name, value in state_of(trainer).items())
    with _NoWaiting():
        trainer.stepper(batch(2), 1e-2, decays)
    assert trainer.nonfinite_steps == 1
    assert not any(torch.equal(value, before[name]) for name, value in state_of(trainer).items())


@pytest.mark.parametrize(("most", "flops", "expected"), [(16, 3.1e9, 2), (2, 24e9, 2), (1, 24e9, 1), (16, 24e9, 16), (16, 1e6, 1), (64, 5e11, 64)])
def test_a_network_with_little_to_do_works_with_few_threads(most: int, flops: float, expected: int):
    assert threads_that_pay(most, flops) == expected


def test_the_operations_of_a_pass_are_those_that_torch_counts():
    trainer = fresh(plan(dropout=0.0))
    with FlopCounterMode(display=False) as counter:
        trainer.stepper.gradient(batch(0))
    assert trainer.pass_flops(LANES * ROWS) == pytest.approx(counter.get_total_flops(), rel=0.05)


@pytest.mark.slow
def test_compiled_it_computes_what_it_computes_as_it_is(tmp_path: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    plain, compiled = fresh(plan(compile=False)), fresh(plan(compile=True))
    assert (plain.arithmetic.compiled, compiled.arithmetic.compiled) == (False, True)
    for step in range(3):
        for mine, theirs in zip(compiled.update(batch(step)), plain.update(batch(step)), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("amx", "avx512", "parameters", "expected"),
    [
        (False, False, 35_000_000, Arithmetic("float32", "channels_last")),
        (False, True, 35_000_000, Arithmetic("bfloat16", "contiguous")),
        (False, True, 400_000, Arithmetic("float32", "channels_last")),
        (True, True, 35_000_000, Arithmetic("bfloat16", "channels_last")),
        (True, True, 400_000, Arithmetic("float32", "channels_last")),
    ],
)
def test_format_and_layout_follow_the_kind_of_cpu_and_the_size_of_the_network(
    monkeypatch: pytest.MonkeyPatch, amx: bool, avx512: bool, parameters: int, expected: Arithmetic
):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    assert choose("auto", "auto", CPU, parameters, 10**9) == expected
    assert choose("float32", "auto", CPU, parameters, 10**9).precision == "float32"
    assert choose("bfloat16", "auto", CPU, parameters, 10**9).precision == "bfloat16"


def test_a_resumed_training_keeps_the_arithmetic_that_it_began_with(tmp_path: Any, monkeypatch: pytest.MonkeyPatch):
    from components.storage import Location

    begun = make_trainer(plan(precision="bfloat16"), MANIFEST, CPU, None)
    begun.update(batch(0))
    begun.save(Location.of(tmp_path / "step"))
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: not torch.cpu._is_avx512_bf16_supported())
    resumed = make_trainer(plan(precision="auto"), MANIFEST, CPU, Location.of(tmp_path / "step"))
    assert resumed.arithmetic == begun.arithmetic
