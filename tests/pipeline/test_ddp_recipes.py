"""Two workers end with the weights of one, to the tolerance of floats, whatever they train; and say so where one of them does not."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from servers import free_ports
from support import ROOT

SCRIPT = textwrap.dedent("""
    import json, sys
    from pathlib import Path
    import numpy as np
    import torch
    from torch.nn.parallel import DistributedDataParallel
    from support import write_dataset
    from test_recipes import SETTINGS, plan
    from cluster.key_value_store import KeyValueStore
    from components.data.reader import RowReader
    from components.data.shards import read_manifest
    from components.storage import Location
    from pipeline.training.desync import DesyncError
    from pipeline.training.heartbeat import Heartbeat
    from pipeline.training.loop import Worker
    from pipeline.training.trainer import make_batch_plan, make_trainer
    from pipeline.training.validation import Validation

    folder, rank, world, port = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    dataset = Location.of(folder / f"dataset-{world}")
    if rank == 0:
        write_dataset(dataset, [np.random.default_rng(0).integers(0, 256, (64, 1, 8, 8), dtype=np.uint8)], ["noise"])
    torch.distributed.barrier()
    manifest = read_manifest(dataset)

    def train(train, diffusion, spoil=False):
        told = plan({"steps": 6, "validate_every": 3, "validate_samples": 70, "compare_ranks_every": 2, "warmup_steps": 0, **train}, diffusion)
        trainer = make_trainer(told, manifest, torch.device("cpu"), None)
        trainer.dataset = str(dataset)
        if world > 1:
            trainer.stepper.network = DistributedDataParallel(trainer.network, broadcast_buffers=False, gradient_as_bucket_view=True)
        if spoil and rank == 1:
            with torch.no_grad():
                next(trainer.network.parameters()).view(-1)[0] += 1e-3
        heartbeat = Heartbeat(KeyValueStore("test"), 1, rank, world, node_id="", node="", first=trainer.step)
        worker = Worker(trainer, make_batch_plan(told, manifest), RowReader(dataset, manifest), heartbeat, None, rank, world)
        worker.validation = Validation(trainer, RowReader(dataset, manifest), manifest, rank, world)
        worker.follow()
        weights = torch.cat([value.double().flatten() for value in (*trainer.network.state_dict().values(), *trainer.ema.weights.values())])
        return {"weights": weights.tolist(), "validations": trainer.validations}

    found = [train(*settings) for settings in SETTINGS]
    said = ""
    if world > 1:
        try:
            train({}, {}, spoil=True)
        except DesyncError as error:
            said = str(error)
    if rank == 0:
        (folder / f"{world}.json").write_text(json.dumps({"found": found, "said": said}))
""")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ddp")
    paths = f"PYTHONPATH={ROOT}:{ROOT / 'tests'}:{Path(__file__).parent}"
    for world in (1, 2):
        port = free_ports(1)[0]
        command = ["env", paths, sys.executable, "-c", SCRIPT, str(folder)]
        running = [
            subprocess.Popen([*command, str(rank), str(world), str(port)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for rank in range(world)
        ]
        said = [process.communicate(timeout=600) for process in running]
        assert [process.returncode for process in running] == [0] * world, said
    return {world: json.loads((folder / f"{world}.json").read_text()) for world in (1, 2)}


def test_two_workers_train_what_one_does_by_every_recipe(found: dict[int, dict[str, Any]]):
    for one, two in zip(found[1]["found"], found[2]["found"], strict=True):
        worst = max(abs(a - b) / (1e-2 + abs(a)) for a, b in zip(one["weights"], two["weights"], strict=True))
        assert worst < 5e-2


def test_two_workers_measure_held_out_rows_as_one_does(found: dict[int, dict[str, Any]]):
    for one, two in zip(found[1]["found"], found[2]["found"], strict=True):
        assert [step for step, _ in one["validations"]] == [step for step, _ in two["validations"]] == [3, 6]
        assert all(abs(a / b - 1) < 1e-3 for (_, a), (_, b) in zip(one["validations"], two["validations"], strict=True))


def test_a_worker_whose_weights_differ_ends_the_run_and_is_named(found: dict[int, dict[str, Any]]):
    assert "the weights of worker 1 are not those of the others at step 2" in found[2]["said"]
