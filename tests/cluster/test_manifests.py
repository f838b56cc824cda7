"""Kubernetes manifests: valid by KubeRay's schemas and by its operator's rules, the same every time, whole, and without a secret."""

import base64
import copy
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes_schema import CRDS, core_errors, operator_errors, schema_errors
from support import ROOT

from cluster.config import ClusterError
from cluster.package import CONFIG_FILE, LIMIT, pack
from cluster.pods import CODE_FOLDER, DEFAULT_IMAGE, RAY_VERSION
from pipeline.config import load_config
from workflows.cli import main
from workflows.preset_files import PRESETS
from workflows.submit_rayjob import CLUSTER_LOST, SUFFIXES, TERMINATED

KUBERNETES = ROOT / "cluster" / "kubernetes"
OVERLAYS = ("cpu", "gpu", "gpu-kueue", "raycronjob")
KINDS = ("rayjob", "raycluster", "raycronjob", "cronjob")
ON_CLAIM = ("cluster.storage=/mnt/ddpm", "--claim", "ddpm-storage")
SECRETS = {
    "AWS_ACCESS_KEY_ID": "planted-1",
    "AWS_SECRET_ACCESS_KEY": "planted-2",
    "AWS_SESSION_TOKEN": "planted-3",
    "MLFLOW_TRACKING_USERNAME": "planted-4",
    "MLFLOW_TRACKING_PASSWORD": "planted-5",
    "MLFLOW_TRACKING_TOKEN": "planted-6",
    "RAY_AUTH_TOKEN": "planted-7",
    "DDPM_WEBHOOK_SECRET": "planted-9",
    "HF_TOKEN": "planted-8",
}
Print = Callable[..., str]
Tree = dict[str, Any]

needs_crds = pytest.mark.skipif(not CRDS.is_dir(), reason="KubeRay's CRDs are not beside the checkout")
needs_kubectl = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")


@pytest.fixture
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], clean_environment: None) -> Callable[..., tuple[int, str, str]]:
    """Returns a function that calls `ddpm manifest` in this process: (exit code, stdout, stderr)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ddpm", "manifest", *arguments])
        with pytest.raises(SystemExit) as caught:
            main()
        captured = capfd.readouterr()
        return int(caught.value.code or 0), captured.out, captured.err

    return run


@pytest.fixture
def manifest(call: Callable[..., tuple[int, str, str]]) -> Print:
    """Returns a function that calls `ddpm manifest` and gives its output."""

    def run(*arguments: str) -> str:
        code, out, err = call(*arguments)
        assert code == 0, err
        return out

    return run


def documents(text: str) -> list[Tree]:
    return list(yaml.safe_load_all(text))


def only(text: str, kind: str) -> Tree:
    return next(document for document in documents(text) if document["kind"] == kind)


def ray_documents(text: str) -> Iterator[Tree]:
    """KubeRay's objects of a manifest, and the one that a CronJob's ConfigMap holds."""
    for document in documents(text):
        if document["apiVersion"] == "ray.io/v1":
            yield document
        if "rayjob.yaml" in document.get("data", {}):
            yield from ray_documents(document["data"]["rayjob.yaml"])


def containers(node: Any) -> Iterator[tuple[Tree, Tree]]:
    """Every container of a tree, with the pod spec around it."""
    if isinstance(node, dict):
        for container in node.get("containers", []):
            yield node, container
        for value in node.values():
            yield from containers(value)
    if isinstance(node, list):
        for item in node:
            yield from containers(item)


VARIANTS = {
    "a claim": ("cifar10-small", *ON_CLAIM),
    "a bucket and a secret": ("cifar10-small", "cluster.storage=s3://bucket/prefix", "--secret", "ddpm", "--service-account", "ddpm"),
    "CPU": ("digits", *ON_CLAIM, "cluster.accelerator=cpu"),
    "a range, labels, resources": (
        "cifar10-small",
        *ON_CLAIM,
        "cluster.num_workers=[2, 8]",
        "cluster.cpus_per_worker=6",
        "cluster.worker_labels={ray.io/accelerator-type: H100}",
        "cluster.preprocess_labels={pool: cpu}",
        "cluster.worker_resources={infiniband: 1}",
        "--gpus-per-pod",
        "2",
    ),
    "Kueue's default queue": ("cifar10-small", *ON_CLAIM, "--queue", "default", "--namespace", "team-a", "--image", "registry.example.com/x:1"),
}


@needs_crds
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_valid_by_schema_and_operator(manifest: Print, kind: str, variant: str):
    found = list(ray_documents(manifest(kind, *VARIANTS[variant])))
    assert len(found) == 1
    assert schema_errors(found[0]) == []
    assert operator_errors(found[0]) == []


@needs_crds
def test_the_schema_and_the_rules_find_mistakes(manifest: Print):
    valid = only(manifest("rayjob", "cifar10-small", *ON_CLAIM), "RayJob")
    misspelt, number, old = copy.deepcopy(valid), copy.deepcopy(valid), copy.deepcopy(valid)
    misspelt["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]["restartPolcy"] = "Never"
    number["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] = 0
    old["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["restartPolicy"] = "Always"
    old["spec"]["shutdownAfterJobFinishes"] = False
    old["spec"]["rayClusterSpec"]["authOptions"] = {}
    assert "restartPolcy" in str(schema_errors(misspelt))
    assert "0 is not of type 'string'" in str(schema_errors(number))
    assert operator_errors(old) == ["a TTL needs shutdownAfterJobFinishes", "autoscaler v2 needs restartPolicy Never", "no token"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_container_has_limits_and_no_privileges(manifest: Print, kind: str):
    text = manifest(kind, *VARIANTS["a range, labels, resources"])
    found = [pair for tree in (documents(text), list(ray_documents(text))) for pair in containers(tree)]
    assert found
    for pod, container in found:
        for side in ("requests", "limits"):
            assert {"cpu", "memory"} <= set(container["resources"][side])
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["runAsUser"] == 1000
    for document in ray_documents(text):
        cluster = document["spec"].get("jobTemplate", document["spec"])
        scaler = cluster.get("rayClusterSpec", cluster)["autoscalerOptions"]
        assert scaler["resources"]["requests"] == scaler["resources"]["limits"]
        assert scaler["securityContext"]["allowPrivilegeEscalation"] is False


@pytest.mark.parametrize("kind", KINDS)
def test_no_secret_of_the_environment_is_printed(manifest: Print, monkeypatch: pytest.MonkeyPatch, kind: str):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.example.com")
    text = manifest(kind, "cifar10-small", *ON_CLAIM, "--secret", "ddpm")
    packed = [zipfile.ZipFile(io.BytesIO(base64.b64decode(value))) for document in documents(text) for value in document.get("binaryData", {}).values()]
    contents = text + "".join(archive.read(name).decode() for archive in packed for name in archive.namelist())
    assert "planted" not in contents
    assert not set(SECRETS) & set(re.findall(r"\w+", text))
    assert "https://mlflow.example.com" in text
    assert {"secretRef": {"name": "ddpm"}} in next(container["envFrom"] for _, container in containers(list(ray_documents(text))) if "envFrom" in container)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_input_gives_the_same_text(manifest: Print, kind: str):
    assert manifest(kind, *VARIANTS["a claim"]) == manifest(kind, *VARIANTS["a claim"])


def test_the_zip_holds_a_project_that_runs(manifest: Print, tmp_path: Path):
    text = manifest("rayjob", "cifar10-small", *ON_CLAIM, "train.steps=7")
    job, code = only(text, "RayJob"), only(text, "ConfigMap")
    (tmp_path / "ddpm.zip").write_bytes(base64.b64decode(code["binaryData"]["ddpm.zip"]))
    with zipfile.ZipFile(tmp_path / "ddpm.zip") as archive:
        names = archive.namelist()
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
        archive.extractall(tmp_path / "code")
    assert {"pyproject.toml", "requirements.lock", CONFIG_FILE, "workflows/presets/digits.yaml", "pipeline/run.py"} <= set(names)
    assert not [name for name in names if name.startswith("tests/") or "__pycache__" in name or "kubernetes/" in name]
    assert load_config(tmp_path / "code" / CONFIG_FILE) == load_config(PRESETS / "cifar10-small.yaml", ["train.steps=7", "cluster.storage=/mnt/ddpm"])
    entry = shlex.split(job["spec"]["entrypoint"])
    assert entry[:5] == ["python", "-m", "workflows", "run", CONFIG_FILE]
    assert entry[5:] == ["cluster.address=auto", "cluster.accelerator=gpu", "cluster.wait_s=900", "--name", "cifar10-small"]
    done = subprocess.run(
        [sys.executable, "-m", "workflows", "config", *entry[4:8]], cwd=tmp_path / "code", env={}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "  steps: 7\n" in done.stdout
    assert '  accelerator: "gpu"\n' in done.stdout


def test_every_pod_that_runs_the_pipeline_finds_the_code_where_ray_looks_for_it(manifest: Print):
    text = manifest("rayjob", "cifar10-small", *ON_CLAIM)
    job, code = only(text, "RayJob"), only(text, "ConfigMap")
    assert yaml.safe_load(job["spec"]["runtimeEnvYAML"]) == {"working_dir": f"file://{CODE_FOLDER}/{next(iter(code['binaryData']))}"}
    cluster = job["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        assert {"name": "code", "configMap": {"name": code["metadata"]["name"]}} in pod["volumes"]
        assert {"name": "storage", "persistentVolumeClaim": {"claimName": "ddpm-storage"}} in pod["volumes"]
        mounts = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
        assert mounts == {"code": CODE_FOLDER, "storage": "/mnt/ddpm"}
    assert "volumes" not in job["spec"]["submitterPodTemplate"]["spec"]


def test_another_config_has_another_configmap(manifest: Print):
    first, second = (only(manifest("rayjob", *VARIANTS["a claim"], f"train.steps={steps}"), "ConfigMap") for steps in (1, 2))
    assert first["immutable"]
    assert first["metadata"]["name"] != second["metadata"]["name"]


def test_worker_groups_follow_the_config(manifest: Print):
    train, preprocess = only(manifest("rayjob", *VARIANTS["a range, labels, resources"]), "RayJob")["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert [train[key] for key in ("groupName", "replicas", "minReplicas", "maxReplicas")] == ["train", 1, 1, 4]
    limits = train["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits == {"cpu": "12", "memory": "48Gi", "nvidia.com/gpu": "2"}
    assert train["labels"] == {"ray.io/accelerator-type": "H100"}
    assert train["resources"] == {"infiniband": "2"}
    assert preprocess["labels"] == {"pool": "cpu"}
    assert "nvidia.com/gpu" not in preprocess["template"]["spec"]["containers"][0]["resources"]["limits"]


def test_a_cpu_run_has_one_group_and_no_gpu(manifest: Print):
    text = manifest("rayjob", *VARIANTS["CPU"])
    assert len(only(text, "RayJob")["spec"]["rayClusterSpec"]["workerGroupSpecs"]) == 1
    assert "gpu" not in yaml.safe_dump(only(text, "RayJob"))


def test_a_queue_takes_the_place_of_scaling(manifest: Print):
    job = only(manifest("rayjob", "cifar10-small", *ON_CLAIM, "cluster.num_workers=[2, 4]", "--queue", "team"), "RayJob")
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team"
    assert job["spec"]["rayClusterSpec"]["enableInTreeAutoscaling"] is False
    assert [(group["minReplicas"], group["replicas"], group["maxReplicas"]) for group in job["spec"]["rayClusterSpec"]["workerGroupSpecs"]] == [
        (4, 4, 4),
        (1, 1, 1),
    ]


def test_a_schedule_retrains_and_kuberay_tries_nothing_again(manifest: Print):
    retrain = "python -m workflows retrain run.yaml cluster.address=auto cluster.accelerator=gpu cluster.wait_s=900 --name cifar10-small --job"
    for kind in ("cronjob", "raycronjob"):
        found = next(ray_documents(manifest(kind, *VARIANTS["a claim"])))["spec"]
        attempt = found.get("jobTemplate", found)
        assert (attempt["entrypoint"], attempt["backoffLimit"]) == (retrain, 0), kind
    run = only(manifest("rayjob", *VARIANTS["a claim"]), "RayJob")["spec"]
    assert (run["entrypoint"], run["backoffLimit"]) == (retrain.replace(" retrain ", " run ").removesuffix(" --job"), 2)


def test_only_a_lost_cluster_or_pod_has_kubernetes_try_a_tick_again(manifest: Print):
    job = only(manifest("cronjob", *VARIANTS["a claim"]), "CronJob")["spec"]["jobTemplate"]["spec"]
    disrupted, failed = job["podFailurePolicy"]["rules"]
    assert disrupted == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    assert failed == {"action": "FailJob", "onExitCodes": {"containerName": "submit", "operator": "NotIn", "values": [CLUSTER_LOST, 137, TERMINATED]}}
    assert [container["name"] for container in job["template"]["spec"]["containers"]] == ["submit"]
    assert (job["backoffLimit"], job["template"]["spec"]["restartPolicy"]) == (len(SUFFIXES) - 1, "Never")


def test_kubernetes_takes_every_object_of_a_cronjob(manifest: Print):
    found = documents(manifest("cronjob", *VARIANTS["a bucket and a secret"]))
    assert [document["kind"] for document in found] == ["ConfigMap", "ServiceAccount", "Role", "RoleBinding", "ConfigMap", "CronJob"]
    assert [error for document in found for error in core_errors(document)] == []


def test_a_cronjob_may_make_and_read_rayjobs_and_read_logs_and_nothing_else(manifest: Print):
    text = manifest("cronjob", "cifar10-small", *ON_CLAIM, "--namespace", "team-a", "--schedule", "30 2 * * 1", "--time-zone", "Europe/Berlin")
    assert only(text, "Role")["rules"] == [
        {"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create", "get", "list"]},
        {"apiGroups": [""], "resources": ["pods"], "verbs": ["list"]},
        {"apiGroups": [""], "resources": ["pods/log"], "verbs": ["get"]},
    ]
    account = only(text, "ServiceAccount")["metadata"]
    assert only(text, "RoleBinding")["subjects"] == [{"kind": "ServiceAccount", "name": account["name"], "namespace": "team-a"}]
    spec = only(text, "CronJob")["spec"]
    assert (spec["schedule"], spec["timeZone"], spec["concurrencyPolicy"]) == ("30 2 * * 1", "Europe/Berlin", "Forbid")
    assert (spec["startingDeadlineSeconds"], spec["successfulJobsHistoryLimit"], spec["failedJobsHistoryLimit"]) == (3600, 3, 3)
    assert spec["jobTemplate"]["spec"]["template"]["spec"]["serviceAccountName"] == account["name"]
    assert {document["metadata"]["namespace"] for document in documents(text)} == {"team-a"}


@needs_kubectl
def test_kubectl_reads_the_cronjob_without_losing_a_field(manifest: Print, tmp_path: Path):
    cronjob = only(manifest("cronjob", "cifar10-small", *ON_CLAIM), "CronJob")
    (tmp_path / "cronjob.yaml").write_text(yaml.safe_dump(cronjob))
    command = ["kubectl", "set", "image", "--local", "-f", str(tmp_path / "cronjob.yaml"), f"submit={DEFAULT_IMAGE}x", "-o", "yaml"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert _without_empty(yaml.safe_load(done.stdout.replace(f"{DEFAULT_IMAGE}x", DEFAULT_IMAGE))) == cronjob


def _without_empty(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: _without_empty(value) for key, value in node.items() if value not in (None, {})}
    return [_without_empty(item) for item in node] if isinstance(node, list) else node


def test_every_place_of_the_ray_version_is_the_lock_s():
    locked = re.search(r"^ray==(\S+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    assert locked
    assert locked[1] == RAY_VERSION
    for path in (KUBERNETES / "Dockerfile", KUBERNETES / "site" / "kustomization.yaml", ROOT / "docs" / "kubernetes.md"):
        assert set(re.findall(r"ray-(\d+\.\d+\.\d+)", path.read_text())) == {RAY_VERSION}, path


def test_the_image_is_built_from_the_lock_without_development_packages():
    dockerfile = (KUBERNETES / "Dockerfile").read_text().replace("\\\n", "")
    instructions = [line.split(maxsplit=1) for line in dockerfile.splitlines() if line and not line.startswith("#")]
    assert {name for name, _ in instructions} == {"FROM", "RUN", "COPY", "ARG", "ENV", "USER", "WORKDIR"}
    pinned = re.search(r'python-version = "([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert pinned
    assert ["FROM", f"python:{pinned[1]}-slim"] in instructions
    assert [value for name, value in instructions if name == "USER"] == ["1000:100"]
    install = next(value for _, value in instructions if "uv pip install" in value)
    assert "-r /opt/ddpm/pyproject.toml -c /opt/ddpm/requirements.lock" in install
    assert "--compile-bytecode" in install
    assert "dev" not in install


@pytest.fixture
def kustomize(manifest: Print, tmp_path: Path) -> Callable[[str], list[Tree]]:
    """Returns a function that renders an overlay, with the code of the committed base beside it."""
    shutil.copytree(KUBERNETES, tmp_path / "kubernetes", ignore=shutil.ignore_patterns("*.zip"))
    manifest("rayjob", *committed_arguments(), "--code", str(tmp_path / "kubernetes" / "site" / "ddpm.zip"))

    def render(overlay: str) -> list[Tree]:
        done = subprocess.run(["kubectl", "kustomize", str(tmp_path / "kubernetes" / "overlays" / overlay)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return documents(done.stdout)

    return render


def committed_arguments() -> list[str]:
    """The preset and options of `make manifests`."""
    found = re.search(r"^MANIFEST \?= (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert found
    return shlex.split(found[1])


@pytest.mark.parametrize(("kind", "file"), [("rayjob", "base/rayjob.yaml"), ("raycronjob", "overlays/raycronjob/raycronjob.yaml")])
def test_the_kustomize_base_is_what_make_manifests_writes(manifest: Print, tmp_path: Path, kind: str, file: str):
    assert (KUBERNETES / file).read_text() == manifest(kind, *committed_arguments(), "--code", str(tmp_path / "ddpm.zip")), "run `make manifests`"


@needs_crds
@needs_kubectl
@pytest.mark.parametrize(
    ("overlay", "kind", "options"),
    [("gpu", "rayjob", []), ("cpu", "rayjob", ["cluster.accelerator=cpu"]), ("gpu-kueue", "rayjob", ["--queue", "ddpm"]), ("raycronjob", "raycronjob", [])],
)
def test_an_overlay_is_what_the_command_prints_with_its_options(
    manifest: Print, kustomize: Callable[[str], list[Tree]], tmp_path: Path, overlay: str, kind: str, options: list[str]
):
    rendered = {document["kind"]: document for document in kustomize(overlay)}
    code, job = rendered.pop("ConfigMap"), rendered.popitem()[1]
    assert schema_errors(job) == []
    assert operator_errors(job) == []
    site = ["--namespace", "ddpm", "--image", "registry.example.com/ddpm:ray-2.60.0"]
    printed = next(ray_documents(manifest(kind, *committed_arguments(), *options, *site, "--code", str(tmp_path / "ddpm.zip"))))
    assert re.fullmatch(r"ddpm-code-[a-z0-9]{10}", code["metadata"]["name"])
    assert code["immutable"]
    text = yaml.safe_dump(job)
    assert text.count("name: ddpm-code") == text.count(f"name: {code['metadata']['name']}"), "a pod names a ConfigMap that does not exist"
    assert yaml.safe_load(text.replace(code["metadata"]["name"], "ddpm-code")) == printed


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["rayjobs", "digits", *ON_CLAIM], {}, "manifest rayjobs is no kind; use one of rayjob, raycluster, raycronjob, cronjob"),
        (["rayjob", "digits"], {}, "cluster.storage=./storage is not a path that every pod can see; use an absolute path with --claim, or s3://BUCKET/PREFIX"),
        (["rayjob", "digits", "cluster.storage=/", "--claim", "x"], {}, "cluster.storage=/ is not a path"),
        (["rayjob", "digits", "cluster.storage=/mnt/ddpm"], {}, "cluster.storage=/mnt/ddpm needs --claim NAME"),
        (["rayjob", "digits", "cluster.storage=s3://b/p", "--secret", "s", "--claim", "x"], {}, "--claim x has no place"),
        (["rayjob", "digits", "cluster.storage=s3://b/p"], {}, "cluster.storage=s3://b/p cannot hold MLflow's database; set MLFLOW_TRACKING_URI"),
        (["rayjob", "digits", *ON_CLAIM, "data.source=photos"], {}, "data.source=photos is not below cluster.storage=/mnt/ddpm"),
        (["rayjob", "digits", *ON_CLAIM, "evaluate.inception_weights=w.pth"], {}, "evaluate.inception_weights=w.pth is not below cluster.storage"),
        (["rayjob", "digits", *ON_CLAIM, "--gpus-per-pod", "4"], {}, "cluster.num_workers=2 does not fill pods of --gpus-per-pod 4; use a multiple"),
        (["rayjob", "digits", *ON_CLAIM, "--name", "x" * 30], {}, "which Kubernetes cannot hold; use up to 29 letters and digits"),
        (["cronjob", "digits", *ON_CLAIM, "--schedule", "@daily"], {}, "--schedule '@daily' is not of five fields, such as '0 3 * * *'"),
        (["raycronjob", "digits", *ON_CLAIM, "--queue", "team"], {}, "--queue team does not reach the jobs of a RayCronJob"),
        (["rayjob", "digits", *ON_CLAIM], {"MLFLOW_TRACKING_URI": "https://me:planted@host"}, "put MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"),
        (["rayjob", "digits", *ON_CLAIM], {"MLFLOW_TRACKING_URI": "sqlite:///mlflow.db"}, "MLFLOW_TRACKING_URI=sqlite:///mlflow.db is on this machine only"),
        (["rayjob", "digits", *ON_CLAIM], {"AWS_ENDPOINT_URL": "http://key:planted@host"}, "AWS_ENDPOINT_URL holds a user, password or option"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_and_exit_code_2(
    call: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch, arguments: list[str], environment: dict[str, str], message: str
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    code, out, err = call(*arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1
    assert "planted" not in err


def test_code_that_no_configmap_can_hold_is_refused_with_the_largest_file(tmp_path: Path):
    for package in ("components", "cluster", "pipeline", "workflows"):
        (tmp_path / package).mkdir()
    for name in ("pyproject.toml", "requirements.lock"):
        (tmp_path / name).write_text("")
    noise = base64.b85encode(os.urandom(LIMIT)).decode()
    (tmp_path / "pipeline" / "tables.py").write_text(noise)
    with pytest.raises(ClusterError, match=r"a ConfigMap holds 1048576; move large files, such as pipeline/tables\.py"):
        pack("", "abc", tmp_path)
