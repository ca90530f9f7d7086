"""Pictures and prompts in buckets and in data sets of the hub, against servers on this machine: read where they lie."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import socket
import subprocess
import sys
import uuid
from pathlib import Path
from urllib.parse import parse_qs, unquote

import pytest
from hub_server import HubHandler, serving
from picture_sets import png, write_hub_parquet, write_tars

from raydistill.config.reading import load
from raydistill.data import pictures as pictures_module
from raydistill.data.images import ImageSet
from raydistill.data.pictures import open_pictures, open_source
from raydistill.data.prompts import training_prompts
from raydistill.errors import InputError
from raydistill.planning.verdict import _is_here
from raydistill.storage.globs import expand, is_pattern
from raydistill.storage.place import remote
from raydistill.storage.resolve import check_paths, check_storage

TOKEN = "hf_secretSECRETsecret"
SHA, LATER = "c" * 40, "d" * 40


# -- patterns -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("*.tar", ["00000.tar", "00001.tar", "[z].tar"]),
        ("{00000..00001}.tar", ["00000.tar", "00001.tar"]),
        ("{00001,b/x}.tar", ["00001.tar", "b/x.tar"]),
        ("**/*.tar", ["00000.tar", "00001.tar", "[z].tar", "b/x.tar"]),
        ("0000[!0].t?r", ["00001.tar"]),
        ("{0000,b/}*.tar", ["00000.tar", "00001.tar", "b/x.tar"]),
    ],
)
def test_patterns_name_the_same_files_in_a_folder_and_in_a_bucket(pattern, names, tmp_path, bucket):
    folder = remote(f"{bucket}/{uuid.uuid4().hex[:8]}")
    (tmp_path / "b").mkdir()
    (tmp_path / ".d").mkdir()
    for name in ("00000.tar", "00001.tar", "[z].tar", "b/x.tar", "c.txt", ".h.tar", "b/.h.tar", ".d/x.tar"):
        (tmp_path / name).write_text(name)
    folder.upload(tmp_path)
    for root in (str(tmp_path), f"file://{tmp_path}", str(folder)):
        found = expand(f"{root}/{pattern}")
        start = len(root.removeprefix("file://")) + 1
        assert [str(one.place)[start:] for one in found] == names
        assert [one.size for one in found] == [len(name) for name in names]
    assert not is_pattern(str(tmp_path / "[z].tar"))


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("{root}/{{0..2}}.tar", "{root}/2.tar: no such file, but {root}/{{0..2}}.tar names it"),
        ("{root}/*.parquet", "{root}/*.parquet: no such files"),
        ("{root}/{{2..1}}.tar", "{{2..1}} is no range of at most 1,000,000 ascending numbers"),
        ("~nobody-of-this-name/*.tar", "~nobody-of-this-name/*.tar: Could not determine home directory"),
        ("{root}/{{a..b}}.tar", "{{a..b}} is no range of numbers, as in {{00000..00099}}"),
        ("{root}/{{0..99999}}{{0..99999}}.tar", "its braces spell out more than 1,000,000 names"),
    ],
)
def test_patterns_of_nothing_are_refused(pattern, said, tmp_path):
    for n in range(2):
        (tmp_path / f"{n}.tar").write_text("x")
    with pytest.raises(InputError) as error:
        expand(pattern.format(root=tmp_path))
    assert said.format(root=tmp_path) in str(error.value)


def test_a_secret_in_a_pattern_is_not_repeated():
    for uri in ("s3://AKIAUSER:pa55word@bucket/*", "s3://bucket/*?secret_key=pa55word"):
        with pytest.raises(InputError) as error:
            expand(uri)
        assert "credentials and options do not belong in a URI" in str(error.value)
        assert "pa55word" not in str(error.value)


def test_a_plan_knows_which_files_of_a_pattern_are_here(tmp_path):
    (tmp_path / "0.tar").write_text("x")
    assert _is_here(f"{tmp_path}/*.tar")
    assert _is_here("hf://datasets/org/set/*.tar")
    assert not _is_here(f"{tmp_path}/{{0..1}}.tar")
    assert not _is_here(f"{tmp_path}/*.parquet")


# -- a bucket -------------------------------------------------------------------------------------------


def test_pictures_in_a_bucket_are_read_where_they_lie(tmp_path, bucket, monkeypatch):
    folder, cache = remote(f"{bucket}/{uuid.uuid4().hex[:8]}"), tmp_path / "cache"
    monkeypatch.setenv("RAYDISTILL_CACHE", str(cache))
    here = tmp_path / "sets"
    write_tars(here / "tars", (3, 2))
    write_hub_parquet(
        here / "parquet" / "x.parquet", range(20), {"caption": [f"cap {n}" for n in range(20)]}, row_group_size=8
    )
    (here / "photos").mkdir()
    for n in range(2):
        (here / "photos" / f"{n}.png").write_bytes(png(n))
    (here / "photos" / "1.txt").write_text("one")
    folder.upload(here)
    for name in ("tars", "tars/*.tar", "tars/{00000..00001}.tar", "parquet/*.parquet", "photos/*.png"):
        pair = [open_pictures(f"{root}/{name}") for root in (here, folder)]
        assert pair[0].fingerprint == pair[1].fingerprint
        local, there = ([(r.name, r.caption, r.data) for r in pictures.rows(3)] for pictures in pair)
        assert there == local
        assert list(pair[1].rows(3))[1].after == list(pair[0].rows(3))[1].after
    for name in ("parquet", "parquet/x.parquet", "photos"):  # as sets were listed before
        local, there = (open_source(f"{root}/{name}") for root in (here, folder))
        assert isinstance(there, ImageSet)
        assert (there.fingerprint, there.prompts) == (local.fingerprint, local.prompts)
        assert [there.read(row) for row in range(len(there))] == [local.read(row) for row in range(len(local))]
    assert not cache.exists()
    with pytest.raises(InputError, match="no such files"):
        open_pictures(f"{folder}/none-*.tar")


def test_what_a_bucket_has_torn_is_asked_for_again_and_told_by_uri_and_rows(tmp_path, bucket, monkeypatch):
    pauses: list[float] = []
    monkeypatch.setattr(pictures_module.time, "sleep", pauses.append)
    folder = remote(f"{bucket}/{uuid.uuid4().hex[:8]}")
    write_tars(tmp_path / "set", (4,))
    whole = (tmp_path / "set" / "00000.tar").read_bytes()
    (tmp_path / "set" / "00000.tar").write_bytes(whole[: whole.rindex(b"000002.png")])  # as an upload that broke off
    folder.upload(tmp_path / "set")
    rows = list(open_pictures(f"{folder}/*.tar").rows(0))
    assert [row.caption for row in rows] == ["cap 0", ""]
    assert rows[1].name == f"{folder}/00000.tar, after 000000"
    assert rows[1].failure.endswith("; at least 1 row is lost")
    assert pauses == [2.0, 4.0, 8.0]
    pictures = open_pictures(f"{folder}/*.tar")
    (folder / "00000.tar").write_bytes(whole[:5000])  # shorter than it was listed
    with pytest.raises(OSError, match=rf"{folder}/00000\.tar, row 1: only 5,000 of \d\d,\d\d\d bytes came"):
        list(pictures.rows(0))


def test_prompts_by_pattern_and_compressed_name_file_and_row(tmp_path, bucket):
    folder = remote(f"{bucket}/{uuid.uuid4().hex[:8]}")
    files = {
        "p-0.txt.gz": "a cup\n\na mug\n",
        "p-1.csv.gz": "prompt,n\na hat,1\n",
        "p-2.tsv.gz": "n\tprompt\n1\ta cat\n",
        "p-3.jsonl.gz": '{"prompt": "a dog"}\nno\n',
        "p-4.json.gz": '["a fox", "a cow"]',
    }
    (tmp_path / "sets").mkdir()
    for name, text in files.items():
        (tmp_path / "sets" / name).write_bytes(gzip.compress(text.encode()))
    folder.upload(tmp_path / "sets")
    for root in (tmp_path / "sets", folder):
        config = load(overrides=[f"prompts.path={root}/p-*.gz"])
        check_paths(config, ["prompts.path"])
        prompts = training_prompts(config)
        assert list(prompts.prompts) == ["a cup", "a mug", "a hat", "a cat", "a dog", "a fox", "a cow"]
        assert prompts.ids.tolist() == [1, 3, 5, 7, 8, 10, 11]
        assert prompts.report.bad_rows() == "1 blank (p-0.txt.gz, row 2), 1 not JSON (p-3.jsonl.gz, row 2)"
        assert prompts.report.source == f"{root}/p-*.gz"
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(b"a cup\n" * 1000)[:-20])
    (tmp_path / "not.txt.gz").write_bytes(b"a cup\n")
    for name, said in (
        ("cut", "its compressed bytes are damaged"),
        ("not", "Not a gzipped file"),
        ("no", "no such files"),
    ):
        config = load(overrides=[f"prompts.path={tmp_path}/{name}.txt.gz" + ("*" if name == "no" else "")])
        with pytest.raises(InputError, match=said):
            training_prompts(config)


# -- the hub --------------------------------------------------------------------------------------------


class Hub(HubHandler):
    """Serves the files of datasets/org/set to everybody, and those of datasets/org/gated to the holder of TOKEN."""

    files: dict[str, bytes] = {}
    main = SHA  # the commit of the files
    before: dict[str, dict[str, bytes]] = {}  # files of other commits
    lost, cut = 0, 0  # requests that get no answer from now on (parquet), or half of one (a tar)

    @classmethod
    def push(cls, commit: str, files: dict[str, bytes]) -> None:
        cls.before, cls.main, cls.files = cls.before | {cls.main: cls.files}, commit, files

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _entry(self, name: str) -> dict:
        data = self.there[name]
        return {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}

    def _below(self, folder: str, recursive: bool) -> list[dict] | None:
        prefix = f"{folder}/" if folder else ""
        names = [name for name in self.there if name.startswith(prefix)]
        folders = {prefix + name[len(prefix) :].split("/")[0] for name in names if "/" in name[len(prefix) :]}
        there = [self._entry(name) for name in names if recursive or "/" not in name[len(prefix) :]]
        dirs = [{"type": "directory", "path": name, "size": 0, "oid": "0" * 40} for name in sorted(folders)]
        return dirs + there if names else None

    def do_GET(self) -> None:
        path, _, query = unquote(self.path).partition("?")
        body = self._body()
        if path.startswith("/datasets/org/gated/") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._send(401, X_Error_Code="GatedRepo", X_Error_Message="accept the licence")
        path = path.replace("org/gated", "org/set", 1)
        revision = (path.removeprefix("/api").split("/") + [""] * 6)[5]
        self.there = Hub.before.get(revision, Hub.files)
        if path.startswith("/datasets/org/set/resolve/"):
            revision, _, name = path.removeprefix("/datasets/org/set/resolve/").partition("/")
            if name not in self.there:
                return self._send(404, X_Error_Code="EntryNotFound")
            if name.endswith("train-00000-of-00001.parquet") and Hub.lost:
                Hub.lost -= 1
                return self._hang_up()
            data, asked = self.there[name], self.headers.get("Range")
            if asked is None:
                return self._send(200, data, ETag='"x"', X_Repo_Commit=SHA)
            first, last = asked.removeprefix("bytes=").split("-")
            part = data[int(first) : int(last or len(data)) + 1]
            if name.endswith("00001.tar") and Hub.cut:
                Hub.cut -= 1
                self.send_response(206)
                self.send_header("Content-Length", str(len(part)))
                self.send_header("Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}")
                self.end_headers()
                self.wfile.write(part[: len(part) // 2])
                return self._hang_up()
            return self._send(
                206, part, Content_Range=f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}", ETag='"x"'
            )
        rest = path.removeprefix("/api/datasets/org/set")
        if rest == path or "/v9" in rest:
            return self._send(404, X_Error_Code="RepoNotFound" if rest == path else "RevisionNotFound")
        if rest.startswith("/tree/"):
            folder = rest.removeprefix("/tree/").partition("/")[2]
            found = self._below(folder, parse_qs(query).get("recursive", ["false"])[0].lower() == "true")
            return (
                self._send(200, json.dumps(found).encode()) if found else self._send(404, X_Error_Code="EntryNotFound")
            )
        if rest.startswith("/paths-info/"):
            names = json.loads(body)["paths"] if body.startswith(b"{") else parse_qs(body.decode())["paths"]
            found = [self._entry(name) for name in names if name in self.there]
            found += [
                {"type": "directory", "path": n, "size": 0, "oid": "0" * 40} for n in names if self._below(n, False)
            ]
            return self._send(200, json.dumps(found).encode())
        commit = revision if revision in Hub.before else Hub.main
        return self._send(200, json.dumps({"id": "org/set", "sha": commit, "siblings": []}).encode())

    do_HEAD = do_POST = do_GET


@pytest.fixture
def hub(tmp_path):
    sets = tmp_path / "sets"
    write_tars(sets / "tars", (3, 2))
    write_hub_parquet(sets / "data" / "train-00000-of-00001.parquet", range(20), row_group_size=8)
    (sets / "prompts.txt.gz").write_bytes(gzip.compress(b"a cup\na mug\n"))
    (sets / "README.md").write_text("a card")
    Hub.files = {str(file.relative_to(sets)): file.read_bytes() for file in sorted(sets.rglob("*")) if file.is_file()}
    Hub.lost, Hub.cut, Hub.main, Hub.before = 0, 0, SHA, {}
    with serving(Hub) as address:
        yield address


READ = """
import hashlib, json, pickle, sys, time
from raydistill.config.reading import load
from raydistill.data.pictures import open_pictures
from raydistill.data.prompts import training_prompts
from raydistill.storage.resolve import check_paths
told, time.sleep = {}, lambda seconds: None
for source in json.loads(sys.argv[1]):
    try:
        if "/prompt" in source:
            config = load(overrides=[f"prompts.path={source}"])
            check_paths(config, ["prompts.path"])
            told[source] = list(training_prompts(config).prompts)
        else:
            pictures = pickle.loads(pickle.dumps(open_pictures(source)))
            rows = [(row.name, row.caption, hashlib.sha1(row.data).hexdigest()) for row in pictures.rows(3)]
            told[source] = [pictures.fingerprint, rows, pictures.source]
    except Exception as error:
        told[source] = f"{type(error).__name__}: {error}"
print(json.dumps(told))
"""


def ask(sources: list[str], endpoint: str, home: Path, **environment: str) -> dict:
    """In a process of its own: the hub's client reads its environment once."""
    variables = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    variables |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home / "hf"), "HF_HUB_DISABLE_XET": "1", **environment}
    variables |= {"RAYDISTILL_CACHE": str(home / "cache")}
    command = [sys.executable, "-c", READ, json.dumps(sources)]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    return json.loads(done.stdout)


def test_data_sets_of_the_hub_are_streamed_and_prompts_in_them_staged(hub, tmp_path):
    here, there = tmp_path / "sets", "hf://datasets/org/set"
    named = {
        "tars": f"{there}/tars", "tars/*.tar": f"{there}@main/tars/*.tar", "tars/{00000..00001}.tar": f"{there}/tars/{{00000..00001}}.tar",
        "data": f"{there}@{SHA}/data", "data/train-*.parquet": "hf://datasets/org/gated/data/train-*.parquet",
    }  # fmt: skip
    wrong = {
        f"{there}@v9/tars": "v9", f"{there}/tars/9*.tar": f"InputError: {there}@{SHA}/tars/9*.tar: no such files",
        "hf://datasets/org/none/tars": "InputError: hf://datasets/org/none/tars: ",
        "hf://org/model/tars": "not a data set of the hub, as in hf://datasets/org/name[@revision]/path",
        f"{there}/none.tar": "no such file or folder",
    }  # fmt: skip
    prompts = [f"{there}/prompts.txt.gz", f"{there}/prompt*.gz"]
    Hub.lost, Hub.cut = 2, 2
    told = ask([*named.values(), *prompts, *wrong], hub, tmp_path, HF_TOKEN=TOKEN)
    assert (Hub.lost, Hub.cut) == (0, 0)
    for local, uri in named.items():
        pictures = open_pictures(str(here / local))
        rows = [[row.name, row.caption, hashlib.sha1(row.data).hexdigest()] for row in pictures.rows(3)]
        assert told[uri][:2] == [pictures.fingerprint, rows], uri
        assert SHA in told[uri][2], told[uri][2]
    assert [told[uri] for uri in prompts] == [["a cup", "a mug"]] * 2
    for uri, said in wrong.items():
        assert said in told[uri], told[uri]
    staged = [file.name for file in (tmp_path / "cache").rglob("*") if file.is_file() and not file.name.startswith(".")]
    assert staged == ["prompts.txt.gz"]


def test_a_branch_that_moves_is_seen_by_a_process_that_has_listed_it(hub, tmp_path):
    code = "import json, sys; from raydistill.storage.place import remote\n"
    code += "for _ in sys.stdin: print(json.dumps(remote('hf://datasets/org/set/tars').entries()), flush=True)"
    variables = os.environ | {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], env=variables, **pipes) as process:

        def listed() -> list:
            process.stdin.write("again\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        before = listed()
        Hub.files["tars/00000.tar"] = Hub.files["tars/00000.tar"][::-1]
        Hub.files["tars/00002.tar"] = b"new"
        after = listed()
        process.stdin.close()
    assert [name for name, *_ in after] == ["00000.tar", "00001.tar", "00002.tar"]
    assert before[0] != after[0]
    assert before[1] == after[1]


LIVES = """
import json, sys
from raydistill.config.reading import load
from raydistill.data.pictures import open_pictures
from raydistill.data.prompts import held_out_prompts, training_prompts
from raydistill.driver.binding import bind, keep
from raydistill.driver.preflight import Inputs
from raydistill.driver.run_folder import asked_sets, create_run_folder, open_run_folder, pin_models
from raydistill.export.licences import picture_sets
for line in sys.stdin:
    name, images, prompts = json.loads(line)
    named = load(None, [f"storage={sys.argv[1]}", f"run.name={name}", f"synthesis.images={images}", f"prompts.path={prompts}",
                        "bridge.source=stream", "bridge.checkpoint=null"])
    try:
        run = open_run_folder(named)
        config = pin_models(named, run)
        pictures, texts = open_pictures(config.synthesis.images), training_prompts(config)
        inputs = Inputs(None, None, texts, held_out_prompts(config), images=pictures)
        binding = bind(config, run, inputs, asked_sets(named, config))
        create_run_folder(run, config)
        keep(binding, run)
        captions = sorted(row.caption for row in pictures.rows(0))
        told = [config.synthesis.images, config.prompts.path, list(texts.prompts), captions, picture_sets(config)[0][0]]
    except Exception as error:
        told = f"{type(error).__name__}: {error}"
    print(json.dumps(told), flush=True)
"""


@pytest.mark.full
def test_a_run_reads_the_commit_that_it_began_with_when_its_data_set_is_published_anew(hub, tmp_path):
    variables = os.environ | {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
    variables |= {"RAYDISTILL_CACHE": str(tmp_path / "cache")}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    base = "hf://datasets/org/set"
    with subprocess.Popen([sys.executable, "-c", LIVES, str(tmp_path / "runs")], env=variables, **pipes) as process:

        def live(name: str, images: str, prompts: str = "/prompts.txt.gz") -> list | str:
            process.stdin.write(json.dumps([name, base + images, base + prompts]) + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        at = f"{base}@{SHA}"
        begun = [f"{at}/tars", f"{at}/prompts.txt.gz", ["a cup", "a mug"], [f"cap {n}" for n in range(5)], f"{at}/tars"]
        assert live("open", "/tars") == begun
        assert live("branch", "@main/tars") == begun
        assert json.loads((tmp_path / "runs/branch/inputs.json").read_text())["asked"] == {
            "synthesis.images": f"{base}@main/tars",
            "prompts.path": f"{base}/prompts.txt.gz",
        }
        write_tars(tmp_path / "later" / "tars", (2, 2))
        later = {f"tars/{file.name}": file.read_bytes() for file in (tmp_path / "later" / "tars").iterdir()}
        Hub.push(LATER, Hub.files | later | {"prompts.txt.gz": gzip.compress(b"a hat\n")})
        for name, images in (("open", "/tars"), ("open", f"@{SHA}/tars"), ("branch", "@main/tars")):
            assert live(name, images) == begun
        assert live("new", "/tars")[:4] == [
            f"{base}@{LATER}/tars", f"{base}@{LATER}/prompts.txt.gz", ["a hat"], [f"cap {n}" for n in range(4)]
        ]  # fmt: skip
        for images in ("@main/tars", f"@{LATER}/tars"):
            said = live("open", images)
            assert f"synthesis.images: '{at}/tars' -> '{base}{images}'" in said
        assert live("lost", "@v9/tars") == (
            f"InputError: synthesis.images: {base}@v9/tars: the hub has no revision v9 of datasets/org/set"
        )
        process.stdin.close()


def test_a_gated_set_without_a_token_and_a_connection_that_is_always_cut_are_one_line(hub, tmp_path):
    Hub.cut = 1000
    said, cut = ask(["hf://datasets/org/gated/tars", "hf://datasets/org/set/tars"], hub, tmp_path).values()
    assert cut.startswith(f"OSError: hf://datasets/org/set@{SHA}/tars/00001.tar, row 1: RemoteProtocolError: ")
    assert "InputError" in said
    assert "HF_TOKEN, or what `hf auth login` has written; a gated set's licence must be accepted" in said


def test_a_hub_that_cannot_be_reached_is_one_line(tmp_path):
    uris = ["hf://datasets/org/set/tars/*.tar", "hf://datasets/org/set/prompts.txt"]
    for said in ask(uris, "http://127.0.0.1:9", tmp_path).values():
        assert said.startswith(("OSError: ", "InputError: "))
        assert "hf://datasets/org/set/" in said
        assert "ConnectError" in said


def test_a_data_set_of_the_hub_is_no_storage():
    with pytest.raises(InputError, match="a data set of the hub is read alone; name a folder, s3:// or gs://"):
        check_storage(load(overrides=["storage=hf://datasets/org/set/runs"]))
