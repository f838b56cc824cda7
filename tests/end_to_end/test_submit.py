"""A run on a real Ray cluster of two nodes, submitted from a process that may go away, with models in an MLflow server."""

import base64
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray_nodes
import yaml
from kubernetes_api import Cluster, kubernetes_api
from support import TINY, Finished, ddpm, ddpm_command

from components.storage import Location
from pipeline.tracking import git_commit

SECRETS = {"MLFLOW_TRACKING_PASSWORD": "planted-Secret-91c4", "AWS_SECRET_ACCESS_KEY": "planted-Secret-7f3a"}
KEYS_OF_NODES = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
NO_TOKEN = {"HOME": "/nonexistent"}


@dataclass(frozen=True)
class Site:
    """A cluster and what belongs to it."""

    nodes: ray_nodes.RayNodes
    mlflow: str
    folder: Path

    @property
    def storage(self) -> str:
        return f"cluster.storage={self.folder / 'storage'}"

    @property
    def env(self) -> dict[str, str]:
        return ray_nodes.environment(self.nodes.env | {"MLFLOW_TRACKING_URI": self.mlflow} | SECRETS)

    @contextlib.contextmanager
    def start(self, *arguments: str) -> Iterator["Started"]:
        """Runs a command that is killed when the block ends, if it still runs."""
        log = self.folder / f"started-{time.monotonic_ns()}.log"
        command = ddpm_command(*arguments, "--address", self.nodes.dashboard_url)
        options: dict[str, Any] = {"env": self.env, "cwd": self.folder, "preexec_fn": heed_ctrl_c}
        with log.open("w") as out, subprocess.Popen(command, stdout=out, stderr=out, **options) as process:
            try:
                yield Started(process, log)
            finally:
                process.kill()

    def ddpm(self, *arguments: str, env: dict[str, str] | None = None, address: str = "") -> Finished:
        command = ddpm_command(*arguments, "--address", address or self.nodes.dashboard_url)
        done = subprocess.run(command, env=self.env if env is None else env, cwd=self.folder, capture_output=True, text=True, timeout=300, check=False)
        return Finished(done.returncode, done.stdout, done.stderr)


def heed_ctrl_c() -> None:
    """Undoes what a shell does to commands that it starts in the background: they ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@dataclass(frozen=True)
class Started:
    """A command in progress, and what it has written."""

    process: "subprocess.Popen[Any]"
    log: Path

    def wait_for(self, condition: Callable[[str], bool], timeout: float = 200) -> str:
        """Returns what the command had written when the condition came true."""
        deadline = time.monotonic() + timeout
        while not condition(text := self.log.read_text()):
            assert self.process.poll() is None, text
            assert time.monotonic() < deadline, text
            time.sleep(0.1)
        return text


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    with ray_nodes.mlflow_server(folder / "mlflow") as mlflow, ray_nodes.start_nodes(folder, cpus=(0, 1, 1), in_namespaces=False, env=KEYS_OF_NODES) as nodes:
        yield Site(nodes, mlflow, folder)


@pytest.fixture(scope="module")
def submitted(site: Site) -> dict[str, Any]:
    """Submits, follows, kills the submitting process once training has begun, comes back; returns the receipts by stage."""
    with site.start("submit", "digits", site.storage, *TINY, "--follow") as following:
        following.wait_for(lambda text: "train for the first time" in text)
    again = site.ddpm("submit", "digits", site.storage, *TINY)
    assert again.code == 0, again.stderr
    assert "digits is in progress already; attached to it\njob     ddpm-digits-1\n" in again.stdout
    back = site.ddpm("jobs", "logs", "digits")
    assert back.code == 0, back.stdout + back.stderr
    assert "ddpm-digits version 1, champion" in back.stdout
    receipts = (site.folder / "storage" / "runs" / "digits").glob("*/*/receipt.json")
    return {path.parent.parent.name: json.loads(path.read_text()) for path in receipts} | {"log": back.stdout}


def test_each_node_that_trains_has_system_metrics_of_its_own(site: Site, submitted: dict[str, Any]):
    import mlflow

    run = mlflow.MlflowClient(tracking_uri=site.mlflow).get_run(submitted["register"]["mlflow_run_id"])
    nodes = {name.split("/")[1] for name in run.data.metrics if name.startswith("system/")}
    assert nodes == {"0", "1"}
    assert {"system/0/cpu_utilization_percentage", "system/1/cpu_utilization_percentage"} <= set(run.data.metrics)


def test_the_run_ends_without_the_process_that_submitted_it_and_is_registered(site: Site, submitted: dict[str, Any]):
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=site.mlflow, registry_uri=site.mlflow)
    version = client.get_model_version_by_alias("ddpm-digits", "champion")
    assert int(version.version) == submitted["register"]["version"]
    run = client.get_run(str(version.run_id))
    assert run.info.status == "FINISHED"
    assert run.data.tags["git.commit"] == git_commit()


@pytest.mark.slow
def test_config_dataset_weights_and_samples_are_those_of_a_run_on_one_machine(first: dict[str, Any], submitted: dict[str, Any]):
    for stage, field in [
        ("train", "config_digest"),
        ("train", "num_workers"),
        ("preprocess", "digest"),
        ("train", "weights_sha256"),
        ("evaluate", "samples_sha256"),
        ("evaluate", "metric"),
    ]:
        assert submitted[stage][field] == first[stage][field], field
    for stage in ("preprocess", "train", "evaluate"):
        assert submitted[stage]["inputs"] == first[stage]["inputs"]


@pytest.mark.slow
def test_on_s3_it_is_the_same_run(site: Site, s3: ray_nodes.S3Server, first: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    storage = f"s3://{s3.bucket}/team"
    done = site.ddpm("submit", "digits", f"cluster.storage={storage}", *TINY, "--name", "on-s3", "--follow", env=site.env | s3.env | SECRETS)
    assert done.code == 0, done.stdout + done.stderr
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    run = Location.of(storage) / "runs" / "on-s3"
    for stage, field in [("preprocess", "digest"), ("train", "weights_sha256"), ("evaluate", "samples_sha256"), ("evaluate", "metric")]:
        folder = run / stage / first[stage]["inputs"]
        assert json.loads((folder / "receipt.json").read_text())[field] == first[stage][field], field
    assert not (run / ".lock").is_file()


def test_the_plan_is_told_before_it_is_asked_for(submitted: dict[str, Any]):
    plan = submitted["log"].index("train       2 workers x (1 CPU), 1 thread each, pack: 1 on node-1")
    assert plan < submitted["log"].index("preprocess for the first time")


def test_no_secret_is_in_any_job_log_parameter_or_tag(site: Site, submitted: dict[str, Any]):
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=site.mlflow, registry_uri=site.mlflow)
    version = client.get_model_version_by_alias("ddpm-digits", "champion")
    run = client.get_run(str(version.run_id))
    jobs = ray_nodes.fetch(f"{site.nodes.dashboard_url}/api/jobs/", token=site.nodes.token_file.read_text()).decode()
    assert "ddpm-digits-1" in jobs
    told = [submitted["log"], jobs, str(run.data.params), str(run.data.tags), str(version.tags), str(version.description)]
    token = site.nodes.token_file.read_text()
    for secret in [*SECRETS.values(), token]:
        assert not [text for text in told if secret in text]


def test_jobs_list_and_status_tell_how_a_run_stands(site: Site, submitted: dict[str, Any]):
    listed = site.ddpm("jobs", "list", "--json").json
    stands = [(job["id"], job["status"], job["exit_code"]) for job in listed if job["name"] == "digits"]
    assert stands == [("ddpm-digits-1", "SUCCEEDED", 0)]
    assert listed[0]["config_digest"] == submitted["train"]["config_digest"]
    status = site.ddpm("jobs", "status", "digits")
    assert status.code == 0
    assert status.stdout.startswith("digits succeeded: ddpm-digits-1")
    unknown = site.ddpm("jobs", "status", "nothing")
    assert (unknown.code, unknown.stderr.count("\n")) == (2, 1)
    assert "knows no run nothing; it knows digits" in unknown.stderr


@pytest.mark.slow
def test_a_stopped_run_submitted_again_goes_on_and_other_settings_do_not_take_its_name(site: Site):
    settings = ["digits", site.storage, *TINY, "train.steps=4000", "train.checkpoint_every=20", "--name", "long"]
    with site.start("submit", *settings, "--follow") as following:
        following.wait_for(lambda text: bool(list((site.folder / "storage/runs/long").glob("train/*/step_*/manifest.json"))))
        other = site.ddpm("submit", *settings, "train.lr=0.1")
        assert other.code == 2
        assert "--name long is in progress as ddpm-long-1 with other settings" in other.stderr
        following.process.send_signal(signal.SIGINT)
        assert following.process.wait(timeout=60) == 130
        assert "detached; ddpm-long-1 goes on. Come back with: ddpm jobs logs long --address" in following.log.read_text()
    assert site.ddpm("jobs", "status", "long").stdout.startswith("long running: ddpm-long-1")
    stopped = site.ddpm("jobs", "stop", "long")
    assert "ddpm-long-1 stopped; submitted again under the name long, the run goes on" in stopped.stdout, stopped.stderr
    assert site.ddpm("jobs", "status", "long").code == 130
    assert status_of_run(site, "long") == "KILLED"
    with site.start("submit", *settings, "--follow") as again:
        text = again.wait_for(lambda text: re.search(r"start \d+: from step [1-9]", text) is not None)
    assert "job     ddpm-long-2" in text
    assert site.ddpm("jobs", "stop", "ddpm-long-2").code == 0


QUICK = [*TINY, "train.steps=4", "cluster.num_workers=1"]
NIGHTLY = [*QUICK, "registry.model_name=nightly", "--name", "nightly"]


@pytest.fixture(scope="module")
def promoted(site: Site) -> Finished:
    """Has a tick's attempt made, kills the submitting process, and comes back for the same tick."""
    tick = ["retrain", "digits", site.storage, *NIGHTLY, "--tick", "monday"]
    with site.start(*tick) as submitting:
        submitting.wait_for(lambda text: "preprocess for the first time" in text)
        other = site.ddpm(*tick, "train.lr=0.1")
        assert (other.code, other.stderr.count("error:")) == (2, 1)
        assert "ddpm-retrain~nightly~monday-1 is in progress with other settings" in other.stderr
        submitting.process.kill()
    back = site.ddpm(*tick)
    assert back.code == 0, back.stdout + back.stderr
    return back


def jobs_of(site: Site, name: str) -> list[tuple[str, str]]:
    jobs = json.loads(ray_nodes.fetch(f"{site.nodes.dashboard_url}/api/jobs/", token=site.nodes.token_file.read_text()))
    return sorted((job["submission_id"], job["status"]) for job in jobs if (job["metadata"] or {}).get("ddpm.name") == name)


@pytest.mark.slow
def test_a_tick_finds_its_job_again_in_progress_and_done(site: Site, promoted: Finished):
    assert "ddpm-retrain~nightly~monday-1 is in progress already; attached to it" in promoted.stdout
    assert re.search(r"^nightly #1: promoted v1: .*\nddpm retrain: exit code 0\n", promoted.stdout, re.MULTILINE)
    done = site.ddpm("retrain", "digits", site.storage, *NIGHTLY, "--tick", "monday")
    assert (done.code, done.stdout) == (0, "ddpm-retrain~nightly~monday-1 is done already\n")
    assert jobs_of(site, "retrain~nightly~monday") == [("ddpm-retrain~nightly~monday-1", "SUCCEEDED")]


@pytest.mark.slow
def test_another_tick_with_nothing_new_is_skipped(site: Site, promoted: Finished):
    skipped = site.ddpm("retrain", "digits", site.storage, *NIGHTLY, "--tick", "tuesday")
    assert skipped.code == 11, skipped.stdout + skipped.stderr
    assert "nightly: skipped: nothing new since attempt 1 (promoted)" in skipped.stdout
    assert jobs_of(site, "retrain~nightly~tuesday") == [("ddpm-retrain~nightly~tuesday-1", "SUCCEEDED")]


@pytest.mark.slow
def test_a_tick_goes_on_where_it_failed_and_not_where_a_person_stopped_it(site: Site, promoted: Finished):
    tick = ["retrain", "digits", site.storage, *NIGHTLY, "train.steps=4000", "--tick", "wednesday"]
    refused = site.ddpm(*tick, "retrain.max_hours=1e-9")
    assert refused.code == 12, refused.stdout + refused.stderr
    assert "ddpm-retrain~nightly~wednesday-1 failed with exit code 12; run the same command again to resume the attempt" in refused.stderr
    with site.start(*tick) as again:
        again.wait_for(lambda text: "attempt 2 of nightly" in text)
        assert site.ddpm("jobs", "stop", "retrain~nightly~wednesday").stdout.endswith(
            "stopped; ddpm retrain with another --tick, or none, resumes the attempt\n"
        )
        assert again.process.wait(timeout=60) == 130
    stopped = site.ddpm(*tick)
    assert stopped.code == 130
    assert stopped.stdout == "ddpm-retrain~nightly~wednesday-2 was stopped; another --tick, or none, resumes the attempt\n"
    assert [status for _, status in jobs_of(site, "retrain~nightly~wednesday")] == ["FAILED", "STOPPED"]


@pytest.mark.slow
def test_a_tick_whose_log_is_lost_is_not_taken_for_a_promotion(site: Site, promoted: Finished):
    logs = [
        path for index in range(3) for path in site.nodes.network.disk(index).rglob("job-driver-ddpm-retrain~nightly~monday-1.log") if not path.is_symlink()
    ]
    assert logs
    text = logs[0].read_text()
    try:
        logs[0].write_text(text.partition("ddpm retrain: exit code")[0])
        lost = site.ddpm("retrain", "digits", site.storage, *NIGHTLY, "--tick", "monday")
    finally:
        logs[0].write_text(text)
    assert lost.code == 2
    assert "whether it promoted, kept or skipped is lost, for its log does not say how" in lost.stderr


@dataclass(frozen=True)
class Schedule:
    """A CronJob's manifest, with a folder in the place of /etc/ddpm, where the pods have their ConfigMaps."""

    site: Site
    api: Cluster
    folder: Path
    pod: dict[str, Any]

    def tick(self, name: str) -> tuple[int, list[str]]:
        """Runs the pod's command, and as KubeRay would the entrypoint of the RayJob that it makes; returns the pod's exit code and lines."""
        command = [part.replace("/etc/ddpm", str(self.folder)) for part in self.pod["command"]]
        given = {variable["name"]: variable["value"].replace("/etc/ddpm", str(self.folder)) for variable in self.pod["env"] if "value" in variable}
        env = {"PATH": PATH, "NO_PROXY": "*", "JOB_NAME": name, "JOB_UID": "0b1c"} | given | self.api.env
        options = ["--account", str(self.api.account), "--poll", "0.2"]
        with subprocess.Popen([*command, *options], env=env, cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as pod:
            try:
                self.wait_for(f"{name}-run", pod)
                self.make_attempt(self.api.rayjobs[f"{name}-run"])
                written, _ = pod.communicate(timeout=100)
            finally:
                pod.kill()
            return pod.returncode, written.splitlines()

    def wait_for(self, rayjob: str, pod: "subprocess.Popen[str]") -> None:
        deadline = time.monotonic() + 100
        while rayjob not in self.api.rayjobs:
            assert pod.poll() is None, pod.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.1)

    def make_attempt(self, rayjob: dict[str, Any]) -> None:
        head = rayjob["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
        given = {variable["name"]: variable["value"] for variable in head["env"]}
        env = ray_nodes.environment(self.site.nodes.env | {"RAY_ADDRESS": self.site.nodes.gcs_address, "PATH": PATH} | given)
        command = ["bash", "-c", rayjob["spec"]["entrypoint"]]
        done = subprocess.run(command, env=env, cwd=self.folder / "unpacked", stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        assert done.returncode == 0, done.stdout
        self.api.logs[rayjob["metadata"]["name"]] = [done.stdout]
        rayjob["status"] = {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}


@pytest.fixture
def schedule(site: Site, tmp_path: Path) -> Iterator[Schedule]:
    settings = [site.storage, *QUICK, "registry.model_name=on-kubernetes", "cluster.accelerator=cpu", "--name", "hourly"]
    printed = ddpm(
        "manifest", "cronjob", "digits", *settings, "--claim", "storage", "--namespace", "team-a", cwd=tmp_path, env={"MLFLOW_TRACKING_URI": site.mlflow}
    )
    assert printed.code == 0, printed.stderr
    code, *_, job, cronjob = yaml.safe_load_all(printed.stdout)
    for folder, name, content in (
        ("code", "ddpm.zip", base64.b64decode(code["binaryData"]["ddpm.zip"])),
        ("job", "rayjob.yaml", job["data"]["rayjob.yaml"].encode()),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_bytes(content)
    with zipfile.ZipFile(tmp_path / "code" / "ddpm.zip") as archive:
        archive.extractall(tmp_path / "unpacked")
    with kubernetes_api(tmp_path) as api:
        yield Schedule(site, api, tmp_path, cronjob["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"][0])


@pytest.mark.slow
def test_the_cronjob_s_pod_and_the_rayjob_that_it_makes_run_as_written(schedule: Schedule):
    import mlflow

    code, lines = schedule.tick("ddpm-hourly-29000000")
    assert (code, "hourly #1: promoted v1: " in lines[-1], lines[-1].endswith("(exit code 0)")) == (0, True, True), lines
    client = mlflow.MlflowClient(tracking_uri=schedule.site.mlflow, registry_uri=schedule.site.mlflow)
    assert client.get_model_version_by_alias("on-kubernetes", "champion").version == "1"
    code, lines = schedule.tick("ddpm-hourly-29000060")
    assert code == 0
    assert re.fullmatch(r"hourly: skipped: nothing new since attempt 1 \(promoted\): .* \(exit code 11\)", lines[-1]), lines
    assert list(schedule.api.rayjobs) == ["ddpm-hourly-29000000-run", "ddpm-hourly-29000060-run"]


def status_of_run(site: Site, name: str) -> str:
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=site.mlflow, registry_uri=site.mlflow)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return client.search_runs(experiments, f"attributes.run_name = '{name}'")[0].info.status


def test_what_the_cluster_does_not_have_is_said_within_ten_seconds_with_what_it_has(site: Site):
    began = time.monotonic()
    done = site.ddpm("submit", "digits", site.storage, "cluster.num_workers=8", "cluster.accelerator=gpu")
    lines = [line for line in done.stderr.splitlines() if "not sent" not in line]
    assert (done.code, len(lines)) == (2, 1)
    assert "cluster.num_workers=8 with cluster.accelerator=gpu needs 8 CPUs, 8 GPUs; the cluster has " in lines[0]
    assert "2 nodes with 1 CPU, no GPU" in lines[0]
    print(f"said after {time.monotonic() - began:.1f} s")


@pytest.mark.parametrize(
    ("arguments", "env", "address", "message"),
    [
        ([], NO_TOKEN, "", "asks for a token, and there is none; set RAY_AUTH_TOKEN_PATH"),
        ([], {"RAY_AUTH_TOKEN": "wrong"}, "", "refuses the token given"),
        ([], {}, "http://127.0.0.1:9", "does not answer"),
        ([], {}, "MLFLOW", "is no Ray dashboard|cannot do this"),
        ([], {}, "127.0.0.1:6379", "is not a web address"),
        (["cluster.storage=./here"], {}, "", "cluster.storage=./here is relative to this machine's folder"),
        (["data.source=my/photos"], {}, "", "data.source=my/photos is relative to this machine's folder"),
        (["cluster.storage=s3://key:secret@bucket/x"], {}, "", "put them into the AWS_"),
        ([], {"MLFLOW_TRACKING_URI": "file:///mlruns"}, "", "MLFLOW_TRACKING_URI=file:///mlruns is on this machine only"),
        (["data.root=s3://bucket/sets"], {}, "", "data.root=s3://bucket/sets is not read from there"),
        (["cluster.storage=s3://my bucket/x"], {}, "", "this is not a bucket"),
        ([], {"MLFLOW_TRACKING_URI": "http://user:planted@host"}, "", "MLFLOW_TRACKING_URI holds a user, password or option"),
    ],
)
def test_what_cannot_work_is_one_clear_line(site: Site, arguments: list[str], env: dict[str, str], address: str, message: str):
    base = {key: value for key, value in site.env.items() if not (env and key.startswith(("RAY_AUTH", "HOME")))}
    token = {} if "HOME" in env or "RAY_AUTH_TOKEN" in env else site.nodes.env
    done = site.ddpm("submit", "digits", site.storage, *arguments, env=base | token | env, address=site.mlflow if address == "MLFLOW" else address)
    lines = [line for line in done.stderr.splitlines() if "not sent" not in line]
    assert (done.code, len(lines)) == (2, 1), done.stderr
    assert re.search(message, lines[0])
    assert "planted" not in lines[0]
