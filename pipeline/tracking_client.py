"""MLflow's client, whose calls are made again where the database refused them for another client's sake.

MLflow's stores look whether a row is there, and then insert or change it. Of two clients that do so at the same moment both insert, the database
refuses one, and MLflow hands its refusal on as an error. A refused transaction left nothing behind, so the call is made again, and finds the row.
"""

import functools
import inspect
import random
import re
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, ParamSpec, TypeVar

if TYPE_CHECKING:
    from mlflow import MlflowClient

TRIES = 8
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 2.0
_LOST_RACE = re.compile(
    r"IntegrityError|UniqueViolation|UNIQUE constraint failed|duplicate key value|Duplicate entry|StaleDataError"  # another client's row was there first
    r"|database is locked|deadlock|could not serialize access|Lock wait timeout"  # a transaction had to make way for another
    r"|Model Version creation error|Failed to set tags",  # MLflow tried again by itself, and gave up
    re.IGNORECASE,
)
_REFUSALS = ("BAD_REQUEST", "INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE")
P = ParamSpec("P")
T = TypeVar("T")


def lost_race(error: Exception) -> bool:
    """Tells whether a call failed only because another client wrote at the same moment, so that nothing of it was kept and it may be made again."""
    from mlflow.exceptions import MlflowException

    return isinstance(error, MlflowException) and error.error_code in _REFUSALS and _LOST_RACE.search(str(error)) is not None


def again_after_races(call: Callable[P, T]) -> Callable[P, T]:
    """Returns a call that is made again, after a random pause, where it lost a race in MLflow's database; at most `TRIES` times in all."""

    @functools.wraps(call)
    def tried(*args: P.args, **kwargs: P.kwargs) -> T:
        for number in range(TRIES - 1):
            try:
                return call(*args, **kwargs)
            except Exception as error:
                if not lost_race(error):
                    raise
            time.sleep(min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2**number) * random.uniform(0.5, 1.5))
        return call(*args, **kwargs)

    return tried


def make_client(uri: str) -> "MlflowClient":
    """Returns a client of a tracking store and registry, every method of which is made again after a lost race."""
    from mlflow import MlflowClient

    public = inspect.getmembers(MlflowClient, lambda member: inspect.isfunction(member) and not member.__name__.startswith("_"))
    patient = type("PatientClient", (MlflowClient,), {name: again_after_races(method) for name, method in public})
    return patient(tracking_uri=uri, registry_uri=uri)
