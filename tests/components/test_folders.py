"""Folders of images, on disk and on a real S3 server."""

import os
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image
from servers import S3Server

from components.data.images import READERS
from components.errors import DataError
from components.ingest import folders
from components.ingest.folders import FolderSource
from components.ingest.listing import UNSEEN, Item, Listing, items_of
from components.ingest.sources import DataConfig, list_source
from components.storage import Location


def forbid(path: Path) -> None:
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")


@pytest.fixture
def bucket(tmp_path: Path, s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Location:
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    folders._reach.cache_clear()
    return Location.of(f"s3://{s3.bucket}/{tmp_path.name}")


@pytest.fixture(params=["disk", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path, bucket: Location) -> Location:
    return Location.of(tmp_path / "images") if request.param == "disk" else bucket


def write(root: Location, **files: str) -> Location:
    for name, content in files.items():
        (root / name).write_text(content)
    return root


def listed(root: Location | Path) -> Listing:
    return list_source(DataConfig(source=str(root)))[1]


def items(root: Location | Path) -> dict[str, Item]:
    return {item.path: item for item in items_of(listed(root).table)}


TREE = {
    "cat/1.png": "one",
    "cat/deep/er/x y+%.JPEG": "two",
    "cat.png": "three",
    "dog/é 図.webp": "four",
    "dog/raw.CR2": "five",
    "dog/phone.heic": "six",
    "cat/notes.txt": "",
    ".hidden.png": "",
    "cat/.thumbs/1.png": "",
    "cat/.thumbs/2.png": "",
    "cat/README": "",
}


def test_a_folder_is_listed_with_its_first_level_as_label_wherever_it_lies(root: Location):
    write(root, **TREE)
    found = {path: (item.label, item.size) for path, item in items(root).items()}
    assert found == {
        "cat.png": (None, 5),
        "cat/1.png": ("cat", 3),
        "cat/deep/er/x y+%.JPEG": ("cat", 3),
        "dog/phone.heic": ("dog", 3),
        "dog/raw.CR2": ("dog", 4),
        "dog/é 図.webp": ("dog", 4),
    }
    assert list(found) == sorted(found, key=str.encode)
    assert listed(root).ignored == {".txt": 1, "hidden file": 1, "hidden folder": 1, "no suffix": 1}


def test_images_are_fetched_wherever_they_lie(root: Location):
    source, listing = list_source(DataConfig(source=str(write(root, **TREE))))
    source.open()
    assert source.is_remote is not root.is_local
    assert {item.path: source.fetch(item.path) for item in items_of(listing.table)} == {path: TREE[path].encode() for path in items(root)}


def test_a_listing_changes_with_every_rewriting_even_one_of_equal_size(root: Location):
    write(root, **{"a/x.png": "old", "a/y.png": "old"})
    before = listed(root).digest()
    assert listed(root).digest() == before
    write(root, **{"a/x.png": "new"})
    rewritten = listed(root).digest()
    (root / "a" / "y.png").remove()
    assert len({before, rewritten, listed(root).digest()}) == 3


def test_a_listing_does_not_depend_on_the_order_in_which_files_were_made(tmp_path: Path):
    names = [f"{label}/{number}.png" for label in "abc" for number in range(40)]
    for root, order in ((tmp_path / "one", names), (tmp_path / "two", names[::-1])):
        for name in order:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(name)
            os.utime(root / name, ns=(1, 1))
    assert listed(tmp_path / "one").table.equals(listed(tmp_path / "two").table)
    assert listed(tmp_path / "one").digest() == listed(tmp_path / "two").digest()


def test_more_keys_than_one_answer_of_s3_holds_are_all_listed(bucket: Location, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(folders, "PAGE_KEYS", 7)
    for number in range(60):
        (tmp_path / f"{number}.png").write_text(str(number))
    bucket.upload(tmp_path)
    assert {path: item.size for path, item in items(bucket).items()} == {path: item.size for path, item in items(tmp_path).items()}


def test_a_prefix_is_a_folder_and_its_markers_are_no_images(bucket: Location):
    write(bucket, **{"photos/a.png": "1", "photos2/b.png": "2"})
    import boto3

    name, _, prefix = bucket.uri.removeprefix("s3://").partition("/")
    for marker in ("photos/", "photos/cat.png/"):
        boto3.client("s3").put_object(Bucket=name, Key=f"{prefix}/{marker}", Body=b"")
    assert list(items(bucket / "photos")) == ["a.png"]
    assert listed(bucket / "photos").ignored == {"folder marker": 2}


def test_a_key_that_cannot_be_a_path_is_listed_and_refused(bucket: Location):
    import boto3

    name, _, prefix = bucket.uri.removeprefix("s3://").partition("/")
    boto3.client("s3").put_object(Bucket=name, Key=f"{prefix}/a//x.png", Body=b"1")
    source, listing = list_source(DataConfig(source=str(bucket)))
    assert [item.path for item in items_of(listing.table)] == ["a//x.png"]
    with pytest.raises(DataError, match="ArrowInvalid: Empty path component"):
        source.fetch("a//x.png")


@pytest.mark.parametrize("address", ["s3://no-such-bucket-here/x", "s3://bucket/no/such/prefix"])
def test_a_bucket_or_prefix_that_is_not_there_is_named(bucket: Location, address: str):
    assert bucket.uri.startswith("s3://bucket/")
    with pytest.raises(DataError, match=rf"data\.source={address} .*name a bucket and prefix that are there"):
        listed(Location.of(address))
    with pytest.raises(DataError, match=rf"data\.source={address} .*name a bucket and prefix that are there"):
        FolderSource(address).open()


def test_an_image_that_is_gone_is_unreadable_in_the_same_words_wherever_it_lay(root: Location):
    source, _ = list_source(DataConfig(source=str(write(root, **{"a.png": "1", "b.png": "2"}))))
    (root / "a.png").remove()
    with pytest.raises(DataError, match=r"^FileNotFoundError: No such file or directory$") as caught:
        source.fetch("a.png")
    assert caught.value.reason == "unreadable"


class Moody(BaseHTTPRequestHandler):
    """An S3 that answers as the test says: so many times with an error, then with an object."""

    failures: list[int]

    def do_GET(self) -> None:
        status = self.failures.pop() if self.failures else 200
        body = b"pixels" if status == 200 else b""
        self.send_response(status)
        self.send_header("Content-Length", str(len(b"pixels" if self.command == "HEAD" and status == 200 else body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.do_GET()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def moody(bucket: Location, monkeypatch: pytest.MonkeyPatch) -> Iterator[FolderSource]:
    assert bucket
    with ThreadingHTTPServer(("127.0.0.1", 0), Moody) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(folders, "PAUSES_S", (0.0, 0.0))
        yield FolderSource("s3://moody/x")
        server.shutdown()


def test_a_read_from_s3_outlives_more_failures_than_arrow_itself_bears(moody: FolderSource):
    Moody.failures = [503] * 40
    assert moody.fetch("a.png") == b"pixels"
    assert not Moody.failures


def test_a_refusal_of_s3_is_not_asked_again(moody: FolderSource):
    Moody.failures = [403] * 5
    with pytest.raises(DataError, match=r"^OSError: AWS Error ACCESS_DENIED$"):
        moody.fetch("a.png")
    assert len(Moody.failures) == 4


def test_names_in_any_script_and_of_no_encoding_are_read(tmp_path: Path):
    names = [b"caf\xe9/\xff.png", "図/😀.png".encode(), b"a\nb/\\x.png"]
    for name in names:
        file = os.path.join(os.fsencode(tmp_path), name)
        os.makedirs(os.path.dirname(file))
        with open(file, "wb") as target:
            target.write(name)
    source, listing = list_source(DataConfig(source=str(tmp_path)))
    found = list(items_of(listing.table))
    assert [source.fetch(item.path) for item in found] == sorted(names)
    assert [item.label for item in found] == ["a\nb", r"caf\xe9", "図"]


def test_linked_files_and_folders_are_read(tmp_path: Path, make_images: Callable[..., Path]):
    make_images(tmp_path / "store", 4, labels=("x",))
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "cat").symlink_to(tmp_path / "store" / "x")
    (tmp_path / "root" / "one.png").symlink_to(tmp_path / "store" / "x" / "0000.png")
    source, listing = list_source(DataConfig(source=str(tmp_path / "root")))
    found = {item.path: item.label for item in items_of(listing.table)}
    assert found == {f"cat/{name}": "cat" for name in os.listdir(tmp_path / "store" / "x")} | {"one.png": None}
    assert source.fetch("one.png") == source.fetch("cat/0000.png") == (tmp_path / "store" / "x" / "0000.png").read_bytes()


def test_a_loop_of_links_ends_and_is_counted(tmp_path: Path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.png").write_text(folder)
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "a" / "itself").symlink_to(".")
    (tmp_path / "a" / "beside").symlink_to("../b")
    (tmp_path / "b" / "back").symlink_to("../a")
    listing = listed(tmp_path)
    assert [item.path for item in items_of(listing.table)] == ["a/x.png", "b/x.png"]
    assert listing.ignored == {"linked folder, seen already": 4}


def test_folders_that_all_link_to_each_other_are_listed_once_each(tmp_path: Path):
    names = [f"{number:02d}" for number in range(20)]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").write_text(name)
        for other in names:
            (tmp_path / name / f"to {other}").symlink_to(f"../{other}")
    listing = listed(tmp_path)
    assert [item.path for item in items_of(listing.table)] == [f"{name}/x.png" for name in names]
    assert listing.ignored == {"linked folder, seen already": 400}


@pytest.mark.parametrize("backwards", [False, True])
def test_a_folder_outside_is_listed_over_the_fewest_links_and_then_the_first_path(tmp_path: Path, backwards: bool):
    for folder in ("out/deep/er", "root/z"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "x.png").write_text(folder)
    links = {"a": "../out/deep", "b": "../out", "c": "../out/deep/er", "B": "z", "z/a": "../../out/deep/er"}
    for name in sorted(links, reverse=backwards):
        (tmp_path / "root" / name).symlink_to(links[name])
    (tmp_path / "out" / "A").symlink_to("deep")
    listing = listed(tmp_path / "root")
    assert [item.path for item in items_of(listing.table)] == ["a/er/x.png", "z/x.png"]
    # B is the real z; b/deep is a; A is a as well, over two links; c and z/a are a/er.
    assert listing.ignored == {"linked folder, seen already": 5}


def test_a_folder_below_a_link_comes_before_a_link_to_it(tmp_path: Path):
    (tmp_path / "out" / "real").mkdir(parents=True)
    (tmp_path / "out" / "real" / "x.png").write_text("x")
    (tmp_path / "out" / "alias").symlink_to("real")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "a").symlink_to("../out")
    assert list(items(tmp_path / "root")) == ["a/real/x.png"]


def test_every_suffix_that_pillow_gives_the_formats_that_are_read_is_listed(tmp_path: Path):
    Image.init()
    suffixes = {suffix for suffix, form in Image.EXTENSION.items() if form in READERS} | {".dib"}
    write(Location.of(tmp_path), **{f"x{suffix}": suffix for suffix in suffixes})
    assert len(items(tmp_path)) == len(suffixes) >= 20


def dig(folder: Path, name: str, depth: int) -> None:
    parent = os.open(folder, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir(name, dir_fd=parent)
        below = os.open(name, os.O_RDONLY, dir_fd=parent)
        os.close(parent)
        parent = below
    os.close(parent)


def test_a_tree_deeper_than_pythons_recursion_is_listed(tmp_path: Path):
    dig(tmp_path, "d", 1500)
    (tmp_path / ("d/" * 1500 + "x.png")).write_text("x")
    try:
        assert list(items(tmp_path)) == ["d/" * 1500 + "x.png"]
    finally:
        subprocess.run(["rm", "-r", str(tmp_path / "d")], check=True)  # shutil.rmtree recurses


def test_a_folder_named_like_an_image_is_looked_into_and_counted(tmp_path: Path):
    (tmp_path / "strange.jpg").mkdir()
    (tmp_path / "strange.jpg" / "x.png").write_text("x")
    listing = listed(tmp_path)
    assert [item.path for item in items_of(listing.table)] == ["strange.jpg/x.png"]
    assert listing.ignored == {"folder named like an image": 1}


def test_what_is_no_file_is_listed_unseen_and_never_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("fifo.png")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind("socket.png")
    os.symlink("nowhere", "dangling.png")
    os.symlink("loop.png", "loop.png")
    os.symlink("/dev/zero", "endless.png")
    source, listing = list_source(DataConfig(source=str(tmp_path)))
    assert [(item.size, item.stamp) for item in items_of(listing.table)] == [(-1, UNSEEN)] * 5
    details = {}
    for item in items_of(listing.table):
        with pytest.raises(DataError) as caught:
            source.fetch(item.path)
        details[item.path] = str(caught.value)
        assert caught.value.reason == "unreadable"
    assert details == {
        "dangling.png": "FileNotFoundError: No such file or directory",
        "endless.png": "OSError: no regular file",
        "fifo.png": "OSError: no regular file",
        "loop.png": "OSError: Too many levels of symbolic links",
        "socket.png": "OSError: No such device or address",
    }


def test_a_folder_beyond_reach_is_listed_itself(tmp_path: Path):
    (tmp_path / "x.png").write_text("x")
    name = "d" * 250
    dig(tmp_path, name, 20)
    source, listing = list_source(DataConfig(source=str(tmp_path)))
    folder, image = items_of(listing.table)
    assert (folder.label, folder.size, folder.stamp) == (name, -1, UNSEEN)
    assert image.path == "x.png"
    with pytest.raises(DataError, match=r"^OSError: File name too long$"):
        source.fetch(folder.path)


def test_files_and_folders_without_permission_are_listed_unseen(tmp_path: Path):
    (tmp_path / "cat").mkdir()
    for name in ("x.png", "y.png", "cat/z.png"):
        (tmp_path / name).write_text(name)
    forbid(tmp_path / "x.png")
    forbid(tmp_path / "cat")
    source, listing = list_source(DataConfig(source=str(tmp_path)))
    (tmp_path / "cat").chmod(0o700)
    found = {item.path: item for item in items_of(listing.table)}
    assert [found["cat"], found["x.png"]] == [Item("cat", None, -1, UNSEEN), Item("x.png", None, 5, UNSEEN)]
    assert found["y.png"].stamp != UNSEEN
    with pytest.raises(DataError, match=r"^PermissionError: Permission denied$"):
        source.fetch("x.png")
    with pytest.raises(DataError, match=r"^IsADirectoryError: Is a directory$"):
        source.fetch("cat")


def test_a_root_without_permission_is_named(tmp_path: Path):
    (tmp_path / "root").mkdir()
    forbid(tmp_path / "root")
    with pytest.raises(DataError, match=r"data\.source=.*root cannot be read; give read permission"):
        listed(tmp_path / "root")


def test_a_root_that_is_gone_is_no_fault_of_an_image(tmp_path: Path):
    with pytest.raises(DataError, match=rf"data\.source={tmp_path}/gone is not there on {socket.gethostname()}"):
        FolderSource(str(tmp_path / "gone")).open()


@pytest.mark.parametrize("names", [[], ["a.txt"]])
def test_a_folder_without_images_is_named(root: Location, names: list[str]):
    if root.is_local:
        root.path.mkdir()
    elif not names:
        pytest.skip("there are no empty folders on S3")
    for name in names:
        (root / name).write_text("x")
    with pytest.raises(DataError, match=rf"data\.source={root} holds no images but {'1 other file;' if names else 'nothing'}"):
        listed(root)
