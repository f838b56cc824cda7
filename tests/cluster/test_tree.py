"""The working tree as it travels to a cluster."""

import subprocess
from pathlib import Path

import pytest

from cluster.config import ClusterError
from cluster.tree import list_tree, stage_tree


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    root = tmp_path / "checkout"
    keys = (".env", ".env.local", "secret.pem", "a/id_rsa", "auth_token")
    for name in (
        *keys,
        "a/kept.py",
        "a/new.py",
        "ignored/big.bin",
        "storage/runs/x",
        ".venv/lib/y.py",
        ".env",
        ".env.local",
        "secret.pem",
        "a/id_rsa",
        "auth_token",
        "a/__pycache__/k.pyc",
        "ümlaut ü.txt",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    (root / ".gitignore").write_text("/ignored/\n")
    return root


def test_what_git_would_keep_travels_and_leftovers_and_keys_do_not(checkout: Path):
    subprocess.run(["git", "init", "-q"], cwd=checkout, check=True)
    subprocess.run(["git", "add", "a/kept.py"], cwd=checkout, check=True)
    assert list_tree(checkout) == ["a/kept.py", "a/new.py", "ümlaut ü.txt"]


def test_a_checkout_that_git_cannot_list_does_not_travel(checkout: Path):
    (checkout / ".git").write_text("broken")
    with pytest.raises(ClusterError, match=r"git cannot list .* so what it ignores would travel too"):
        list_tree(checkout)


def test_without_git_all_but_the_usual_leftovers_travels(checkout: Path):
    assert list_tree(checkout) == ["a/kept.py", "a/new.py", "ignored/big.bin", "ümlaut ü.txt"]


def test_the_tree_is_copied_with_the_extra_files(checkout: Path, tmp_path: Path):
    size = stage_tree(tmp_path / "staged", {"COMMIT": "abc\n"}, root=checkout)
    assert size == sum((checkout / name).stat().st_size for name in list_tree(checkout))
    assert (tmp_path / "staged" / "a" / "new.py").read_text() == "a/new.py"
    assert (tmp_path / "staged" / "COMMIT").read_text() == "abc\n"


def test_a_tree_above_the_limit_is_refused_with_its_largest_files_before_anything_is_copied(checkout: Path, tmp_path: Path):
    (checkout / "ignored" / "big.bin").write_bytes(bytes(3 << 20))
    with pytest.raises(ClusterError, match=r"has 3 MiB in 4 files, and at most 2 MiB travel.*the largest are ignored/big\.bin \(3\.0 MiB\).*\.gitignore"):
        stage_tree(tmp_path / "staged", {}, root=checkout, limit_bytes=2 << 20)
    assert not (tmp_path / "staged").exists()
