"""The pods of a Ray cluster on Kubernetes: a head that does no work, a group that trains and samples, a group that preprocesses."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .config import ClusterConfig, ClusterError

Tree = dict[str, Any]

RAY_VERSION = "2.60.0"
DEFAULT_IMAGE = f"ddpm:ray-{RAY_VERSION}"
CODE_FOLDER = "/etc/ddpm/code"
CODE_FILE = "ddpm.zip"
GIB_PER_CPU = 4  # Ray's object store, 30 % of it, lies in /dev/shm and counts as the pod's memory
CPUS_PER_GPU_WORKER, CPUS_PER_CPU_WORKER = 8, 4
HEAD_CPUS, PREPROCESS_CPUS, MAX_PREPROCESS_PODS = 2, 4, 4
NODE_DISK_GIB = 10
IDLE_SECONDS = 300
USER, GROUP = 1000, 100


@dataclass(frozen=True)
class Job:
    """What a manifest is made from.

    Attributes:
        name: Kubernetes' name of the object.
        run_name: the run's name.
        code: name of the ConfigMap that holds the code; empty where it travels with each job.
        queue: Kueue's LocalQueue; without one the cluster scales itself.
        secret: Secret whose keys become environment variables.
        claim: ReadWriteMany claim that is mounted at the storage root.
        service_account: of head and workers.
        gpus_per_pod: GPUs, and with them training workers, of one pod.
        environment: settings that are no secret.
    """

    name: str
    run_name: str
    cluster: ClusterConfig
    code: str
    namespace: str = "default"
    image: str = DEFAULT_IMAGE
    queue: str | None = None
    secret: str | None = None
    claim: str | None = None
    service_account: str | None = None
    gpus_per_pod: int = 1
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def use_gpu(self) -> bool:
        """Whether the training group has GPUs: always, unless `cluster.accelerator=cpu`."""
        return self.cluster.accelerator != "cpu"

    @property
    def labels(self) -> dict[str, str]:
        """Labels of every object and pod."""
        return {"app.kubernetes.io/name": "ddpm", "app.kubernetes.io/instance": self.name}


_NAME_LIMITS = {"namespace": 63, "queue": 63, "secret": 253, "claim": 253, "service_account": 253}
"""Characters: a namespace is a DNS label, a queue's name the value of a label, the others are DNS subdomains."""
_PART = "[a-z0-9]([a-z0-9-]*[a-z0-9])?"
_NAME = re.compile(rf"{_PART}(\.{_PART})*")


def check_names(job: Job) -> None:
    """Checks the names of objects that a person says are there, which the API server would refuse only when the manifest is applied.

    Raises:
        ClusterError: naming the option of the first that Kubernetes cannot hold.
    """
    for key, most in _NAME_LIMITS.items():
        name, has_dots = getattr(job, key), key != "namespace"
        if name is not None and (not _NAME.fullmatch(name) or len(name) > most or ("." in name and not has_dots)):
            right = f"use up to {most} small letters and digits, with '-'{' and dots' if has_dots else ''} between them"
            raise ClusterError(f"--{key.replace('_', '-')} {name} is not a valid name in Kubernetes; {right}")
    if not re.fullmatch(r"[!-~]{1,500}", job.image):
        raise ClusterError(f"--image {job.image} is not an image; use REGISTRY/NAME:TAG")


def check_storage(job: Job) -> None:
    """Checks that every pod will find the storage root.

    Raises:
        ClusterError: if the root is on one machine only, or a claim has no place.
    """
    storage = job.cluster.storage
    if storage.startswith("s3://"):
        if job.claim:
            raise ClusterError(f"--claim {job.claim} has no place where cluster.storage={storage}; leave it out, or name the folder to mount it at")
    elif not storage.startswith("/") or storage.rstrip("/") == "":
        raise ClusterError(f"cluster.storage={storage} is not a path that every pod can see; use an absolute path with --claim, or s3://BUCKET/PREFIX")
    elif not job.claim:
        raise ClusterError(f"cluster.storage={storage} needs --claim NAME, a ReadWriteMany claim to mount there; or use s3://BUCKET/PREFIX")


def ray_cluster(job: Job) -> Tree:
    """Returns the spec of a RayCluster.

    Raises:
        ClusterError: if the workers do not fill whole pods.
    """
    scaling: Tree = {"enableInTreeAutoscaling": False} if job.queue else {"enableInTreeAutoscaling": True, "autoscalerOptions": _autoscaler()}
    groups = [_train_group(job)]
    if job.use_gpu or job.cluster.preprocess_labels:
        groups.append(_preprocess_group(job))
    head = {"rayStartParams": {"num-cpus": "0"}, "template": _ray_pod(job, "ray-head", _resources(HEAD_CPUS))}
    return {"rayVersion": RAY_VERSION, "authOptions": {"mode": "token"}, **scaling, "headGroupSpec": head, "workerGroupSpecs": groups}


def submitter(job: Job) -> Tree:
    """Returns the pod that hands the job to the head and follows its log; the operator gives it command and token."""
    container = plain_container(job, "ray-job-submitter", _resources(1, memory="1Gi"))
    return _template(job, {"automountServiceAccountToken": False, "containers": [container]})


def plain_container(job: Job, name: str, resources: Tree) -> Tree:
    """Returns a container of the image, without privileges."""
    return {"name": name, "image": job.image, "imagePullPolicy": "IfNotPresent", "resources": resources, "securityContext": _no_privileges()}


def pod_security() -> Tree:
    """Returns the security context of a pod: one user without privileges, to whom mounted volumes are writable."""
    user = {"runAsNonRoot": True, "runAsUser": USER, "runAsGroup": GROUP, "fsGroup": GROUP, "fsGroupChangePolicy": "OnRootMismatch"}
    return {**user, "seccompProfile": {"type": "RuntimeDefault"}}


def same(quantities: Tree) -> Tree:
    """Returns resources whose requests equal their limits, so that no neighbour can take them."""
    return {"requests": quantities, "limits": dict(quantities)}


def _autoscaler() -> Tree:
    resources = same({"cpu": "500m", "memory": "1Gi"})
    return {"version": "v2", "idleTimeoutSeconds": IDLE_SECONDS, "resources": resources, "securityContext": _no_privileges()}


def _no_privileges() -> Tree:
    return {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def _train_group(job: Job) -> Tree:
    cluster = job.cluster
    per_pod = job.gpus_per_pod if job.use_gpu else 1
    for count in (cluster.min_workers, cluster.max_workers):
        if count % per_pod:
            raise ClusterError(f"cluster.num_workers={count} does not fill pods of --gpus-per-pod {per_pod}; use a multiple")
    cpus = (cluster.cpus_per_worker or (CPUS_PER_GPU_WORKER if job.use_gpu else CPUS_PER_CPU_WORKER)) * per_pod
    pod = _worker_pod(job, _resources(cpus, gpus=per_pod if job.use_gpu else 0, disk=_disk_gib(cluster)))
    if job.use_gpu:
        pod["spec"]["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    fewest = cluster.max_workers if job.queue else cluster.min_workers
    custom = {name: f"{amount * per_pod:g}" for name, amount in cluster.worker_resources.items()}
    return _group("train", fewest // per_pod, fewest // per_pod, cluster.max_workers // per_pod, pod, cluster.worker_labels, custom)


def _preprocess_group(job: Job) -> Tree:
    pod = _worker_pod(job, _resources(PREPROCESS_CPUS, disk=_disk_gib(job.cluster)))
    fewest, most = (1, 1) if job.queue else (0, MAX_PREPROCESS_PODS)
    return _group("preprocess", 1, fewest, most, pod, job.cluster.preprocess_labels, {})


def _group(name: str, replicas: int, fewest: int, most: int, pod: Tree, labels: Mapping[str, str], resources: Mapping[str, str]) -> Tree:
    counts = {"replicas": replicas, "minReplicas": fewest, "maxReplicas": most}
    extras = {key: dict(value) for key, value in (("labels", labels), ("resources", resources)) if value}
    return {"groupName": name, **counts, **extras, "rayStartParams": {}, "template": pod}


def _disk_gib(cluster: ClusterConfig) -> int:
    return NODE_DISK_GIB + (-(-cluster.cache_bytes >> 30) if cluster.storage.startswith("s3://") else 0)


def _resources(cpus: int, *, gpus: int = 0, disk: int = 0, memory: str = "") -> Tree:
    quantities: Tree = {"cpu": str(cpus), "memory": memory or f"{cpus * GIB_PER_CPU}Gi"}
    resources = same(quantities | ({"nvidia.com/gpu": str(gpus)} if gpus else {}))
    if disk:
        resources["requests"]["ephemeral-storage"] = f"{disk}Gi"
    return resources


def _ray_pod(job: Job, container_name: str, resources: Tree) -> Tree:
    """Returns a pod that runs the pipeline: with code, storage, settings and secrets."""
    variables = {"PYTHONUNBUFFERED": "1", "RAY_USAGE_STATS_ENABLED": "0"} | dict(sorted(job.environment.items()))
    volumes, mounts = _volumes(job)
    container = plain_container(job, container_name, resources) | {"env": [{"name": name, "value": value} for name, value in variables.items()]}
    container |= {"envFrom": [{"secretRef": {"name": job.secret}}]} if job.secret else {}
    container |= {"volumeMounts": mounts} if mounts else {}
    account = {"serviceAccountName": job.service_account} if job.service_account else {}
    return _template(job, {**account, "containers": [container]} | ({"volumes": volumes} if volumes else {}))


def _worker_pod(job: Job, resources: Tree) -> Tree:
    """Returns the pod of a worker; only the autoscaler, beside the head, speaks to Kubernetes."""
    pod = _ray_pod(job, "ray-worker", resources)
    return pod | {"spec": pod["spec"] | {"automountServiceAccountToken": False}}


def _volumes(job: Job) -> tuple[list[Tree], list[Tree]]:
    volumes: list[Tree] = []
    mounts: list[Tree] = []
    if job.code:
        volumes.append({"name": "code", "configMap": {"name": job.code}})
        mounts.append({"name": "code", "mountPath": CODE_FOLDER, "readOnly": True})
    if job.claim:
        volumes.append({"name": "storage", "persistentVolumeClaim": {"claimName": job.claim}})
        mounts.append({"name": "storage", "mountPath": job.cluster.storage})
    return volumes, mounts


def _template(job: Job, spec: Tree) -> Tree:
    return {"metadata": {"labels": job.labels}, "spec": {"restartPolicy": "Never", "securityContext": pod_security(), **spec}}
