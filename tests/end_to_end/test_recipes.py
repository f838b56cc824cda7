"""A run made longer and shorter, started from another model, measured while it trains; a model of diffusers that competes; averages made afterwards."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from support import TINY, Finished

from components.model.checkpoint import read_weights

Command = Callable[..., Finished]


def train(command: Command, home: Path, name: str, *settings: str) -> Finished:
    return command("train", "digits", *TINY, "--name", name, *settings, "--json", cwd=home)


def trained(command: Command, home: Path, name: str, *settings: str) -> dict[str, Any]:
    done = train(command, home, name, *settings)
    assert done.code == 0, done.stderr
    return done.json["train"]


def test_a_run_that_is_made_longer_ends_like_one_in_one_go_and_is_one_run(home: Path, command: Command, first: dict[str, Any]):
    short = trained(command, home, "long")
    assert short["weights_sha256"] == first["train"]["weights_sha256"]
    longer = train(command, home, "long", "train.steps=16")
    assert longer.code == 0, longer.stderr
    receipt = longer.json["train"]
    assert "train it has 12 steps, and 16 are asked for" in longer.stderr
    assert re.search("start 2: from step 12 with 2 workers", longer.stderr)
    straight = trained(command, home, "straight", "train.steps=16")
    assert receipt["weights_sha256"] == straight["weights_sha256"]
    assert (receipt["steps"], receipt["mlflow_run_id"], receipt["inputs"]) == (16, short["mlflow_run_id"], short["inputs"])
    assert "made longer, from 12 to 16 steps" in (next(Path(receipt["folder"]).glob("restarts/*.json"))).read_text()
    shorter = trained(command, home, "long")
    assert (shorter["steps"], shorter["weights_sha256"]) == (12, first["train"]["weights_sha256"])
    none = train(command, home, "long", "train.steps=10")
    assert none.code == 2
    run = mlflow.MlflowClient(f"sqlite:///{home / 'storage' / 'mlflow' / 'mlflow.db'}").get_run(short["mlflow_run_id"])
    assert (run.info.status, run.data.tags["train.steps"]) == ("FINISHED", "12")
    assert "train.steps=10: the run has done 16 steps, and of those before it keeps checkpoints of 12, 16 alone" in none.stderr


def test_a_training_starts_from_a_registered_model_and_keeps_what_is_frozen(home: Path, command: Command, first: dict[str, Any]):
    start = f"train.init_from=models:/{first['register']['model_name']}/{first['register']['version']}"
    receipt = trained(command, home, "started", start, 'train.freeze=["down.*"]', "train.steps=4")
    assert receipt["start"] == f"ema of models:/{first['register']['model_name']}/{first['register']['version']}"
    ours = read_weights(Path(receipt["path"]) / "weights.safetensors")
    theirs = read_weights(Path(first["train"]["path"]) / "ema.safetensors")
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]) == name.startswith("down."), name
    unlike = train(command, home, "unlike", start, "model.base_channels=16", "train.steps=4")
    assert unlike.code == 2
    assert "of another shape: conv_in.weight ([8, 1, 3, 3], not [16, 1, 3, 3])" in unlike.stderr
    some = train(command, home, "some", start, "model.num_res_blocks=2", "train.init_strict=false", "train.steps=4")
    assert some.code == 0, some.stderr
    assert "missing" in some.stderr


@pytest.mark.slow
def test_held_out_images_end_a_training_with_its_best_checkpoint_which_stands_for_election(home: Path, command: Command):
    settings = ["train.steps=60", "train.lr=0.05", "train.warmup_steps=0", "train.validate_every=4", "train.early_stop=2", "train.early_stop_gain=0.2"]
    done = command("run", "digits", *TINY, *settings, "--name", "early", "evaluate.election_samples=32", "--json", cwd=home)
    assert done.code == 0, done.stderr
    receipt = done.json["train"]
    assert receipt["stopped_at"] < 60
    assert f"stopped early at step {receipt['stopped_at']}: 2 measurements without a gain" in done.stderr
    assert receipt["steps"] <= receipt["stopped_at"]
    assert {entry["step"] for entry in done.json["evaluate"]["election"]} >= {receipt["steps"]}
    again = command("run", "digits", *TINY, *settings, "--name", "early", "evaluate.election_samples=32", "train.steps=90", "--json", cwd=home)
    assert again.json["train"]["skipped"], again.stderr


@pytest.mark.slow
def test_a_model_of_diffusers_competes_and_averages_are_made_after_the_training(home: Path, command: Command, tmp_path: Path):
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    unet: Any = UNet2DModel(8, 1, 1, layers_per_block=1, block_out_channels=(32, 64), **blocks)
    pipeline: Any = DDPMPipeline(unet, DDPMScheduler())
    pipeline.save_pretrained(tmp_path / "theirs")
    measured = ["evaluate.num_samples=64", "evaluate.steps=4", "evaluate.extractor=dct8", "evaluate.batch_size=16", "data.holdout_fraction=0.1"]
    given = ["import", str(tmp_path / "theirs"), "--name", "theirs", "data.source=digits", *measured]
    done = command(*given, "--json", cwd=home)
    assert done.code == 0, done.stderr
    assert (done.json["register"]["version"], done.json["register"]["promoted"], done.json["train"]["loss"]) == (1, True, None)
    assert command("sample", "models:/theirs@champion", "--num", "2", "--steps", "2", cwd=home).code == 0
    again = command(*given, "--json", cwd=home)
    assert all(stage["skipped"] for stage in again.json.values())
    kept = ["train.ema_widths=[0.05,0.1]", "train.ema_snapshot_every=4"]
    whole = command("run", "digits", *TINY, *kept, "--name", "kept", "registry.model_name=kept", "--json", cwd=home)
    assert whole.code == 0, whole.stderr
    found = command("ema", "models:/kept@champion", "--widths", "0.03,0.08", "--samples", "32", "--json", cwd=home)
    assert found.code == 0, found.stderr
    assert {Path(entry["checkpoint"]).name for entry in found.json["evaluate"]["election"]} >= {"step_000000012-width-0.03", "step_000000012-width-0.08"}
    none = command("ema", "theirs", "--widths", "0.03", cwd=home)
    assert none.code == 2
    assert "train with train.ema_widths=[0.05,0.1] and train.ema_snapshot_every" in none.stderr
