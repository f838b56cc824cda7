"""The project's code in one zip file, small enough to travel inside a Kubernetes manifest."""

import io
import zipfile
from pathlib import Path

from .config import ClusterError
from .tree import COMMIT_FILE, ROOT

PACKAGES = ("components", "cluster", "pipeline", "workflows")
PRESETS = "workflows/presets"
FILES = ("pyproject.toml", "requirements.lock")
CONFIG_FILE = "run.yaml"
LIMIT = 1 << 20  # bytes of all values of a ConfigMap, before base64
EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest date a zip file knows


def pack(config: str, commit: str, root: Path = ROOT) -> bytes:
    """Returns a zip file of the packages and of a run's settings; the same files and settings give the same bytes.

    Args:
        config: the settings as YAML, stored as `run.yaml` at the top.
        commit: of the checkout, for the run's tags.
        root: the checkout.

    Raises:
        ClusterError: if it would not fit into a ConfigMap.
    """
    contents = {path.relative_to(root).as_posix(): path.read_bytes() for path in _files(root)} | {
        CONFIG_FILE: config.encode(),
        COMMIT_FILE: f"{commit}\n".encode(),
    }
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name in sorted(contents):
            entry = zipfile.ZipInfo(name, EPOCH)
            entry.create_system, entry.external_attr, entry.compress_type = 3, 0o644 << 16, zipfile.ZIP_DEFLATED
            archive.writestr(entry, contents[name])
    size = len(buffer.getvalue())
    if size >= LIMIT:
        largest = max(contents, key=lambda name: len(contents[name]))
        raise ClusterError(f"the code is {size} bytes zipped, and a ConfigMap holds {LIMIT}; move large files, such as {largest}, out of the packages")
    return buffer.getvalue()


def _files(root: Path) -> list[Path]:
    code = [path for package in PACKAGES for path in (root / package).rglob("*.py")]
    return [*code, *(root / PRESETS).glob("*.yaml"), *(root / name for name in FILES)]
