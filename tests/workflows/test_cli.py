"""The command's help, and what it says to a mistake: one line that names it, exit code 2, before anything expensive starts."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from support import ROOT

from pipeline.config import load_config
from workflows.preset_files import find_preset

Run = Callable[..., tuple[int, str, str]]


def test_help_names_every_command_and_imports_nothing_heavy():
    code = (
        "import sys, workflows.cli as c; assert not {'torch', 'ray', 'mlflow', 'pipeline.config'} & set(sys.modules); sys.argv = ['ddpm', '--help']; c.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name in ("run", "preprocess", "train", "evaluate", "register", "config", "sample", "models", "data", "ui", "verify-resume"):
        assert f" {name} " in done.stdout


def test_settings_and_stages_that_are_skipped_load_neither_torch_nor_ray():
    code = (
        "import sys, pipeline.config, pipeline.run, workflows.retrain, workflows.submit, workflows.models; "
        "from components.model.retention import newest_whole_checkpoint; assert not {'torch', 'ray', 'mlflow'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_config_prints_every_setting_and_the_digest(run: Run):
    code, out, _ = run("config", "digits", "train.lr=1e-4")
    assert code == 0
    assert "  lr: 0.0001\n" in out
    assert "  # Optimiser steps at which training ends; a run that has done fewer goes on from its last checkpoint.\n" in out
    assert "# digest " in out


def test_what_config_prints_is_a_preset_of_the_same_settings(run: Run, tmp_path: Path):
    _, out, _ = run("config", "digits", "train.lr=1e-4")
    (tmp_path / "copy.yaml").write_text(out)
    assert load_config(tmp_path / "copy.yaml") == load_config(find_preset("digits"), ["train.lr=1e-4"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "digitz"], "preset digitz is neither a file nor one of"),
        (["run", "digits", "train.stepz=1"], "train.stepz is not a setting; did you mean train.steps?"),
        (["run", "digits", "train.steps=many"], "train.steps='many' is wrong: input should be a valid integer"),
        (["run", "digits", "data.image_size=9"], "data.image_size=9 cannot be halved 1 times; use a multiple of 2"),
        (["run", "digits", "cluster.num_workers=3"], "cluster.num_workers=3 does not divide train.lanes=8"),
        (["run", "digits", "--from", "trian"], "--from trian is no stage; use one of preprocess, encode, train, evaluate, register"),
        (["run", "digits", "--name", "a/b"], "--name a/b is no run name"),
        (["run", "digits", "data.source=/no/such/folder"], "data.source=/no/such/folder does not exist; name a folder"),
        (["run", "digits", "data.source=empty"], "data.source=empty holds no images but nothing"),
        (["run", "digits", "data.source=."], "contains the storage root"),
        (["run", "digits", "cluster.storage=/proc/nowhere"], "cluster.storage=/proc/nowhere cannot be written"),
        (["run", "digits", "cluster.storage=a-file/storage"], "cluster.storage=a-file/storage cannot be written"),
        (["run", "digits", "evaluate.inception_weights=absent.pth"], "evaluate.inception_weights=absent.pth does not exist"),
        (["sample", "no/such/checkpoint"], "no/such/checkpoint is not a whole checkpoint"),
        (["sample", "no/such/checkpoint", "--out", "grid.txt"], "--out grid.txt is no PNG file"),
        (["sample", "models:/nobody@champion"], "holds no MLflow store yet; run `ddpm run digits` first"),
        (["models", "nobody"], "holds no MLflow store yet; run `ddpm run digits` first"),
        (["ui"], "holds no MLflow store yet; run `ddpm run digits` first"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_and_exit_code_2(run: Run, tmp_path: Path, arguments: list[str], message: str):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a-file").write_text("")
    code, out, err = run(*arguments)
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert (code, out, len(errors)) == (2, "", 1), err
    assert message.replace("data.source=empty", f"data.source={tmp_path / 'empty'}") in errors[0]
    assert "Traceback" not in err
    assert not list(tmp_path.glob("storage/datasets")), "work began before the mistake was found"


def test_an_unreachable_tracking_server_is_told_before_the_work_begins(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@127.0.0.1:9")
    code, _, err = run("run", "digits")
    assert code == 2
    assert "MLFLOW_TRACKING_URI=http://127.0.0.1:9 does not answer" in err
    assert "secret" not in err
    assert not list(tmp_path.glob("storage/datasets"))


def test_a_folder_where_every_image_is_bad_ends_with_its_names(run: Run, tmp_path: Path):
    (tmp_path / "bad").mkdir()
    for number in range(3):
        (tmp_path / "bad" / f"{number}.jpg").write_bytes(b"")
    code, _, err = run("run", "digits", f"data.source={tmp_path / 'bad'}")
    assert code == 2
    assert "3 of 3 files are bad (3 not_an_image), the first 0.jpg (not_an_image: the file is empty)" in err
    assert list(tmp_path.glob("storage/datasets/*/*/quarantine.parquet"))
    assert not list(tmp_path.glob("storage/datasets/*/*/manifest.json"))


def test_a_namesake_of_a_package_is_refused(tmp_path: Path):
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster" / "__init__.py").write_text("")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from workflows.cli import main; sys.argv = ['ddpm', '-h']; main()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "package cluster is found in" in done.stderr


def test_a_port_that_is_taken_is_named(run: Run, tmp_path: Path):
    import socket

    store = tmp_path / "storage" / "mlflow"
    store.mkdir(parents=True)
    (store / "mlflow.db").touch()
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        code, _, err = run("ui", "--port", str(port))
    assert code == 2
    assert f"--port {port} is taken" in err


def test_a_single_image_is_too_few(run: Run, tmp_path: Path):
    (tmp_path / "one").mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "one" / "only.png")
    code, _, err = run("preprocess", "cifar10-small", f"data.source={tmp_path / 'one'}")
    assert code == 2
    assert "gives 1 usable image; name a source of at least 2" in err
