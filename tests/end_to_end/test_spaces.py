"""Other data than square images, by the command: points, wide images, transparency; and a kind of network that is one new file."""

import io
import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
from PIL import Image
from support import ROOT, Finished

from components.ingest.points import moons

Command = Callable[..., Finished]
POINTS = ["data.num_points=1200", "model.width=32", "model.depth=2", "train.steps=300", "train.checkpoint_every=100", "evaluate.num_samples=300"]
QUICK = ["evaluate.steps=20", "train.log_every=50", "train.sample_every=300"]
TINY_UNET = ["model.base_channels=8", "model.channel_mults=[1,2]", "model.num_res_blocks=1", "model.num_groups=4", "model.attention_resolutions=[]"]
IMAGES = [*TINY_UNET, "train.steps=8", "train.checkpoint_every=8", "cluster.num_workers=1", "evaluate.num_samples=40", "evaluate.steps=4"]
TINY_NETWORK = """
from typing import Literal
from .config import NetworkConfig
class Config(NetworkConfig):
    kind: Literal["tiny"] = "tiny"
    def build(self, shape, num_classes=0):
        from torch import nn
        class Tiny(nn.Sequential):
            def forward(self, x_t, t, labels=None, keys=None): return super().forward(x_t)
        return Tiny(nn.Linear(shape[-1], 32), nn.SiLU(), nn.Linear(32, shape[-1]))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("spaces")


@pytest.fixture(scope="module")
def points(place: Path, command: Command) -> dict[str, Any]:
    done = command("run", "points", *POINTS, *QUICK, "--json", cwd=place)
    assert done.code == 0, done.stderr
    assert "256 points per worker and step" in done.stderr
    return done.json


def loaded(place: Path, name: str) -> Any:
    address = f"sqlite:///{place / 'storage' / 'mlflow' / 'mlflow.db'}"
    mlflow.set_tracking_uri(address)
    mlflow.set_registry_uri(address)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MLflow's, of type hints that the model does without
        return mlflow.pyfunc.load_model(f"models:/{name}@champion")


def test_points_are_trained_on_measured_by_their_own_distance_and_registered(points: dict[str, Any]):
    metric, floor = points["evaluate"]["metric"], points["evaluate"]["floor"]
    assert (metric["kind"], metric["unit"]["extractor"], points["register"]["promoted"]) == ("energy", "ed_points", True)
    assert metric["standard_error"] > 0
    assert floor["spread"] > 0
    assert {score["unit"]["reference_split"] for score in points["evaluate"]["scores"] if score["kind"] == "energy"} == {"holdout"}
    assert metric["value"] < 0.1  # of a spiral's size; noise about its middle is ten times as far


def test_their_page_shows_the_way_from_noise_and_no_picture_is_large(points: dict[str, Any]):
    folder = Path(points["evaluate"]["folder"])
    assert {"grid.png", "denoising.gif", "forward.png", "schedule.png", "report.html"} <= {file.name for file in folder.iterdir()}
    assert max(file.stat().st_size for file in folder.glob("*.png")) < 2_000_000
    assert (folder / "denoising.gif").stat().st_size < 2_000_000


def test_a_registered_model_of_points_answers_with_arrays(points: dict[str, Any], place: Path):
    model = loaded(place, "ddpm-points")
    drawn = model.predict({"num_images": 5, "seed": 3})
    assert (drawn.shape, drawn.dtype) == ((5, 2), np.float32)
    assert np.array_equal(drawn[2:], model.predict({"num_images": 3, "seed": 5}))
    with pytest.raises(ValueError, match="format=png means nothing to points; use array"):
        model.predict({"format": "png"})


def test_the_process_is_shown_by_commands(points: dict[str, Any], place: Path, command: Command):
    digest = points["preprocess"]["digest"]
    for arguments, file in (
        (("forward", digest, "--preset", "points"), "forward.png"),
        (("reverse", "models:/ddpm-points@champion", "--num", "200", "--steps", "10"), "reverse.gif"),
        (("schedule", "--steps", "100"), "schedule.png"),
        (("data", digest), "data.png"),
    ):
        done = command("show", *arguments, cwd=place)
        assert (done.code, done.stdout) == (0, f"{file}\n"), done.stderr
        with Image.open(place / file) as picture:
            assert (getattr(picture, "n_frames", 1) > 5) == file.endswith(".gif")
    wrong = command("show", "reverse", "models:/ddpm-points@champion", "--steps", "5000", cwd=place)
    assert (wrong.code, "--steps=5000 is out of range; use 1 to 100" in wrong.stderr) == (2, True)


@pytest.mark.slow
def test_points_of_a_table_are_retrained_on_as_they_arrive(place: Path, command: Command):
    file = place / "points.csv"
    values = moons(900, 0)
    np.savetxt(file, values[:600], delimiter=",")
    same = ["data.source=points:points.csv", *POINTS, *QUICK, "registry.model_name=moons", "retrain.min_new_images=50"]
    first = command("retrain", "points", *same, "--json", cwd=place)
    assert (first.code, first.json["outcome"]) == (0, "promoted"), first.stderr
    with file.open("a") as opened:
        np.savetxt(opened, values[600:], delimiter=",")
        opened.write("nan,1\n")
    second = command("retrain", "points", *same, "--json", cwd=place)
    assert (second.code, second.json["outcome"]) in ((0, "promoted"), (10, "kept")), second.stderr
    summary = json.loads(Path(second.json["summary"]).with_suffix(".json").read_text())
    assert (summary["new_images"], summary["quarantined"]) == (300, {"not_a_point": 1})


@pytest.mark.parametrize(("name", "mode"), [pytest.param("wide", "L", marks=pytest.mark.slow), ("clear", "RGBA")])
def test_images_of_any_shape_and_with_transparency_end_as_a_champion_that_draws_such(place: Path, command: Command, name: str, mode: str):
    draw = np.random.default_rng(0)
    folder = place / f"{name}-images"
    folder.mkdir()
    for number in range(60):
        Image.fromarray(draw.integers(0, 256, (20, 30, 4), dtype=np.uint8)).save(folder / f"{number}.png")
    arguments = [f"data.source={folder}", "data.image_size=[8,16]", f"data.mode={mode}", *IMAGES, f"registry.model_name={name}", "--name", name]
    done = command("run", "digits", *arguments, "--json", cwd=place)
    assert done.code == 0, done.stderr
    assert done.json["register"]["promoted"]
    model = loaded(place, name)
    (png,) = model.predict({"num_images": 1, "steps": 2})
    with Image.open(io.BytesIO(png)) as picture:
        assert (picture.size, picture.mode) == ((16, 8), mode)
    assert model.predict({"num_images": 2, "steps": 2, "format": "array"}).shape == (2, 8, 16, len(mode))
    import diffusers

    exported = mlflow.artifacts.download_artifacts(f"models:/{name}@champion/artifacts/diffusers", dst_path=str(place / f"{name}-diffusers"))
    pipeline: Any = diffusers.DDPMPipeline.from_pretrained(exported, low_cpu_mem_usage=False)
    (image,) = pipeline(batch_size=1, num_inference_steps=2).images
    assert image.size == (16, 8)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["digits", "data.source=points:moons"], "model.kind=unet takes images"),
        (["points", "data.source=digits"], "model.kind=point_mlp takes points"),
        (["points", "train.flip=true"], "train.flip=true means nothing to points; use train.flip=false"),
        (["points", "data.source=points:circle"], "points:circle is no shape and no file of points"),
        (["points", "evaluate.extractor=dct8"], "mean nothing to points, which are their own features; leave them out"),
        (["points", "model.kind=transformer"], "model.kind='transformer' is unknown; use autoencoder_kl or dit or point_mlp or unet"),
        (["digits", "data.image_size=[9,16]"], "data.image_size=[9,16] cannot be halved 1 times; use a multiple of 2 such as [8,16]"),
    ],
)
def test_what_does_not_fit_together_is_one_line_and_exit_code_2(place: Path, command: Command, arguments: list[str], named: str):
    done = command("run", *arguments, "--name", "wrong", cwd=place)
    assert done.code == 2, done.stderr
    assert named in done.stderr.splitlines()[-1]


def test_a_new_kind_of_network_is_one_file(tmp_path: Path):
    for package in ("components", "cluster", "pipeline", "workflows"):
        shutil.copytree(ROOT / package, tmp_path / "tree" / package, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "tree" / "components" / "networks" / "tiny.py").write_text(TINY_NETWORK)
    arguments = ["run", "points", "model.kind=tiny", "data.num_points=400", "train.steps=60", "train.checkpoint_every=60", "evaluate.num_samples=100", *QUICK]
    environment = ["env", f"PYTHONPATH={tmp_path / 'tree'}", sys.executable, "-m", "workflows", *arguments]
    done = subprocess.run(environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert loaded(tmp_path, "ddpm-points").predict({"num_images": 3, "steps": 5}).shape == (3, 2)
