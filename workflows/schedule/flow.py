"""What Prefect runs and shows: an attempt as a flow of four tasks. It is imported by a new process for each run, so it imports little."""

import os
import re
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

from prefect import flow, task
from prefect.artifacts import create_link_artifact, create_markdown_artifact
from prefect.cache_policies import INPUTS, RUN_ID
from prefect.client.schemas.objects import State
from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from prefect.states import Completed, Failed

from components.storage import Location
from workflows.schedule.attempt import STAGES, Outcome, StageError, run_stage
from workflows.schedule.plan import FLOW, Plan
from workflows.schedule.processes import MARK

RETRY_DELAY_S = 10


def this_plan() -> Plan:
    """Returns the plan of the schedule that this process belongs to."""
    return Plan.load(Location(os.environ[MARK]))


def _may_pass(_task: Any, _task_run: Any, state: State) -> bool:
    """Tells whether a stage that failed so may succeed when it is tried again."""
    return not (isinstance(state.data, StageError) and state.data.is_final)


# Results are kept by run, so that a run which is tried again finds its finished stages; as JSON, for nothing here reads a pickle.
@task(persist_result=True, cache_policy=INPUTS + RUN_ID, result_serializer="json", retry_delay_seconds=RETRY_DELAY_S, retry_condition_fn=_may_pass)
def do_stage(stage: str) -> dict[str, Any]:
    """Does the attempt up to a stage, in a process of its own."""
    plan = this_plan()
    return run_stage(plan.command, stage, plan.cwd, get_run_logger().info).model_dump()


def run_name() -> str:
    """Returns the name of this run: the time that it was meant for, in the schedule's time zone."""
    plan = this_plan()
    return f"{plan.name} {flow_run.get_scheduled_start_time().astimezone(ZoneInfo(plan.when.time_zone)):%Y-%m-%d %H:%M:%S}"


@flow(name=FLOW, flow_run_name=run_name)
def retrain() -> State:
    """Makes one attempt: preprocess, train, evaluate, register; ends early where the attempt does."""
    plan, outcome = this_plan(), None
    try:
        for stage in STAGES:
            outcome = Outcome.model_validate(do_stage.with_options(name=stage, task_run_name=stage, retries=plan.retries)(stage))
            if not outcome.is_open:
                break
    except StageError as error:
        return _told(Failed(name="Stopped" if error.is_stopped else None, message=str(error)))
    assert outcome is not None
    _show(outcome)
    if outcome.is_open:
        return _told(Failed(message=f"the attempt is open still after {STAGES[-1]}; is this another version of ddpm?"))
    return _told(Completed(name=outcome.outcome.capitalize(), message=outcome.reason))


def _told(state: State) -> State:
    """Prints one line, which `ddpm schedule` lets through to whoever started it."""
    line = f"{run_name()} {str(state.name).lower()}: {state.message}\n"
    try:
        os.write(1, line.encode())
    except OSError:
        get_run_logger().debug("nobody reads the line of this run any more")
    return state


def _show(outcome: Outcome) -> None:
    """Puts the attempt's summary and links beside the run."""
    key = re.sub(r"[^a-z0-9]+", "-", outcome.name.lower()).strip("-")
    create_markdown_artifact(summary_of(outcome), key=f"{key}-summary", description=f"attempt {outcome.attempt} of {outcome.name}")
    for what, link in links_of(outcome).items():
        create_link_artifact(link, what, key=f"{key}-{what.split()[0]}", description=f"attempt {outcome.attempt} of {outcome.name}, in MLflow")


def summary_of(outcome: Outcome) -> str:
    """Returns the attempt's summary as Markdown, and where to find the rest."""
    file = Path(outcome.summary) if outcome.summary else None
    text = file.read_text(encoding="utf-8") if file is not None and file.is_file() else f"**{outcome.outcome}**: {outcome.reason}\n"
    facts = {"run": outcome.run_name, "MLflow run": outcome.mlflow_run_id, "MLflow": outcome.mlflow_uri, "model": outcome.model, "report": outcome.report}
    return text.rstrip() + "\n\n" + "".join(f"* {name}: `{value}`\n" for name, value in facts.items() if value)


def links_of(outcome: Outcome) -> dict[str, str]:
    """Returns links into MLflow, where it is served at an address of its own."""
    if outcome.mlflow_uri is None or not outcome.mlflow_uri.startswith("http"):
        return {}
    pages = {}
    if outcome.mlflow_run_id:
        pages["run in MLflow"] = f"runs/{outcome.mlflow_run_id}"
    if outcome.model and (version := re.fullmatch(r"models:/(.+)/([0-9]+)", outcome.model)):
        pages["version in MLflow"] = f"models/{version[1]}/versions/{version[2]}"
    return {what: f"{outcome.mlflow_uri.rstrip('/')}/#/{page}?workflowType=machine_learning" for what, page in pages.items()}
