"""Kubernetes manifests of a run: RayJob, RayCluster, CronJob and RayCronJob, as plain trees. For KubeRay 1.7 and Ray 2.60."""

import base64
import hashlib
import re
from collections.abc import Iterable

import yaml

from .config import ClusterError
from .package import CONFIG_FILE
from .pods import CODE_FILE, CODE_FOLDER, Job, Tree, check_storage, plain_container, pod_security, ray_cluster, same, submitter

PREFIX = "ddpm-"
CODE_NAME = "ddpm-code"
MAX_NAME = 34  # a RayJob's name holds 47, and a schedule appends up to 13
WAIT_S = 900
RETRIES = 2
CLUSTER_LOST, KILLED, TOLD_TO_STOP = 75, 137, 143  # exit codes after which another pod of a tick may do better
SUBMIT_CONTAINER = "submit"
CLUSTER_TTL_S = 60
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
TEMPLATE_FOLDER = "/etc/ddpm/job"
CATCH_UP_S = 3600
RAYCRONJOB_NOTES = """\
RayCronJob is alpha: KubeRay's operator needs the feature gate RayCronJob. It has no overlap policy, and replays missed ticks after an outage or
a suspension. No attempt is made twice for that: one that finds another running leaves at once (retrain.when_busy=leave; wait would hold its pods),
and one that finds nothing new is over in seconds. But each has a cluster made for it first, so let Kueue admit one at a time (--queue default); the
kind cronjob needs neither.
"""


def kubernetes_name(run_name: str) -> str:
    """Returns the name of a run's objects.

    Raises:
        ClusterError: if Kubernetes and KubeRay cannot hold it.
    """
    name = PREFIX + re.sub(r"[._]", "-", run_name.lower())
    if len(name) > MAX_NAME or name.endswith("-"):
        raise ClusterError(
            f"--name {run_name} becomes {name}, which Kubernetes cannot hold; use up to {MAX_NAME - len(PREFIX)} letters and digits, '-' between them"
        )
    return name


def code_name(code: bytes) -> str:
    """Returns the ConfigMap's name of a zip file: another code has another name, so that a running job keeps its own."""
    return f"{CODE_NAME}-{hashlib.sha256(code).hexdigest()[:10]}"


def code_map(job: Job, code: bytes) -> Tree:
    """Returns the ConfigMap that carries the code."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(job, job.code),
        "immutable": True,
        "binaryData": {CODE_FILE: base64.b64encode(code).decode()},
    }


def rayjob(job: Job) -> Tree:
    """Returns a RayJob: a cluster that comes for one run and goes with it; a retry is a new cluster that goes on from the last checkpoint."""
    return _rayjob(job, _rayjob_spec(job, "run", "", RETRIES))


def raycluster(job: Job) -> Tree:
    """Returns a RayCluster that stays, to submit runs to."""
    check_storage(job)
    return {"apiVersion": "ray.io/v1", "kind": "RayCluster", "metadata": _metadata(job, job.name, queue=job.queue), "spec": ray_cluster(job)}


def raycronjob(job: Job, schedule: str, time_zone: str) -> Tree:
    """Returns KubeRay's own schedule of attempts at retraining.

    Raises:
        ClusterError: if a queue is named that its RayJobs could not be told of.
    """
    check_storage(job)
    if job.queue not in (None, "default"):
        raise ClusterError(f"--queue {job.queue} does not reach the jobs of a RayCronJob, which have no label; use --queue default (Kueue's own), or cronjob")
    spec = {"schedule": schedule, "timeZone": time_zone, "jobTemplate": _attempt_spec(job)}
    return {"apiVersion": "ray.io/v1", "kind": "RayCronJob", "metadata": _metadata(job, job.name), "spec": spec}


def cronjob(job: Job, schedule: str, time_zone: str) -> list[Tree]:
    """Returns a CronJob whose pod has a RayJob make an attempt at retraining, and waits for it, so that `Forbid` covers it; and what that pod needs."""
    account = f"{job.name}-submit"
    template = {"rayjob.yaml": to_yaml([_rayjob(job, _attempt_spec(job))])}
    rules = [
        {"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create", "get", "list"]},
        # What became of an attempt that did not fail is told by its log alone.
        {"apiGroups": [""], "resources": ["pods"], "verbs": ["list"]},
        {"apiGroups": [""], "resources": ["pods/log"], "verbs": ["get"]},
    ]
    return [
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": _metadata(job, account)},
        {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "Role", "metadata": _metadata(job, account), "rules": rules},
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "RoleBinding",
            "metadata": _metadata(job, account),
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": account},
            "subjects": [{"kind": "ServiceAccount", "name": account, "namespace": job.namespace}],
        },
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": _metadata(job, f"{job.name}-job"), "data": template},
        _cronjob(job, schedule, time_zone, account),
    ]


def to_yaml(documents: Iterable[Tree], comment: str = "") -> str:
    """Returns YAML that kubectl reads; the same trees give the same text."""
    lines = "".join(f"# {line}\n" for line in comment.splitlines())
    return lines + "".join("---\n" + yaml.dump(document, Dumper=_Dumper, sort_keys=False, width=10_000) for document in documents)


class _Dumper(yaml.SafeDumper):
    """Writes every value out, where YAML would point to an equal one, and texts of several lines as such."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def _metadata(job: Job, name: str, queue: str | None = None) -> Tree:
    return {"name": name, "namespace": job.namespace, "labels": job.labels | ({QUEUE_LABEL: queue} if queue else {})}


def _rayjob(job: Job, spec: Tree) -> Tree:
    check_storage(job)
    return {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": _metadata(job, job.name, queue=job.queue), "spec": spec}


def _attempt_spec(job: Job) -> Tree:
    """Returns the spec of an attempt at retraining. KubeRay would try again whatever went wrong, also what a guard stopped, and count as many failures."""
    return _rayjob_spec(job, "retrain", " --job", 0)


def _rayjob_spec(job: Job, command: str, options: str, retries: int) -> Tree:
    placement = f"cluster.address=auto cluster.accelerator={'gpu' if job.use_gpu else 'cpu'} cluster.wait_s={job.cluster.wait_s or WAIT_S}"
    return {
        "entrypoint": f"python -m workflows {command} {CONFIG_FILE} {placement} --name {job.run_name}{options}",
        "runtimeEnvYAML": f"working_dir: file://{CODE_FOLDER}/{CODE_FILE}\n",
        "submissionMode": "K8sJobMode",
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": CLUSTER_TTL_S,
        "backoffLimit": retries,
        "submitterConfig": {"backoffLimit": RETRIES},
        "submitterPodTemplate": submitter(job),
        "rayClusterSpec": ray_cluster(job),
    }


def _cronjob(job: Job, schedule: str, time_zone: str, account: str) -> Tree:
    again = {"containerName": SUBMIT_CONTAINER, "operator": "NotIn", "values": [CLUSTER_LOST, KILLED, TOLD_TO_STOP]}
    rules = [{"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}, {"action": "FailJob", "onExitCodes": again}]
    pod = {"metadata": {"labels": job.labels}, "spec": _submit_pod(job, account)}
    spec = {
        "schedule": schedule,
        "timeZone": time_zone,
        "concurrencyPolicy": "Forbid",
        "startingDeadlineSeconds": CATCH_UP_S,
        "successfulJobsHistoryLimit": 3,
        "failedJobsHistoryLimit": 3,
        "jobTemplate": {"metadata": {"labels": job.labels}, "spec": {"backoffLimit": RETRIES, "podFailurePolicy": {"rules": rules}, "template": pod}},
    }
    return {"apiVersion": "batch/v1", "kind": "CronJob", "metadata": _metadata(job, job.name), "spec": spec}


def _submit_pod(job: Job, account: str) -> Tree:
    """Returns the pod that makes the RayJob; the RayJob is named after its batch Job, one for each tick."""
    batch = {"JOB_NAME": "job-name", "JOB_UID": "controller-uid"}
    fields = [{"name": name, "valueFrom": {"fieldRef": {"fieldPath": f"metadata.labels['batch.kubernetes.io/{label}']"}}} for name, label in batch.items()]
    container = plain_container(job, SUBMIT_CONTAINER, same({"cpu": "100m", "memory": "256Mi"})) | {
        "command": ["python", "-m", "workflows.submit_rayjob", "--template", f"{TEMPLATE_FOLDER}/rayjob.yaml", "--wait"],
        "env": [{"name": "PYTHONPATH", "value": f"{CODE_FOLDER}/{CODE_FILE}"}, {"name": "PYTHONUNBUFFERED", "value": "1"}, *fields],
        "volumeMounts": [
            {"name": "code", "mountPath": CODE_FOLDER, "readOnly": True},
            {"name": "job", "mountPath": TEMPLATE_FOLDER, "readOnly": True},
        ],
    }
    volumes = [{"name": "code", "configMap": {"name": job.code}}, {"name": "job", "configMap": {"name": f"{job.name}-job"}}]
    return {"restartPolicy": "Never", "serviceAccountName": account, "securityContext": pod_security(), "containers": [container], "volumes": volumes}
