"""Enters the block of a lease some times and looks whether it is alone in it; for tests of leases between processes.

    python lease_process.py URI WITNESS ROUNDS SECONDS SETTLE_S [unconditional]

Says `in` and `out`. The exit code is 3 where another process was in the block, by a lock on the local file WITNESS, which ends with its
process; and 4 where the lease was lost. `unconditional` does without conditions wherever it is, as earlier versions did.
"""

import fcntl
import sys
import time
from pathlib import Path

from components.storage import Location
from pipeline import lease
from pipeline.lease import LeaseLostError, held
from pipeline.lease_record import Unconditional


def main(uri: str, witness: str, rounds: int, seconds: float, settle_s: float, kind: str) -> int:
    lease.RENEW_S, lease.EXPIRE_S, lease.SETTLE_S = 0.5, 5.0, settle_s
    if kind == "unconditional":
        lease.record_file = Unconditional
    try:
        for _ in range(rounds):
            with held(Location.of(uri), wait=True), Path(witness).open("a") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    return 3
                print("in", flush=True)
                time.sleep(seconds)
            print("out", flush=True)
    except LeaseLostError as error:
        print(error, flush=True)
        return 4
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4]), float(sys.argv[5]), sys.argv[6] if len(sys.argv) > 6 else ""))
