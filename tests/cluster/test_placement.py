"""What a run asks of a cluster, from its settings and the nodes there are."""

import threading

import pytest

from cluster import node_watch
from cluster.config import ClusterConfig, ClusterError
from cluster.nodes import Node, describe
from cluster.placement import Placement, fewer_for_gpus, plan, scaling_config

HEAD = Node("h", "head", {"node:10.0.0.1": 1.0, "memory": 8e9})
CPU = Node("c", "cpu-1", {"CPU": 16.0, "memory": 64e9})
GPU_1 = Node("g1", "gpu-1", {"CPU": 32.0, "GPU": 4.0, "accelerator_type:H100": 1.0}, {"ray.io/accelerator-type": "H100", "zone": "a"})
GPU_2 = Node("g2", "gpu-2", {"CPU": 32.0, "GPU": 4.0, "infiniband": 4.0}, {"ray.io/accelerator-type": "H100", "zone": "b"})
NODES = [HEAD, CPU, GPU_1, GPU_2]


def placed(*nodes: Node, **settings: object) -> Placement:
    return plan(ClusterConfig.model_validate({"address": "auto", **settings}), nodes or NODES)


def where(placement: Placement) -> str:
    return next(line for line in placement.lines if line.startswith("  train"))


def test_workers_take_gpus_where_there_are_enough_and_samplers_all_of_them():
    placement = placed(num_workers=8, cpus_per_worker=8)
    assert (placement.num_workers, placement.use_gpu, placement.threads) == (8, True, 8)
    assert placement.per_worker == {"CPU": 8.0, "GPU": 1.0}
    assert (placement.num_samplers, placement.per_sampler) == (8, {"num_gpus": 1.0})
    assert where(placement).endswith("8 workers x (8 CPU + 1 GPU), 8 threads each, pack: 4 on gpu-1, 4 on gpu-2")


def test_a_share_of_a_gpu_for_each_sampler_makes_more_of_them():
    assert placed(num_workers=2, gpus_per_sampler=0.25).num_samplers == 32
    assert placed(num_workers=2, gpus_per_sampler=0.3).num_samplers == 26
    assert placed(CPU, num_workers=2, gpus_per_sampler=0.25).per_sampler == {"num_cpus": 1}


@pytest.mark.parametrize(("strategy", "places"), [("pack", "4 on gpu-1"), ("spread", "2 on gpu-1, 2 on gpu-2"), ("strict_pack", "4 on gpu-1")])
def test_workers_are_packed_or_spread(strategy: str, places: str):
    assert where(placed(num_workers=4, strategy=strategy)).endswith(f"{strategy}: {places}")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_workers": 16, "accelerator": "gpu"}, "needs 16 CPUs, 16 GPUs; the cluster has 1 node with 16 CPUs, no GPU; 1 node with 32 CPUs"),
        ({"num_workers": 8, "strategy": "strict_pack", "accelerator": "gpu"}, "on one node"),
        ({"num_workers": 4, "strategy": "strict_spread", "accelerator": "gpu"}, "each on a node of its own"),
        ({"num_workers": 2, "worker_resources": {"tpu": 1}}, "needs 2 CPUs, 2 tpu"),
        ({"num_workers": 8, "worker_labels": {"zone": "b"}, "accelerator": "gpu"}, "on nodes with zone=b"),
        ({"num_workers": [5, 8], "worker_labels": {"zone": "b"}, "accelerator": "gpu"}, r"num_workers=\[5, 8\]"),
    ],
)
def test_what_the_cluster_lacks_is_named_with_what_it_has(settings: dict[str, object], message: str):
    with pytest.raises(ClusterError, match=message) as raised:
        placed(**settings)
    assert "4 infiniband" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_labels_and_custom_resources_choose_nodes():
    assert where(placed(num_workers=2, worker_labels={"zone": "b"})).endswith("2 on gpu-2")
    assert where(placed(num_workers=2, worker_resources={"infiniband": 2})).endswith("2 on gpu-2")
    assert placed(num_workers=2, worker_labels={"zone": "b"}).num_samplers == 4


def test_samplers_stay_on_the_labelled_nodes_and_preprocessing_finds_its_own():
    assert placed(num_workers=2, worker_labels={"zone": "b"}).per_sampler == {"num_gpus": 1.0, "label_selector": {"zone": "b"}}
    with pytest.raises(ClusterError, match=r"preprocess_labels=\{'pool': 'cpu'\} is on no node that has a CPU; the cluster has"):
        placed(num_workers=2, preprocess_labels={"pool": "cpu"})


def test_a_range_takes_what_there_is_room_for():
    assert placed(num_workers=[2, 8], worker_labels={"zone": "a"}).num_workers == 4
    config = ClusterConfig(address="auto", num_workers=(2, 8), strategy="spread", worker_labels={"zone": "a"}, resize_interval_s=7)
    scaling = scaling_config(config, plan(config, NODES))
    assert (scaling.num_workers, scaling.placement_strategy, scaling.label_selector) == ((2, 8), "SPREAD", {"zone": "a"})
    assert scaling.elastic_resize_monitor_interval_s == 7.0


@pytest.mark.parametrize(
    ("gpus", "accelerator", "num_workers", "placed_as"),
    [
        (0, "auto", 2, (2, False)),
        (1, "auto", 2, (1, True)),
        (1, "auto", [2, 4], (1, True)),
        (2, "auto", 2, (2, True)),
        (3, "auto", [2, 4], (3, True)),
        (4, "auto", 2, (2, True)),
        (1, "cpu", 2, (2, False)),
        (2, "gpu", 2, (2, True)),
    ],
)
def test_the_gpus_that_are_there_are_used_and_cpus_only_without_any(gpus: int, accelerator: str, num_workers: object, placed_as: tuple[int, bool]):
    node = Node("n", "laptop", {"CPU": 16.0} | ({"GPU": float(gpus)} if gpus else {}))
    placement = placed(node, num_workers=num_workers, accelerator=accelerator)
    assert (placement.num_workers, placement.use_gpu) == placed_as
    config = ClusterConfig.model_validate({"num_workers": num_workers, "accelerator": accelerator})
    asked = scaling_config(config, placement).num_workers
    assert asked == ((2, 4) if gpus == 3 else placed_as[0])


def test_fewer_gpus_than_workers_are_told_in_one_line():
    nodes = [Node("n", "laptop", {"CPU": 16.0, "GPU": 1.0})]
    config = ClusterConfig(num_workers=2)
    said = "  cluster.num_workers=2, and 1 GPU: 1 worker will train, for how many they are is no part of a result"
    assert fewer_for_gpus(config, plan(config, nodes)) == said
    for settings in ({"num_workers": 1}, {"num_workers": 2, "accelerator": "cpu"}):
        config = ClusterConfig.model_validate(settings)
        assert fewer_for_gpus(config, plan(config, nodes)) is None


def test_gpus_that_are_asked_for_are_all_needed():
    with pytest.raises(ClusterError, match="needs 2 CPUs, 2 GPUs"):
        placed(Node("n", "laptop", {"CPU": 16.0, "GPU": 1.0}), num_workers=2, accelerator="gpu")


def test_threads_share_the_cpus_of_the_fullest_node():
    assert placed(CPU, num_workers=4, accelerator="cpu").threads == 4
    assert placed(CPU, Node("s", "small", {"CPU": 1.0}), num_workers=2, accelerator="cpu", strategy="spread").threads == 1


def test_a_cluster_is_described_in_words():
    assert describe([CPU, Node("d", "cpu-2", {"CPU": 16.0}), HEAD]) == "2 nodes with 16 CPUs, no GPU; 1 node with no CPU, no GPU"
    assert describe([]) == "no node"


def test_a_lost_node_is_told_of_and_waited_for_only_so_long(monkeypatch: pytest.MonkeyPatch):
    nodes = [CPU]
    monkeypatch.setattr(node_watch, "living_nodes", lambda: nodes)
    monkeypatch.setattr(node_watch, "LOOK_S", 0.01)
    monkeypatch.setattr(node_watch.NodeWatch, "patience_s", 0.3)
    told: list[str] = []
    gave_up = threading.Event()
    with node_watch.NodeWatch(ClusterConfig(address="auto", num_workers=16), told.append, gave_up.set) as watch:
        assert not gave_up.wait(0.6)
        assert (told, watch.failure) == ([], None)
        nodes[0] = Node("s", "small", {"CPU": 1.0})
        assert gave_up.wait(10)
    assert "waiting up to" in told[0]
    assert "needs 16 CPUs" in told[0]
    assert "the cluster has 1 node with 1 CPU, no GPU" in str(watch.failure)
    assert "run the same command again to resume from the last checkpoint" in str(watch.failure)
