"""Four workers that are interrupted: sums over more than two depend on their order, and that on what a process has done before."""

import subprocess
import sys
import textwrap
from pathlib import Path

from servers import free_ports
from support import ROOT

WORKERS = 4
SCRIPT = textwrap.dedent("""
    import hashlib, sys
    from pathlib import Path
    import numpy as np
    import torch
    from torch.nn.parallel import DistributedDataParallel
    from support import write_dataset
    from cluster.key_value_store import KeyValueStore
    from components.data.reader import RowReader
    from components.data.shards import read_manifest
    from components.diffusion.config import DiffusionConfig
    from components.networks.unet.config import UNetConfig
    from components.storage import Location
    from pipeline.training.loop import Worker
    from pipeline.training.config import TrainConfig
    from pipeline.training.plan import TrainPlan
    from pipeline.training.heartbeat import Heartbeat
    from pipeline.training.trainer import make_batch_plan, make_trainer

    folder, rank, world, port = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    dataset = Location.of(folder / "dataset")
    if rank == 0:
        write_dataset(dataset, [np.random.default_rng(0).integers(0, 256, (64, 1, 8, 8), dtype=np.uint8)], ["noise"])
    torch.distributed.barrier()
    manifest = read_manifest(dataset)

    def train(steps, resume_from=None):
        plan = TrainPlan(
            train=TrainConfig(steps=steps, global_batch_size=8, lanes=4, lr=1e-2, warmup_steps=0),
            model=UNetConfig(base_channels=16, channel_mults=(1, 2), num_res_blocks=1, attention_resolutions=(4,), num_groups=4, dropout=0.1),
            diffusion=DiffusionConfig(), dataset=str(dataset), folder="", inputs="i", threads=1, group_timeout_s=60,
        )
        trainer = make_trainer(plan, manifest, torch.device("cpu"), resume_from)
        trainer.stepper.network = DistributedDataParallel(trainer.network, broadcast_buffers=False, gradient_as_bucket_view=True)
        heartbeat = Heartbeat(KeyValueStore("test"), 1, rank, world, node_id="", node="", first=trainer.step)
        Worker(trainer, make_batch_plan(plan, manifest), RowReader(dataset, manifest), heartbeat, None, rank, world).follow()
        return trainer

    def digest(trainer):
        values = [*trainer.network.state_dict().values(), *trainer.ema.weights.values()]
        return hashlib.sha256(b"".join(value.contiguous().numpy().tobytes() for value in values)).hexdigest()

    straight = digest(train(6))
    place = Location.of(folder / "step_000000003-0001")
    interrupted = train(3)
    if rank == 0:
        interrupted.save(place)
    torch.distributed.barrier()
    resumed = digest(train(6, place))
    print(straight, resumed, digest(interrupted))
""")


def test_four_workers_that_are_interrupted_end_bit_for_bit_like_four_that_are_not(tmp_path: Path):
    command = ["env", f"PYTHONPATH={ROOT}:{ROOT / 'tests'}", sys.executable, "-c", SCRIPT, str(tmp_path)]
    port = free_ports(1)[0]
    running = [
        subprocess.Popen([*command, str(rank), str(WORKERS), str(port)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for rank in range(WORKERS)
    ]
    said = [process.communicate(timeout=300) for process in running]
    assert [process.returncode for process in running] == [0] * WORKERS, said
    digests = {out.strip() for out, _ in said}
    assert len(digests) == 1, digests
    straight, resumed, halfway = digests.pop().split()
    assert straight == resumed
    assert straight != halfway
