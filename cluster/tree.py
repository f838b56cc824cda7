"""The working tree as it travels to a cluster: what git would keep of it, within a limit."""

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from .config import ClusterError

ROOT = Path(__file__).resolve().parent.parent
LIMIT_BYTES = 100 << 20
COMMIT_FILE = "COMMIT"
_LEFTOVERS = (".git", ".venv", "venv", "storage", "__pycache__", "node_modules", ".gitignore", ".rayignore", "*.pyc", "*.egg-info")
_KEYS = (".env", ".env.*", "*.env", "*.pem", "*.key", "id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*", ".netrc", "auth_token*", "credentials", ".aws", ".ssh")
_SHOWN = 3


def list_tree(root: Path = ROOT) -> list[str]:
    """Returns the files of a working tree, relative and sorted: those git tracks or would add; without git all but the usual leftovers.

    Files that hold keys by their name do not count.

    Raises:
        ClusterError: if the tree is git's, and git cannot say what belongs to it.
    """
    names = _ask_git(root)
    found = _walk(root) if names is None else names
    return sorted(name for name in found if _belongs(name) and (root / name).is_file())


def _ask_git(root: Path) -> list[str] | None:
    command = ["git", "-C", str(root), "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        done = subprocess.run(command, capture_output=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        if not (root / ".git").exists():
            return None
        said = error.stderr.decode(errors="replace") if isinstance(error, subprocess.CalledProcessError) else str(error)
        raise ClusterError(f"git cannot list {root} ({' '.join(said.split())[:200]}), so what it ignores would travel too; mend that") from error
    return [os.fsdecode(name) for name in done.stdout.split(b"\0") if name]


def _walk(root: Path) -> Iterator[str]:
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if _belongs(name) and not name.startswith(".")]
        yield from (os.path.relpath(os.path.join(folder, name), root) for name in names)


def _belongs(name: str) -> bool:
    return not any(fnmatchcase(part, pattern) for part in name.split("/") for pattern in (*_LEFTOVERS, *_KEYS))


def stage_tree(target: Path, extra: Mapping[str, str], *, root: Path = ROOT, limit_bytes: int = LIMIT_BYTES) -> int:
    """Copies a working tree into a folder, with some further text files, and returns its size in bytes.

    Raises:
        ClusterError: if it is larger than the limit, naming what makes it so; nothing has been copied then.
    """
    names = list_tree(root)
    sizes = {name: (root / name).stat().st_size for name in names}
    total = sum(sizes.values())
    if total > limit_bytes:
        raise ClusterError(_too_large(root, sizes, total, limit_bytes))
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / name, target / name)
    for name, text in extra.items():
        (target / name).write_text(text, encoding="utf-8")
    return total


def _too_large(root: Path, sizes: Mapping[str, int], total: int, limit_bytes: int) -> str:
    largest: Sequence[str] = sorted(sizes, key=lambda name: -sizes[name])[:_SHOWN]
    shown = ", ".join(f"{name} ({sizes[name] / 2**20:.1f} MiB)" for name in largest)
    return (
        f"the working tree {root} has {total / 2**20:.0f} MiB in {len(sizes)} files, and at most {limit_bytes / 2**20:.0f} MiB travel to a cluster; "
        f"the largest are {shown}; move them away or name them in .gitignore"
    )
