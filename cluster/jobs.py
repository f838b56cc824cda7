"""Ray's Job Submission API: submit an entrypoint, find it again, follow its log, stop it."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from .config import ClusterError
from .connect import use_token
from .nodes import Node, called

NAME, ATTEMPT, CONFIG = "ddpm.name", "ddpm.attempt", "ddpm.config"
RUNNING = ("PENDING", "RUNNING")
SUBMITS, RECONNECTS, RECONNECT_S, SILENCE_S, STOP_S = 4, 20, 3.0, 120.0, 90.0
# Each sets its own level when it is imported.
_LINES_OF_RAY = ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk", "ray._private.runtime_env.packaging")
_EXIT_CODES = {"SUCCEEDED": 0, "STOPPED": 130}


@dataclass(frozen=True)
class Job:
    """One attempt of a run on a cluster.

    Attributes:
        id: Ray's submission id.
        config_digest: of the settings that decide the run's result.
        started_ms: since the epoch, None before the start.
        exit_code: of the driver, None while it runs or where it has none.
    """

    id: str
    name: str
    attempt: int
    status: str
    config_digest: str
    message: str
    started_ms: int | None
    ended_ms: int | None
    exit_code: int | None

    @property
    def is_running(self) -> bool:
        """Whether it waits or runs."""
        return self.status in RUNNING

    @property
    def outcome(self) -> int:
        """The exit code that a command which followed it ends with."""
        if self.status in _EXIT_CODES:
            return _EXIT_CODES[self.status]
        return self.exit_code or 1


@contextlib.contextmanager
def answering(address: str) -> Iterator[None]:
    """Turns what Ray and HTTP raise inside a block into a ClusterError of one line."""
    import requests
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError as error:
        has_token = use_token()
        wrong = "refuses the token given" if has_token else "asks for a token, and there is none"
        raise ClusterError(
            f"--address {address} {wrong}; set RAY_AUTH_TOKEN_PATH to the file that holds the cluster's token, or RAY_AUTH_TOKEN to the token"
        ) from error
    except (TimeoutError, ConnectionError, requests.RequestException) as error:
        raise ClusterError(f"--address {address} does not answer ({_short(error)}); name the address of a Ray dashboard, such as http://HEAD:8265") from error
    except (RuntimeError, ValueError, KeyError) as error:
        raise ClusterError(f"--address {address} cannot do this: {_short(error)}") from error


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


class JobServer:
    """The job server of a Ray cluster.

    Raises:
        ClusterError: if it does not answer, or refuses the token.
    """

    def __init__(self, address: str) -> None:
        if not address.startswith(("http://", "https://")):
            raise ClusterError(f"--address {address} is not a web address; use that of the Ray dashboard, such as http://HEAD:8265")
        self.address = address.rstrip("/")
        use_token()
        with answering(address):
            from ray.job_submission import JobSubmissionClient

            for name in _LINES_OF_RAY:
                logging.getLogger(name).setLevel(logging.WARNING)
            _probe(self.address)
            self._client = JobSubmissionClient(self.address)
        _check_version(self.address, self._client._server_ray_version)

    def page(self, job_id: str) -> str:
        """Returns the address of a job's page in the Ray dashboard."""
        return f"{self.address}/#/jobs/{job_id}"

    def nodes(self) -> list[Node]:
        """Returns the nodes that are alive."""
        from ray.util.state import list_nodes

        with answering(self.address):
            states = list_nodes(address=self.address, filters=[("state", "=", "ALIVE")], limit=10_000, timeout=20)
            return [
                Node(state.node_id, called(state.node_name, state.node_ip), dict(state.resources_total or {}), dict(state.labels or {})) for state in states
            ]

    def jobs(self, name: str | None = None) -> list[Job]:
        """Returns the jobs that this command submitted, the latest first."""
        with answering(self.address):
            found = [_job(details) for details in self._client.list_jobs() if details and NAME in (details.metadata or {})]
        return sorted((job for job in found if name in (None, job.name)), key=lambda job: (-(job.started_ms or 2**62), job.name, -job.attempt))

    def latest(self, name: str) -> Job | None:
        """Returns the latest attempt of a run, None if there was none."""
        return max(self.jobs(name), key=lambda job: job.attempt, default=None)

    def find(self, name: str) -> Job:
        """Returns the latest attempt of a run, which may also be named by its submission id.

        Raises:
            ClusterError: if the cluster knows none.
        """
        every = self.jobs()
        jobs = [job for job in every if name in (job.id, job.name)]
        if not jobs:
            known = ", ".join(sorted({job.name for job in every})) or "none"
            raise ClusterError(f"{self.address} knows no run {name}; it knows {known}; ddpm jobs list shows them")
        return max(jobs, key=lambda job: job.attempt)

    def submit(self, entrypoint: str, *, name: str, attempt: int, config_digest: str, runtime_env: Mapping[str, Any]) -> str:
        """Submits an attempt of a run and returns its submission id, which follows from both; one that is already there is left as it is."""
        job_id = f"ddpm-{name}-{attempt}"
        metadata = {NAME: name, ATTEMPT: str(attempt), CONFIG: config_digest, "job_name": name}
        with answering(self.address):
            for _ in range(SUBMITS):
                try:
                    return self._client.submit_job(entrypoint=entrypoint, submission_id=job_id, runtime_env=dict(runtime_env), metadata=metadata)
                except RuntimeError as error:
                    if "already exists" in str(error):
                        return job_id
                    # A cluster that has just started answers before its agents do.
                    if "No available agent" not in str(error):
                        raise
                time.sleep(RECONNECT_S)
            raise RuntimeError("no node takes jobs; look at dashboard_agent.log on its head")

    def follow(self, job_id: str, write: Callable[[str], None]) -> Job:
        """Writes a job's log as it grows, from its beginning, until the job ends; a lost connection is taken up again."""
        import aiohttp

        log, lost = _Log(write), 0
        while True:
            try:
                asyncio.run(self._tail(job_id, log))
                lost = 0
            except TimeoutError:
                pass
            except (RuntimeError, OSError, aiohttp.ClientError) as error:
                lost += 1
                if lost > RECONNECTS:
                    raise ClusterError(f"--address {self.address} was lost while following {job_id} ({_short(error)}); the job keeps running") from error
            with contextlib.suppress(ClusterError):
                job = self.get(job_id)
                if not job.is_running:
                    return job
            time.sleep(RECONNECT_S)

    async def _tail(self, job_id: str, log: "_Log") -> None:
        """Raises TimeoutError after a long silence: a connection that was cut off does not tell."""
        log.rewind()
        chunks = self._client.tail_job_logs(job_id)
        with contextlib.suppress(StopAsyncIteration):
            while True:
                log.add(await asyncio.wait_for(anext(chunks), SILENCE_S))

    def log(self, job_id: str) -> str:
        """Returns a job's log as it is now."""
        with answering(self.address):
            return self._client.get_job_logs(job_id)

    def get(self, job_id: str) -> Job:
        """Returns a job by its submission id."""
        with answering(self.address):
            return _job(self._client.get_job_info(job_id))

    def stop(self, job_id: str) -> Job:
        """Stops a job and returns it when it has ended."""
        with answering(self.address):
            self._client.stop_job(job_id)
        until = time.monotonic() + STOP_S
        while (job := self.get(job_id)).is_running and time.monotonic() < until:
            time.sleep(0.5)
        return job


class _Log:
    """A log that is sent from its beginning with every connection, and written once."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write, self._written, self._seen = write, 0, 0

    def rewind(self) -> None:
        self._seen = 0

    def add(self, text: str) -> None:
        fresh = text[max(0, self._written - self._seen) :]
        self._seen += len(text)
        if fresh:
            self._write(fresh)
        self._written = max(self._written, self._seen)


def _probe(address: str) -> None:
    """Fails within seconds where nothing answers; Ray's own client would wait for minutes."""
    import requests

    requests.get(f"{address}/api/version", timeout=8)


def _check_version(address: str, theirs: str | None) -> None:
    """Raises ClusterError where the cluster's Ray is another than this one: the two do not understand each other's workers."""
    ours = version("ray")
    if theirs and theirs.split(".")[:2] != ours.split(".")[:2]:
        raise ClusterError(f"--address {address} runs Ray {theirs}, and this project Ray {ours}; give the cluster's nodes the packages of requirements.lock")


def _job(details: Any) -> Job:
    metadata: Mapping[str, str] = details.metadata or {}
    return Job(
        id=details.submission_id,
        name=metadata.get(NAME, ""),
        attempt=int(metadata.get(ATTEMPT, 0)),
        status=str(getattr(details.status, "value", details.status)),
        config_digest=metadata.get(CONFIG, ""),
        message=details.message or "",
        started_ms=details.start_time,
        ended_ms=details.end_time,
        exit_code=details.driver_exit_code,
    )
