"""The search itself, which is Ray Tune's: ASHA decides which trials go on, a grid over what was drawn or Optuna which trials there are.

Nothing of Tune's own state is kept. A search that is started again asks for the same trials in the same order, each answers at once what it was like
at rungs that it has reached, and so every decision is made again as it was.
"""

import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search import Searcher
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.errors import ConfigError
from pipeline.sweeping.plan import FACTOR, SweepPlan
from pipeline.sweeping.space import Space, plain_value
from pipeline.sweeping.trial import Rung, Runner

HEAD = {"node:__internal_head__": 0.001}
"""Where Tune's actors are, which do no work and must take no CPU that training workers need."""
NUMBER, STEPS = "trial", "steps"
_ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends the command at once: the same command goes on
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
}
_PASSED_ON = ("MLFLOW_", "AWS_")


class _Trial(tune.Trainable):
    """What Tune knows of a trial: each step is a rung, which a Runner trains."""

    def setup(self, config: dict[str, Any], plan: str = "", environment: Mapping[str, str] | None = None, folder: str = "", node: str = "") -> None:
        self._rungs = SweepPlan.model_validate_json(plan).rungs
        self._decides = SweepPlan.model_validate_json(plan).decides
        options = {"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False)}
        self._runner: Any = ray.remote(Runner).options(**options).remote(plan, environment or {}, folder)
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Makes another trial of it."""
        self._begin(new_config)
        return True

    def _begin(self, config: Mapping[str, Any]) -> None:
        self._reached = 0
        settings = {key: plain_value(value) for key, value in config.items()}
        self._number = settings[NUMBER] if NUMBER in settings else ray.get(self._runner.number.remote(settings))

    def step(self) -> dict[str, Any]:
        steps = self._rungs[self._reached]
        answer = ray.get(self._runner.train.remote(self._number, steps))
        self._reached += 1
        if answer is None:
            return {NUMBER: self._number, STEPS: steps, self._decides: float("nan"), "rung": "", "done": True}
        value = Rung.model_validate_json(answer).values.get(self._decides, float("nan"))
        ends = math.isnan(value) or steps == self._rungs[-1]
        return {NUMBER: self._number, STEPS: steps, self._decides: value, "rung": answer, "done": ends}


class _Follower(tune.Callback):
    """Tells of every rung, and keeps the numbers of trials for which there was no time left."""

    def __init__(self, told: Callable[[Rung], None]) -> None:
        self._told, self.out_of_time = told, set[int]()

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune keeps a copy of its settings, which nobody reads

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any) -> None:
        if result["rung"]:
            self._told(Rung.model_validate_json(result["rung"]))
        else:
            self.out_of_time.add(result[NUMBER])


def search(plan: SweepPlan, space: Space, trials: int, *, seed: int, parallel: int, bookkeeping: Path, told: Callable[[Rung], None]) -> set[int]:
    """Trains the trials of a sweep, each as far as ASHA lets it; their rungs are on record then. Returns which trials there was no time for.

    Args:
        parallel: trials at once; with one, ASHA decides the same each time, whatever was interrupted.
        bookkeeping: a folder for Ray Tune's own notes, which nobody reads again.
        told: is given every rung.

    Raises:
        Exception: what a trial raised that is no fault of its settings.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # what a trial raises is raised here, too
    environment = {name: value for name, value in os.environ.items() if name.startswith(_PASSED_ON)}
    node = ray.get_runtime_context().get_node_id()
    given = {"plan": plan.model_dump_json(), "environment": environment, "folder": os.getcwd(), "node": node}
    trainable: Any = tune.with_resources(tune.with_parameters(_Trial, **given), tune.PlacementGroupFactory([HEAD]))
    follower = _Follower(told)
    tuner = tune.Tuner(
        trainable,
        param_space=_domains(plan, space, trials),
        tune_config=tune.TuneConfig(
            metric=plan.decides,
            mode="min",
            scheduler=ASHAScheduler(time_attr=STEPS, max_t=plan.rungs[-1], grace_period=plan.rungs[0], reduction_factor=FACTOR),
            search_alg=_searcher(plan, seed),
            num_samples=trials if plan.search == "optuna" else 1,
            max_concurrent_trials=parallel,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name=plan.name,
            storage_path=str(bookkeeping),
            verbose=0,
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            callbacks=[follower],
            failure_config=tune.FailureConfig(max_failures=0, fail_fast=True),
        ),
    )
    _raise_first(tuner.fit().errors)
    return follower.out_of_time


def _domains(plan: SweepPlan, space: Space, trials: int) -> dict[str, Any]:
    """Returns what Tune chooses from: the numbers of the trials that were drawn, or the space itself."""
    if plan.search == "optuna":
        return {key: values.domain() for key, values in space.items()}
    return {NUMBER: tune.grid_search(list(range(trials)))}


def _searcher(plan: SweepPlan, seed: int) -> Searcher | None:
    if plan.search != "optuna":
        return None
    from ray.tune.search.optuna import OptunaSearch

    return OptunaSearch(seed=seed)


def check_optuna() -> None:
    """Checks that Optuna is installed.

    Raises:
        ConfigError: if it is not.
    """
    from importlib.util import find_spec

    if find_spec("optuna") is None:
        raise ConfigError("--search optuna needs the package optuna, which is not installed; pip install 'ddpm-pipeline[sweep]', or use --search random")


def _raise_first(errors: Sequence[BaseException]) -> None:
    """Raises what a process of Ray's raised, without what Ray wraps it in."""
    for error in errors:
        raise _innermost(error)


def _innermost(error: BaseException) -> BaseException:
    cause = getattr(error, "cause", None)
    return _innermost(cause) if isinstance(cause, BaseException) else error
