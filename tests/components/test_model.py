import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from servers import S3Server

from components.diffusion.config import DiffusionConfig
from components.errors import DataError
from components.model.checkpoint import TrainingRecord, TrainingState, load_denoiser, load_training_state, read_weights, write_checkpoint
from components.model.ema import Ema, warmed_up
from components.model.manifest import average_name, averages_in, sha256_of, verify
from components.model.retention import checkpoint_name, checkpoint_step, checkpoints, damage_of, damaged_checkpoints, newest_whole_checkpoint, prune
from components.model.spec import DenoiserSpec
from components.networks.unet.config import UNetConfig
from components.networks.unet.network import UNet
from components.spaces.pixels import PixelSpace
from components.storage import Location

SPEC = DenoiserSpec(
    model=UNetConfig(base_channels=8, channel_mults=(1, 2), num_res_blocks=1, attention_resolutions=(4,), num_groups=4),
    diffusion=DiffusionConfig(prediction="v"),
    space=PixelSpace(image_size=8, mode="L"),
)


CONDITIONAL = SPEC.model_copy(update={"model": SPEC.model.model_copy(update={"conditional": True}), "label_names": ("cat", "dog", "eel")})


def write(path: Path, step: int = 4) -> Any:
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


def test_a_checkpoint_of_a_conditional_denoiser_knows_its_classes(tmp_path: Path):
    unet = CONDITIONAL.build().eval()
    torch.nn.init.normal_(unet.get_parameter("conv_out.weight"))
    write_checkpoint(Location.of(tmp_path / "made"), CONDITIONAL, unet.state_dict())
    loaded = load_denoiser(Location.of(tmp_path / "made"))
    x, t, labels = torch.randn(4, 1, 8, 8), torch.tensor([3, 700, 3, 20]), torch.tensor([0, 1, 2, 3])
    torch.testing.assert_close(loaded.network(x, t, labels), unet(x, t, labels), rtol=1e-4, atol=1e-4)
    assert (loaded.spec.label_names, loaded.spec.null_label, SPEC.null_label) == (("cat", "dog", "eel"), 3, None)


def test_a_checkpoint_written_before_there_were_classes_still_loads(tmp_path: Path):
    unet = write(tmp_path / "old").eval()
    record = json.loads((tmp_path / "old" / "denoiser.json").read_text())
    del record["label_names"], record["model"]["conditional"]
    (tmp_path / "old" / "denoiser.json").write_text(json.dumps(record))
    files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in (tmp_path / "old").iterdir() if path.name != "manifest.json"}
    (tmp_path / "old" / "manifest.json").write_text(json.dumps({"format": 1, "files": files}))
    loaded = load_denoiser(Location.of(tmp_path / "old"))
    assert loaded.spec == SPEC
    assert all(torch.equal(value, unet.state_dict()[name]) for name, value in loaded.network.state_dict().items())


@pytest.mark.parametrize(("spec", "names"), [(SPEC, ["cat", "dog"]), (CONDITIONAL, [])])
def test_classes_that_do_not_fit_the_network_are_refused(spec: DenoiserSpec, names: list[str]):
    with pytest.raises(ValueError, match=rf"label_names=.* does not fit model\.conditional={not names}"):
        DenoiserSpec.model_validate(spec.model_dump() | {"label_names": names})


def test_classes_leave_all_other_weights_and_a_network_without_them_as_they_were():
    torch.manual_seed(0)
    plain = SPEC.build().state_dict()
    torch.manual_seed(0)
    told = CONDITIONAL.build().state_dict()
    assert told.pop("label_embedding.weight").shape == (4, 32)
    assert list(told) == list(plain)
    assert all(torch.equal(value, plain[name]) for name, value in told.items())


def test_a_network_that_is_told_no_class_computes_what_the_null_label_does():
    unet = CONDITIONAL.build().eval()
    torch.nn.init.normal_(unet.get_parameter("conv_out.weight"))
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 700])
    assert torch.equal(unet(x, t), unet(x, t, torch.tensor([3, 3])))
    assert not torch.allclose(unet(x, t), unet(x, t, torch.tensor([0, 1])))


def test_labels_are_refused_by_a_network_without_classes():
    with pytest.raises(ValueError, match=r"labels are given to a network without classes.*model\.conditional=true"):
        SPEC.build()(torch.zeros(1, 1, 8, 8), torch.tensor([3]), torch.tensor([0]))


def test_each_average_of_a_checkpoint_loads_by_its_name_and_others_are_refused(tmp_path: Path):
    main, other = SPEC.build().state_dict(), SPEC.build().state_dict()
    path = Location.of(tmp_path / "made")
    write_checkpoint(path, SPEC, main, more_averages={average_name(0.999): other, average_name(0.5): main})
    assert averages_in(path) == ["ema", "ema-0.5", "ema-0.999"]
    assert set(verify(path.path)) == {"denoiser.json", "ema.safetensors", "ema-0.5.safetensors", "ema-0.999.safetensors"}
    for name, expected in (("ema", main), ("ema-0.5", main), ("ema-0.999", other)):
        loaded = load_denoiser(path, weights=name).network.state_dict()
        assert all(torch.equal(value, expected[key]) for key, value in loaded.items()), name
    with pytest.raises(DataError, match=r"weights=ema-0\.99 is not in .*; use one of ema, ema-0\.5, ema-0\.999"):
        load_denoiser(path, weights="ema-0.99")


def test_weights_that_are_no_average_are_not_drawn_from(tmp_path: Path):
    write(tmp_path / "step_000000004")
    assert averages_in(Location.of(tmp_path / "step_000000004")) == ["ema"]
    with pytest.raises(DataError, match=r"weights=weights is not in .*; use one of ema"):
        load_denoiser(Location.of(tmp_path / "step_000000004"), weights="weights")


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
    folder = Location.of(tmp_path)
    for _ in range(2):
        assert newest_whole_checkpoint(folder) == folder / "step_000000004"
        assert folder.folders() == ["damaged_step_000000008", "step_000000004"]
    assert damaged_checkpoints(folder) == [folder / "damaged_step_000000008"]
    assert file.name in damage_of(folder / "damaged_step_000000008")


def test_a_checkpoint_that_is_damaged_under_a_name_set_aside_before_gets_another_one(tmp_path: Path):
    folder = Location.of(tmp_path)
    for _ in range(3):
        write(tmp_path / "step_000000004-0001")
        (tmp_path / "step_000000004-0001" / "state.json").write_text("{}")
        assert newest_whole_checkpoint(folder) is None
    assert [path.name for path in damaged_checkpoints(folder)] == [f"damaged_step_000000004-0001{end}" for end in ("", ".2", ".3")]


def test_on_s3_a_damaged_checkpoint_is_set_aside_and_one_under_way_is_left_alone(s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name, value in {**s3.env, "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}.items():
        monkeypatch.setenv(name, value)
    folder = Location.of(f"s3://{s3.bucket}/damaged/run")
    for step in (4, 8, 12):
        write(tmp_path / "made", step)
        (folder / checkpoint_name(step, 1)).upload(tmp_path / "made", last="manifest.json")
    (folder / checkpoint_name(8, 1) / "weights.safetensors").write_text("half")
    (folder / checkpoint_name(12, 1) / "manifest.json").remove()
    assert newest_whole_checkpoint(folder) == folder / checkpoint_name(4, 1)
    assert folder.folders() == [f"damaged_{checkpoint_name(8, 1)}", checkpoint_name(4, 1), checkpoint_name(12, 1)]
    assert "weights.safetensors" in damage_of(folder / f"damaged_{checkpoint_name(8, 1)}")


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
    ema = Ema(module, partial(warmed_up, 0.9))
    before = {name: value.clone() for name, value in ema.weights.items()}
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1)
    ema.update(module, torch.tensor(0.1))
    for name, value in ema.weights.items():
        torch.testing.assert_close(value, before[name] + 0.1)


def test_the_average_warms_up():
    ema = Ema(torch.nn.Linear(1, 1), partial(warmed_up, 0.9999))
    assert ema.decay_at(0) == pytest.approx(0.1)
    assert ema.decay_at(90) == pytest.approx(0.91)
    assert ema.decay_at(10**7) == 0.9999


@pytest.mark.parametrize(("size", "named"), [(30, "image_size=30 cannot be halved 3 times; use a multiple of 8 such as 32"), (4, "image_size=4")])
def test_a_size_that_cannot_be_halved_is_refused(size: int, named: str):
    with pytest.raises(ValueError, match=named):
        UNet(UNetConfig(), shape=(3, size, size))


def test_pruning_counts_whole_checkpoints_only_and_never_takes_the_one_just_written(tmp_path: Path):
    folder = Location.of(tmp_path)
    for name in ("step_000000890-0001", "step_000000895-0001", "step_000000900-0001", "step_000000950-0003"):
        write(tmp_path / name)
    for torn in ("step_000000940-0002", "step_000001000-0001", "step_000001000-0002"):
        (folder / torn / "ema.safetensors").write_text("half")
    prune(folder, 2, folder / "step_000000950-0003")
    assert folder.folders() == ["step_000000900-0001", "step_000000950-0003", "step_000001000-0001", "step_000001000-0002"]


@pytest.mark.parametrize(("keep_every", "kept"), [(None, [7, 8]), (2, [2, 4, 6, 7, 8]), (3, [3, 6, 7, 8]), (4, [4, 7, 8]), (100, [7, 8])])
def test_checkpoints_at_multiples_of_keep_every_are_never_pruned(tmp_path: Path, keep_every: int | None, kept: list[int]):
    folder = Location.of(tmp_path)
    for step in range(1, 9):
        write(tmp_path / checkpoint_name(step, 1))
        prune(folder, 2, folder / checkpoint_name(step, 1), keep_every)
    assert [checkpoint_step(path) for path in reversed(checkpoints(folder))] == kept


def test_of_a_step_to_be_kept_that_was_written_twice_the_later_whole_one_is_kept(tmp_path: Path):
    folder = Location.of(tmp_path)
    for attempt in (1, 2, 3):
        write(tmp_path / checkpoint_name(4, attempt))
    (tmp_path / checkpoint_name(4, 3) / "ema.safetensors").write_text("half")
    write(tmp_path / checkpoint_name(5, 4))
    prune(folder, 1, folder / checkpoint_name(5, 4), 4)
    assert folder.folders() == [checkpoint_name(4, 2), checkpoint_name(5, 4)]


def test_what_a_killed_writer_left_half_written_is_removed_by_the_next_one(tmp_path: Path):
    (tmp_path / ".step_000000004-0001.123.tmp").mkdir()
    (tmp_path / ".step_000000004-0001.123.tmp" / "ema.safetensors").write_text("half")
    written = Location.of(tmp_path / checkpoint_name(8, 2))
    write(written.path)
    prune(Location.of(tmp_path), 2, written)
    assert [path.name for path in tmp_path.iterdir()] == [written.name]


def test_a_storage_that_cannot_be_reached_says_nothing_about_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write(tmp_path / "step_000000004-0001")

    def fail(location: Location) -> bytes:
        raise OSError("no route to host")

    monkeypatch.setattr(Location, "read_bytes", fail)
    with pytest.raises(OSError, match="no route"):
        newest_whole_checkpoint(Location.of(tmp_path))
