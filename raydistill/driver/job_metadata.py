"""What `ray job list` and the dashboard show of a submitted job: its run and where to look at it.

A job knows these only once it runs. Ray takes metadata at the submission alone, so they are written where Ray keeps a job's
facts. Their key and form are private to Ray: where a release has others, the job goes on without them, and says what to add
to `ray job submit`.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping

from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put

from raydistill.tracking.screen import screen

SUBMITTED = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # of a job that `ray job submit` has started
NAMESPACE, KEY = b"job", "_ray_internal_job_info_{}"  # of Ray's key-value store


def describe_job(facts: Mapping[str, str]) -> None:
    """Add metadata to the submitted job that this process is; what it has already stays. Ray must be connected."""
    try:
        own = (json.loads(os.environ.get(SUBMITTED) or "{}") or {}).get("metadata") or {}
        submission = own.get("job_submission_id")
        if submission is None:
            return
        key = KEY.format(submission).encode()
        info = json.loads(_internal_kv_get(key, namespace=NAMESPACE))
        info["metadata"] = dict(facts) | (info["metadata"] or {})
        # Ray writes it again when the job ends, and keeps what it finds.
        _internal_kv_put(key, json.dumps(info).encode(), overwrite=True, namespace=NAMESPACE)
    except (AttributeError, TypeError, KeyError, ValueError):
        screen.say(
            f"job       ray job submit --metadata-json {shlex.quote(json.dumps(dict(facts)))} shows this in lists"
        )
