"""What a result was made with: the packages, the machine and the code; never a name, a path or the value of an environment variable."""

import importlib.metadata
import platform
import re
import subprocess
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from cluster.machine import Machine, this_machine
from pipeline.tracking import git_commit

PACKAGES = ("torch", "torchvision", "ray", "mlflow", "pyarrow", "numpy")
ENVIRONMENT_FILES, CHANGES_FILE = ("requirements.txt", "environment.json"), "uncommitted.diff"
MOST_CHANGES = 1 << 20
_ROOT = Path(__file__).resolve().parent.parent


class Environment(BaseModel):
    """What ran, and on what.

    Attributes:
        packages: versions of those that decide most; all of them are in requirements().
        commit: of the project, `-dirty` where its checkout had changes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    python: str
    packages: dict[str, str]
    commit: str
    machine: Machine


def write_environment(folder: Path) -> None:
    """Writes the packages and the machine into a folder, and how the checkout differs from its commit, if it does."""
    contents = dict(zip(ENVIRONMENT_FILES, (requirements(), this_environment().model_dump_json(indent=2) + "\n"), strict=True))
    if changes := uncommitted_changes():
        contents[CHANGES_FILE] = changes
    for name, content in contents.items():
        (folder / name).write_text(content, encoding="utf-8")


def this_environment() -> Environment:
    """Returns what this process runs with."""
    return Environment(
        python=f"{platform.python_implementation()} {platform.python_version()}",
        packages={name: version for name, version in sorted(_installed().items()) if name in PACKAGES},
        commit=git_commit(),
        machine=this_machine(),
    )


def requirements() -> str:
    """Returns the exact versions of all installed packages, a line for each, as pip reads them."""
    return "".join(f"{name}=={version}\n" for name, version in sorted(_installed().items()))


def _installed() -> dict[str, str]:
    """Returns versions by the packages' normalised names; the first on the path wins, as it does on import."""
    found: dict[str, str] = {}
    for package in importlib.metadata.distributions():
        name = package.metadata["Name"]
        if name:
            found.setdefault(re.sub(r"[-_.]+", "-", name).lower(), package.version)
    return found


def uncommitted_changes() -> str:
    """Returns how the checkout's tracked files differ from its commit, at most a megabyte of it; nothing outside a checkout."""
    if not (_ROOT / ".git").exists():
        return ""
    command = ["git", "-C", str(_ROOT), "diff", "HEAD", "--no-ext-diff", "--no-color", "--no-textconv", "--", "."]
    try:
        done = subprocess.run(command, capture_output=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    text = done.stdout.decode("utf-8", "replace")
    return text if len(text) <= MOST_CHANGES else f"{text[:MOST_CHANGES]}\n(cut off: {len(text) - MOST_CHANGES:,} more characters)\n"
