"""A stage whose workers fail again and again in the same place ends, with the reason and the node's name.

Ray Train starts failed workers again, `distill.max_failures` times. With -1 an error that stays would be repeated for ever
at full price: a GPU that no kernel was built for, a driver that is too old, memory that is broken, a network without a way.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import ray
import ray.train
from ray.exceptions import RayActorError

from raydistill.errors import RunLost
from raydistill.storage.atomic import read_json, replace_text
from raydistill.storage.lease import Lease, check, holding
from raydistill.storage.resolve import to_place
from raydistill.workers.left_out_nodes import LeftOutNodes, node_of

FATAL_FILE = "fatal.txt"  # of a stage's folder: workers that find it end at once, and the driver reads the reason
ELSEWHERE_FILE = "fatal-elsewhere.txt"  # the same, of workers that met what another one can name better
NODES_FILE = "left-out-nodes.txt"  # the last that was said of nodes; workers that begin say it
NODE_DIED = "node has died"  # what Ray says of an actor that was lost with its node


@dataclass
class NoProgress(ray.train.UserCallback):
    """In Ray Train's controller: counts failures between which no update was done that had not been done before.

    Args:
        stage: for people.
        folder: of the stage: a path, or a URI.
        progress: name of its file of progress.
        limit: failures; below 1: any number.
        lease: under which it writes.
        nodes: whose failures may have workers avoid them; None: none's.
    """

    stage: str
    folder: str
    progress: str
    limit: int
    lease: Lease | None = None
    nodes: LeftOutNodes | None = None
    furthest: int = field(default=-1, init=False)
    failures: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if self.nodes is not None:
            self.nodes.tell = functools.partial(self._write, NODES_FILE)

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Ray Train calls this before it decides whether to start the workers again."""
        if any(_lost_with_its_node(error) for error in worker_exceptions.values()):
            return
        step = self._step()
        begins = step > self.furthest
        self.failures = 1 if begins else self.failures + 1
        self.furthest = max(self.furthest, step)
        if 1 <= self.limit <= self.failures:
            self._end(_first_cause(worker_exceptions))
        elif self.nodes is not None:
            self.nodes.failed(worker_exceptions, begins)

    def _step(self) -> int:
        """The last update that any worker has told of; 0: none yet."""
        file = to_place(self.folder) / self.progress
        try:
            return int(read_json(file, "it is written anew")["step"]) if file.is_file() else 0
        except (OSError, ValueError):  # being written, or the storage is away
            return max(0, self.furthest)

    def _end(self, error: Exception) -> None:
        _, node = node_of(error) or ("", "unknown")
        text = (
            f"{self.failures} failures in a row and no update after {self.furthest} "
            f"(distill.max_failures_without_progress={self.limit}); the last one on node {node}: "
            f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
        )
        self._write(FATAL_FILE, text)

    def _write(self, file: str, text: str) -> None:
        """A file of the stage's folder."""
        folder = to_place(self.folder)
        with holding(self.lease):
            try:
                check(folder)
                replace_text(folder / file, text)
            except (OSError, RunLost) as problem:  # the next failure tries again
                print(f"{self.stage}: {text}; not written down: {problem}", flush=True)


def _first_cause(errors: dict[int, Exception]) -> Exception:
    """That of the lowest rank that says on which node it arose: others may only have lost their peer."""
    named = [rank for rank, error in errors.items() if node_of(error)]
    return errors[min(named or errors)]


def _lost_with_its_node(error: Exception) -> bool:
    """Whether a worker was lost with its node, which says nothing of the run."""
    cause = getattr(error, "health_check_failure", error)
    return isinstance(cause, RayActorError) and (cause.preempted or NODE_DIED in str(cause))
