"""Prints Kubernetes manifests of a run: which settings of this machine travel, and which must not."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import yaml

from cluster.manifests import CODE_NAME, RAYCRONJOB_NOTES, code_map, code_name, cronjob, kubernetes_name, raycluster, raycronjob, rayjob, to_yaml
from cluster.package import pack
from cluster.pods import DEFAULT_IMAGE, Job, check_names
from components.ingest.sources import TORCHVISION
from pipeline.config import RunConfig
from pipeline.errors import ConfigError
from pipeline.tracking import git_commit
from workflows.schedule.plan import check_zone
from workflows.settings import paths_of, travelling_settings

KINDS = ("rayjob", "raycluster", "raycronjob", "cronjob")
APPLY = "Apply with `kubectl apply --server-side -f FILE`: the code would be too long for the annotation of a plain apply."


@dataclass(frozen=True)
class Options:
    """What the command line says besides the run's settings; the names are those of the options."""

    image: str = DEFAULT_IMAGE
    namespace: str = "default"
    queue: str | None = None
    schedule: str = "0 3 * * *"
    time_zone: str = "Etc/UTC"
    secret: str | None = None
    claim: str | None = None
    service_account: str | None = None
    gpus_per_pod: int = 1
    code: Path | None = None


def print_manifest(stdout: IO[str], kind: str, config: RunConfig, run_name: str, options: Options) -> None:
    """Writes the manifest, and with `options.code` the code into a file instead of the manifest.

    Raises:
        ConfigError: if a setting is of this machine only, or holds a secret.
        ClusterError: if the run cannot be placed as asked.
    """
    if kind not in KINDS:
        raise ConfigError(f"manifest {kind} is no kind; use one of {', '.join(KINDS)}")
    if len(options.schedule.split()) != 5:
        raise ConfigError(f"--schedule {options.schedule!r} is not of five fields, such as '0 3 * * *'")
    check_zone(options.time_zone)
    environment = travelling_settings(os.environ, "into a Secret named by --secret")
    _check_reachable(config, options, environment)
    code = pack(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), git_commit())
    name = CODE_NAME if options.code else code_name(code)
    documents = _documents(kind, _job(config, run_name, options, environment, "" if kind == "raycluster" else name), code, options)
    if options.code and kind != "raycluster":
        options.code.write_bytes(code)
    stdout.write(to_yaml(documents, APPLY + "\n" + (RAYCRONJOB_NOTES if kind == "raycronjob" else "")))


def _documents(kind: str, job: Job, code: bytes, options: Options) -> list[dict[str, object]]:
    if kind == "raycluster":
        return [raycluster(job)]
    first = [] if options.code else [code_map(job, code)]
    if kind == "rayjob":
        return [*first, rayjob(job)]
    if kind == "raycronjob":
        return [*first, raycronjob(job, options.schedule, options.time_zone)]
    return [*first, *cronjob(job, options.schedule, options.time_zone)]


def _job(config: RunConfig, run_name: str, options: Options, environment: Mapping[str, str], code: str) -> Job:
    job = Job(
        name=kubernetes_name(run_name),
        run_name=run_name,
        cluster=config.cluster,
        code=code,
        namespace=options.namespace,
        image=options.image,
        queue=options.queue,
        secret=options.secret,
        claim=options.claim,
        service_account=options.service_account,
        gpus_per_pod=options.gpus_per_pod,
        environment=environment,
    )
    check_names(job)
    return job


def _check_reachable(config: RunConfig, options: Options, environment: Mapping[str, str]) -> None:
    storage = config.cluster.storage
    if storage.startswith("s3://") and "MLFLOW_TRACKING_URI" not in environment and not options.secret:
        raise ConfigError(f"cluster.storage={storage} cannot hold MLflow's database; set MLFLOW_TRACKING_URI to a server, here or in the Secret of --secret")
    paths = paths_of({"data.root": config.data.root, "evaluate.inception_weights": config.evaluate.inception_weights}, config.data.source, TORCHVISION)
    for setting, path in paths.items():
        if not Path(path).is_relative_to(storage):
            raise ConfigError(f"{setting}={path} is not below cluster.storage={storage}, all that the pods can see; put it into a --claim there")
