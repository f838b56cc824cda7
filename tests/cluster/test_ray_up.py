"""`ray up`'s configuration: valid by Ray's own schema, with a token on every node and nothing open beyond loopback."""

import copy
import re
from typing import Any

import pytest
import yaml
from jsonschema import ValidationError
from support import ROOT

util = pytest.importorskip("ray.autoscaler._private.util")
AWS = ROOT / "cluster" / "aws.yaml"


@pytest.fixture
def config() -> dict[str, Any]:
    return yaml.safe_load(AWS.read_text())


def test_ray_accepts_the_configuration(config: dict[str, Any]):
    util.validate_config(util.prepare_config(copy.deepcopy(config)))


@pytest.mark.parametrize(
    ("change", "message"),
    [({"head_node_type": "heads"}, "head_node_type` must be one of"), ({"cluster_nme": "x"}, "'cluster_nme' was unexpected"), ({"auth": []}, "is not of type")],
)
def test_ray_refuses_a_mistake(config: dict[str, Any], change: dict[str, object], message: str):
    with pytest.raises((ValueError, ValidationError), match=message):
        util.validate_config(util.prepare_config(copy.deepcopy(config) | change))


def test_every_ray_that_starts_wants_the_token(config: dict[str, Any]):
    starts = [line for key in ("head_start_ray_commands", "worker_start_ray_commands") for line in config[key] if "ray start" in line]
    assert len(starts) == 2
    for line in starts:
        assert "RAY_AUTH_MODE=token ray start" in line
        assert "RAY_AUTH_TOKEN_PATH=$HOME/.ray/auth_token" in line
    assert config["file_mounts"]["/home/ubuntu/.ray/auth_token"] == "~/.ray/auth_token"
    assert "chmod 600 ~/.ray/auth_token" in config["setup_commands"][0]


def test_the_head_does_no_work_and_shows_its_dashboard_to_itself_only(config: dict[str, Any]):
    head = config["head_start_ray_commands"][-1]
    assert "--num-cpus=0" in head
    assert "--dashboard-host=127.0.0.1" in head
    assert config["available_node_types"][config["head_node_type"]]["resources"] == {"CPU": 0}


def test_no_node_type_leaves_image_or_firewall_to_ray(config: dict[str, Any]):
    for name, node in config["available_node_types"].items():
        assert node["node_config"]["ImageId"].startswith("ami-"), name
        assert node["node_config"]["SecurityGroupIds"][0].startswith("sg-"), name
        assert name == config["head_node_type"] or node["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}


def test_packages_come_from_the_lock_and_not_from_a_nightly_build(config: dict[str, Any]):
    prepared = util.prepare_config(copy.deepcopy(config))
    commands = "\n".join(prepared["setup_commands"] + prepared["head_setup_commands"] + prepared["worker_setup_commands"])
    locked = re.search(r"^uv==(\S+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    assert locked
    assert f"https://astral.sh/uv/{locked[1]}/install.sh" in commands
    assert "-c ~/lock/requirements.lock" in commands
    assert "wheels" not in commands
