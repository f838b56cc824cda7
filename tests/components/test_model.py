import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from components.diffusion.schedule import DiffusionConfig
from components.errors import DataError
from components.model.checkpoint import (
    DenoiserSpec,
    TrainingRecord,
    TrainingState,
    load_denoiser,
    load_training_state,
    newest_whole_checkpoint,
    prune,
    read_weights,
    verify,
    write_checkpoint,
)
from components.model.ema import Ema
from components.model.unet import UNet, UNetConfig
from components.storage import Location

SPEC = DenoiserSpec(
    model=UNetConfig(base_channels=8, channel_mults=(1, 2), num_res_blocks=1, attention_resolutions=(4,), num_groups=4),
    diffusion=DiffusionConfig(prediction="v"),
    image_size=8,
    channels=1,
)


def write(path: Path, step: int = 4) -> UNet:
    torch.manual_seed(step)
    unet = SPEC.build()
    record = TrainingRecord(step=step, train_digest="abc", precision="float32")
    write_checkpoint(Location.of(path), SPEC, unet.state_dict(), TrainingState(unet.state_dict(), {"0.step": torch.tensor(4.0)}, record))
    return unet


def test_a_checkpoint_rebuilds_its_denoiser_by_itself(tmp_path: Path):
    unet = write(tmp_path / "step_000000004").eval()
    loaded = load_denoiser(Location.of(tmp_path / "step_000000004"))
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 700])
    torch.testing.assert_close(loaded.network(x, t), unet(x, t), rtol=1e-4, atol=1e-6)
    assert loaded.spec == SPEC
    assert load_training_state(Location.of(tmp_path / "step_000000004")).state.record.step == 4


@pytest.mark.parametrize("damage", ["truncate", "flip a bit", "remove", "no manifest"])
def test_a_damaged_checkpoint_is_named_and_passed_over(tmp_path: Path, damage: str):
    write(tmp_path / "step_000000004")
    write(tmp_path / "step_000000008", 8)
    file = tmp_path / "step_000000008" / ("manifest.json" if damage == "no manifest" else "weights.safetensors")
    content = bytearray(file.read_bytes())
    if damage == "truncate":
        file.write_bytes(content[:-10])
    elif damage == "flip a bit":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    else:
        file.unlink()
    with pytest.raises(DataError, match=file.name):
        verify(tmp_path / "step_000000008")
    assert newest_whole_checkpoint(Location.of(tmp_path)) == Location.of(tmp_path / "step_000000004")


def test_a_checkpoint_replaces_an_older_one_of_the_same_step(tmp_path: Path):
    write(tmp_path / "step_000000004", 1)
    unet = write(tmp_path / "step_000000004", 2)
    assert torch.equal(read_weights(tmp_path / "step_000000004" / "ema.safetensors")["conv_in.weight"], unet.conv_in.weight)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000000004"]


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match="is not a whole checkpoint"):
        load_denoiser(Location.of(tmp_path))


def test_our_reader_reads_what_safetensors_writes(tmp_path: Path):
    tensors = {"a": torch.randn(3, 4), "b": torch.arange(5), "c": torch.tensor(2.5, dtype=torch.float64), "d": torch.zeros(0, 2)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    read = read_weights(tmp_path / "x.safetensors")
    assert set(read) == set(tensors)
    for name, value in tensors.items():
        assert torch.equal(read[name], value)
        assert read[name].dtype == value.dtype


@pytest.mark.parametrize("content", [b"", b"12345678garbage", json.dumps({}).encode()])
def test_what_is_no_safetensors_file_is_refused(tmp_path: Path, content: bytes):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(DataError, match=r"x\.safetensors is not a readable safetensors file"):
        read_weights(tmp_path / "x.safetensors")


def test_the_average_moves_by_one_minus_decay():
    module = torch.nn.Linear(2, 2)
    ema = Ema(module, decay=0.9)
    before = {name: value.clone() for name, value in ema.weights.items()}
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1)
    ema.update(module, step=10_000)
    for name, value in ema.weights.items():
        torch.testing.assert_close(value, before[name] + 0.1)


def test_the_average_warms_up():
    ema = Ema(torch.nn.Linear(1, 1), decay=0.9999)
    assert ema.decay_at(0) == pytest.approx(0.1)
    assert ema.decay_at(90) == pytest.approx(0.91)
    assert ema.decay_at(10**7) == 0.9999


@pytest.mark.parametrize(("size", "named"), [(30, "image_size=30 cannot be halved 3 times; use a multiple of 8 such as 32"), (4, "image_size=4")])
def test_a_size_that_cannot_be_halved_is_refused(size: int, named: str):
    with pytest.raises(ValueError, match=named):
        UNet(UNetConfig(), image_size=size, channels=3)


def test_pruning_counts_whole_checkpoints_only_and_never_takes_the_one_just_written(tmp_path: Path):
    folder = Location.of(tmp_path)
    for name in ("step_000000890-0001", "step_000000895-0001", "step_000000900-0001", "step_000000950-0003"):
        write(tmp_path / name)
    for torn in ("step_000000940-0002", "step_000001000-0001", "step_000001000-0002"):
        (folder / torn / "ema.safetensors").write_text("half")
    prune(folder, 2, folder / "step_000000950-0003")
    assert folder.folders() == ["step_000000900-0001", "step_000000950-0003", "step_000001000-0001", "step_000001000-0002"]


def test_a_storage_that_cannot_be_reached_says_nothing_about_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write(tmp_path / "step_000000004-0001")

    def fail(location: Location) -> bytes:
        raise OSError("no route to host")

    monkeypatch.setattr(Location, "read_bytes", fail)
    with pytest.raises(OSError, match="no route"):
        newest_whole_checkpoint(Location.of(tmp_path))
