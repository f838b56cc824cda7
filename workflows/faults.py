"""A training by the command that is struck at seeded moments, and started again by the same command until it comes to its end."""

import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import psutil

from components.model.manifest import is_complete
from components.model.retention import checkpoints
from components.storage import Location
from pipeline.artifacts import TrainedModel
from pipeline.errors import ConfigError
from pipeline.training.metrics_log import METRICS_FOLDER, attempts_so_far, open_metrics
from workflows.processes import ProcessTree

Kind = Literal[
    "worker killed", "driver killed", "newest checkpoint truncated", "newest checkpoint bit-flipped", "worker stands still", "asked to end", "head killed"
]
KILLS: tuple[Kind, ...] = ("worker killed", "driver killed")
HARDSHIPS: tuple[Kind, ...] = ("worker stands still", "asked to end", "head killed")
"""Faults other than kills of what trains: SIGSTOP, SIGTERM, SIGKILL of Ray's head."""
DAMAGES: tuple[Kind, ...] = ("newest checkpoint truncated", "newest checkpoint bit-flipped")

RUN_NAME = "verify"
ROOT = Path(__file__).resolve().parent.parent
LOOK_S = 0.1
PATIENCE_S = 30.0
LONGEST_DELAY_S = 0.5
LAST_PART = 0.6
_ALWAYS_LEFT = "torchinductor_"


@dataclass(frozen=True)
class Fault:
    """What is done to a training, and when.

    Attributes:
        step: not before the loss curve has come this far.
        delay_s: seconds after that.
        draw: decides among those it could hit.
    """

    kind: Kind
    step: int
    delay_s: float
    draw: int


@dataclass(frozen=True)
class InjectedFault:
    """A fault that was done.

    Attributes:
        hit: the process or checkpoint that it was done to.
        seconds: when, since the training first started.
        step: how far the loss curve had come.
        attempt: number of the start of the workers that was under way.
        recovered_s: seconds from then until a later start added to the curve.
    """

    kind: Kind
    hit: str
    seconds: float
    step: int
    attempt: int
    recovered_s: float | None = None


def plan_faults(kinds: Sequence[Kind], count: int, steps: int, seed: int) -> list[Fault]:
    """Returns faults at random moments of a training, each kind as often as the others, the earliest first.

    None is planned for the last steps: the training could end before it.
    """
    rng = np.random.default_rng(seed)
    dealt = rng.permutation([index % len(kinds) for index in range(count)])
    moments = np.sort(rng.integers(0, max(1, int(steps * LAST_PART)), count))
    return [Fault(kinds[kind], int(step), float(rng.uniform(0, LONGEST_DELAY_S)), int(rng.integers(2**31))) for kind, step in zip(dealt, moments, strict=True)]


@dataclass(frozen=True)
class Trial:
    """A training and the folders it has for itself.

    Attributes:
        settings: laid on the preset.
        folder: holds its storage root, its temporary files and its log.
    """

    preset: str
    settings: tuple[str, ...]
    folder: Path

    @property
    def storage(self) -> Location:
        """The storage root."""
        return Location.of(self.folder / "storage")

    @property
    def temporary(self) -> Path:
        """Where its processes put temporary files, Ray's sessions too: the name is short, for sockets' names have a limit."""
        return self.folder / "t"

    @property
    def log(self) -> Path:
        """What the command said, all starts one after the other."""
        return self.folder / "log"

    @property
    def receipt(self) -> Path:
        """What the last start printed."""
        return self.folder / "receipt.json"

    def start(self, within: Sequence[str] = ()) -> ProcessTree:
        """Starts the command, the same one each time.

        Args:
            within: a command that runs it.
        """
        self.temporary.mkdir(parents=True, exist_ok=True)
        command = [
            *within,
            sys.executable,
            "-m",
            "workflows",
            "train",
            self.preset,
            *self.settings,
            f"cluster.storage={self.storage}",
            "--name",
            RUN_NAME,
            "--json",
        ]
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
        paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        return ProcessTree(command, env=inherited | {"PYTHONPATH": paths, "TMPDIR": str(self.temporary)}, stdout=self.receipt, stderr=self.log)

    def training_folder(self) -> Location | None:
        """Returns where the training writes, once it does."""
        stage = self.storage / "runs" / RUN_NAME / "train"
        found = stage.folders()
        return stage / found[0] if found else None

    def model(self) -> TrainedModel:
        """Returns the receipt of the training that came to its end."""
        fields = json.loads(self.receipt.read_text(encoding="utf-8"))["train"]
        return TrainedModel.model_validate({name: value for name, value in fields.items() if name in TrainedModel.model_fields})

    def temporary_files(self) -> list[str]:
        """Returns what lies about in the temporary folder and half written in the storage root; torch's cache apart, which is always left."""
        loose = [path for path in self.temporary.iterdir() if not path.name.startswith(_ALWAYS_LEFT)]
        return sorted(str(path.relative_to(self.folder)) for path in [*loose, *self.storage.path.rglob("*.tmp")])


@dataclass(frozen=True)
class TrialResult:
    """A training that came to its end.

    Attributes:
        starts: how often the command was started.
        gave_up: starts that ended with an error of their own after a fault.
        seconds: from the first start to the end, the wait for its last process excluded.
        processes: who was alive half a minute after a command had ended by itself.
    """

    starts: int
    gave_up: int
    seconds: float
    struck: tuple[InjectedFault, ...]
    processes: tuple[str, ...]


@dataclass
class FaultInjector:
    """A trial under way."""

    trial: Trial
    pending: list[Fault]
    starts: int = 0
    gave_up: int = 0
    struck: list[InjectedFault] = field(default_factory=list)
    processes: list[str] = field(default_factory=list)
    _began: float = field(default_factory=time.monotonic)
    _due: float | None = None
    _step: int = 0
    _writer: int = 0

    def run(self) -> TrialResult:
        """Runs the command, strikes it, and runs it again, until it comes to its end.

        Raises:
            ConfigError: if it fails without having been struck.
        """
        while not self._run_once():
            pass
        seconds = time.monotonic() - self._began
        self._note_progress(ended=True)
        return TrialResult(self.starts, self.gave_up, seconds, tuple(self.struck), tuple(self.processes))

    def _run_once(self) -> bool:
        """Starts the command and returns whether it came to its end."""
        self.starts += 1
        before, family = len(self.struck), self.trial.start()
        try:
            while (code := family.code()) is None:
                family.look()
                self._note_progress()
                if self._is_due() and self._strike(family):
                    return False
                time.sleep(LOOK_S)
            self.processes += family.wait(PATIENCE_S)
        finally:
            family.kill()
        if code and len(self.struck) == before:
            raise ConfigError(f"the training ended with exit code {code} by itself; its last lines:", *self._last_lines())
        self.gave_up += code != 0
        return code == 0

    def _last_lines(self) -> list[str]:
        return self.trial.log.read_text(encoding="utf-8", errors="replace").splitlines()[-8:]

    def _note_progress(self, *, ended: bool = False) -> None:
        """Looks how far the curve has come, and which faults are behind it."""
        folder, now = self.trial.training_folder(), time.monotonic() - self._began
        lines = open_metrics(folder).lines() if folder else []
        self._step = lines[-1].step if lines else 0
        self._writer = max((int(name.partition("-")[0]) for name in (folder / METRICS_FOLDER).files()), default=0) if folder else 0
        self.struck = [
            replace(one, recovered_s=now - one.seconds) if one.recovered_s is None and (ended or self._writer > one.attempt) else one for one in self.struck
        ]

    def _is_due(self) -> bool:
        if not self.pending or self._step < self.pending[0].step:
            return False
        if self._due is None:
            self._due = time.monotonic() + self.pending[0].delay_s
        return time.monotonic() >= self._due

    def _strike(self, family: ProcessTree) -> bool:
        """Does the next fault, if there is something that it can hit, and returns whether that has ended the command for good."""
        fault = self.pending[0]
        if fault.kind == "worker killed":
            hit = _send_one(family.training_workers(), fault.draw, signal.SIGKILL)
        elif fault.kind == "worker stands still":
            hit = _send_one(family.training_workers(), fault.draw, signal.SIGSTOP) if self._makes_steps() else ""
        elif fault.kind == "asked to end":
            hit = _send_one([family.main], 0, signal.SIGTERM) if self._makes_steps() else ""
        elif fault.kind == "head killed":
            hit = _send_one(family.called("gcs_server"), 0, signal.SIGKILL)
        elif fault.kind == "driver killed":
            hit = f"{family.kill()} processes"
        elif self._newest_checkpoint() is not None:
            family.kill()
            hit = self._damage_newest(fault)
        else:
            hit = ""
        if hit:
            self._done(fault, hit)
        return bool(hit) and fault.kind in ("driver killed", *DAMAGES)

    def _makes_steps(self) -> bool:
        """Tells whether the workers that run now have come as far as a step."""
        folder = self.trial.training_folder()
        return folder is not None and self._writer == attempts_so_far(folder) > 0

    def _damage_newest(self, fault: Fault) -> str:
        """Damages the newest checkpoint and returns its name; until all were dead, another one may have been finished, or the last one set aside."""
        newest = self._newest_checkpoint()
        if newest is None:
            return "none was left"
        damage(newest, fault.kind, fault.draw)
        return newest.name

    def _newest_checkpoint(self) -> Path | None:
        folder = self.trial.training_folder()
        return next((path.path for path in checkpoints(folder) if is_complete(path)), None) if folder else None

    def _done(self, fault: Fault, hit: str) -> None:
        folder, seconds = self.trial.training_folder(), time.monotonic() - self._began
        self.struck.append(InjectedFault(fault.kind, hit, seconds, self._step, attempts_so_far(folder) if folder else 0))
        self.pending, self._due = self.pending[1:], None


def _send_one(processes: Sequence[psutil.Process], draw: int, number: signal.Signals) -> str:
    """Sends one of some processes a signal and returns which; nothing where there is none."""
    if not processes:
        return ""
    chosen = draw % len(processes)
    with suppress(psutil.NoSuchProcess):
        processes[chosen].send_signal(number)
    return f"{chosen + 1} of {len(processes)}, pid {processes[chosen].pid}"


def damage(checkpoint: Path, kind: Kind, draw: int) -> None:
    """Does to a checkpoint's weights what a disk may do: cuts the file short, or turns one bit."""
    file = checkpoint / "weights.safetensors"
    content = bytearray(file.read_bytes())
    place = draw % len(content)
    if kind == "newest checkpoint truncated":
        file.write_bytes(content[:place])
        return
    content[place] ^= 1 << draw % 8
    file.write_bytes(content)


def raw_curve(folder: Location) -> list[tuple[int, float]]:
    """Returns every point of the loss curve as it was written down, a step that two starts wrote twice."""
    metrics_log, points = folder / METRICS_FOLDER, []
    for name in metrics_log.files():
        lines = [json.loads(line) for line in (metrics_log / name).read_text().splitlines()]
        points += [(line["step"], line["metrics"]["train/loss"]) for line in lines if "train/loss" in line["metrics"]]
    return sorted(points)


def new_folder() -> Path:
    """Returns a temporary folder with a short name, because Ray puts sockets below it."""
    return Path(tempfile.mkdtemp(prefix="ddpm-v-"))
