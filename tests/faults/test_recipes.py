"""What training can be told to do, each killed at random moments: it ends like an undisturbed one."""

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keeper
import pytest
import servers
from support import ddpm_command

from components.storage import Location
from pipeline.training.metrics_log import read_metrics

SMALL = ["train.global_batch_size=32", "train.warmup_steps=2", "model.base_channels=8", "model.num_groups=4"]

RECIPES = {
    "start and freeze": ["train.init_from={model}", 'train.freeze=["down.*"]', "train.optimizer=sgd", "train.lr=0.05"],
    "early stop": ["train.lr=0.03", "train.validate_every=20", "train.validate_images=64", "train.early_stop=3", "train.early_stop_gain=0.05"],
    "flow, augmented, averaged, guarded": [
        "diffusion.process=flow",
        "train.rotation=20",
        "train.crop_jitter=1",
        "train.augment_conditioning=true",
        "train.ema_widths=[0.05,0.1]",
        "train.spike_deviations=3",
        "train.skip_spikes=true",
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_training_that_is_killed_ends_like_an_undisturbed_one(name: str, command: Callable[..., Any], tmp_path: Path):
    model = ""
    if "start" in name:
        done = command("train", "digits", *SMALL, "train.steps=4", "--json", cwd=tmp_path, timeout=200)
        assert done.code == 0, done.stderr
        model = done.json["train"]["path"]
    settings = [setting.format(model=model) for setting in RECIPES[name]]
    done = command("verify-resume", "digits", *SMALL, *settings, "--steps", "240", "--kills", "2", "--json", cwd=tmp_path, timeout=390)
    assert done.code == 0, done.stdout + done.stderr
    assert [one["what"] for one in done.json["compared"] if not one["equal"]] == []
    assert len(done.json["disturbed"]["struck"]) == 2


@pytest.mark.slow
def test_a_training_that_is_killed_while_it_is_made_longer_ends_like_one_in_one_go(command: Callable[..., Any], tmp_path: Path):
    settings = [*SMALL, "train.log_every=5", "train.checkpoint_every=30", "cluster.num_workers=1"]
    done = command("train", "digits", *settings, "train.steps=40", "--json", cwd=tmp_path, timeout=200)
    assert done.code == 0, done.stderr
    folder = Location.of(done.json["train"]["folder"])
    longer = [*settings, "train.steps=240"]
    for number, step in enumerate((60, 135)):
        kept = keeper.start(
            ddpm_command("train", "digits", *longer, f"cluster.storage={tmp_path / 'storage'}"), log=tmp_path / f"{number}.log", env=servers.environment({})
        )
        try:
            deadline = time.monotonic() + 200
            while read_metrics(folder)[-1].step < step:
                assert kept.is_running(), kept.tail()
                assert time.monotonic() < deadline
                time.sleep(0.05)
        finally:
            kept.end()
    again = command("train", "digits", *longer, "--json", cwd=tmp_path, timeout=200)
    straight = command("train", "digits", *longer, "--name", "straight", "--json", cwd=tmp_path, timeout=200)
    assert (again.code, straight.code) == (0, 0), again.stderr + straight.stderr
    assert again.json["train"]["steps"] == 240
    assert again.json["train"]["weights_sha256"] == straight.json["train"]["weights_sha256"]
    assert [(line.step, line.metrics["train/loss"]) for line in read_metrics(folder)] == [
        (line.step, line.metrics["train/loss"]) for line in read_metrics(Location.of(straight.json["train"]["folder"]))
    ]


LATENT = [
    *("train.steps=16", "train.global_batch_size=32", "train.checkpoint_every=2", "train.log_every=2", "train.warmup_steps=2", "train.sample_every=8"),
    *("model.depth=1", "model.hidden_size=16", "model.num_heads=2", "evaluate.num_samples=64", "evaluate.steps=4", "evaluate.extractor=dct8"),
    "data.shard_bytes=5000",
]
TINY = """
kind: autoencoder
model: {base_channels: 8, num_groups: 4, channel_mults: [1, 2]}
train: {steps: 16, global_batch_size: 32, lanes: 2, warmup_steps: 2, log_every: 2, checkpoint_every: 2, sample_every: 8, flip: false}
evaluate: {num_samples: 64, extractor: dct8}
"""


@pytest.mark.slow
def test_a_run_in_latents_that_is_killed_anywhere_ends_like_an_undisturbed_one(command: Callable[..., Any], tmp_path: Path):
    (tmp_path / "tiny.yaml").write_text(TINY)
    started = time.monotonic()
    latent = [*LATENT, f"data.autoencoder=preset:{tmp_path / 'tiny.yaml'}"]
    straight = command("run", "digits-latent", *latent, f"cluster.storage={tmp_path / 'other'}", "--json", cwd=tmp_path, timeout=300)
    took = time.monotonic() - started
    assert straight.code == 0, straight.stderr
    draw, kills = random.Random(0), 0
    while kills < 8:
        kept = keeper.start(
            ddpm_command("run", "digits-latent", *latent, f"cluster.storage={tmp_path / 'storage'}"),
            log=tmp_path / f"{kills}.log",
            env=servers.environment({}),
        )
        deadline = time.monotonic() + draw.uniform(0.15, 0.7) * took
        while kept.is_running() and time.monotonic() < deadline:
            time.sleep(0.05)
        ended = not kept.is_running()
        kept.end()
        kills += 1
        if ended:
            break
    again = command("run", "digits-latent", *latent, "--json", cwd=tmp_path, timeout=300)
    assert again.code == 0, again.stderr
    assert kills > 1
    for stage, key in (("preprocess", "digest"), ("encode", "digest"), ("train", "weights_sha256"), ("evaluate", "samples_sha256")):
        assert again.json[stage][key] == straight.json[stage][key], stage
    assert again.json["encode"]["space"] == straight.json["encode"]["space"]
    assert again.json["evaluate"]["metric"]["value"] == straight.json["evaluate"]["metric"]["value"]
