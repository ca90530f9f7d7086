"""Scores by a program of one's own: how DPG-Bench, MPS and anything else without a usable package are brought in.

    --metrics command:NAME=PROGRAM [ARGUMENT ...]        (quoted as for a shell, which is not used)

The program is started as `PROGRAM [ARGUMENT ...] REQUEST ANSWER`, in the folder where the job was started, with the
same environment variables.

REQUEST is a JSON-lines file, one picture a line:
    {"id": 0, "image": "/absolute/path.png", "prompt": "…", "prompt_id": 3, "category": "…"}
ANSWER is the JSON-lines file that the program appends to, in any order:
    {"id": 0, "score": 0.83}                    one column, NAME
    {"id": 0, "scores": {"a": 0.5, "b": 1}}     several, NAME.a and NAME.b; null where a picture has none
Exit code 0, and a line for every picture of the request, mean success. Of a program that was killed, whole lines of
ANSWER are kept, and the next start asks for the missing pictures only.

DPG-Bench: its scorer is a script of the ELLA repository (mPLUG answers the questions of dpg_bench.csv); a wrapper of a
few lines looks up the questions of `prompt` and writes the graph's score. MPS: load the authors' MPS_overall_checkpoint.pth with
their own code, and write its score of (image, prompt).
"""

from __future__ import annotations

import json
import math
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from raydistill.errors import InputError
from raydistill.evaluation.folder import SCORES, EvaluationFolder
from raydistill.pictures.picture import Picture
from raydistill.storage.atomic import replace_text
from raydistill.storage.json_lines import lines_of

PREFIX = "command:"
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
LAST_LINES = 5  # of what a failed program printed
WITHIN_S = 900.0  # for all pictures of an evaluation of a run, whose trainers wait


def parse_command(text: str) -> tuple[str, list[str]]:
    """`command:NAME=PROGRAM ...` -> (name, words). Raises InputError, also where there is no such program."""
    name, sign, line = text.removeprefix(PREFIX).partition("=")
    if not sign or not _NAME.fullmatch(name):
        raise InputError(f"{text}: write command:NAME=PROGRAM, NAME of letters, digits, _ and -")
    try:
        words = shlex.split(line)
    except ValueError as error:
        raise InputError(f"{text}: {error}") from None
    if not words:
        raise InputError(f"{text}: no program")
    if shutil.which(words[0]) is None:
        raise InputError(f"{text}: there is no program {words[0]}")
    return name, words


def run_command(
    path: str, batch_size: int, name: str, words: list[str], directory: str, within_s: float | None = None
) -> None:
    """Ask the program for every picture that has no score yet, and write the metric's scores.

    Args:
        path, batch_size: of the `EvaluationFolder`.
        within_s: after which the program is ended; None: it may take as long as it will.

    Raises:
        InputError: it failed, or its answer is wrong; what it answered rightly before is kept.
    """
    folder = EvaluationFolder(path, batch_size)
    request, answer = (folder.path / SCORES / name / f"{file}.jsonl" for file in ("request", "answer"))
    request.parent.mkdir(parents=True, exist_ok=True)
    known = read_answer(answer, name, len(folder.pictures), whole=True)
    rest = [picture for picture in folder.pictures if picture.index not in known]
    if rest:
        replace_text(request, "".join(json.dumps(_asked(folder, p), ensure_ascii=False) + "\n" for p in rest))
        replace_text(answer, "".join(json.dumps(known[index]) + "\n" for index in sorted(known)))
        try:
            done = subprocess.run(
                [*words, str(request), str(answer)],
                cwd=directory, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                errors="replace", timeout=within_s,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise InputError(f"{name}: {shlex.join(words)} did not end within {within_s:.0f} s") from None
        if done.returncode:
            said = " | ".join(done.stdout.strip().splitlines()[-LAST_LINES:]) or "nothing"
            raise InputError(f"{name}: {shlex.join(words)} ended with code {done.returncode} and said: {said}")
        known = read_answer(answer, name, len(folder.pictures))
        lacking = [picture.index for picture in rest if picture.index not in known]
        if lacking:
            raise InputError(
                f"{name}: {answer} has no line for {len(lacking)} pictures, the first with id {lacking[0]}"
            )
    names = list(dict.fromkeys(column for line in known.values() for column in _columns(line, name)))
    for batch in folder.batches:
        rows = [_columns(known[picture.index], name) for picture in folder.batch(batch)]
        folder.write(name, batch, {column: [row.get(column) for row in rows] for column in names})


class CommandScorer:
    """The program as a scorer of picture files, for whoever waits for its numbers."""

    def __init__(self, name: str, words: Sequence[str], within_s: float = WITHIN_S) -> None:
        self.name, self.words, self.within_s = name, list(words), within_s

    def __call__(self, files: Sequence[str], prompts: Sequence[str]) -> dict[str, list[float | None]]:
        """Raises InputError, as `run_command`."""
        pictures = [Picture(index, index, prompt, 0) for index, prompt in enumerate(prompts)]
        with tempfile.TemporaryDirectory() as place:
            folder = EvaluationFolder.create(Path(place), pictures, {"batch_size": len(pictures)})
            for picture, file in zip(pictures, files, strict=True):
                folder.file_of(picture).symlink_to(file)
            run_command(place, len(pictures), self.name, self.words, str(Path.cwd()), self.within_s)
            return folder.read(self.name)


def _asked(folder: EvaluationFolder, picture: Picture) -> dict[str, Any]:
    about = {"prompt": picture.prompt, "prompt_id": picture.prompt_id, "category": picture.category}
    return {"id": picture.index, "image": str(folder.file_of(picture).absolute())} | about


def _columns(line: dict[str, Any], name: str) -> dict[str, float | None]:
    return {name: line["score"]} if "score" in line else {f"{name}.{k}": v for k, v in line["scores"].items()}


def read_answer(file: Path, name: str, count: int, whole: bool = False) -> dict[int, dict[str, Any]]:
    """id -> line of an answer.

    Args:
        file: may be missing.
        count: ids are 0 … count - 1.
        whole: leave out a last line without its end, which a killed program left.

    Raises:
        InputError: naming file and line.
    """
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    lines = lines_of(text[: text.rfind("\n") + 1] if whole else text)
    found: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(lines, start=1):
        if line.strip():
            entry = _entry(line, f"{name}: {file}, line {number}", count)
            found[entry["id"]] = entry
    return found


def _entry(line: str, where: str, count: int) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except ValueError:
        raise InputError(f"{where}: not JSON") from None
    if not isinstance(entry, dict) or ("score" in entry) == ("scores" in entry):
        raise InputError(f'{where}: must be an object with "id" and either "score" or "scores"')
    index = entry.get("id")
    if type(index) is not int or not 0 <= index < count:
        raise InputError(f"{where}: id {index!r} is not one of the request's, 0 … {count - 1}")
    values = entry["scores"] if "scores" in entry else {"score": entry["score"]}
    if not isinstance(values, dict) or not values:
        raise InputError(f'{where}: "scores" must be an object of numbers')
    for key, value in values.items():
        if value is not None and (type(value) not in (int, float) or not math.isfinite(value)):
            raise InputError(f"{where}: {key} is {value!r}, not a finite number or null")
    return entry
