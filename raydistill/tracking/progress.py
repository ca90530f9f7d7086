"""Progress of remote work on the driver's screen: rank 0 writes a small file, the driver shows it.

A terminal gets a bar. Anything else gets a line every fifteen seconds.
"""

from __future__ import annotations

import json
import threading
import time

from tqdm import tqdm

from raydistill.storage.atomic import replace_text
from raydistill.storage.place import Place, Remote

BUCKET_EVERY_S = 2  # a progress file in a bucket is written and read less often
_last_written: dict[Remote, float] = {}


def write_progress(file: Place, **values: float | int | str) -> None:
    """Replace the file. A file in a bucket is written every BUCKET_EVERY_S, and at the end. Needs `step` and `total`."""
    if isinstance(file, Remote):
        now = time.monotonic()
        if now - _last_written.get(file, float("-inf")) > BUCKET_EVERY_S or values["step"] == values["total"]:
            _last_written[file] = now
            file.write_text(json.dumps(values))
        return
    replace_text(file, json.dumps(values), durable=False)


class ProgressWatcher:
    """Context in which a thread follows a progress file."""

    def __init__(self, file: Place, stage: str, unit: str = "step") -> None:
        self.file, self.stage, self.unit = file, stage, unit
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
        bar, first, last_line, last_step = None, None, 0.0, -1
        while not self._stop.wait(BUCKET_EVERY_S if isinstance(self.file, Remote) else 0.5):
            try:
                now = json.loads(self.file.read_text())
            except (OSError, ValueError):
                continue
            step, total = int(now.pop("step")), int(now.pop("total"))
            if bar is None:
                bar = tqdm(total=total, initial=step, desc=self.stage, unit=self.unit, disable=None)
                first = (time.monotonic(), step)
            if step == last_step:
                continue
            if step < last_step:  # restarted from a checkpoint
                first = (time.monotonic(), step)
            last_step = step
            details = " ".join(f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in now.items())
            bar.set_postfix_str(details, refresh=False)
            bar.update(step - bar.n)
            elapsed, done = time.monotonic() - first[0], step - first[1]
            if bar.disable and (time.monotonic() - last_line > 15 or step == total):
                last_line = time.monotonic()
                left = f", {elapsed / done * (total - step):.0f} s left" if done else ""
                print(f"{self.stage}: {self.unit} {step}/{total}{left}, {details}", flush=True)
                bar.n = step
        if bar is not None:
            bar.close()
