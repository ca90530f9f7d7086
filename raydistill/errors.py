"""The errors of wrong input, and texts without secrets. Everything else imports this; it imports nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any
from urllib.parse import quote, quote_plus, unquote, unquote_plus


class InputError(ValueError):
    """A configuration, a file or a folder that cannot be used. The message names it and says what to do."""


class StageFailed(RuntimeError):
    """A stage of a run ended without its result. The message says why. A resume goes on from what was reached."""


class RunLost(Exception):
    """Another job has taken this one's run over. Nothing more may be written to the run."""


class OutOfMemory(RuntimeError):
    """A device is full. The message names role, what it was doing, and settings that need less.

    Attributes:
        doing: what the role was doing; empty: not known.
    """

    def __init__(self, message: str, doing: str = "") -> None:
        super().__init__(message, doing)
        self.doing = doing

    def __str__(self) -> str:
        return str(self.args[0])


class NonFiniteError(FloatingPointError):
    """A value that must be finite is not. The message names where it arose.

    Attributes:
        count: samples in which it is not finite.
        rows: their places in the batch, where known.
        elsewhere: whether it was met in a mean over workers: another one may name it better.
        samples: ids of all samples that have a value that is not finite; empty: they are other workers'; None: it is no
            matter of single samples.
    """

    def __init__(
        self,
        message: str,
        count: int = 1,
        rows: Sequence[int] = (),
        elsewhere: bool = False,
        samples: Sequence[int] | None = None,
    ) -> None:
        super().__init__(message, count, rows, elsewhere, samples)
        self.message, self.count, self.rows, self.elsewhere = message, count, rows, elsewhere
        self.samples = samples

    def __str__(self) -> str:
        return self.message


class GradientOverflow(NonFiniteError):
    """A scaled gradient is not finite, although all that it was computed from is: its scale is too large."""


# -- texts without secrets --------------------------------------------------------------------------------

MASK = "***"
SHORTEST = 4  # characters; a shorter secret is masked where it stands in a URI, and not wherever its letters occur
_SECRET_KEY = re.compile(r"token|secret|password|passwd|credential|key", re.IGNORECASE)
_URI = re.compile(r"[A-Za-z][\w+.-]*://")
# In a text: userinfo, which may hold blanks, slashes and question marks; a port is none.
_USERINFO = re.compile(rf"({_URI.pattern})[^\s/?#@:]*(?::(?!\d+(?:[^\d@]|$))(?:(?!://)[^@])*)?@")
_IN_TEXT = re.compile(rf"{_URI.pattern}\S+")
_HOST = re.compile(r"(\[[^\]]*\]|[^:@]*)(:\d*)?")  # with its port
_QUERY_VALUE = re.compile(r"([?&;][^\s=&;?]+=)[^\s&]+")
# What a connection string in a query's value holds: `PWD={a;b};…`, `password='a b' …`, `host:6380,password=a`
_BRACKETED = re.compile(r"""\{((?:[^}]|\}\})*)\}|"([^"]*)"|'([^']*)'""")
_DELIMITERS = (r"[;&]", r"[;&,]|\s+(?=[\w.]+\s*=)")


def mask(key: str, value: Any) -> str:
    """`value` as text without secrets: values of keys like `token`; userinfo and every value of a query in URIs."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    if _SECRET_KEY.search(key) and value not in (None, ""):
        return MASK
    return _mask_uri(text) if _URI.match(text) else _mask_text(text)


def reason(error: BaseException, *uris: str) -> str:
    """One line of an error, without secrets.

    Args:
        uris: that the failed call was given. Libraries repeat them whole or in parts, decoded or not.
    """
    text = str(error)
    for uri in uris:
        for known in {uri, unquote(uri)}:
            text = text.replace(known, _mask_uri(known))
        user, secrets = _secrets(uri)
        text = _without(text, secrets)
        if len(user) >= SHORTEST:  # may be a token; as a word of its own: `postgres` is a common name
            text = re.sub(rf"(?<!\w){re.escape(user)}(?!\w)", MASK, text)
    return _mask_text(" ".join(text.split()) or type(error).__name__)[:300]


def _without(text: str, secrets: Iterable[str]) -> str:
    """A text in which every letter of a secret is masked: two that overlap are masked together, in whatever order."""
    hidden = bytearray(len(text))
    for secret in secrets:
        for found in re.finditer(f"(?={re.escape(secret)})", text):
            hidden[found.start() : found.start() + len(secret)] = b"\1" * len(secret)
    shown, end = [], 0
    for run in re.finditer(b"\1+", hidden):
        shown += [text[end : run.start()], MASK]
        end = run.end()
    return "".join([*shown, text[end:]])


def _split(uri: str) -> tuple[str, str, str]:
    """(userinfo, host and path, query with what it begins with) of what comes after `://`.

    A secret that is not encoded may hold any character. Where there is no telling what is userinfo, all of it is.
    """
    rest = uri.partition("://")[2]
    head, query = _without_query(rest)
    authority = head.partition("/")[0]
    if "@" in query and not (_HOST.fullmatch(authority) and "=" in query.partition("@")[0]):
        if rest.count("@") > 1 or ":" not in authority:
            return rest, "", ""
        userinfo, _, after = rest.partition("@")  # a password with ? or #
        return userinfo, *_without_query(after)
    if "@" in authority or (":" in authority and "@" in head):
        userinfo, _, head = head.rpartition("@")
        return (rest, "", "") if "@" in query else (userinfo, head, query)
    return "", head, query


def _without_query(rest: str) -> tuple[str, str]:
    """(host and path, query with what it begins with)."""
    start = re.search(r"[?#]|;[^/;@]*=|$", rest).start()
    return rest[:start], rest[start:]


def _mask_uri(uri: str) -> str:
    """A text that is one URI, whatever characters it holds."""
    userinfo, head, query = _split(uri)
    shown = uri.partition("://")[0] + "://" + (f"{MASK}@" if userinfo else "") + head
    return shown + re.sub(r"([?&;#])(?:([^=?&;#]*=)[^?&;#]*|[^?&;#]+)", rf"\1\2{MASK}", query)


def _mask_text(text: str) -> str:
    """A text in which URIs, or the queries of some, may occur."""
    text = _IN_TEXT.sub(lambda found: _mask_uri(found.group()), _USERINFO.sub(rf"\1{MASK}@", text))
    return _QUERY_VALUE.sub(rf"\1{MASK}", text)


def _secrets(uri: str) -> tuple[str, set[str]]:
    """What of a URI no message may show: the user's name, and the rest in every form in which a library may write it."""
    userinfo, _, query = _split(uri)
    fields = {*re.split(r"[?&;#]", query), *re.split(r"[&;]", query)}  # a value may hold ? and #
    found = {userinfo} | {field.partition("=")[2] if "=" in field else field for field in fields}
    for end in re.finditer("@", f"{userinfo}@"):  # a password may hold @
        user, _, password = userinfo[: end.start()].partition(":")
        found.add(password)
    found |= {secret for value in {*found, query} for secret in _nested(value)}
    forms = {form(secret) for secret in found for form in (str, unquote, unquote_plus, quote, quote_plus)}
    forms |= {repr(form)[1:-1] for form in forms}
    return user, {form for form in forms if len(form) >= SHORTEST}


def _nested(value: str) -> set[str]:
    """The secrets of the connection strings and URIs that a value holds, encoded or not, however often."""
    found: set[str] = set()
    while value:
        for delimiters in _DELIMITERS:
            found |= {field.partition("=")[2].strip() for field in re.split(delimiters, value)}
        found |= {group.replace("}}", "}") for groups in _BRACKETED.findall(value) for group in groups}
        inner = [_split(uri)[0] for uri in _IN_TEXT.findall(value)]
        found |= {*inner, *(userinfo.partition(":")[2] for userinfo in inner)}
        decoded = unquote_plus(value)
        value = decoded if decoded != value else ""
    return {secret.strip("{}\"'") for secret in found} | found
