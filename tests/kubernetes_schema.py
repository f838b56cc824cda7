"""Kubernetes' rules about objects, as far as tests can know them: CRD schemas made into JSON schemas, and what KubeRay's operator refuses."""

import functools
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft7Validator
from support import ROOT

CRDS = ROOT.parent / "shared" / "reference" / "crds"
KUBERNETES_VERSION = "1.33"
DROPPED = ("nullable", "format", "default", "description", "example")
Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def to_json_schema(node: Any) -> Any:
    """Returns the JSON schema of a structural schema, strict about unknown fields as `kubectl create` is."""
    if isinstance(node, list):
        return [to_json_schema(item) for item in node]
    if not isinstance(node, dict):
        return node
    if node.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]} | {key: node[key] for key in ("pattern",) if key in node}
    schema = {key: _convert(key, value) for key, value in node.items() if key not in DROPPED and not key.startswith("x-kubernetes-")}
    properties = node.get("properties", {})
    if "required" in schema:  # the API server fills defaults in before it validates
        schema["required"] = [name for name in schema["required"] if "default" not in properties.get(name, {})]
    if node.get("nullable") and "type" in schema:
        schema["type"] = [schema["type"], "null"]
    if schema.get("type") == "object" and properties and not node.get("x-kubernetes-preserve-unknown-fields"):
        schema.setdefault("additionalProperties", False)
    return schema


def _convert(key: str, value: Any) -> Any:
    if key == "properties":
        return {name: to_json_schema(schema) for name, schema in value.items()}
    return value if key in ("enum", "required") else to_json_schema(value)


@functools.cache
def validator(kind: str) -> Draft7Validator:
    definition = yaml.load(Path(CRDS / f"ray.io_{kind.lower()}s.yaml").read_text(), Loader=Loader)
    schema = to_json_schema(next(version for version in definition["spec"]["versions"] if version["name"] == "v1")["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    Draft7Validator.check_schema(schema)
    return Draft7Validator(schema)


def schema_errors(document: dict[str, Any]) -> list[str]:
    return [f"{error.json_path}: {error.message[:200]}" for error in validator(document["kind"]).iter_errors(document)]


def core_errors(document: dict[str, Any]) -> list[str]:
    """Returns what Kubernetes' own API server would refuse in one of its own objects, unknown fields too."""
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed: it is in the extra dev")
    try:
        kubernetes_validate.validate(document, KUBERNETES_VERSION, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{document['kind']} {error.json_path}: {error.message[:200]}"]
    return []


def operator_errors(document: dict[str, Any]) -> list[str]:
    """Returns what KubeRay 1.7's operator would refuse though the schema allows it."""
    spec = document["spec"].get("jobTemplate", document["spec"])
    cluster = spec.get("rayClusterSpec", spec)
    longest = {"RayCluster": 53, "RayJob": 47, "RayCronJob": 38}[document["kind"]]
    errors = [] if len(document["metadata"]["name"]) <= longest else ["name is too long"]
    return errors + (_job_errors(spec) if "entrypoint" in spec else []) + _cluster_errors(cluster)


def _job_errors(spec: dict[str, Any]) -> list[str]:
    shutdown, mode = spec.get("shutdownAfterJobFinishes", False), spec.get("submissionMode", "K8sJobMode")
    rules = {
        "suspend needs shutdownAfterJobFinishes": spec.get("suspend") and not shutdown,
        "a TTL needs shutdownAfterJobFinishes": spec.get("ttlSecondsAfterFinished", 0) > 0 and not shutdown,
        "deletionStrategy excludes shutdown and TTL": "deletionStrategy" in spec and shutdown,
        "clusterSelector excludes suspend, retries, sidecars": "clusterSelector" in spec and (spec.get("suspend") or spec.get("backoffLimit")),
        "no such submissionMode": mode not in ("K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode"),
        "SidecarMode excludes a submitter": mode == "SidecarMode" and ("submitterPodTemplate" in spec or "submitterConfig" in spec),
        "InteractiveMode excludes retries": mode == "InteractiveMode" and spec.get("backoffLimit"),
        "runtimeEnvYAML is no mapping": not isinstance(yaml.safe_load(spec["runtimeEnvYAML"]), dict),
    }
    return [rule for rule, broken in rules.items() if broken]


def _cluster_errors(cluster: dict[str, Any]) -> list[str]:
    groups, head = cluster["workerGroupSpecs"], cluster["headGroupSpec"]
    scales = cluster.get("enableInTreeAutoscaling", False)
    v2 = scales and cluster.get("autoscalerOptions", {}).get("version") == "v2"
    policies = {pod["template"]["spec"].get("restartPolicy", "Never") for pod in (head, *groups)}
    names = {variable["name"] for pod in (head, *groups) for variable in pod["template"]["spec"]["containers"][0].get("env", [])}
    numbers = ("num-cpus", "num-gpus", "memory", "resources")
    rules = {
        "autoscaler v2 needs restartPolicy Never": v2 and policies != {"Never"},
        "the autoscaler's version is set twice": "RAY_enable_autoscaler_v2" in names,
        "counts are no range": any(not 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"] for group in groups),
        "resources are said twice": any(group.get("resources") and set(numbers) & set(group["rayStartParams"]) for group in (head, *groups)),
        "labels belong to the group": any("labels" in group["rayStartParams"] for group in (head, *groups)),
        "no token": cluster.get("authOptions") != {"mode": "token"} or cluster.get("rayVersion", "") < "2.52.0",
        "Redis without gcsFaultToleranceOptions": bool({"RAY_REDIS_ADDRESS", "REDIS_USERNAME"} & names),
    }
    return [rule for rule, broken in rules.items() if broken]
