"""Moves of the champion on a real MLflow store: one after the other, whoever asks, and whatever dies in between."""

import io
import json
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import PERMISSION_DENIED
from rich.console import Console
from support import ROOT, UNIT

from components.storage import Location
from pipeline.artifacts import ChampionTest, Metric, PairedTest, ShardSet
from pipeline.config import RunConfig, load_config
from pipeline.context import Reporter
from pipeline.errors import RegistryError
from pipeline.registry import ledger as ledger_module
from pipeline.registry.browse import list_models, log_of
from pipeline.registry.decide import Champion, Decision, decide
from pipeline.registry.gate import delete_version, pass_gate, promote, roll_back
from pipeline.registry.ledger import LEDGER_TAG, Ledger
from pipeline.registry.versions import CANDIDATE, CHAMPION, PREVIOUS, alias_of, read_champion, set_alias
from pipeline.run import Pipeline, _warn_about_other_images
from pipeline.tracking import Tracking, connect
from workflows.preset_files import find_preset

NAME = "faces"
PATHS = ":".join(str(folder) for folder in (ROOT, ROOT / "tests", ROOT / "tests" / "pipeline"))


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    connect(Location.of(folder))
    return folder


@pytest.fixture
def tracking(empty_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tracking:
    monkeypatch.setattr(ledger_module, "NOTICE_S", 0.05)
    shutil.copytree(empty_store, tmp_path, dirs_exist_ok=True)
    return connect(Location.of(tmp_path))


def model_page(tracking: Tracking) -> str:
    return tracking.client.get_registered_model(NAME).description or ""


@pytest.fixture
def make_version(tracking: Tracking, tmp_path: Path) -> Callable[..., int]:
    """Returns a function that registers a version whose tags carry a number, from a run of its own."""

    def make(value: float, **changes: object) -> int:
        client = tracking.client
        if not [model for model in client.search_registered_models() if model.name == NAME]:
            client.create_registered_model(NAME)
        run_id = tracking.open_run(NAME, f"run {value}", None)
        tags = {"metric.value": repr(value), "metric.unit": UNIT.model_copy(update=changes).model_dump_json()}
        return int(client.create_model_version(NAME, source=str(tmp_path), run_id=run_id, tags=tags).version)

    return make


def measured(tracking: Tracking, version: int, champion: int | None) -> tuple[Decision, ChampionTest | None]:
    """Decides by the numbers of the tags, as if both tests had found them without error."""
    mine = read_champion(tracking, NAME, version).metric
    assert mine is not None
    if champion is None:
        return decide(mine, None, None, 0.0), None
    theirs = read_champion(tracking, NAME, champion)
    assert theirs.metric is not None
    difference = mine.value - theirs.metric.value
    test = PairedTest(first_seed=0, num_samples=10, candidate=mine.value, champion=theirs.metric.value, difference=difference, standard_error=0)
    found = ChampionTest(champion_version=champion, test=test, confirmation=test)
    return decide(mine, theirs, found, 0.0), found


def gate(tracking: Tracking, version: int) -> str:
    ledger = Ledger.of(tracking, NAME)
    move = pass_gate(ledger, version, lambda champion: measured(tracking, version, champion), Reporter())
    ledger.settle()
    return move.kind


def aliases(tracking: Tracking) -> tuple[int | None, int | None]:
    return alias_of(tracking, NAME, CHAMPION), alias_of(tracking, NAME, PREVIOUS)


def test_the_first_version_is_champion_a_better_one_follows_and_a_worse_one_does_not(tracking: Tracking, make_version: Callable[..., int]):
    assert gate(tracking, make_version(5)) == "promoted"
    assert aliases(tracking) == (1, None)
    assert gate(tracking, make_version(4)) == "promoted"
    assert aliases(tracking) == (2, 1)
    assert gate(tracking, make_version(4.5)) == "kept"
    assert aliases(tracking) == (2, 1)
    moves = log_of(tracking, NAME)
    assert [(move.kind, move.version, move.champion) for move in moves] == [("promoted", 1, 1), ("promoted", 2, 2), ("kept", 3, 2)]
    assert all("@" in move.who and move.when.startswith("20") and move.why for move in moves)
    assert moves[1].champion_test is not None
    assert moves[1].champion_test.champion_version == 1


def test_a_decision_is_made_once(tracking: Tracking, make_version: Callable[..., int]):
    version = make_version(5)
    assert [gate(tracking, version), gate(tracking, version)] == ["promoted", "promoted"]
    assert len(log_of(tracking, NAME)) == 1


def test_the_model_page_tells_the_last_moves_within_the_limit(tracking: Tracking, make_version: Callable[..., int]):
    for value in range(25, 0, -1):
        version = make_version(value)
        tracking.client.update_model_version(NAME, str(version), f"version of {value}")
        gate(tracking, version)
    page = model_page(tracking)
    assert page.startswith("Champion: version 25. version of 1\n")
    assert "v25 promoted; champion v25" in page
    assert "All 25 moves: `ddpm models log faces`" in page
    assert len(page) <= 5000


def test_two_processes_that_decide_at_once_never_both_decide_on_the_stale_champion(tracking: Tracking, make_version: Callable[..., int], tmp_path: Path):
    gate(tracking, make_version(20))
    versions = [make_version(value) for value in (12, 13, 15, 11)]
    script = textwrap.dedent(f"""
        import sys, time
        from pathlib import Path
        from components.storage import Location
        from pipeline.context import Reporter
        from pipeline.registry.gate import pass_gate
        from pipeline.registry.ledger import Ledger
        from pipeline.tracking import connect
        from test_ledger import NAME, measured

        folder, version, others = Path({str(tmp_path)!r}), int(sys.argv[1]), {len(versions)}
        tracking = connect(Location.of(folder))
        ledger = Ledger.of(tracking, NAME)

        def judge(champion):
            seen = folder / "saw" / f"{{version}}-{{champion}}"
            seen.parent.mkdir(exist_ok=True)
            seen.write_text("")
            while len(list(seen.parent.glob(f"*-1"))) < others:  # all have seen the first champion before any writes
                time.sleep(0.01)
            return measured(tracking, version, champion)

        pass_gate(ledger, version, judge, Reporter())
        ledger.settle()
    """)
    command = ["env", f"PYTHONPATH={PATHS}", sys.executable, "-c", script]
    running = [subprocess.Popen([*command, str(version)], stderr=subprocess.PIPE, text=True) for version in versions]
    for process in running:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    moves = log_of(tracking, NAME)
    values = dict(zip((1, *versions), (20, 12, 13, 15, 11), strict=True))
    for before, move in pairwise(moves):
        assert move.champion_test is not None
        assert move.champion_test.champion_version == before.champion
        assert (move.kind == "promoted") == (values[move.version or 0] < values[before.champion or 0])
    assert sorted(move.version or 0 for move in moves) == [1, *versions]
    assert aliases(tracking)[0] == versions[-1]
    assert aliases(tracking)[1] == moves[-1].champions[-2]


def test_an_alias_of_a_version_that_is_not_there_is_an_error(tracking: Tracking, make_version: Callable[..., int]):
    version = make_version(5)
    with pytest.raises(MlflowException, match="not found"):
        set_alias(tracking, NAME, PREVIOUS, version + 1)


@pytest.mark.parametrize("moment", ["_carry_out", "_show"])
def test_what_a_killed_process_decided_is_carried_out_by_the_next(tracking: Tracking, make_version: Callable[..., int], tmp_path: Path, moment: str):
    gate(tracking, make_version(5))
    better = make_version(4)
    script = textwrap.dedent(f"""
        import os, signal
        from components.storage import Location
        from pipeline.context import Reporter
        from pipeline.registry.gate import pass_gate
        from pipeline.registry.ledger import Ledger
        from pipeline.tracking import connect
        from test_ledger import NAME, measured

        tracking = connect(Location.of({str(tmp_path)!r}))
        ledger = Ledger.of(tracking, NAME)
        Ledger.{moment} = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        pass_gate(ledger, {better}, lambda champion: measured(tracking, {better}, champion), Reporter())
        ledger.settle()
    """)
    command = ["env", f"PYTHONPATH={PATHS}", sys.executable, "-c", script]
    assert subprocess.run(command, check=False, capture_output=True, timeout=120).returncode == -9
    assert gate(tracking, make_version(4.5)) == "kept"
    assert aliases(tracking) == (better, 1)
    assert "v2 promoted; champion v2" in model_page(tracking)
    assert [move.kind for move in log_of(tracking, NAME)] == ["promoted", "promoted", "kept"]


def test_a_rollback_goes_back_champion_by_champion_and_a_promotion_forward_again(tracking: Tracking, make_version: Callable[..., int]):
    for value in (5, 4, 3):
        gate(tracking, make_version(value))
    ledger = Ledger.of(tracking, NAME)
    assert roll_back(ledger, None, "blurred").champion == 2
    assert aliases(tracking) == (2, 1)
    assert roll_back(ledger, None, "").champion == 1
    assert aliases(tracking) == (1, None)
    with pytest.raises(RegistryError, match="no earlier champion"):
        roll_back(ledger, None, "")
    promote(ledger, 3, lambda champion: measured(tracking, 3, champion), "mended")
    assert aliases(tracking) == (3, 1)
    kinds = [(move.kind, move.champion, move.why) for move in log_of(tracking, NAME)][3:]
    assert kinds[0] == ("rolled back", 2, "blurred")
    assert kinds[1] == ("rolled back", 1, "v2 taken back")
    assert kinds[2][:2] == ("promoted by hand", 3)
    assert kinds[2][2].startswith("mended; better: ")


def test_a_rollback_to_a_named_champion_skips_those_between(tracking: Tracking, make_version: Callable[..., int]):
    for value in (5, 4, 3):
        gate(tracking, make_version(value))
    with pytest.raises(RegistryError, match="--to 9 is none of the earlier champions of faces; use one of 2, 1"):
        roll_back(Ledger.of(tracking, NAME), 9, "")
    assert roll_back(Ledger.of(tracking, NAME), 1, "").champion == 1
    assert aliases(tracking) == (1, None)


def test_after_a_rollback_the_gate_measures_against_the_champion_that_is_back(tracking: Tracking, make_version: Callable[..., int]):
    for value in (5, 3):
        gate(tracking, make_version(value))
    roll_back(Ledger.of(tracking, NAME), None, "")
    assert gate(tracking, make_version(4)) == "promoted"
    assert aliases(tracking) == (3, 1)


def test_a_person_promotes_only_past_the_gate_or_by_force(tracking: Tracking, make_version: Callable[..., int]):
    gate(tracking, make_version(5))
    other = make_version(1, num_samples=10)
    ledger = Ledger.of(tracking, NAME)
    with pytest.raises(RegistryError, match=r"num_samples 10 against 1000.*--force"):
        promote(ledger, other, lambda champion: measured(tracking, other, champion), "")
    assert aliases(tracking) == (1, None)
    promote(ledger, other, None, "the customer asked")
    assert aliases(tracking) == (2, 1)
    assert log_of(tracking, NAME)[-1].why == "the customer asked; not measured beside the champion"
    with pytest.raises(RegistryError, match="champion already"):
        promote(ledger, other, None, "again")


def test_an_alias_moved_on_the_pages_is_noticed_and_stays(tracking: Tracking, make_version: Callable[..., int]):
    for value in (5, 4, 6):
        gate(tracking, make_version(value))
    tracking.client.set_registered_model_alias(NAME, CHAMPION, "3")
    assert gate(tracking, make_version(5.5)) == "promoted"
    moves = log_of(tracking, NAME)[-2:]
    assert [(move.kind, move.champion, move.who) for move in moves[:1]] == [("outside", 3, "unknown")]
    assert aliases(tracking) == (4, 3)


def test_a_champion_deleted_on_the_pages_gives_way_to_the_one_before(tracking: Tracking, make_version: Callable[..., int]):
    for value in (5, 4):
        gate(tracking, make_version(value))
    tracking.client.delete_model_version(NAME, "2")
    Ledger.of(tracking, NAME).settle()
    assert log_of(tracking, NAME)[-1].why == "v2 was deleted outside this log; back to v1"
    assert aliases(tracking) == (1, None)


def test_an_alias_removed_on_the_pages_leaves_no_champion(tracking: Tracking, make_version: Callable[..., int]):
    gate(tracking, make_version(5))
    tracking.client.delete_registered_model_alias(NAME, CHAMPION)
    assert gate(tracking, make_version(9)) == "promoted"
    assert [(move.kind, move.champion) for move in log_of(tracking, NAME)] == [("promoted", 1), ("outside", None), ("promoted", 2)]


def test_a_champion_older_than_the_log_is_taken_over(tracking: Tracking, make_version: Callable[..., int]):
    make_version(5)
    tracking.client.set_registered_model_alias(NAME, CHAMPION, "1")
    assert gate(tracking, make_version(4)) == "promoted"
    assert [(move.kind, move.champion) for move in log_of(tracking, NAME)] == [("outside", 1), ("promoted", 2)]
    assert aliases(tracking) == (2, 1)


def test_a_log_deleted_on_the_pages_is_restored(tracking: Tracking, make_version: Callable[..., int]):
    gate(tracking, make_version(5))
    tracking.client.delete_run(tracking.client.get_registered_model(NAME).tags[LEDGER_TAG])
    assert gate(tracking, make_version(4)) == "promoted"
    assert len(log_of(tracking, NAME)) == 2


def test_the_champion_and_the_one_before_are_not_deleted(tracking: Tracking, make_version: Callable[..., int]):
    for value in (5, 4, 6):
        gate(tracking, make_version(value))
    tracking.client.set_registered_model_alias(NAME, CANDIDATE, "3")
    ledger = Ledger.of(tracking, NAME)
    for version, alias in ((2, "champion"), (1, "previous")):
        with pytest.raises(RegistryError, match=f"version={version} of faces is {alias}"):
            delete_version(ledger, version)
    delete_version(ledger, 3)
    with pytest.raises(RegistryError, match="version=3 of faces is not in the registry"):
        delete_version(ledger, 3)
    assert aliases(tracking) == (2, 1)
    assert alias_of(tracking, NAME, CANDIDATE) == 2


def test_a_model_whose_versions_have_no_run_has_no_log(tracking: Tracking, tmp_path: Path):
    tracking.client.create_registered_model(NAME)
    tracking.client.create_model_version(NAME, source=str(tmp_path))
    with pytest.raises(RegistryError, match="no version of faces has a run"):
        Ledger.of(tracking, NAME)


def test_the_log_is_plain_json_in_the_store(tracking: Tracking, make_version: Callable[..., int]):
    gate(tracking, make_version(5))
    run = tracking.client.get_run(tracking.client.get_registered_model(NAME).tags[LEDGER_TAG])
    assert json.loads(run.data.params["move.000001"])["champions"] == [1]
    assert run.info.run_name == "champion log of faces"
    assert run.info.status == "FINISHED"


def test_a_metric_and_its_error_come_back_from_the_tags(tracking: Tracking, make_version: Callable[..., int]):
    version = make_version(5)
    tracking.client.set_model_version_tag(NAME, str(version), "metric.standard_error", "0.25")
    assert read_champion(tracking, NAME, version) == Champion(version, Metric(value=5, unit=UNIT, standard_error=0.25))


def test_models_beyond_the_first_page_and_with_a_quote_in_their_name_are_listed(tracking: Tracking):
    for number in range(101):
        tracking.client.create_registered_model(f"model {number:03d}")
    tracking.client.create_registered_model("zoe's model")
    assert len(list_models(tracking, None)) == 102
    assert list_models(tracking, "zoe's model") == {"zoe's model": []}


def test_a_user_who_may_not_remove_aliases_rolls_back_to_the_first_champion(
    tracking: Tracking, make_version: Callable[..., int], monkeypatch: pytest.MonkeyPatch
):
    def refuse(*_: str) -> None:
        raise MlflowException("Permission denied", error_code=PERMISSION_DENIED)

    for value in (2.0, 1.0):
        version = make_version(value)
        pass_gate(Ledger.of(tracking, NAME), version, lambda champion: (Decision(True, "better"), None), Reporter())
    Ledger.of(tracking, NAME).settle()
    monkeypatch.setattr(tracking.client, "delete_registered_model_alias", refuse)
    assert roll_back(Ledger.of(tracking, NAME), None, "").champion == 1
    assert alias_of(tracking, NAME, CHAMPION) == 1
    assert promote(Ledger.of(tracking, NAME), 2, None, "after all").champion == 2


@pytest.mark.parametrize("why", ["\x01" * 5000, '"\\' * 5000, "\N{SNOWMAN}" * 5000, "\n" * 5000], ids=["control", "quotes", "snow", "lines"])
def test_no_reason_makes_an_entry_that_cannot_be_read(tracking: Tracking, make_version: Callable[..., int], why: str):
    version = make_version(1.0)
    promote(Ledger.of(tracking, NAME), version, None, why)
    assert [move.kind for move in Ledger.of(tracking, NAME).moves()] == ["promoted by hand"]


def test_reading_the_log_of_another_teams_model_changes_nothing(tracking: Tracking, make_version: Callable[..., int]):
    make_version(5)
    tracking.client.set_registered_model_alias(NAME, CHAMPION, "1")
    tracking.client.update_registered_model(NAME, "please keep this text")
    assert log_of(tracking, NAME) == []
    assert model_page(tracking) == "please keep this text"
    assert LEDGER_TAG not in tracking.client.get_registered_model(NAME).tags
    assert gate(tracking, make_version(4)) == "promoted"
    assert model_page(tracking) == "please keep this text"


def test_a_model_deleted_and_made_anew_has_a_new_log(tracking: Tracking, make_version: Callable[..., int]):
    for value in (5, 4):
        gate(tracking, make_version(value))
    run_id = tracking.client.get_model_version(NAME, "1").run_id
    tracking.client.delete_registered_model(NAME)
    tracking.client.create_registered_model(NAME)
    unit = UNIT.model_dump_json()
    tracking.client.create_model_version(NAME, source="x", run_id=run_id, tags={"metric.value": "5.0", "metric.unit": unit})
    assert gate(tracking, 1) == "promoted"
    assert gate(tracking, make_version(9)) == "kept"
    assert [(move.kind, move.version) for move in log_of(tracking, NAME)] == [("promoted", 1), ("kept", 2)]


def test_a_deleted_candidate_leaves_its_alias_to_the_newest_that_is_left(tracking: Tracking, make_version: Callable[..., int]):
    for value in (5, 6, 7):
        gate(tracking, make_version(value))
    tracking.client.set_registered_model_alias(NAME, CANDIDATE, "3")
    delete_version(Ledger.of(tracking, NAME), 3)
    assert alias_of(tracking, NAME, CANDIDATE) == 2


def a_run(config: RunConfig, source: str, digest: str, tmp_path: Path) -> tuple[Pipeline, ShardSet, io.StringIO]:
    """Returns a run that stands before its training, its dataset, and what is said of it."""
    said, reporter = io.StringIO(), Reporter()
    reporter.console = Console(file=said, width=1000)
    shards = ShardSet.model_construct(source=source, digest=digest)
    return Pipeline(config, "night", None, reporter, Location.of(tmp_path), {}), shards, said


def test_a_run_on_other_images_than_the_champions_is_told_so_before_it_trains(tracking: Tracking, make_version: Callable[..., int], tmp_path: Path):
    config = load_config(find_preset("digits"), [f"registry.model_name={NAME}", "data.source=/dogs/images"])
    for version, source in enumerate(("/cats/images", "/cats/images"), start=1):
        gate(tracking, make_version(5 - version))
        for key, value in (("dataset.source", source), ("dataset.digest", "c0ffee")):
            tracking.client.set_model_version_tag(NAME, str(version), key, value)
    for source, digest, told in (("/dogs/images", "d06", True), ("/cats/images", "more", False), ("/moved/cats/images", "c0ffee", False)):
        pipeline, shards, said = a_run(config, source, digest, tmp_path)
        _warn_about_other_images(pipeline, tracking, shards)
        assert bool(said.getvalue()) is told
        if told:
            assert "version 2 of faces was trained on /cats/images, this run trains on /dogs/images" in said.getvalue()
            assert "registry.model_name=ddpm-dogs-images makes a model of these images alone" in said.getvalue()


def test_the_first_run_of_a_model_is_told_nothing(tracking: Tracking, tmp_path: Path):
    pipeline, shards, said = a_run(load_config(find_preset("digits"), []), "/dogs/images", "d06", tmp_path)
    _warn_about_other_images(pipeline, tracking, shards)
    assert said.getvalue() == ""
