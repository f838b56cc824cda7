"""What two clients of one MLflow store write at the same moment: the database refuses one of them, whose call is made again."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import sqlalchemy.event
import sqlalchemy.orm
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import BAD_REQUEST, INTERNAL_ERROR, INVALID_PARAMETER_VALUE, RESOURCE_ALREADY_EXISTS, TEMPORARILY_UNAVAILABLE
from postgresql import find_programs, postgresql_server

from components.storage import Location
from pipeline.register import _create_model
from pipeline.tracking import Tracking, connect
from pipeline.tracking_client import TRIES, again_after_races, lost_race

MODEL, RUN, LOGGED, EXPERIMENT = "model", "run", "logged", "experiment"
Ids = dict[str, str]
Write = Callable[[MlflowClient, Ids, str], object]


def a_dataset() -> list[DatasetInput]:
    return [DatasetInput(Dataset("photos", "0123", "local", "{}", "{}", "{}"), [InputTag("mlflow.data.context", "training")])]


REFUSED: dict[str, Write] = {
    "experiment tag": lambda client, ids, word: client.set_experiment_tag(ids[EXPERIMENT], "saved view", word),
    "run tag": lambda client, ids, word: client.set_tag(ids[RUN], "note", word),
    "parameters": lambda client, ids, _: client.log_batch(ids[RUN], params=[Param("lr", "1e-4")]),
    "dataset": lambda client, ids, word: client.log_inputs(ids[word], a_dataset()),
    "registered model's tag": lambda client, ids, word: client.set_registered_model_tag(ids[MODEL], "log", word),
    "version's tag": lambda client, ids, word: client.set_model_version_tag(ids[MODEL], "1", "decision", word),
    "alias": lambda client, ids, _: client.set_registered_model_alias(ids[MODEL], "candidate", "1"),
}
"""Writes of which MLflow lets the second fail, by what they insert."""
TAKEN: dict[str, Write] = {
    "run's tags": lambda client, ids, word: client.log_batch(ids[RUN], tags=[RunTag("commit", word)]),
    "parameter": lambda client, ids, _: client.log_param(ids[RUN], "steps", "1000", synchronous=True),
    "metrics": lambda client, ids, _: client.log_batch(ids[RUN], metrics=[Metric("loss", 0.5, 1, 1)]),
    "logged model's metrics": lambda client, ids, _: client.log_batch(ids[RUN], metrics=[Metric("fid", 9.0, 1, 1, model_id=ids[LOGGED])]),
    "logged model's tags": lambda client, ids, word: client.set_logged_model_tags(ids[LOGGED], {"versions": word}),
    "version": lambda client, ids, _: client.create_model_version(ids[MODEL], "/model", ids[RUN]),
    "model's page": lambda client, ids, word: client.update_registered_model(ids[MODEL], word),
}
"""Writes that MLflow itself makes again, or whose second is the first one's."""


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def tracking(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tracking]:
    folder = tmp_path_factory.mktemp("store")
    if request.param == "sqlite":
        yield connect(Location.of(folder))
        return
    if find_programs() is None:
        pytest.skip("PostgreSQL is not installed")
    with postgresql_server(folder / "postgresql.log") as database, pytest.MonkeyPatch.context() as patch:
        for name, value in (database.env | {"MLFLOW_TRACKING_URI": database.uri}).items():
            patch.setenv(name, value)
        yield connect(Location.of(folder))


@pytest.fixture(scope="module")
def ids(tracking: Tracking) -> Ids:
    return something_to_write_to(tracking.client, "photos")


def something_to_write_to(client: MlflowClient, name: str) -> Ids:
    experiment = client.create_experiment(name)
    run, mine, theirs = (client.create_run(experiment).info.run_id for _ in range(3))
    client.create_registered_model(name)
    client.create_model_version(name, "/model", run)
    logged = client.create_logged_model(experiment, "model", run).model_id
    return {EXPERIMENT: experiment, RUN: run, "mine": mine, "theirs": theirs, MODEL: name, LOGGED: logged}


@contextmanager
def another_first(write: Callable[[], object]) -> Iterator[list[bool]]:
    """Lets another client write between the moment when MLflow has looked and the one when it writes, once; yields whether that happened."""
    happened: list[bool] = []

    def flush(session: sqlalchemy.orm.Session, *_: object) -> None:
        if (session.new or session.dirty) and not happened:
            happened.append(True)
            write()

    sqlalchemy.event.listen(sqlalchemy.orm.Session, "before_flush", flush)
    try:
        yield happened
    finally:
        sqlalchemy.event.remove(sqlalchemy.orm.Session, "before_flush", flush)


@pytest.mark.parametrize("what", REFUSED)
def test_a_write_that_loses_its_race_is_made_again(tracking: Tracking, ids: Ids, what: str):
    write = REFUSED[what]
    with another_first(lambda: write(tracking.client, ids, "theirs")) as happened:
        write(tracking.client, ids, "mine")
    assert happened


@pytest.mark.parametrize("what", REFUSED)
def test_mlflow_itself_lets_such_a_write_fail(tracking: Tracking, what: str):
    """Where this no longer fails, MLflow has learnt it, and pipeline/tracking_client.py may go."""
    plain, write = MlflowClient(tracking.uri, tracking.uri), REFUSED[what]
    ids = something_to_write_to(plain, f"plain {what}")
    with another_first(lambda: write(plain, ids, "theirs")), pytest.raises(MlflowException) as failure:
        write(plain, ids, "mine")
    assert lost_race(failure.value)


@pytest.mark.parametrize("what", TAKEN)
def test_a_write_that_loses_its_race_harmlessly_is_taken(tracking: Tracking, ids: Ids, what: str):
    write = TAKEN[what]
    with another_first(lambda: write(tracking.client, ids, "theirs")):
        write(tracking.client, ids, "mine")


def test_the_last_of_two_tags_stands(tracking: Tracking, ids: Ids):
    with another_first(lambda: tracking.client.set_tag(ids[RUN], "who", "theirs")) as happened:
        tracking.client.set_tag(ids[RUN], "who", "mine")
    assert happened
    assert tracking.client.get_run(ids[RUN]).data.tags["who"] == "mine"


def test_a_parameter_that_another_wrote_first_is_refused_for_good(tracking: Tracking, ids: Ids):
    """The log of decisions rests on this: of several that write one parameter, one succeeds."""
    with another_first(lambda: tracking.client.log_param(ids[RUN], "move.000001", "theirs")) as happened, pytest.raises(MlflowException) as failure:
        tracking.client.log_param(ids[RUN], "move.000001", "mine")
    assert happened
    assert failure.value.error_code == "INVALID_PARAMETER_VALUE"
    assert tracking.client.get_run(ids[RUN]).data.params["move.000001"] == "theirs"


def test_two_that_make_one_experiment_share_it(tracking: Tracking):
    others: list[str] = []
    with another_first(lambda: others.append(tracking.open_run("shared", "theirs", None))):
        mine = tracking.open_run("shared", "mine", None)
    experiments = {tracking.client.get_run(run_id).info.experiment_id for run_id in (mine, *others)}
    assert len(others) == len(experiments) == 1


def test_two_that_make_one_registered_model_share_it(tracking: Tracking):
    with another_first(lambda: _create_model("shared", tracking)) as happened:
        _create_model("shared", tracking)
    assert happened
    assert [model.name for model in tracking.client.search_registered_models("name='shared'")] == ["shared"]


def test_a_race_that_is_lost_each_time_is_an_error_in_the_end(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pipeline.tracking_client.FIRST_PAUSE_S", 0.0)
    tries: list[int] = []

    def never() -> None:
        tries.append(1)
        raise MlflowException("(sqlite3.OperationalError) database is locked", error_code=TEMPORARILY_UNAVAILABLE)

    with pytest.raises(MlflowException, match="locked"):
        again_after_races(never)()
    assert len(tries) == TRIES


@pytest.mark.parametrize(
    ("code", "message", "lost"),
    [
        (BAD_REQUEST, "(psycopg2.errors.UniqueViolation) duplicate key value violates unique constraint", True),
        (BAD_REQUEST, "(pymysql.err.IntegrityError) (1062, \"Duplicate entry 'a-b' for key 'PRIMARY'\")", True),
        (TEMPORARILY_UNAVAILABLE, "(psycopg2.errors.DeadlockDetected) deadlock detected", True),
        (INTERNAL_ERROR, "Model Version creation error (name=faces). Giving up after 3 attempts.", True),
        (BAD_REQUEST, "Invalid value for parameter", False),
        (TEMPORARILY_UNAVAILABLE, "connection refused", False),
        (INVALID_PARAMETER_VALUE, "Changing param values is not allowed: UNIQUE constraint failed", False),
        (RESOURCE_ALREADY_EXISTS, "Experiment(name=a) already exists. Error: IntegrityError", False),
    ],
)
def test_only_what_the_database_refused_for_anothers_sake_is_a_lost_race(code: int, message: str, lost: bool):
    assert lost_race(MlflowException(message, error_code=code)) is lost
