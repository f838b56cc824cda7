"""Two models of the digits: the gate between them, and what `ddpm compare` and `ddpm reference` say of them."""

import subprocess
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import CHROMIUM, read_page
from PIL import Image
from servers import environment, free_ports
from support import TINY, Finished, ddpm_command

Command = Callable[..., Finished]
SMALL = [*TINY, "cluster.num_workers=1"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compare")


@pytest.fixture(scope="module")
def weak(home: Path, command: Command) -> dict[str, Any]:
    done = command("run", "digits", *SMALL, "--name", "weak", "--json", cwd=home)
    assert done.code == 0, done.stderr
    return done.json


@pytest.fixture(scope="module")
def strong(home: Path, weak: dict[str, Any], command: Command) -> dict[str, Any]:
    """Returns a longer run of a conditional model, whose evaluation also elects an average."""
    done = command("run", "digits", *SMALL, "train.steps=60", "train.checkpoint_every=60", "model.conditional=true", "--name", "strong", "--json", cwd=home)
    assert done.code == 0, done.stderr
    return done.json


def test_a_better_model_is_promoted_on_two_blocks_of_common_seeds(weak: dict[str, Any], strong: dict[str, Any]):
    champion_test = strong["register"]["champion_test"]
    test, confirmation = champion_test["test"], champion_test["confirmation"]
    assert strong["register"]["promoted"] is True
    assert strong["register"]["decision"].startswith("better: ")
    assert test["candidate"] == pytest.approx(strong["evaluate"]["metric"]["value"])
    assert test["champion"] == pytest.approx(weak["evaluate"]["metric"]["value"])
    assert test["first_seed"] == 0
    assert confirmation["first_seed"] >= 2**61
    assert test["difference"] + 1.645 * test["standard_error"] < 0
    assert confirmation["difference"] + 1.645 * confirmation["standard_error"] < 0
    assert confirmation["candidate"] != test["candidate"]


def test_an_evaluation_says_what_it_was_measured_against_and_how_sure_it_is(strong: dict[str, Any]):
    evaluation = strong["evaluate"]
    assert evaluation["metric"]["standard_error"] > 0
    assert evaluation["metric"]["unit"]["reference_split"] == "train"
    against_holdout = [score for score in evaluation["scores"] if score["unit"]["reference_split"] == "holdout"]
    assert {score["kind"] for score in against_holdout} == {"frechet", "kernel", "precision", "recall", "density", "coverage"}
    assert evaluation["floor"]["measured"] == "held-out images against the training split"
    assert evaluation["floor"]["value"] < evaluation["metric"]["value"]
    assert evaluation["memorisation"]["copies"] is False
    page = Path(evaluation["report"]).read_text()
    assert all(name in page for name in ("fd_dct8_v1_64", "precision_dct8_v1_64_holdout", "Memorisation", "data:image/gif"))


def test_the_run_has_numbers_pictures_and_the_page(home: Path, strong: dict[str, Any]):
    import mlflow

    uri = f"sqlite:///{home / 'storage' / 'mlflow' / 'mlflow.db'}"
    client = mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)
    run = client.get_run(strong["register"]["mlflow_run_id"])
    assert run.data.metrics["eval/fd_dct8_v1_64"] == strong["evaluate"]["metric"]["value"]
    assert {"eval/floor", "eval/copy_rate", "eval/fd_dct8_v1_64_standard_error", "eval/recall_dct8_v1_64_holdout"} <= set(run.data.metrics)
    files = {Path(file.path).name for file in client.list_artifacts(run.info.run_id, "evaluate")}
    assert {"report.html", "grid.png", "denoising.gif", "interpolation.png", "timesteps.png", "neighbours.png"} <= files


def test_compare_shows_both_models_with_intervals_and_a_picture(home: Path, strong: dict[str, Any], command: Command):
    done = command("compare", "models:/ddpm-digits@champion", "models:/ddpm-digits/1", "--samplers", "ddim,unipc", "--steps", "2,4", "--json", cwd=home)
    assert done.code == 0, done.stderr
    results = done.json["results"]
    assert [(result["model"], result["sampler"], result["steps"]) for result in results] == [
        (f"ddpm-digits v{version}", sampler, steps) for sampler in ("ddim", "unipc") for steps in (2, 4) for version in (2, 1)
    ]
    measured = {(result["model"], result["recipe"]): result for result in results}
    again = measured["ddpm-digits v2", "ddim, 4 steps"]
    assert again["metric"]["value"] == pytest.approx(strong["evaluate"]["metric"]["value"], rel=1e-9)
    test = measured["ddpm-digits v1", "ddim, 4 steps"]["against_first"]
    assert test["difference"] == pytest.approx(-strong["register"]["champion_test"]["test"]["difference"], rel=1e-9)
    assert measured["ddpm-digits v1", "ddim, 4 steps"]["verdict"] == "worse"
    with Image.open(home / "compare" / "samples.png") as picture:
        assert picture.width > 500
    assert "ddpm-digits v1" in (home / "compare" / "compare.html").read_text()


@pytest.fixture(scope="module")
def other_unit(home: Path, weak: dict[str, Any], strong: dict[str, Any], command: Command) -> dict[str, Any]:
    """Returns the weak run measured against a file of statistics, registered after the strong one."""
    digest = weak["preprocess"]["digest"]
    written = command("reference", digest, "--out", "stats.npz", "--set", "evaluate.extractor=dct8", cwd=home)
    assert written.code == 0, written.stderr
    assert written.stdout == f"stats.npz: mu and sigma of fd_dct8_v1 over {weak['preprocess']['num_train']} train images of dataset {digest}\n"
    with np.load(home / "stats.npz", allow_pickle=False) as saved:
        assert (saved["mu"].shape, saved["sigma"].shape) == ((32,), (32, 32))
        np.savez(home / "theirs.npz", mu=saved["mu"], sigma=saved["sigma"])
    done = command("run", "digits", *SMALL, "evaluate.reference=theirs.npz", "--name", "weak", "--json", cwd=home)
    assert done.code == 0, done.stderr
    return done.json


@pytest.mark.slow
def test_a_reference_file_takes_the_place_of_the_dataset_and_is_another_unit(weak: dict[str, Any], other_unit: dict[str, Any]):
    assert other_unit["evaluate"]["metric"]["value"] == pytest.approx(weak["evaluate"]["metric"]["value"], rel=1e-6)
    assert other_unit["evaluate"]["metric"]["unit"]["reference_split"] == "file"
    assert "reference_split file against train" in other_unit["register"]["decision"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "models:/nobody@champion"], "models:/nobody@champion is not in the registry"),
        (["compare", "models:/ddpm-digits"], "models:/ddpm-digits names no version; write models:/NAME/VERSION or models:/NAME@ALIAS"),
        (["compare", "models:/ddpm-digits/1", "--steps", "5,many"], "--steps many is no number"),
        (["compare", "models:/ddpm-digits/1", "--samplers", "euler"], "--samplers euler --steps 4"),
        (["compare", "models:/ddpm-digits/1", "--set", "evaluate.nonsense=1"], "evaluate.nonsense is not a setting"),
        (["compare", "models:/ddpm-digits/1", "--dataset", "zzz"], "dataset 'zzz' is neither a dataset's folder nor the beginning of a name"),
        (["run", "digits", *SMALL, "evaluate.eta=0.5", "evaluate.sampler=unipc"], "evaluate.eta=0.5 means nothing to sampler=unipc"),
        (["run", "digits", *SMALL, "evaluate.guidance=2"], "evaluate.guidance=2.0 needs a conditional model"),
        (["run", "digits", *SMALL, "evaluate.reference=absent.npz"], "absent.npz"),
        (["run", "digits", *SMALL, "evaluate.dinov2_weights=absent"], "absent lacks config.json and model.safetensors"),
        (["reference", "zzz"], "dataset 'zzz' is neither a dataset's folder nor the beginning of a name"),
    ],
    ids=lambda value: f"{value[0]} {value[-1]}" if isinstance(value, list) else "",
)
def test_what_cannot_be_compared_is_told_in_one_message(
    home: Path, weak: dict[str, Any], arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    from workflows import cli

    monkeypatch.chdir(home)
    monkeypatch.setattr("sys.argv", ["ddpm", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def aliases(home: Path, command: Command) -> dict[str, str]:
    done = command("models", "ddpm-digits", "--json", cwd=home)
    assert done.code == 0, done.stderr
    return done.json[0]["aliases"]


@pytest.mark.slow
def test_show_says_what_a_version_is_and_what_became_of_it(home: Path, strong: dict[str, Any], other_unit: dict[str, Any], command: Command):
    done = command("models", "show", "ddpm-digits", "--json", cwd=home)
    assert done.code == 0, done.stderr
    shown, metric = done.json, strong["evaluate"]["metric"]
    assert (shown["name"], shown["version"], shown["aliases"]) == ("ddpm-digits", 2, ["champion"])
    assert (shown["value"], shown["standard_error"], shown["unit"]) == (metric["value"], metric["standard_error"], metric["unit"])
    assert shown["tags"]["champion.version"] == "1"
    assert float(shown["tags"]["champion.difference"]) == strong["register"]["champion_test"]["test"]["difference"]
    assert shown["tags"]["memorisation.verdict"] == "no sign of copied training images"
    assert shown["settings"]["train.steps"] == "60"
    assert [(move["kind"], move["version"]) for move in shown["log"]] == [("promoted", 2), ("kept", 3)]
    text = command("models", "show", "ddpm-digits@previous", cwd=home).stdout
    assert "ddpm-digits v1 (previous)" in text
    assert "ddpm sample models:/ddpm-digits/1" in text


@pytest.mark.slow
def test_models_compare_names_what_differs(home: Path, other_unit: dict[str, Any], command: Command):
    done = command("models", "compare", "ddpm-digits", "2", "1", "3", "--json", cwd=home)
    assert done.code == 0, done.stderr
    unlike = [version["unlike"] for version in done.json["versions"]]
    assert unlike[:2] == [[], []]
    assert "reference_split file against train" in unlike[2]
    assert done.json["settings"]["train.steps"] == ["60", "12", "12"]
    assert done.json["settings"]["model.conditional"] == ["True", "False", "False"]
    text = command("models", "compare", "ddpm-digits", cwd=home).stdout
    assert "v3 is not comparable with v2: reference_digest " in text


@pytest.mark.slow
def test_a_version_of_another_unit_is_a_candidate_and_not_promoted(home: Path, other_unit: dict[str, Any], command: Command):
    assert other_unit["register"]["promoted"] is False
    assert aliases(home, command) == {"champion": "2", "previous": "1", "candidate": "3"}
    refused = command("models", "promote", "ddpm-digits", cwd=home)
    assert refused.code == 2
    assert "version=3 of ddpm-digits is not promoted: kept: not comparable with champion v2" in refused.stderr
    assert "reference_split file against train" in refused.stderr
    assert "; --force --why REASON" in refused.stderr
    assert aliases(home, command)["champion"] == "2"


@pytest.mark.slow
def test_a_rollback_and_a_promotion_move_the_alias_back_and_forth_and_are_logged(home: Path, other_unit: dict[str, Any], command: Command):
    back = command("models", "rollback", "ddpm-digits", "--why", "users see blur", cwd=home)
    assert (back.code, back.stdout) == (0, "champion of ddpm-digits is version 1: users see blur\n")
    assert aliases(home, command)["champion"] == "1"
    again = command("models", "promote", "ddpm-digits/2", "--json", cwd=home)
    assert again.code == 0, again.stderr
    assert (again.json["champion"], again.json["kind"]) == (2, "promoted by hand")
    assert again.json["champion_test"]["champion_version"] == 1
    assert again.json["champion_test"]["confirmation"]["difference"] < 0
    assert aliases(home, command) == {"champion": "2", "previous": "1", "candidate": "3"}
    forced = command("models", "promote", "ddpm-digits/3", "--force", "--why", "their statistics are trusted", cwd=home)
    assert forced.code == 0, forced.stderr
    command("models", "rollback", "ddpm-digits", cwd=home)
    log = command("models", "log", "ddpm-digits", "--json", cwd=home).json
    assert [(move["kind"], move["version"], move["champion"]) for move in log] == [
        ("promoted", 1, 1),
        ("promoted", 2, 2),
        ("kept", 3, 2),
        ("rolled back", 1, 1),
        ("promoted by hand", 2, 2),
        ("promoted by hand", 3, 3),
        ("rolled back", 2, 2),
    ]
    assert [move["why"] for move in log][3:] == [
        "users see blur",
        strong_decision(log),
        "their statistics are trusted; not measured beside the champion",
        "v3 taken back",
    ]
    refused = command("models", "delete", "ddpm-digits/2", cwd=home)
    assert refused.code == 2
    assert "version=2 of ddpm-digits is champion" in refused.stderr


def strong_decision(log: list[dict[str, Any]]) -> str:
    """Returns the gate's sentence about the strong version, which asking the gate again repeats."""
    return next(move["why"] for move in log if move["kind"] == "promoted" and move["version"] == 2)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["models", "promote", "ddpm-digits/2", "--force"], "--force needs --why REASON"),
        (["models", "show", "nobody"], "models:/nobody@champion is not in the registry"),
        (["models", "rollback", "nobody"], "model nobody is not in the registry; it has ddpm-digits"),
        (["models", "rollback", "ddpm-digits", "--to", "77"], "--to 77 is none of the earlier champions"),
        (["models", "compare", "ddpm-digits", "first"], "models:/ddpm-digits@first is not in the registry"),
        (["models", "delete", "ddpm-digits"], "ddpm-digits names no single version; write NAME/VERSION"),
        (["models", "promote", "ddpm-digits@nobody"], "models:/ddpm-digits@nobody is not in the registry"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_wrong_about_a_move_is_told(home: Path, strong: dict[str, Any], command: Command, arguments: list[str], told: str):
    done = command(*arguments, cwd=home)
    assert done.code == 2
    assert told in done.stderr


def test_the_version_page_tells_number_picture_dataset_recipe_and_how_to_load(home: Path, strong: dict[str, Any]):
    import mlflow

    version = mlflow.MlflowClient(tracking_uri=f"sqlite:///{home / 'storage' / 'mlflow' / 'mlflow.db'}").get_model_version("ddpm-digits", "2")
    page, metric = version.description or "", strong["evaluate"]["metric"]
    error = 1.96 * metric["standard_error"]
    assert page.startswith(f"fd_dct8_v1_64 {metric['value']:.4g} ± {error:.2g} (champion v1: ")
    for part in (
        strong["register"]["decision"],
        f"&path=evaluate%2Fgrid.png)\n\n- **fd_dct8_v1_64**: {metric['value']:.4g} ± {error:.2g} (95 %)",
        "- **against the champion**: v1 has ",
        f"- **dataset**: [{strong['preprocess']['digest']}](#/experiments/",
        "- **memorisation**: no sign of copied training images",
        "- **hardware**: 1 x ",
        'model = mlflow.pyfunc.load_model("models:/ddpm-digits/2")\n',
    ):
        assert part in page
    assert len(page) <= 5000


@pytest.fixture(scope="module")
def pages(home: Path, strong: dict[str, Any]) -> Iterator[str]:
    """Serves MLflow's pages as `ddpm ui` does; gives their address."""
    port = free_ports(1)[0]
    with subprocess.Popen(ddpm_command("ui", "--port", str(port)), cwd=home, env=environment({}), stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        assert running.stdout.readline().startswith("models  ")
        yield f"http://127.0.0.1:{port}"
        running.terminate()
        running.wait(timeout=60)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH")
def test_a_browser_shows_description_picture_alias_and_tags_of_a_version(pages: str, strong: dict[str, Any], tmp_path: Path):
    run_id = strong["register"]["mlflow_run_id"]
    shown = read_page(f"{pages}/#/models/ddpm-digits/versions/2?workflowType=machine_learning", tmp_path, "metric.value")
    picture = f"get-artifact?run_id={run_id}&path=evaluate%2Fgrid.png"
    assert "Version 2" in shown
    assert "@ champion" in shown
    assert strong["register"]["decision"] in shown
    assert f"[{picture}]" in shown
    assert f"dataset : {strong['preprocess']['digest']} : {strong['preprocess']['num_rows']} images of 8x8x1" in shown
    assert 'mlflow.pyfunc.load_model("models:/ddpm-digits/2")' in shown
    for tag in ("champion.difference", "metric.value", str(strong["evaluate"]["metric"]["value"])):
        assert tag in shown
    with urllib.request.urlopen(f"{pages}/{picture}", timeout=60) as answer:
        assert answer.read() == Path(strong["evaluate"]["grid"]).read_bytes()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH")
def test_a_browser_shows_champion_log_and_aliases_of_the_model_and_the_way_from_run_to_version(pages: str, strong: dict[str, Any], tmp_path: Path):
    model = read_page(f"{pages}/#/models/ddpm-digits?workflowType=machine_learning", tmp_path, "@ champion")
    assert "Champion: version 2. fd_dct8_v1_64" in model
    assert "v2 promoted; champion v2" in model
    assert "@ champion" in model
    assert "@ previous" in model
    run_id = strong["register"]["mlflow_run_id"]
    run = read_page(f"{pages}/#/experiments/1/runs/{run_id}?workflowType=machine_learning", tmp_path, "train.steps")
    assert "ddpm-digits version 2 : fd_dct8_v1_64" in run
    assert f"digits ({strong['preprocess']['digest']})" in run
