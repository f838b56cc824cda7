"""Ray Train, with no more processes than there is use for.

Ray Train runs its controller in an actor, beside one that outlives it to give its workers' places back, one that hands out Ray Datasets, one that
asks an autoscaler for machines, and one that workers meet in. On a Ray of our own none of them has anything to do: the command itself is the
controller, and nothing outlives it. Each is a Python process that starts after the one before, and together they took half the time to the first step.

What is taken from Ray's internals is all here; Ray's version is pinned to a minor one.
"""

import asyncio
import logging
import threading
from collections.abc import Coroutine, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from typing import Any

import ray
from ray.train import Result
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.metrics import ControllerMetricsCallback, WorkerMetricsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.callback import RayTrainCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group import Worker, WorkerGroup, worker_group
from ray.train.v2._internal.logging.logging import PlainRayHandler
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

_LEAVE_S = 2.0
_NEEDLESS = (ControllerMetricsCallback, DatasetsCallback, PlacementGroupCleanerCallback, WorkerMetricsCallback)


def train_loop(config: dict[str, Any]) -> str:
    """Runs on every worker; the module that trains is imported there alone, for it brings torch."""
    from pipeline.training.loop import train_loop

    return train_loop(config)


class InProcessTrainer(DataParallelTrainer):
    """A trainer whose controller is this process: for a Ray of our own and a fixed number of workers."""

    def _create_default_callbacks(self) -> list[RayTrainCallback]:
        return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, _NEEDLESS)]

    def _initialize_and_run_controller(self, **options: Any) -> Result:
        options["scaling_policy"] = _LocalWorkers(self.train_run_context.scaling_config)
        with _without_synchronization_actor():
            return _interruptible(_control(options))


async def _control(options: Mapping[str, Any]) -> Result:
    controller = _Controller(**options)
    _to_files_only(logging.getLogger("ray.train"))
    await controller.run()
    return controller.get_result()


def _interruptible(work: Coroutine[Any, Any, Result]) -> Result:
    """Returns what some work results in, done in another thread: while it asks a head that is gone, nothing can interrupt it."""
    loop, outcome = asyncio.new_event_loop(), Future[Result]()
    task = loop.create_task(work)

    def run() -> None:
        try:
            outcome.set_result(loop.run_until_complete(task))
        except BaseException as error:  # whoever waits raises it
            outcome.set_exception(error)
        finally:
            loop.close()

    thread = threading.Thread(target=run, name="controller", daemon=True)
    thread.start()
    try:
        return outcome.result()
    except KeyboardInterrupt:
        with suppress(RuntimeError):  # it has ended just now
            loop.call_soon_threadsafe(task.cancel)
        thread.join(_LEAVE_S)  # longer only where it waits for a head that is gone, or for workers that start
        raise


class _LocalWorkers(FixedScalingPolicy):
    """Asks no autoscaler for machines."""

    def after_controller_start(self, train_run_context: Any) -> None:
        return

    def _maybe_send_resource_request(self) -> None:
        return


class _Workers(WorkerGroup):
    """Workers that need not be told what their machine's environment says, so that processes which run already can be they."""

    @staticmethod
    def _get_worker_runtime_env(custom_runtime_env: Any) -> dict[str, Any]:
        return dict(custom_runtime_env)

    def _init_train_context_on_workers(self, workers: list[Worker], sync_actor: Any, train_context_args: dict[str, list[Any]]) -> None:
        tasks = [
            worker.actor.init_train_context.remote(
                train_run_context=self._train_run_context,
                distributed_context=worker.distributed_context,
                synchronization_actor=sync_actor,
                storage_context=self._storage_context,
                worker_callbacks=self._worker_callbacks_to_propagate,
                controller_actor=None,  # which workers ask for checkpoints that they reported to Ray, and ours report none
                **{name: values[index] for name, values in train_context_args.items()},
            )
            for index, worker in enumerate(workers)
        ]
        ray.get(tasks)
        self._decorate_worker_log_file_paths(workers)


class _Controller(TrainController):
    worker_group_cls = _Workers


@contextmanager
def _without_synchronization_actor() -> Iterator[None]:
    """Keeps groups of workers that start during a block from starting a process to meet in: ours meet in their process group."""
    meeting_place = worker_group.SynchronizationActor
    worker_group.SynchronizationActor = _NoActor(meeting_place)  # pyrefly: ignore[bad-assignment]
    try:
        yield
    finally:
        worker_group.SynchronizationActor = meeting_place


class _NoActor:
    """An actor that waits for ever for something no machine has, and so takes no process."""

    def __init__(self, kind: Any) -> None:
        self._kind = kind

    def options(self, **_: Any) -> Any:
        return self._kind.options(resources={"ddpm-never": 1})


def _to_files_only(logger: logging.Logger) -> None:
    """Keeps what the controller logs off the terminal; it stays among Ray's logs."""
    for handler in [handler for handler in logger.handlers if isinstance(handler, PlainRayHandler)]:
        logger.removeHandler(handler)
