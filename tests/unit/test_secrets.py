"""No secret of a URI is shown: by the structure of the URI, whatever its parts are called and whatever they hold."""

from __future__ import annotations

import http.server
import json
import logging
import socket
import threading
from urllib.parse import quote, quote_plus

import pytest

from raydistill.config.reading import load
from raydistill.driver.logged_model import log_student
from raydistill.driver.preflight import check_inputs
from raydistill.errors import InputError, mask, reason
from raydistill.export.source import find_export
from raydistill.tracking.store import TrackingError, open_run, prepare, ui_lines
from raydistill.tracking.tracker import Tracker

PASSWORDS = [
    "hunter2",
    "hunter two",
    "hunter/two",
    "hunter@two",
    "hunter?two",
    "hunter#two",
    "hunter:two",
    "1234/hunter",
]
PASSWORDS += ["1234 hunter", "hunter'two", 'hunter"two', "hunter&two=x", "hunter\\two", "hünter"]


def leaks(text: str) -> bool:
    """Whether a text shows a part of one of these that says something."""
    return any(word in text for word in ("hunter", "hünter", "two"))


@pytest.mark.parametrize("password", PASSWORDS)
@pytest.mark.parametrize(
    "uri",
    [
        "postgresql://me:{}@db.example:5432/mlflow",
        "https://{}@db.example/mlflow",
        "mysql+pymysql://db.example/mlflow?pwd={}",
        "https://db.example/mlflow?a=1&auth={}&b=2",
        "https://db.example/mlflow#{}",
        "https://me:{0}@db.example/mlflow?anything={0}",
    ],
)
def test_userinfo_and_every_value_of_a_query_are_masked_and_the_host_is_shown(uri, password):
    if "&" in password:  # it would end a query's value
        uri = "postgresql://me:{}@db.example:5432/mlflow"
    if uri.startswith("https://{}@") and not password.isalnum():
        password = quote(password, safe="")  # a token has no delimiters of its own
    shown = mask("tracking.uri", uri.format(password))
    assert not leaks(shown)
    assert "***" in shown
    ambiguous = uri.endswith("#{}") and "@" in password or "{0}" in uri and {*"@?#"} & {*password}
    if not ambiguous:
        assert "db.example" in shown


@pytest.mark.parametrize(
    "harmless",
    [
        "http://server:5000", "http://server:5000/path", "http://[::1]:5000/x", "sqlite:////a b/mlflow.db",
        "file:///home/me@work/store", "s3://bucket/model@v1", "https://hub.example/model@v1", "shapes:prompts.txt",
        "org/name@revision", "is it 3 & 4? yes", "see https://docs.example/x: mail y@z",
    ],
)  # fmt: skip
def test_what_holds_no_secret_stays_readable(harmless):
    assert mask("x", harmless) == harmless
    assert reason(ValueError(harmless)) == harmless


@pytest.mark.parametrize("password", PASSWORDS)
@pytest.mark.parametrize("uri", ["http://me:{}@h.example:5000/x", "http://h.example/x?pwd={}&auth=open sesame"])
def test_what_a_library_repeats_of_a_uri_is_masked_in_each_form(uri, password):
    password = password.replace("&", "+")  # which would end a query's value
    given = uri.format(password)
    for form in (str, quote, quote_plus, repr):
        for text in (
            "cannot open {0}",
            "'{0}' is no URI",
            "password {1} was refused",
            "with url: /x?pwd={1}&auth=sesame",
        ):
            message = reason(RuntimeError(text.format(form(given), form(password))), given)
            assert not leaks(message), message
            assert "sesame" not in message


CONNECTIONS = [
    ("DRIVER={{ODBC Driver 18}};SERVER=h.example;UID=me;PWD={};Encrypt=yes", "geheim99"),
    ("PWD={{{}}};UID=me", "geheim;99 two"),
    ("UID=me; Pwd = {} ;x=y", "geheim 99"),
    ("host=h password={} dbname=x", "geheim99"),
    ("host=h password='{}' dbname=x", "geheim 99"),
    ("h.example:6380,password={},ssl=True", "geheim99"),
    ("postgresql://me:{}@h.example/x", "geheim99"),
    ("user=me&anything={}", "geheim=99"),
    ("-c anything={}", "geheim99"),
]  # fmt: skip


@pytest.mark.parametrize(("connection", "password"), CONNECTIONS)
@pytest.mark.parametrize(
    "encode", [str, quote_plus, lambda text: quote(quote(text, safe=""), safe="")], ids=["as it is", "once", "twice"]
)
def test_a_password_inside_a_querys_value_is_masked_in_each_form(connection, password, encode):
    """As ODBC's, libpq's and other connection strings, which libraries take apart and write anew."""
    connection = connection.format(password)
    anew = connection if ";" in password else "; ".join(reversed(connection.split(";")))
    uri = f"mssql+pyodbc:///?odbc_connect={encode(connection)}"
    for form in (str, quote, quote_plus, repr, lambda text: quote(text, safe="")):
        for text in (uri, connection, password, anew):
            message = reason(RuntimeError(f"cannot open {form(text)}: refused"), uri)
            assert "geheim" not in message, message
            assert "99" not in message, message
            assert message.startswith("cannot open ")
    assert "geheim" not in mask("tracking.uri", uri)


def test_a_text_with_several_uris_keeps_what_is_not_secret():
    text = (
        "from http://a.example:1/x to http://me:hunter2@b.example/y?k=hunter2 and postgresql://u:hun ter2@c.example/z"
    )
    assert mask("x", f"went {text}") == (
        "went from http://a.example:1/x to http://***@b.example/y?k=*** and postgresql://***@c.example/z"
    )


# -- errors about the store, as the libraries raise them --------------------------------------------------


@pytest.fixture
def closed_port():
    """A port of this machine at which nobody answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        yield free.getsockname()[1]


STORES = [
    "http://127.0.0.1:{}/?pwd=hunter2&auth=open sesame",
    "http://me:hunter sesame@127.0.0.1:{}",
    "gopher://me:hunter sesame@127.0.0.1:{}/x?pwd=hunter2",
    "postgresql://me:hunter sesame@127.0.0.1:{}/mlflow?password=hunter2",
    "databricks://hunter sesame:x@h{}",
]


@pytest.mark.parametrize("store", STORES)
def test_errors_about_the_tracking_store_show_no_secret(store, closed_port, tmp_path, monkeypatch, capfd, caplog):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    uri, messages = store.format(closed_port), []
    with pytest.raises(TrackingError) as caught:
        prepare(uri)
    messages.append(str(caught.value))
    with pytest.raises(TrackingError) as caught:
        open_run(uri, "e", "r", storage=tmp_path, params={}, tags={})
    messages.append(str(caught.value))
    with pytest.raises(InputError) as caught:
        find_export("0" * 32, tmp_path, uri)
    messages.append(str(caught.value))
    with caplog.at_level(logging.INFO, logger="raydistill"):
        tracker = Tracker(uri, "run", interval=0.01)
        tracker.metrics({"loss": 1.0}, 1)
        tracker.close(timeout=0.5)
    assert "does not answer" in caplog.text
    for text in (*messages, caplog.text, *capfd.readouterr()):
        assert "hunter" not in text
        assert "sesame" not in text


class Repeating(http.server.BaseHTTPRequestHandler):
    """A server, or a proxy before it, whose error repeats what it was asked with."""

    def do_GET(self) -> None:
        answer = {
            "error_code": "INVALID_STATE",
            "message": "Detected out-of-date database schema for hunter2 at PWD=sesame",
        }
        body = json.dumps(answer).encode()
        self.send_response(400)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_PATCH = do_GET

    def log_message(self, *_: object) -> None:
        pass


def test_whatever_asks_a_store_tells_its_error_without_secrets(tmp_path, capsys):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Repeating) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            uri = f"http://me:hunter2@127.0.0.1:{server.server_port}/?odbc_connect={quote_plus('UID=me;PWD=sesame')}"
            messages = []
            for ask in (
                lambda: prepare(uri),
                lambda: ui_lines(uri, "0" * 32),
                lambda: open_run(uri, "e", "r", storage=tmp_path, params={}, tags={}),
                lambda: find_export("0" * 32, tmp_path, uri),
                lambda: find_export("models:/student/1", tmp_path, uri),
            ):
                with pytest.raises((TrackingError, InputError)) as caught:
                    ask()
                messages.append(str(caught.value))
            log_student(uri, "0" * 32, tmp_path, None, None)
            log_student("gopher://me:hunter2@h/?odbc_connect=PWD%3Dsesame", "0" * 32, tmp_path, None, None)
            messages += capsys.readouterr().out.splitlines()
        finally:
            server.shutdown()
            thread.join()
    told = [message for message in messages if "***" in message]
    assert len(told) == 7
    assert sum("database schema for ***" in message for message in told) == 6
    assert not any(secret in message for message in messages for secret in ("hunter", "sesame"))


def test_the_check_before_a_run_shows_no_secret(closed_port, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    uri = f"http://me:hunter sesame@127.0.0.1:{closed_port}/?pwd=hunter2&auth=open sesame"
    with pytest.raises(InputError, match=r"^tracking\.uri: .*http://\*\*\*@127\.0\.0\.1") as caught:
        check_inputs(load(overrides=[f"storage={tmp_path}", f"tracking.uri={uri}"]))
    assert "hunter" not in str(caught.value)
    assert "sesame" not in str(caught.value)


@pytest.mark.parametrize(
    "override",
    [
        "tracking.uri=['http://me:hunter2@h?pwd=hunter2']",
        'tracking.uri="http://me:hunter2@h',
        "tracking.uri={a: 'http://h/?pwd=hunter2'",
        "run.name='http://me:hunter2@h?pwd=hunter 2'",
        "http://me:hunter2@h",
    ],
)
def test_a_wrong_value_is_shown_without_its_secrets(override):
    with pytest.raises(InputError) as caught:
        load(overrides=[override])
    assert "hunter" not in str(caught.value)
