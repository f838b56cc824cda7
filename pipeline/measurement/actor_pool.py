"""The actors of an evaluation, and how work is dealt to them."""

import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from cluster.config import ClusterConfig, ClusterError
from cluster.placement import Placement
from components.errors import DataError
from pipeline.measurement.sample_store import Identity
from pipeline.measurement.sampling_actor import ExtractorChoice, Sampler

Result = TypeVar("Result")
MOST_DEATHS = 5
"""Actors that one piece of work may take with it: a lost node takes one or two, an image that kills its process takes all."""


@dataclass
class _Call:
    """One piece of work: which it is in the row of results, and how to do it."""

    number: int
    method: str
    arguments: tuple[Any, ...]
    deaths: int = 0


class ActorPool:
    """The actors of an evaluation. Work is dealt to whoever is free; results come back in the order of the work.

    An actor that dies, with its node or alone, is replaced, and its work is dealt again; no actor is waited for while others are there.
    """

    def __init__(self, placement: Placement, kinds: Sequence[ExtractorChoice], cluster: ClusterConfig, evaluations: int = 0) -> None:
        """Starts the actors.

        Args:
            evaluations: of the network that are ahead.
        """
        self._placement, self._arguments = placement, (list(kinds), placement.use_gpu, evaluations, cluster.cache, cluster.cache_bytes)
        self._joining: dict[Any, Any] = {}
        self._free: deque[Any] = deque()
        self._running: dict[Any, tuple[_Call, Any]] = {}
        self._deaths = 0
        for _ in range(placement.num_samplers):
            self._start_actor()
        self.identities: list[Identity] = self.first("identities")

    def __enter__(self) -> "ActorPool":
        return self

    def __exit__(self, *_: object) -> None:
        import ray

        for actor in {*self._free, *self._joining.values(), *(actor for _, actor in self._running.values())}:
            ray.kill(actor)

    def first(self, method: str, *arguments: Any) -> Any:
        """Returns the result of one call."""
        return next(self.map(method, iter([arguments])))

    def compute(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Returns function(*arguments, DEVICE): on the GPU of an actor where they have any, else in this process, which has more threads than an actor.

        Args:
            function: of a module, its arguments such as travel.
        """
        return self.first("compute", function, arguments) if self._placement.use_gpu else function(*arguments, "cpu")

    def map(self, method: str, work: Iterator[tuple[Any, ...]]) -> Iterator[Any]:
        """Yields the results of `method(*arguments)` in order; as much work is ahead as four calls per actor, so memory stays bounded.

        Raises:
            ClusterError: if actors die again and again.
        """
        again: deque[_Call] = deque()
        ready: dict[int, Any] = {}
        started = expected = 0
        exhausted = False
        while not (exhausted and expected == started):
            while self._free and not again and not exhausted and started - expected < 4 * self._placement.num_samplers:
                arguments = next(work, None)
                exhausted = arguments is None
                if arguments is not None:
                    self._assign(_Call(started, method, arguments))
                    started += 1
            while self._free and again:
                self._assign(again.popleft())
            for call, result, died in self._settle():
                if died:
                    again.append(call)
                else:
                    ready[call.number] = result
            while expected in ready:
                yield ready.pop(expected)
                expected += 1

    def _start_actor(self) -> None:
        import ray

        actor: Any = ray.remote(max_restarts=0, **self._placement.per_sampler)(Sampler).remote(*self._arguments)
        self._joining[actor.identities.remote()] = actor

    def _assign(self, call: _Call) -> None:
        actor = self._free.popleft()
        self._running[getattr(actor, call.method).remote(*call.arguments)] = (call, actor)

    def _settle(self) -> list[tuple[_Call, Any, bool]]:
        """Waits for an actor to join or a call to end; returns ended calls with their results, or as died."""
        import ray

        if not self._running and not self._joining:
            return []
        done, _ = ray.wait([*self._running, *self._joining], num_returns=1)
        ended: list[tuple[_Call, Any, bool]] = []
        for reference in done:
            call, actor = self._running.pop(reference, (None, None))
            actor = actor or self._joining.pop(reference)
            try:
                result = ray.get(reference)
            except (ray.exceptions.RayActorError, ray.exceptions.ObjectLostError) as error:
                self._replace(actor, error)
                if call:
                    call.deaths += 1
                    if call.deaths >= MOST_DEATHS:
                        raise ClusterError(f"sampling actors died {call.deaths} times of one piece of work: {_shortened(error)}") from error
                    ended.append((call, None, True))
                continue
            except ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, DataError):
                    raise error.cause from error
                raise
            self._free.append(actor)
            if call:
                self._deaths = 0
                ended.append((call, result, False))
        return ended

    def _replace(self, actor: Any, error: Exception) -> None:
        import ray

        self._deaths += 1
        if (cause := re.search(r"DataError: (.*)", str(error))) is not None:
            raise DataError(cause.group(1)) from error
        if self._deaths > 3 * self._placement.num_samplers:
            raise ClusterError(f"sampling actors died {self._deaths} times, the last time: {_shortened(error)}") from error
        ray.kill(actor)
        self._start_actor()


def _shortened(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
