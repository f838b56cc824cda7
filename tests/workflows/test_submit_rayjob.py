"""What a CronJob's pod does, against a server that speaks the few calls of Kubernetes' API that it needs, over TLS and with a token."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from kubernetes_api import PODS, RAYJOBS, TOKEN, Cluster, kubernetes_api
from support import ROOT

BATCH_JOB, UID = "ddpm-digits-29000000", "0b1c"
JOB, SECOND, THIRD = (f"{BATCH_JOB}{suffix}" for suffix in ("-run", "-2nd", "-3rd"))
HEADLINE = "digits #3: kept champion v1: FD (dct8) 0.42 (champion v1: 0.41 ± 0.1), 300 new images, 12 s"


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with kubernetes_api(tmp_path) as cluster:
        yield cluster


@pytest.fixture
def start(cluster: Cluster, tmp_path: Path):
    """Returns a function that starts the module as the pod does, with changes to its environment."""
    template = {"apiVersion": "ray.io/v1", "kind": "RayJob", "spec": {"entrypoint": "true"}}
    metadata = {"name": "ddpm-digits", "namespace": "elsewhere", "labels": {"app.kubernetes.io/instance": "ddpm-digits"}}
    (tmp_path / "rayjob.yaml").write_text(yaml.safe_dump(template | {"metadata": metadata}))

    def run(*arguments: str, **changes: str) -> subprocess.Popen[str]:
        pod = cluster.env | {"JOB_NAME": BATCH_JOB, "JOB_UID": UID}
        environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "NO_PROXY": "*"} | pod | changes
        options = ["--template", str(tmp_path / "rayjob.yaml"), "--account", str(cluster.account), "--poll", "0.05", "--patience", "1"]
        command = [sys.executable, "-W", "error", "-m", "workflows.submit_rayjob", *options, *arguments]
        return subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    return run


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def test_a_tick_makes_one_rayjob_named_after_its_batch_job_and_waits_for_it(cluster: Cluster, start):
    cluster.states = [("", ""), ("Initializing", ""), ("Running", "RUNNING"), ("Running", "RUNNING"), ("Complete", "SUCCEEDED")]
    cluster.logs[JOB] = [
        "digits #3: failed: in an earlier pod\nddpm retrain: exit code 1\n",
        f"step 7 of 12\n{HEADLINE}\nddpm retrain: exit code 10\nJob succeeded\n",
    ]
    code, out, err = finish(start("--wait"))
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        f"RayJob {JOB} is made",
        f"RayJob {JOB}: Initializing",
        f"RayJob {JOB}: Running, job RUNNING",
        f"RayJob {JOB}: Complete, job SUCCEEDED",
        f"{HEADLINE} (exit code 10)",
    ]
    assert list(cluster.rayjobs) == [JOB]
    assert cluster.rayjobs[JOB]["metadata"]["ownerReferences"] == [{"apiVersion": "batch/v1", "kind": "Job", "name": BATCH_JOB, "uid": UID}]
    assert JOB != BATCH_JOB, "KubeRay submits by a batch Job of the RayJob's name"
    assert "namespace" not in cluster.rayjobs[JOB]["metadata"]
    assert cluster.calls[:2] == [f"GET {RAYJOBS}?labelSelector=app.kubernetes.io/instance%3Dddpm-digits", f"POST {RAYJOBS}"]


def test_a_second_pod_of_the_same_tick_follows_the_rayjob_that_is_there(cluster: Cluster, start):
    cluster.rayjobs[JOB] = {"metadata": {"name": JOB}, "status": {"jobDeploymentStatus": "Running"}}
    cluster.states = [("Running", "RUNNING"), ("Complete", "SUCCEEDED")]
    code, out, _ = finish(start("--wait"))
    assert code == 0
    assert f"RayJob {JOB} is there already; following it" in out
    assert len(cluster.rayjobs) == 1


def failed(code: int, log: str = "") -> tuple[str, str, str]:
    """The state of a RayJob whose driver failed, with the message that Ray writes then."""
    return "Failed", "FAILED", f"Job entrypoint command failed with exit code {code}, last available logs (truncated to 20,000 chars):\n{log}"


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        (failed(12, "digits #4: stopped: retrain.max_label_drift=0.3 is exceeded\nddpm retrain: exit code 12\n"), 12),
        (failed(2, "error: data.source=photos is no folder\n"), 2),
        (failed(1), 1),
        (("Complete", "STOPPED"), 1),
        (("ValidationFailed", ""), 1),
        (failed(137), 75),
        (failed(-9), 75),
        (("Failed", "FAILED", "Unexpected error occurred: the job supervisor died"), 75),
        (("Failed", ""), 75),
    ],
    ids=lambda value: str(value)[:60],
)
def test_the_exit_code_is_the_driver_s_and_another_where_the_cluster_was_lost(cluster: Cluster, start, end: tuple[str, ...], expected: int):
    cluster.states = [("Running", "RUNNING"), end]
    code, out, _ = finish(start("--wait"))
    assert code == expected
    assert f"RayJob {JOB}: {end[0]}" in out
    assert out.endswith("resumes it\n") == (code == 75)
    if expected == 12:
        assert out.splitlines()[-1] == "digits #4: stopped: retrain.max_label_drift=0.3 is exceeded (exit code 12)"


def test_the_next_pod_of_a_tick_makes_another_rayjob_where_the_cluster_was_lost_and_only_there(cluster: Cluster, start):
    cluster.states = [("Failed", "")]
    assert finish(start("--wait"))[0] == 75
    cluster.states = [failed(137)]
    assert finish(start("--wait"))[0] == 75
    cluster.states = [failed(12)]
    assert finish(start("--wait"))[0] == 12
    code, out, _ = finish(start("--wait"))
    assert (code, list(cluster.rayjobs)) == (12, [JOB, SECOND, THIRD])
    assert f"RayJob {THIRD} is there already; following it" in out
    cluster.rayjobs[THIRD]["status"] = {"jobDeploymentStatus": "Failed"}
    assert finish(start("--wait"))[0] == 75
    assert len(cluster.rayjobs) == 3


def test_a_log_that_cannot_be_read_fails_nothing(cluster: Cluster, start):
    cluster.states = [("Complete", "SUCCEEDED")]
    code, out, err = finish(start("--wait"))
    assert (code, err) == (0, "")
    assert out.splitlines()[-1] == f"the log of RayJob {JOB} does not say what became of the attempt"
    cluster.forbidden = PODS
    code, out, err = finish(start("--wait"))
    assert (code, err) == (0, "")
    assert f"the log of RayJob {JOB} cannot be read: GET https://127.0.0.1:{cluster.port}{PODS}?" in out


def test_a_tick_starts_nothing_while_the_rayjob_of_an_earlier_one_runs(cluster: Cluster, start):
    cluster.rayjobs["ddpm-digits-28999999-run"] = {"metadata": {"name": "ddpm-digits-28999999-run"}, "status": {"jobDeploymentStatus": "Running"}}
    cluster.rayjobs["ddpm-digits-28999998-run"] = {"metadata": {"name": "ddpm-digits-28999998-run"}, "status": {"jobDeploymentStatus": "Complete"}}
    code, out, _ = finish(start("--wait"))
    assert (code, out) == (0, "RayJob ddpm-digits-28999999-run of an earlier tick still runs; nothing is started\n")
    assert JOB not in cluster.rayjobs


def test_without_wait_the_pod_ends_once_the_rayjob_is_made(cluster: Cluster, start):
    code, out, _ = finish(start())
    assert (code, out) == (0, f"RayJob {JOB} is made\n")


def test_sigterm_leaves_the_rayjob_alive(cluster: Cluster, start):
    cluster.states = [("Running", "RUNNING")]
    process = start("--wait")
    assert cluster.looked.wait(60)
    process.send_signal(signal.SIGTERM)
    code, out, err = finish(process)
    assert (code, err) == (143, "")
    assert "the RayJob goes on" in out
    assert JOB in cluster.rayjobs
    assert {call.partition(" ")[0] for call in cluster.calls} == {"GET", "POST"}


def test_an_api_that_stumbles_is_asked_again(cluster: Cluster, start):
    cluster.failures = [503, 429]
    cluster.states = [("Complete", "SUCCEEDED")]
    assert finish(start("--wait"))[0] == 0


def test_a_rayjob_that_somebody_deleted_is_told(cluster: Cluster, start):
    cluster.failures = []
    process = start("--wait")
    assert cluster.looked.wait(60)
    cluster.rayjobs.clear()
    code, _, err = finish(process)
    assert code == 2
    assert err == f"error: RayJob {JOB} is gone: somebody deleted it\n"


@pytest.mark.parametrize(
    ("failures", "changes", "message"),
    [
        ([403], {}, "was refused (HTTP 403"),
        ([500] * 50, {}, "does not answer for 1 s (HTTP 500"),
        ([], {"KUBERNETES_SERVICE_PORT": "9"}, "does not answer for 1 s (ConnectionError)"),
        ([], {"JOB_NAME": ""}, "JOB_NAME or JOB_UID is not set"),
        ([], {"KUBERNETES_SERVICE_HOST": ""}, "run this in a pod that has a service account"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(cluster: Cluster, start, failures: list[int], changes: dict[str, str], message: str):
    cluster.failures = failures
    code, out, err = finish(start("--wait", **changes))
    assert (code, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1
    assert TOKEN not in err


def test_another_certificate_is_not_trusted(cluster: Cluster, start, tmp_path: Path):
    import certifi

    (tmp_path / "account" / "ca.crt").write_text(Path(certifi.where()).read_text())
    code, _, err = finish(start("--wait"))
    assert code == 2
    assert "SSLError" in err
    assert cluster.calls == []


def test_the_pod_s_command_runs_from_the_zip_alone(cluster: Cluster, start, tmp_path: Path):
    from cluster.package import pack

    (tmp_path / "ddpm.zip").write_bytes(pack("", "abc"))
    code, out, err = finish(start(PYTHONPATH=str(tmp_path / "ddpm.zip")))
    assert (code, out) == (0, f"RayJob {JOB} is made\n"), err
