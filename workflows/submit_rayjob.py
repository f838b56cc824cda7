"""Makes a RayJob and waits for it: what the CronJob's pod runs, so that the pod lives as long as the training.

The image holds `requests` already, through Ray and MLflow; three calls do not need the official client and its 30 MB.
"""

import argparse
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any
from urllib.parse import quote

import requests
import yaml

from workflows.outcome import LoggedOutcome, said_in

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
INSTANCE_LABEL, JOB_LABEL = "app.kubernetes.io/instance", "batch.kubernetes.io/job-name"
ENDED = ("Complete", "Failed", "ValidationFailed")
SUFFIXES = ("-run", "-2nd", "-3rd")
"""Of a tick's RayJobs: the first, and those that go on where the cluster of the one before was lost."""
LOG_LINES = 100
KILLED = 128
"""Exit codes above are those of a driver that was ended by a signal."""
TIMEOUT_S = 30
PATIENCE_S, LOG_PATIENCE_S = 600, 30
SUCCESS, FAILURE, USER_ERROR, CLUSTER_LOST, TERMINATED = 0, 1, 2, 75, 143  # the CronJob's podFailurePolicy knows the last two

Tree = dict[str, Any]


class SubmitError(Exception):
    """Raised when the RayJob can be neither made nor followed. The message says what would be right."""


@dataclass(frozen=True)
class Api:
    """The RayJobs of one namespace, through Kubernetes' API.

    Attributes:
        server: its address.
        account: folder with the service account's token and the cluster's certificate.
        patience_s: seconds for which an API that does not answer is asked again.
    """

    server: str
    namespace: str
    account: Path
    patience_s: float = PATIENCE_S

    @property
    def rayjobs(self) -> str:
        """Address of all RayJobs."""
        return f"{self.server}/apis/ray.io/v1/namespaces/{self.namespace}/rayjobs"

    @property
    def pods(self) -> str:
        """Address of all pods."""
        return f"{self.server}/api/v1/namespaces/{self.namespace}/pods"

    def create(self, rayjob: Tree) -> bool:
        """Makes the RayJob; returns whether it was not there yet."""
        return self._call("POST", self.rayjobs, rayjob, expected=(requests.codes.conflict,)).status_code != requests.codes.conflict

    def get(self, name: str) -> Tree:
        answer = self._call("GET", f"{self.rayjobs}/{name}", expected=(requests.codes.not_found,))
        if answer.status_code == requests.codes.not_found:
            raise SubmitError(f"RayJob {name} is gone: somebody deleted it")
        return answer.json()

    def of_instance(self, instance: str) -> list[Tree]:
        return self._list(self.rayjobs, f"{INSTANCE_LABEL}={instance}")

    def log(self, name: str) -> str:
        """Returns the end of what the driver of a RayJob wrote, as the pod shows it by which KubeRay submitted; nothing where there is none."""
        pods = self._list(self.pods, f"{JOB_LABEL}={name}")
        if not pods:
            return ""
        latest = max(pods, key=lambda pod: pod["metadata"].get("creationTimestamp") or "")["metadata"]["name"]
        return self._call("GET", f"{self.pods}/{latest}/log?tailLines={LOG_LINES}").content.decode(errors="replace")

    def _list(self, url: str, selector: str) -> list[Tree]:
        return self._call("GET", f"{url}?labelSelector={quote(selector)}").json()["items"]

    def _call(self, method: str, url: str, body: Tree | None = None, expected: tuple[int, ...] = ()) -> requests.Response:
        """Calls until the API answers; no answer, `429` and `5xx` are asked again, other failures than the expected ones are final."""
        give_up = time.monotonic() + self.patience_s
        while True:
            try:
                answer = self._ask(method, url, body)
            except (requests.ConnectionError, requests.Timeout) as error:
                problem = type(error).__name__
            else:
                if answer.ok or answer.status_code in expected:
                    return answer
                problem = f"HTTP {answer.status_code}: {answer.text[:500]}"
                if answer.status_code < requests.codes.server_error and answer.status_code != requests.codes.too_many_requests:
                    raise SubmitError(f"{method} {url} was refused ({problem}); see the Role of this pod's service account, and that KubeRay is installed")
            if time.monotonic() > give_up:
                raise SubmitError(f"{url} does not answer for {self.patience_s:.0f} s ({problem}); the RayJob goes on without this pod")
            time.sleep(min(5.0, self.patience_s / 10))

    def _ask(self, method: str, url: str, body: Tree | None) -> requests.Response:
        token = (self.account / "token").read_text(encoding="utf-8").strip()  # read every time, for it is renewed
        headers = {"Authorization": f"Bearer {token}"}
        return requests.request(method, url, json=body, headers=headers, verify=str(self.account / "ca.crt"), timeout=TIMEOUT_S, allow_redirects=False)


def connect(environ: Mapping[str, str], account: Path, patience_s: float = PATIENCE_S) -> Api:
    """Returns the API as a pod finds it.

    Raises:
        SubmitError: outside a pod.
    """
    host, port = environ.get("KUBERNETES_SERVICE_HOST"), environ.get("KUBERNETES_SERVICE_PORT", "443")
    if not host or not (account / "token").is_file():
        raise SubmitError(f"KUBERNETES_SERVICE_HOST or {account}/token is missing; run this in a pod that has a service account")
    namespace = (account / "namespace").read_text(encoding="utf-8").strip()
    host = f"[{host}]" if ":" in host else host
    return Api(f"https://{host}:{port}", namespace, account, patience_s)


def prepare(template: Tree, environ: Mapping[str, str]) -> Tree:
    """Returns the RayJob of this tick, all but its suffix: named after the batch Job that runs this pod, and removed with it by the CronJob's history limits.

    Raises:
        SubmitError: if the pod was not told its Job.
    """
    name, uid = environ.get("JOB_NAME"), environ.get("JOB_UID")
    if not name or not uid:
        raise SubmitError("JOB_NAME or JOB_UID is not set; take both from the labels batch.kubernetes.io/job-name and controller-uid of the pod")
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": name, "uid": uid}
    metadata = {key: value for key, value in template["metadata"].items() if key != "namespace"}
    return template | {"metadata": metadata | {"name": name, "ownerReferences": [owner]}}


def submit(api: Api, rayjob: Tree, *, wait: bool, poll_s: float, say: Callable[[str], None]) -> int:
    """Makes the RayJob, or goes on with the one that is there, and follows it; returns the exit code."""
    known = {other["metadata"]["name"]: other for other in api.of_instance(rayjob["metadata"]["labels"][INSTANCE_LABEL])}
    name = _next_name(rayjob["metadata"]["name"], known)
    running = [other for other, found in known.items() if _state(found)[0] not in ENDED]
    if running and name not in known:
        say(f"RayJob {running[0]} of an earlier tick still runs; nothing is started")
        return SUCCESS
    rayjob = rayjob | {"metadata": rayjob["metadata"] | {"name": name}}
    say(f"RayJob {name} is made" if api.create(rayjob) else f"RayJob {name} is there already; following it")
    return _follow(api, name, poll_s, say) if wait else SUCCESS


def _next_name(tick: str, known: Mapping[str, Tree]) -> str:
    """Returns the name of a tick's RayJob: the first that is not there yet, or whose cluster was not lost.

    Each has a suffix, for KubeRay submits by a batch Job of the RayJob's own name.
    """
    names = [f"{tick}{suffix}" for suffix in SUFFIXES]
    return next((name for name in names if name not in known or not _is_lost(known[name])), names[-1])


def _is_lost(rayjob: Tree) -> bool:
    """Tells whether a RayJob failed before its driver could end by itself, so that another cluster may do better."""
    code = _exit_code(rayjob)
    return _state(rayjob)[0] == "Failed" and not (code is not None and 0 < code < KILLED)


def _exit_code(rayjob: Tree) -> int | None:
    """Returns the exit code of the driver, as Ray tells it where it is not 0."""
    found = re.search(r"failed with exit code (-?\d+)", (rayjob.get("status") or {}).get("message") or "")
    return int(found[1]) if found else None


def _follow(api: Api, name: str, poll_s: float, say: Callable[[str], None]) -> int:
    seen = ("", "")
    while True:
        rayjob = api.get(name)
        state = _state(rayjob)
        if state != seen:
            say(f"RayJob {name}: {state[0] or 'waiting for the operator'}{f', job {state[1]}' if state[1] else ''}")
            seen = state
        if state[0] in ENDED:
            return _end(api, rayjob, say)
        time.sleep(poll_s)


def _end(api: Api, rayjob: Tree, say: Callable[[str], None]) -> int:
    """Says how a RayJob ended, last what became of the attempt, and returns the exit code: 0 where nothing failed, else the driver's."""
    name, message = rayjob["metadata"]["name"], (rayjob["status"].get("message") or "").strip()
    if message:
        say(f"RayJob {name}: {message}")
    said = said_in(message) or _said(api, name, say)
    if said is not None:
        say(f"{said.line} (exit code {said.code})")
    if _state(rayjob) == ("Complete", "SUCCEEDED"):
        return SUCCESS
    if _is_lost(rayjob):
        say(f"RayJob {name} was lost before the attempt could end; the next pod of this Job, or the next tick, resumes it")
        return CLUSTER_LOST
    return _exit_code(rayjob) or FAILURE


def _said(api: Api, name: str, say: Callable[[str], None]) -> LoggedOutcome | None:
    """Returns what the attempt said at its end; a log that cannot be read fails nothing."""
    try:
        said = said_in(replace(api, patience_s=min(LOG_PATIENCE_S, api.patience_s)).log(name))
    except SubmitError as error:
        say(f"the log of RayJob {name} cannot be read: {error}")
        return None
    if said is None:
        say(f"the log of RayJob {name} does not say what became of the attempt")
    return said


def _state(rayjob: Tree) -> tuple[str, str]:
    status = rayjob.get("status") or {}
    return status.get("jobDeploymentStatus", ""), status.get("jobStatus", "")


def _read(template: Path) -> Tree:
    try:
        rayjob = yaml.safe_load(template.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise SubmitError(f"--template {template} cannot be read ({error}); name the RayJob that `ddpm manifest cronjob` put into its ConfigMap") from error
    if not isinstance(rayjob, dict) or rayjob.get("kind") != "RayJob":
        raise SubmitError(f"--template {template} is no RayJob; name the RayJob that `ddpm manifest cronjob` put into its ConfigMap")
    return rayjob


def _leave(signum: int, frame: FrameType | None) -> None:
    print("this pod was asked to stop; the RayJob goes on, and the next pod of this Job follows it", flush=True)
    sys.exit(TERMINATED)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code: 0 for an attempt that did not fail, 75 for a lost cluster, else the driver's, 1 without one; 2 for a mistake."""
    parser = argparse.ArgumentParser(prog="python -m workflows.submit_rayjob", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--template", type=Path, required=True, help="YAML file of the RayJob")
    parser.add_argument("--wait", action="store_true", help="follow the RayJob to its end")
    parser.add_argument("--poll", type=float, default=10.0, help="seconds between two looks")
    parser.add_argument("--patience", type=float, default=PATIENCE_S, help="seconds for which an API that does not answer is asked again")
    parser.add_argument("--account", type=Path, default=ACCOUNT, help="folder with token, ca.crt and namespace")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, _leave)
    try:
        rayjob = prepare(_read(options.template), os.environ)
        api = connect(os.environ, options.account, options.patience)
        return submit(api, rayjob, wait=options.wait, poll_s=options.poll, say=lambda line: print(line, flush=True))
    except SubmitError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
