"""DINOv2 features are those of transformers' own model after its own image processor."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

from components.errors import DataError
from components.metrics.dino import DinoExtractor


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dinov2")
    torch.manual_seed(0)
    Dinov2Model(Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=70, patch_size=14)).save_pretrained(path)
    return path


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "dinov2"))


def pixels(channels: int) -> torch.Tensor:
    return torch.randint(0, 256, (3, channels, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("channels", [1, 3])
def test_features_are_the_class_tokens_of_transformers(folder: Path, channels: int):
    found = DinoExtractor(folder)(pixels(channels))
    published = {"resample": 3, "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}  # of facebook/dinov2-large
    processor = BitImageProcessorPil(size={"shortest_edge": 224}, do_center_crop=False, **published)
    rgb = [image.numpy() for image in pixels(channels).expand(-1, 3, -1, -1).permute(0, 2, 3, 1)]
    with torch.no_grad():
        outputs = Dinov2Model.from_pretrained(folder)(**processor(rgb, input_data_format="channels_last", return_tensors="pt"))
    assert (found.shape, found.dtype) == ((3, 32), np.float32)
    np.testing.assert_allclose(found, outputs.last_hidden_state[:, 0].numpy(), rtol=1e-4, atol=1e-5)
    assert np.ptp(found, axis=0).max() > 1e-3


def test_the_name_follows_the_weights_and_the_config(copied: Path):
    before = DinoExtractor(copied)
    weights = load_file(copied / "model.safetensors")
    save_file({name: value * 1.5 for name, value in weights.items()}, copied / "model.safetensors", metadata={"format": "pt"})
    heavier = DinoExtractor(copied)
    config = (copied / "config.json").read_text()
    (copied / "config.json").write_text(config.replace('"layer_norm_eps": 1e-06', '"layer_norm_eps": 0.001'))
    smoother = DinoExtractor(copied)
    assert len({before.digest, heavier.digest, smoother.digest}) == 3
    assert before.name == f"fd_dinov2_{before.digest[:8]}"
    assert not np.allclose(heavier(pixels(3)), smoother(pixels(3)))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_folder_without_a_part_of_the_model_is_refused(copied: Path, name: str):
    (copied / name).unlink()
    with pytest.raises(DataError, match=f"dinov2 lacks {name}"):
        DinoExtractor(copied)


def test_weights_in_a_pickle_are_never_read(copied: Path):
    torch.save(load_file(copied / "model.safetensors"), copied / "pytorch_model.bin")
    (copied / "model.safetensors").unlink()
    with pytest.raises(DataError, match=r"lacks model\.safetensors"):
        DinoExtractor(copied)


def test_weights_of_another_network_are_refused(copied: Path):
    weights = load_file(copied / "model.safetensors")
    weights.pop("layernorm.weight")
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"lacks 1 tensors of DINOv2, such as layernorm\.weight"):
        DinoExtractor(copied)


@pytest.mark.parametrize(("name", "content"), [("config.json", b"{"), ("model.safetensors", b"no tensors")])
def test_a_broken_file_is_refused_by_its_folder(copied: Path, name: str, content: bytes):
    (copied / name).write_bytes(content)
    with pytest.raises(DataError, match=r"dinov2 holds no readable DINOv2|config\.json is no configuration of DINOv2"):
        DinoExtractor(copied)


def test_a_missing_package_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(DataError, match="pip install"):
        DinoExtractor(folder)
