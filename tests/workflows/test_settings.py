import pytest

from components.ingest.sources import TORCHVISION
from pipeline.errors import ConfigError
from workflows.settings import paths_of


@pytest.mark.parametrize("source", ["digits", "cifar10", "s3://bucket/photos"])
def test_a_source_that_no_node_needs_to_mount_is_no_path(source: str):
    assert paths_of({"data.root": None}, source, TORCHVISION) == {}


def test_a_folder_of_images_is_a_path():
    assert paths_of({"cluster.storage": "s3://bucket/x"}, "/photos", TORCHVISION) == {"cluster.storage": "s3://bucket/x", "data.source": "/photos"}


def test_what_is_not_read_from_s3_is_refused_there():
    with pytest.raises(ConfigError, match=r"data\.root=s3://bucket/sets is not read from there"):
        paths_of({"data.root": "s3://bucket/sets"}, "cifar10", TORCHVISION)
