"""Diffusion in the latent space of an autoencoder, by the command: trained first, encoded once, measured and served in pixels."""

import hashlib
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keeper
import mlflow
import numpy as np
import pandas as pd
import pytest
import servers
from PIL import Image
from support import Finished, ddpm_command

from components.storage import Location
from pipeline.training.metrics_log import read_metrics

Command = Callable[..., Finished]
STAGES = ["preprocess", "encode", "train", "evaluate", "register"]
AUTOENCODER = """
kind: autoencoder
model: {base_channels: 8, num_groups: 4}
train: {steps: 6, global_batch_size: 32, lanes: 2, warmup_steps: 2, log_every: 2, checkpoint_every: 3, sample_every: 3, flip: false, validate_every: 3}
evaluate: {num_samples: 30, extractor: dct8}
"""
DATA = ["data.image_size=8", "data.mode=RGB", "data.holdout_fraction=0.2", "data.shard_bytes=2000"]
DENOISER = ["model.kind=dit", "model.depth=1", "model.hidden_size=16", "model.num_heads=2", "model.conditional=true"]
TRAIN = ["train.steps=8", "train.global_batch_size=32", "train.checkpoint_every=4", "train.log_every=2", "train.warmup_steps=2", "train.sample_every=4"]
MEASURE = ["train.validate_every=4", "train.validate_samples=16", "evaluate.num_samples=40", "evaluate.steps=4", "evaluate.extractor=dct8"]


def write_images(folder: Path, numbers: range) -> None:
    for number in numbers:
        file = folder / ("cat", "dog")[number % 2] / f"{number:04d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(file)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("latent")
    write_images(place / "photos", range(150))
    (place / "small-autoencoder.yaml").write_text(AUTOENCODER)
    return place


def settings(place: Path, *more: str) -> list[str]:
    return [f"data.source={place / 'photos'}", *DATA, "data.autoencoder=preset:small-autoencoder.yaml", *DENOISER, *TRAIN, *MEASURE, *more]


@pytest.fixture(scope="module")
def first(place: Path, command: Command) -> dict[str, Any]:
    done = command("run", "digits", *settings(place), "--name", "latent", "--json", cwd=place)
    assert done.code == 0, done.stderr
    assert "autoencoder small-autoencoder\n" in done.stderr
    return done.json


def test_all_stages_run_and_the_denoiser_works_on_latents(place: Path, first: dict[str, Any]):
    assert list(first) == STAGES
    space = first["encode"]["space"]
    assert (space["kind"], space["latent"], space["mirrors"]) == ("latents", [4, 4, 4], False)
    assert first["encode"]["num_decoded"] == first["preprocess"]["num_rows"] == 150
    assert first["train"]["dataset_digest"] == first["preprocess"]["digest"]
    assert first["evaluate"]["metric"]["unit"]["reference_digest"] == first["preprocess"]["digest"]
    assert first["register"]["promoted"]
    spec = json.loads((Path(first["train"]["path"]) / "denoiser.json").read_text())
    assert spec["space"]["autoencoder"] == space["autoencoder"]
    grid = Image.open(first["evaluate"]["grid"])
    assert np.asarray(grid).std() > 1


def test_the_autoencoder_is_a_model_of_its_own_measured_by_reconstructions(place: Path, first: dict[str, Any]):
    address = f"sqlite:///{place / 'storage' / 'mlflow' / 'mlflow.db'}"
    client = mlflow.MlflowClient(address)
    names = {model.name for model in client.search_registered_models()}
    own = first["register"]["model_name"] + "-autoencoder"
    assert names == {own, first["register"]["model_name"]}
    evaluation = json.loads(next((place / "storage" / "runs" / "small-autoencoder" / "evaluate").glob("*/receipt.json")).read_text())
    unit = evaluation["metric"]["unit"]
    assert (unit["sampler"], unit["reference_split"], unit["steps"]) == ("reconstruction", "holdout", 1)
    assert client.get_model_version_by_alias(own, "champion").version in (1, "1")


def test_the_same_command_again_skips_everything_the_autoencoder_too(place: Path, first: dict[str, Any], command: Command):
    again = command("run", "digits", *settings(place), "--name", "latent", "--json", cwd=place)
    assert again.code == 0, again.stderr
    assert [again.json[stage]["skipped"] for stage in STAGES] == [True] * 5
    assert "autoencoder small-autoencoder is trained" in again.stderr


def test_a_registered_version_draws_alone_and_goes_to_diffusers(place: Path, first: dict[str, Any]):
    address = f"sqlite:///{place / 'storage' / 'mlflow' / 'mlflow.db'}"
    mlflow.set_tracking_uri(address)
    mlflow.set_registry_uri(address)
    uri = f"models:/{first['register']['model_name']}@champion"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MLflow's, of type hints that the model does without
        model = mlflow.pyfunc.load_model(uri)
    drawn: Any = model.predict(pd.DataFrame([{"num_images": 3, "steps": 4, "format": "array", "label": "cat"}]))
    assert (drawn.shape, drawn.dtype) == ((3, 8, 8, 3), np.uint8)
    folder = Path(mlflow.artifacts.download_artifacts(uri, dst_path=str(place / "downloaded")))
    assert any(line.startswith("diffusers==") for line in (folder / "requirements.txt").read_text().splitlines())
    index = json.loads((folder / "artifacts" / "diffusers" / "model_index.json").read_text())
    assert (index["_class_name"], index["vae"], index["id2label"]) == ("DiTPipeline", ["diffusers", "AutoencoderKL"], {"0": "cat", "1": "dog"})


def test_an_autoencoder_shows_what_it_decodes_and_has_no_reverse_process(place: Path, first: dict[str, Any], command: Command):
    own = trained(place).partition("#")[0]
    done = command("sample", own, "--num", "4", "--out", "decoded.png", cwd=place)
    assert done.code == 0, done.stderr
    assert np.asarray(Image.open(place / "decoded.png")).std() > 1
    done = command("show", "reverse", own, cwd=place)
    assert (done.code, "is an autoencoder, whose images do not rise from noise" in done.stderr) == (2, True), done.stderr


def test_a_registered_autoencoder_is_named_by_its_alias(place: Path, first: dict[str, Any], command: Command):
    name = f"models:/{first['register']['model_name']}-autoencoder@champion"
    done = command("encode", "digits", *settings(place, f"data.autoencoder={name}"), "--name", "by-alias", "--json", cwd=place)
    assert done.code == 0, done.stderr
    assert done.json["encode"]["digest"] == first["encode"]["digest"]
    assert done.json["encode"]["num_decoded"] == 0


def files_of(folder: Path) -> dict[str, str]:
    """Returns the files of a dataset with its shards, by their names below it, each with a checksum."""
    files = [*folder.glob("*.*"), *(folder.parent / "shards").iterdir()]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_of_more_images_only_those_are_encoded_killed_at_any_time_and_to_the_same_bytes(place: Path, first: dict[str, Any], command: Command):
    write_images(place / "photos", range(150, 250))
    more = settings(place, "data.autoencoder=" + trained(place))
    encoded = Path(first["encode"]["path"]).parent / "encoded"
    before = len(list(encoded.iterdir()))
    kept = keeper.start(
        ddpm_command("encode", "digits", *more, "--name", "latent", f"cluster.storage={place / 'storage'}"), log=place / "log", env=servers.environment({})
    )
    try:
        deadline = time.monotonic() + 200
        while len(list(encoded.iterdir())) < before + 2 and kept.is_running():
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        kept.end()
    done = command("encode", "digits", *more, "--name", "latent", "--json", cwd=place)
    assert done.code == 0, done.stderr
    assert done.json["encode"]["num_rows"] == 250
    assert 0 < done.json["encode"]["num_decoded"] <= 100
    assert f"{250 - done.json['encode']['num_decoded']} of 250 images are encoded" in done.stderr
    elsewhere = command("encode", "digits", *more, f"cluster.storage={place / 'other'}", "--name", "latent", "--json", cwd=place)
    assert elsewhere.code == 0, elsewhere.stderr
    assert elsewhere.json["encode"]["num_decoded"] == 250
    assert elsewhere.json["encode"]["digest"] == done.json["encode"]["digest"]
    assert elsewhere.json["encode"]["space"] == done.json["encode"]["space"]


def trained(place: Path) -> str:
    """Returns the address of the autoencoder that was trained first."""
    pin = json.loads(next((place / "storage" / "runs" / "small-autoencoder").glob("trained-*.json")).read_text())
    return f"{pin['checkpoint']}#{pin['weights']}"


@pytest.mark.slow
def test_one_worker_draws_the_same_of_the_posteriors_as_two(place: Path, first: dict[str, Any], command: Command):
    changed = settings(place, "cluster.num_workers=1", "data.autoencoder=" + trained(place))
    source = f"data.source={place / 'few'}"
    write_images(place / "few", range(64))
    losses, moved = [], ["train.flip=true", "train.crop_jitter=1", "train.crop_copies=2"]
    for workers in (1, 2):
        done = command("train", "digits", *changed, source, f"cluster.num_workers={workers}", *moved, "--name", f"w{workers}", "--json", cwd=place)
        assert done.code == 0, done.stderr
        space = done.json["encode"]["space"]
        assert (space["mirrors"], space["copies"], space["jitter"]) == (True, 2, 1)
        losses.append([line.metrics["train/loss"] for line in read_metrics(Location.of(done.json["train"]["folder"])) if "train/loss" in line.metrics])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


def check_refused(place: Path, command: Command, changed: list[str], message: str) -> None:
    done = command("train", "digits", *settings(place, *changed), "--name", "wrong", cwd=place)
    assert (done.code, message in done.stderr) == (2, True), (changed, done.stderr)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["data.autoencoder=nowhere"], "data.autoencoder=nowhere is no folder of a diffusers AutoencoderKL"),
        (["train.rotation=10"], "of augmentation latents know mirrors and crop_jitter"),
        (["data.autoencoder=preset:digits"], "data.autoencoder=preset:digits is no preset of `kind: autoencoder`"),
    ],
)
def test_what_is_no_autoencoder_or_means_nothing_to_one_is_one_clear_line(place: Path, command: Command, changed: list[str], message: str):
    check_refused(place, command, changed, message)


@pytest.mark.slow
def test_what_does_not_fit_an_autoencoder_is_one_clear_line(place: Path, first: dict[str, Any], command: Command):
    for changed, message in (
        (["model.patch_size=3"], "model: the latents are 4x4 of 4 channels: model.patch_size=3 does not divide height 4 and width 4; use 1, 2, 4"),
        (["data.mode=L", "data.autoencoder=" + trained(place)], "takes images of 3 channels, and these have 1; use data.mode=RGB"),
        ([f"train.init_from={first['train']['path']}", "data.autoencoder=null"], "works on latents of autoencoder"),
    ):
        check_refused(place, command, changed, message)
