"""What training can be told to do, each killed at random moments: it ends like an undisturbed one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

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
