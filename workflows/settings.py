"""Which settings of this machine's environment a run elsewhere needs too, and which must never travel."""

from collections.abc import Mapping
from urllib.parse import urlsplit

from pipeline.errors import ConfigError

ADDRESSES = ("MLFLOW_TRACKING_URI", "MLFLOW_S3_ENDPOINT_URL", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3")
PLAIN = ("AWS_DEFAULT_REGION", "AWS_REGION", "AWS_EC2_METADATA_DISABLED")
SECRETS = (
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "DDPM_WEBHOOK_SECRET",
)


def travelling_settings(environ: Mapping[str, str], secrets_go: str) -> dict[str, str]:
    """Returns the settings that travel: a fixed list, none of them secret.

    Args:
        secrets_go: where a secret belongs instead, for the message.

    Raises:
        ConfigError: if an address holds a secret, or is of this machine only.
    """
    for name in ADDRESSES:
        _check_address(name, environ.get(name) or "http://unset", secrets_go)
    return {name: environ[name] for name in (*ADDRESSES, *PLAIN) if environ.get(name)}


def _check_address(name: str, address: str, secrets_go: str) -> None:
    parts = urlsplit(address)
    if "@" in parts.netloc or parts.query:
        better = "put MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD" if name.startswith("MLFLOW") else "put AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        raise ConfigError(f"{name} holds a user, password or option, which others could read; {better} {secrets_go}")
    if parts.scheme not in ("http", "https"):
        raise ConfigError(f"{name}={address} is on this machine only; use http:// or https://, or unset it")


def paths_of(settings: Mapping[str, str | None], source: str, builtin: Mapping[str, object]) -> dict[str, str]:
    """Returns the settings that name files, by key; a source that is built in or on S3 names none.

    Raises:
        ConfigError: if another is on S3, which only the storage root may be.
    """
    paths = {key: path for key, path in settings.items() if path is not None}
    if source != "digits" and source not in builtin and not source.startswith("s3://"):
        paths["data.source"] = source
    for key, path in paths.items():
        if "://" in path and key != "cluster.storage":
            raise ConfigError(f"{key}={path} is not read from there; name a path that every machine of the run sees")
    return paths
