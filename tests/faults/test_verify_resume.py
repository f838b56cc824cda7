"""`ddpm verify-resume`, for real and small: a training that is killed ends like an undisturbed one, and one of another seed does not."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import load_config
from workflows.preset_files import find_preset
from workflows.verify_resume import verify_resume

SMALL = ["train.global_batch_size=32", "train.warmup_steps=2", "model.base_channels=8", "model.num_groups=4"]
STEPS = 320


@pytest.mark.slow
def test_a_training_with_a_killed_worker_and_a_killed_driver_ends_like_an_undisturbed_one_and_leaves_no_process(command: Callable[..., Any], tmp_path: Path):
    done = command("verify-resume", "digits", *SMALL, "--steps", str(STEPS), "--kills", "2", "--json", cwd=tmp_path, timeout=390)
    assert done.code == 0, done.stdout + done.stderr
    found = done.json
    assert {one["what"] for one in found["compared"]} >= {"weights.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json"}
    assert [one["what"] for one in found["compared"] if not one["equal"]] == []
    assert [one["detail"] for one in found["compared"] if "curve" in one["what"]] == ["40 points, 0 twice"] * 2
    assert sorted(one["kind"] for one in found["disturbed"]["struck"]) == ["driver killed", "worker killed"]
    assert all(one["recovered_s"] > 0 for one in found["disturbed"]["struck"])
    assert found["disturbed"]["starts"] >= 2
    assert (found["undisturbed"]["starts"], found["undisturbed"]["struck"]) == (1, [])
    assert found["left"] == {"processes": [], "shared_memory": [], "temporary": []}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_trainings_that_differ_are_not_called_equal(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    settings, preset = [*SMALL, "cluster.num_workers=1"], find_preset("digits")
    out, options = io.StringIO(), {"steps": 8, "kills": 0, "seed": 0, "as_json": True}
    code = verify_resume(out, load_config(preset, settings), str(preset), settings, unlike=["train.seed=1"], **options)
    kept = Path(capsys.readouterr().err.rpartition("both trainings lie in ")[2].strip())
    try:
        assert code == 1
        assert (kept / "a" / "storage").is_dir()
    finally:
        shutil.rmtree(kept)
    found = json.loads(out.getvalue())
    assert found["equal"] is False
    unlike = [one["what"] for one in found["compared"] if not one["equal"]]
    assert {"weights.safetensors", "ema.safetensors", "optimizer.safetensors", "loss curve, as written down", "loss curve, in MLflow"} <= set(unlike)
    assert "denoiser.json" not in unlike
