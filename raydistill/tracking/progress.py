"""Progress of remote work on the driver's screen: rank 0 writes a small file, the driver shows it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence

from raydistill.storage.atomic import replace_text
from raydistill.storage.place import Place, Remote
from raydistill.tracking.screen import Bar, Pace, screen

BUCKET_EVERY_S = 2  # a progress file in a bucket is written and read less often
_last_written: dict[Remote, float] = {}


def write_progress(file: Place, *, step: int, total: int, tail_s: float = 0.0, **values: float | int | str) -> None:
    """Replace the file. A file in a bucket is written every BUCKET_EVERY_S, and at the end.

    Args:
        tail_s: seconds of work that follow the last step; as much comes before the first.
        values: what the screen shows, by name.
    """
    text = json.dumps({"step": step, "total": total, "tail_s": tail_s, "values": values})
    if isinstance(file, Remote):
        now = time.monotonic()
        if now - _last_written.get(file, float("-inf")) > BUCKET_EVERY_S or step == total:
            _last_written[file] = now
            file.write_text(text)
        return
    replace_text(file, text, durable=False)


class ProgressWatcher:
    """Context in which a thread follows a progress file and shows it on the screen."""

    def __init__(self, file: Place, stage: str, unit: str = "step", alike: Sequence[str] = ()) -> None:
        """`alike`: other stages that take as long as this one."""
        self.file, self.stage, self.unit, self.alike = file, stage, unit, alike
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> ProgressWatcher:
        self.file.unlink(missing_ok=True)  # of an earlier attempt, which may have got further than its last checkpoint
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _follow(self) -> None:
        pace = Pace()
        with screen.bar(screen.numbered(self.stage), self.unit) as bar:
            while not self._stop.wait(BUCKET_EVERY_S if isinstance(self.file, Remote) else 0.5):
                self._look(bar, pace)
            self._look(bar, pace)  # at what was written since

    def _look(self, bar: Bar, pace: Pace) -> None:
        try:
            now = json.loads(self.file.read_text())
        except (OSError, ValueError):
            return
        step, total = int(now["step"]), int(now["total"])
        pace.see(step, time.monotonic())
        left, whole, tail = pace.left(total), pace.takes(total) or 0.0, float(now["tail_s"])
        left = None if left is None else left + tail
        whole += 2 * tail  # the evaluation at the end takes as long as that of the start
        details = " ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in now["values"].items())
        bar.update(step, total, details, screen.time_left(self.stage, left, whole, self.alike))
