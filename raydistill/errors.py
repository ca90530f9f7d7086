"""The errors of wrong input, and texts without secrets. Everything else imports this; it imports nothing."""

from __future__ import annotations

import json
import re
from typing import Any


class ConfigError(ValueError):
    """A configuration that cannot be used; the message is for whoever typed it."""


MASK = "***"
_SECRET_KEY = re.compile(r"token|secret|password|passwd|credential|key", re.IGNORECASE)
_USERINFO = re.compile(r"([A-Za-z][\w+.-]*://)[^/\s]*@")
_SECRET_QUERY = re.compile(r"([?&][^=&\s]*(?:token|secret|password|key|sig)[^=&\s]*=)[^&\s]+", re.IGNORECASE)


# -- what a run is described by ---------------------------------------------------------------------------


def mask(key: str, value: Any) -> str:
    """`value` as text without secrets: whole values of secret-looking keys, passwords and tokens inside URIs."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    if _SECRET_KEY.search(key) and value not in (None, ""):
        return MASK
    return _SECRET_QUERY.sub(rf"\1{MASK}", _USERINFO.sub(rf"\1{MASK}@", text))


def reason(error: BaseException) -> str:
    """One line of an error, without secrets."""
    return mask("reason", " ".join(str(error).split()) or type(error).__name__)[:300]
