"""Eight processes, each with a storage root of its own, that register forty versions of one new model in one MLflow at the same moment."""

import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

import pytest
from postgresql import find_programs, postgresql_server
from servers import environment, mlflow_server, team_server
from support import ROOT, TINY, Finished

from components.storage import Location
from pipeline.registry.browse import list_models, log_of
from pipeline.registry.ledger import Ledger
from pipeline.tracking import connect

pytestmark = pytest.mark.slow
PROCESSES, RUNS = 8, 5
MODEL = "ddpm-digits"
SCRIPT = textwrap.dedent("""
    import sys, time
    from pathlib import Path
    from pipeline.config import load_config
    from pipeline.run import run

    preset, ready, names, overrides = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3].split(","), sys.argv[4:]
    config = load_config(preset, overrides)
    import pipeline.registry.package, pipeline.registry.served_model
    (ready / names[0]).touch()
    while len(list(ready.iterdir())) < int((ready.parent / "processes").read_text()):  # all begin with one first write
        time.sleep(0.01)
    for name in names:
        run(config, name)
""")


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Returns what a client of a fresh server needs in its environment."""
    folder = tmp_path_factory.mktemp("server")
    with ExitStack() as stack:
        if request.param == "sqlite":
            yield {"MLFLOW_TRACKING_URI": stack.enter_context(mlflow_server(folder, env={"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}))}
            return
        if find_programs() is None:
            pytest.skip("PostgreSQL is not installed")
        database = stack.enter_context(postgresql_server(folder / "postgresql.log"))
        settings = {"MLFLOW_BACKEND_STORE_URI": database.uri, "MLFLOW_ARTIFACTS_DESTINATION": str(folder / "artifacts"), "MLFLOW_WORKERS": "2"}
        yield stack.enter_context(team_server(folder, settings | database.env, "planted-Secret-77aa")).env()


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory, command: Callable[..., Finished]) -> Path:
    home = tmp_path_factory.mktemp("evaluated")
    done = command("evaluate", "digits", *TINY, cwd=home)
    assert done.code == 0, done.stderr
    return home / "storage"


def storage_root(evaluated: Path, folder: Path, names: list[str]) -> Path:
    """Returns a copy of a storage root in which several names have finished all but the last stage."""
    root = folder / f"storage-{names[0]}"
    shutil.copytree(evaluated, root, ignore=shutil.ignore_patterns("mlflow"))
    for name in names:
        shutil.copytree(root / "runs" / "digits", root / "runs" / name, ignore=shutil.ignore_patterns("mlflow_run.json"))
    return root


def test_forty_first_versions_by_eight_processes_all_succeed_in_one_log(
    server: dict[str, str], evaluated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    ready = tmp_path / "ready"
    ready.mkdir()
    (tmp_path / "processes").write_text(str(PROCESSES))
    running = []
    for process in range(PROCESSES):
        names = [f"p{process}-{number}" for number in range(RUNS)]
        root = storage_root(evaluated, tmp_path, names)
        arguments = [str(ROOT / "workflows" / "presets" / "digits.yaml"), str(ready), ",".join(names), *TINY, f"cluster.storage={root}"]
        env = environment(server | {"PYTHONPATH": str(ROOT)})
        running.append(subprocess.Popen([sys.executable, "-c", SCRIPT, *arguments], env=env, cwd=tmp_path, stderr=subprocess.PIPE, text=True))
    for process in running:
        _, errors = process.communicate(timeout=900)
        assert process.returncode == 0, errors
    for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
        monkeypatch.delenv(name)
    for name, value in server.items():
        monkeypatch.setenv(name, value)
    tracking = connect(Location.of(tmp_path))
    versions, moves = list_models(tracking, MODEL)[MODEL], log_of(tracking, MODEL)
    assert sorted(version.version for version in versions) == list(range(1, PROCESSES * RUNS + 1))
    assert len({version.run_id for version in versions}) == PROCESSES * RUNS
    assert all(version.decision for version in versions)
    assert [move.number for move in moves] == list(range(1, PROCESSES * RUNS + 1))
    assert sorted(move.version or 0 for move in moves) == list(range(1, PROCESSES * RUNS + 1))
    assert [move.kind for move in moves] == ["promoted"] + ["kept"] * (len(moves) - 1)
    assert all(after.champion == before.champion for before, after in pairwise(moves))
    assert Ledger.of(tracking, MODEL).settle() == moves[-1]
    assert [version.version for version in versions if "champion" in version.aliases] == [moves[0].version]
    assert [version.version for version in versions if "candidate" in version.aliases]
