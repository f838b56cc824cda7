"""The process that hands Prefect's due runs to processes of their own; before it does, it clears up after a crash and an outage."""

import asyncio
import os
import sys
from datetime import UTC, datetime, timedelta
from uuid import UUID

from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterId,
    FlowRunFilter,
    FlowRunFilterExpectedStartTime,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy, FlowRun, State, StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.exceptions import ObjectNotFound
from prefect.logging import get_logger
from prefect.runner import Runner
from prefect.schedules import Cron, Interval, Schedule
from prefect.states import AwaitingRetry, Cancelled, Crashed

from components.errors import DataError
from components.storage import Location
from workflows.schedule.flow import retrain, this_plan
from workflows.schedule.plan import ANCHOR, FLOW, Plan, When
from workflows.schedule.processes import MARK

QUERY_S = 2.0
BEGUN = (StateType.RUNNING, StateType.PENDING, StateType.CANCELLING)
_LATEST = 200


def schedule_of(when: When) -> Schedule | None:
    """Returns Prefect's schedule, none where attempts follow changes. Raises ValueError if the cron line means nothing."""
    if when.interval_s is not None:
        return Interval(timedelta(seconds=when.interval_s), anchor_date=ANCHOR, timezone=when.time_zone)
    return None if when.cron is None else Cron(when.cron, timezone=when.time_zone)


async def reconcile(client: PrefectClient, plan: Plan) -> None:
    """Clears up what ended processes left behind; begins before any run is handed out.

    A run that they were doing is said to have crashed, which frees its place, and goes on: its finished stages are found again. Of the times
    that were missed one is caught up, unless such a run goes on already; the others are said to be missed.
    """
    runs = await _runs(client, plan)
    now = datetime.now(UTC)
    begun = [run for run in runs if run.state_type in BEGUN]
    for run in begun:
        await _set(client, run, _aborted(run))
    going_on = _going_on(runs)
    if going_on is not None:
        await _set(client, going_on, AwaitingRetry(scheduled_time=now, message="resumes after the scheduler was interrupted"))
    late = [run for run in runs if run.state_type == StateType.SCHEDULED]
    late.sort(key=lambda run: (run.run_count, run.next_scheduled_start_time or now))
    for run in late if going_on else late[:-1]:
        await _set(client, run, Cancelled(name="Missed", message="the scheduler did not run at that time; one later run takes the place of all that it missed"))


def _aborted(run: FlowRun) -> State:
    if run.state_type == StateType.CANCELLING:
        return Cancelled(message="cancelled; the scheduler was interrupted meanwhile")
    return Crashed(message="the scheduler was interrupted during this run")


def _going_on(runs: list[FlowRun]) -> FlowRun | None:
    """Returns the run to go on with: the latest that began, if it was interrupted. A cancelled one stays so."""
    # A run that found its place taken has a start time too, but was never counted as running.
    begun = [run for run in runs if run.run_count or run.state_type in (*BEGUN, StateType.CRASHED)]
    latest = max(begun, key=lambda run: run.start_time or run.expected_start_time or datetime.min.replace(tzinfo=UTC), default=None)
    return latest if latest is not None and latest.state_type in (StateType.RUNNING, StateType.PENDING, StateType.CRASHED) else None


async def _set(client: PrefectClient, run: FlowRun, state: State) -> None:
    await client.set_flow_run_state(run.id, state, force=True)


async def _runs(client: PrefectClient, plan: Plan, *types: StateType) -> list[FlowRun]:
    """Returns the deployment's latest runs whose time has come, of some types or of all."""
    try:
        deployment = await client.read_deployment_by_name(f"{FLOW}/{plan.name}")
    except ObjectNotFound:
        return []
    state = FlowRunFilterState(type=FlowRunFilterStateType(any_=list(types))) if types else None
    wanted = FlowRunFilter(state=state, expected_start_time=FlowRunFilterExpectedStartTime(before_=datetime.now(UTC)))
    this = DeploymentFilter(id=DeploymentFilterId(any_=[deployment.id]))
    return await client.read_flow_runs(flow_run_filter=wanted, deployment_filter=this, sort=FlowRunSort.EXPECTED_START_TIME_DESC, limit=_LATEST)


async def deploy(runner: Runner, client: PrefectClient, plan: Plan) -> UUID:
    """Tells the server what is run and when; what an earlier start told it is replaced."""
    await _forget_schedules(client, plan)
    schedule = schedule_of(plan.when)
    deployment: UUID = await runner.aadd_flow(
        retrain,
        name=plan.name,
        schedule=schedule,
        concurrency_limit=ConcurrencyLimitConfig(limit=1, collision_strategy=ConcurrencyLimitStrategy.CANCEL_NEW),
        description=f"`{plan}`\n\n{plan.when}; files below `{plan.storage}`",
        tags=["ddpm", plan.name],
    )
    return deployment


async def _forget_schedules(client: PrefectClient, plan: Plan) -> None:
    """Removes the schedules of an earlier start, which an update without a schedule would leave alone."""
    try:
        deployment = await client.read_deployment_by_name(f"{FLOW}/{plan.name}")
    except ObjectNotFound:
        return
    for schedule in await client.read_deployment_schedules(deployment.id):
        await client.delete_deployment_schedule(deployment.id, schedule.id)


async def follow_changes(client: PrefectClient, plan: Plan, deployment: UUID, folder: Location) -> None:
    """Asks for an attempt whenever the source has changed and no run is under way."""
    from workflows.schedule.changes import Seen, Watch

    watch, complained = Watch(plan, Seen.load(folder)), ""
    while plan.when.poll_s is not None:
        try:
            if await asyncio.to_thread(watch.is_due) and not await _runs(client, plan, *BEGUN, StateType.SCHEDULED):
                await client.create_flow_run_from_deployment(deployment, idempotency_key=watch.seen.key)
                watch.asked(folder)
            complained = ""
        except (DataError, OSError) as error:
            if str(error) != complained:
                get_logger("runner").warning("the source cannot be looked at: %s", error)
            complained = str(error)
        await asyncio.sleep(plan.when.poll_s)


async def run() -> None:
    """Serves the plan of this process' schedule until the process is ended."""
    plan, folder = this_plan(), Location(os.environ[MARK])
    # Prefect would take a run ten seconds early, and so find the place of the one before still taken.
    runner = Runner(name=plan.name, query_seconds=QUERY_S, prefetch_seconds=0, limit=None, pause_on_shutdown=False)
    async with get_client() as client:
        await reconcile(client, plan)
        deployment = await deploy(runner, client, plan)
        sys.stdout.write(f"ready    attempts are made {plan.when}\n")
        sys.stdout.flush()
        async with asyncio.TaskGroup() as group:
            group.create_task(runner.start())
            if plan.when.poll_s is not None:
                group.create_task(follow_changes(client, plan, deployment, folder))


if __name__ == "__main__":
    asyncio.run(run())
