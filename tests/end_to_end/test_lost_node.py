"""Machines with addresses of their own, storage on S3: a run is submitted, a node's link is cut in the middle of training, the run ends right."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import ray_nodes
from servers import fetch
from support import TINY, ddpm_command

pytestmark = [pytest.mark.slow, pytest.mark.netns, pytest.mark.skipif(not ray_nodes.can_make_namespaces(), reason="needs root and network namespaces")]

KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "planted-Secret-7f3a"}
STEPS = 400


def in_s3(s3: ray_nodes.S3Server, nodes: ray_nodes.RayNodes, pattern: str) -> list[str]:
    """Returns the keys of the bucket that match."""
    listing = fetch(f"{s3.url}/{s3.bucket}?list-type=2&max-keys=1000", prefix=nodes.prefix).decode()
    return [key for key in re.findall("<Key>([^<]+)</Key>", listing) if re.search(pattern, key)]


@dataclass(frozen=True)
class Site:
    """Three machines, an S3 server and an MLflow server."""

    nodes: ray_nodes.RayNodes
    s3: ray_nodes.S3Server
    mlflow: str
    folder: Path

    @property
    def env(self) -> dict[str, str]:
        return ray_nodes.environment(self.nodes.env | self.s3.env | KEYS | {"MLFLOW_TRACKING_URI": self.mlflow})

    def submit(self, *settings: str) -> list[str]:
        return [*self.nodes.prefix, *ddpm_command("submit", "digits", *settings, "--address", self.nodes.dashboard_url, "--follow")]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    with ray_nodes.start_nodes(folder, cpus=(0, 1, 1), in_namespaces=True, env=KEYS, quick_to_declare_dead=True) as nodes:
        place = {"host": nodes.host, "prefix": nodes.prefix}
        with ray_nodes.s3_server(folder, **place) as s3, ray_nodes.mlflow_server(folder / "mlflow", **place) as mlflow:
            yield Site(nodes, s3, mlflow, folder)


def test_a_storage_root_that_is_not_shared_is_noticed_before_the_run_with_the_nodes_by_name(site: Site):
    storage = site.nodes.network.disk(0) / "of-each-node-its-own"
    command = site.submit(*TINY, f"cluster.storage={storage}", "--name", "unshared")
    done = subprocess.run(command, env=site.env, cwd=site.folder, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 2, done.stdout + done.stderr
    for index in (1, 2):
        assert f"error: node node-{index} ({site.nodes.ip(index)}) cannot work with cluster.storage={storage}: FileNotFoundError" in done.stdout
    assert "preprocess" not in done.stdout.partition("checking from 2 nodes that ")[2]


def test_a_link_cut_during_training_leaves_a_run_that_ends_right(site: Site, tmp_path: Path):
    nodes, s3 = site.nodes, site.s3
    settings = [*TINY, f"train.steps={STEPS}", "train.checkpoint_every=10", "cluster.num_workers=[1, 2]", "cluster.group_timeout_s=60"]
    with (tmp_path / "log").open("w") as log:
        following = subprocess.Popen(site.submit(f"cluster.storage=s3://{s3.bucket}/team", *settings), env=site.env, cwd=tmp_path, stdout=log, stderr=log)
        try:
            wait_for(lambda: bool(in_s3(s3, nodes, r"step_0000000[2-9]0-0001/manifest\.json")), following, tmp_path / "log")
            nodes.cut(2)
            code = following.wait(timeout=380)
        finally:
            following.kill()
            following.wait()
    text = (tmp_path / "log").read_text()
    assert code == 0, text
    assert "2 workers of 1 to 2 x (1 CPU)" in text
    curve = fetch_history(nodes, tmp_path, site.env)
    receipt = json.loads(fetch(f"{s3.url}/{s3.bucket}/{in_s3(s3, nodes, 'train/.*/receipt.json')[0]}", prefix=nodes.prefix))
    assert receipt["num_workers"] == 1
    assert receipt["steps"] == STEPS
    assert receipt["path"].endswith(f"step_{STEPS:09d}-0002")
    assert [step for step, _ in curve] == sorted({step for step, _ in curve})
    assert curve[-1][0] == STEPS
    assert KEYS["AWS_SECRET_ACCESS_KEY"] not in text


HISTORY = """
import json, mlflow
client = mlflow.MlflowClient()
version = client.get_model_version_by_alias("ddpm-digits", "champion")
print(json.dumps([(point.step, point.value) for point in client.get_metric_history(version.run_id, "train/loss")]))
"""


def fetch_history(nodes: ray_nodes.RayNodes, folder: Path, env: dict[str, str]) -> list[tuple[int, float]]:
    """Returns the loss curve of the champion's run: step and loss."""
    done = subprocess.run([*nodes.prefix, sys.executable, "-c", HISTORY], env=env, cwd=folder, capture_output=True, text=True, timeout=120, check=True)
    return json.loads(done.stdout)


def wait_for(condition: Callable[[], bool], process: "subprocess.Popen[bytes]", log: Path, timeout: float = 240) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)
