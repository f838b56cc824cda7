"""The clusters that other tests run on are real ones."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray_nodes

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and subreapers")

JOB = """
import json, ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
ray.init(address="auto")

@ray.remote
def address():
    return ray.util.get_node_ip_address()

where = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in ray.nodes() if node["Alive"] and "CPU" in node["Resources"]]
print("ran on", json.dumps(ray.get([address.options(scheduling_strategy=strategy).remote() for strategy in where])))
"""
SUBMIT = """
import sys, time
from ray.job_submission import JobSubmissionClient
client = JobSubmissionClient(sys.argv[1])
job = client.submit_job(entrypoint="python job.py", runtime_env={"working_dir": sys.argv[2]})
while not client.get_job_status(job).is_terminal():
    time.sleep(0.2)
print(client.get_job_logs(job))
sys.exit(client.get_job_status(job) != "SUCCEEDED")
"""


def submit(nodes: ray_nodes.RayNodes, folder: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Submits JOB as a client that has nothing but this environment."""
    (folder / "job").mkdir(exist_ok=True)
    (folder / "job" / "job.py").write_text(JOB)
    command = [*nodes.prefix, sys.executable, "-c", SUBMIT, nodes.dashboard_url, str(folder / "job")]
    clean = ray_nodes.environment({"HOME": str(folder)} | env)
    return subprocess.run(command, env=clean, cwd=folder, capture_output=True, text=True, timeout=180, check=False)


def ran_on(done: subprocess.CompletedProcess[str]) -> list[str]:
    lines = [line for line in done.stdout.splitlines() if line.startswith("ran on ")]
    assert done.returncode == 0, done.stdout + done.stderr
    return sorted(json.loads(lines[-1].removeprefix("ran on ")))


def test_a_job_reaches_every_node_and_nobody_without_the_token(tmp_path: Path) -> None:
    began = time.monotonic()
    with ray_nodes.start_nodes(tmp_path, cpus=(1, 1), in_namespaces=False) as nodes:
        print(f"two nodes on loopback: {time.monotonic() - began:.1f} s")
        assert ran_on(submit(nodes, tmp_path, nodes.env)) == [nodes.ip(0), nodes.ip(1)]
        refused = submit(nodes, tmp_path, {})
        assert refused.returncode == 1
        assert "Missing authentication token" in refused.stderr
        assert nodes.token_file.stat().st_mode & 0o777 == 0o600


def test_nothing_is_left_of_a_cluster_whose_test_fails(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        fail_on_a_cluster(tmp_path)
    folder = (tmp_path / "folder").read_text()
    assert not processes_with(folder)
    assert not Path(folder).parent.exists()


def fail_on_a_cluster(folder: Path) -> None:
    with ray_nodes.start_nodes(folder, cpus=(0,), in_namespaces=False) as nodes:
        disk = str(nodes.network.disk(0))
        (folder / "folder").write_text(disk)
        assert processes_with(disk)
        raise ZeroDivisionError


def processes_with(text: str) -> list[str]:
    """Returns the command lines that hold a text."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if text in line:
            found.append(line)
    return found
