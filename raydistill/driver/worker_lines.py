"""Lines of workers on the driver's screen: ours, and what nobody knows. Ray's narration stays in Ray's own log files.

Ray hands every line of a cluster's processes, and its own messages, to one function of the driver, `print_to_stdstream`.
That function is private. Where a release of Ray has another, Ray's own printing stays as it is.
What the C++ side writes in the driver's own process never passes there: `native_lines` hears it.
"""

from __future__ import annotations

import inspect
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ray
from ray._private import worker as ray_worker

from raydistill.driver.native_lines import native_lines
from raydistill.tracking.screen import screen

HOOK = "print_to_stdstream"
EVENT = ":event_summary:"  # Ray's mark of what concerns people
ONCE_WITHIN_S = 60.0  # workers that say the same

# Actors of Ray itself. What goes wrong in them reaches the driver as an error of the call that needed them.
OF_RAY = re.compile(
    r"^\(?(ServeController|ProxyActor|SERVE_(?!REPLICA)|TrainController|PlacementGroupCleaner|DatasetManager|_?AutoscalingCoordinator|"
    r"_?StatsActor|TrainStateActor|SynchronizationActor|PreemptionWatcher)"
)
NATIVE = re.compile(r"^\[[^\]]* ([IWECF]) \d+ \d+\] (?:\([^)]*\) )?\S+\.(?:cc|h):\d+: ?")  # prefix of Ray's C++ side
SHORT_OF = re.compile(r"\b(memory|OOM|disk|space)\b", re.IGNORECASE)  # why a node ends workers, or keeps no more data
NONE_KILLED = re.compile(
    r"^0 Workers \(tasks / actors\) killed due to memory pressure"
)  # once a minute where actors were ended
NARRATION = re.compile(
    r"infinite retries remaining"  # an actor that was ended on purpose
    r"|^INFO \d{4}-\d\d-\d\d .* -- "  # Serve
    r"|__ray_tqdm_magic_token__"
    r"|^Refer to the documentation on how to address the out of memory issue"  # follows that, whatever the number
)


def lines_to_show(data: Mapping[str, Any]) -> list[str]:
    """What the screen shows of one message.

    Args:
        data: of Ray: `lines`, `pid`, `is_err`, and where known `actor_name`, `task_name`, `ip`.
    """
    who = str(data.get("actor_name") or data.get("task_name") or data.get("pid") or "")
    if OF_RAY.match(who):
        return []
    if who == "autoscaler":  # which nodes come and go; the rest is its own log
        return [f"(autoscaler) {line.partition(EVENT)[2]}" for line in data["lines"] if EVENT in line]
    lines = [text for line in data["lines"] if (text := _shown(line)).strip() and not NARRATION.search(text)]
    if not data.get("is_err") and data.get("actor_name"):
        return lines  # our workers print what concerns the user, and name the stage themselves
    pid = data.get("pid")
    name = who if who == str(pid) else f"{who} {pid}"
    return [f"({name}) {line}" for line in lines]


def _shown(line: str) -> str:
    """A line without the prefix of Ray's C++ side, which is heard where a process dies of it, or a node is short of memory or disk."""
    prefix = NATIVE.match(line)
    if prefix is None:
        return line
    text = line[prefix.end() :]
    return (
        text
        if prefix[1] in "CF" or (prefix[1] in "WE" and SHORT_OF.search(text) and not NONE_KILLED.match(text))
        else ""
    )


class _Shown:
    """Replaces Ray's function on the driver."""

    def __init__(self) -> None:
        self._last: dict[str, tuple[Any, float]] = {}  # text -> (process that said it last, when)

    def __call__(self, data: Mapping[str, Any], ignore_prefix: bool = False) -> None:
        for line in data["lines"]:
            for text in lines_to_show({**data, "lines": [line]}):
                if not self._was_said(line, data.get("pid")):
                    screen.say(text)

    def _was_said(self, text: str, pid: Any) -> bool:
        """Whether another process said the same a moment ago."""
        now = time.monotonic()
        self._last = {line: said for line, said in self._last.items() if now - said[1] < ONCE_WITHIN_S}
        other, _ = self._last.get(text, (pid, now))
        self._last[text] = (other, now)
        return other != pid


@contextmanager
def worker_lines() -> Iterator[None]:
    """Show them this way for the length of the block; `ray.init` must come inside."""
    theirs = getattr(ray_worker, HOOK, None)
    with native_lines(_shown):
        if theirs is None or list(inspect.signature(theirs).parameters) != ["data", "ignore_prefix"]:
            screen.say(f"ray       {ray.__version__} has another {HOOK}: all that Ray's processes print is shown")
            yield
            return
        setattr(ray_worker, HOOK, _Shown())
        try:
            yield
        finally:
            setattr(ray_worker, HOOK, theirs)
