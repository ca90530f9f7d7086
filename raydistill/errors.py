"""The errors of wrong input, and texts without secrets. Everything else imports this; it imports nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any


class InputError(ValueError):
    """A configuration, a file or a folder that cannot be used. The message names it and says what to do."""


class StageFailed(RuntimeError):
    """A stage of a run ended without its result. The message says why. A resume goes on from what was reached."""


class RunLost(Exception):
    """Another job has taken this one's run over. Nothing more may be written to the run."""


class NonFiniteError(FloatingPointError):
    """A value that must be finite is not. The message names where it arose.

    Attributes:
        count: samples in which it is not finite.
        rows: their places in the batch, where known.
    """

    def __init__(self, message: str, count: int = 1, rows: Sequence[int] = ()) -> None:
        super().__init__(message, count, rows)
        self.message, self.count, self.rows = message, count, rows

    def __str__(self) -> str:
        return self.message


# -- texts without secrets --------------------------------------------------------------------------------

MASK = "***"
_SECRET_KEY = re.compile(r"token|secret|password|passwd|credential|key", re.IGNORECASE)
_USERINFO = re.compile(r"([A-Za-z][\w+.-]*://)[^/\s]*@")
_SECRET_QUERY = re.compile(r"([?&][^=&\s]*(?:token|secret|password|key|sig)[^=&\s]*=)[^&\s]+", re.IGNORECASE)


def mask(key: str, value: Any) -> str:
    """`value` as text without secrets. Masked are values of keys like `token`, and credentials in URIs."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    if _SECRET_KEY.search(key) and value not in (None, ""):
        return MASK
    return _SECRET_QUERY.sub(rf"\1{MASK}", _USERINFO.sub(rf"\1{MASK}@", text))


def reason(error: BaseException) -> str:
    """One line of an error, without secrets."""
    return mask("reason", " ".join(str(error).split()) or type(error).__name__)[:300]
