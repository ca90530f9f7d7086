"""The frame of the jobs that start a run: configuration, checks, Ray, and what the exit code says.

0  done, or the run was finished already
1  the run failed; what it reached is kept, and the same run.name continues it
2  wrong input, an impossible request, or another living job has the run; nothing was started
75 asked to leave by SIGTERM or Ctrl-C, or another job has taken the run over (EX_TEMPFAIL: try again); the same
   run.name continues it
"""

from __future__ import annotations

import pkgutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raydistill.config.command_line import from_command_line
from raydistill.config.reading import STAGES, changed, stages_of, streams_bridge
from raydistill.config.schema import Config
from raydistill.driver import finished
from raydistill.driver.run_folder import RunFolder, asked_sets, create_run_folder, open_run_folder, pin_models
from raydistill.driver.run_lock import RunLocked, lock_run
from raydistill.errors import InputError, NonFiniteError, RunLost, StageFailed
from raydistill.storage.lease import LEASE_FILE, owner_of
from raydistill.storage.place import Place
from raydistill.tracking.screen import screen
from raydistill.workers.stop_signal import Stopped, stop_on_signals

if TYPE_CHECKING:  # loaded once the command line is known to be right: torch, diffusers and Ray take seconds
    from raydistill.driver.binding import Binding
    from raydistill.driver.preflight import Inputs

RESUMABLE = 75
DASHBOARD = "--dashboard"
OPTIONS = {DASHBOARD: "show Ray's dashboard of this run: a cluster of its own has none otherwise"}

RunFunction = Callable[[Config, RunFolder, "Inputs"], Any]


@dataclass(frozen=True, kw_only=True)
class Job:
    """A kind of run.

    Attributes:
        run: the run, which raises StageFailed; "module:function", loaded once the command line is known to be right.
        result: file of the run's folder that exists once the run is finished.
        changes: values of configuration sections that this job sets, whatever was typed.
        check: what this job checks beside `check_inputs`; raises InputError.
        roles: those of `planning.memory.ROLES` that this job runs, if not all; they must fit the GPUs they ask for.
        stages: those of a whole run that this job has.
        extends: a finished run goes on where it is asked for more (`driver.finished`).
    """

    run: str | RunFunction
    result: str
    changes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    check: str | RunFunction | None = None
    roles: Sequence[str] | None = None
    stages: Sequence[str] = STAGES
    extends: bool = False


@dataclass(frozen=True)
class Prepared:
    """A run that has passed its checks; nothing is started.

    Attributes:
        inputs: None where the run is finished, and nothing is left to do.
        binding: what the run's inputs and checkpoints are bound to.
        extended: what a finished run is to have besides.
        notes: lines for people.
    """

    config: Config
    folder: RunFolder
    inputs: Inputs | None = None
    binding: Binding | None = None
    extended: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def prepare(job: Job, config: Config) -> Prepared:
    """Check everything that can be checked before anything starts. Raises ValueError, one line a mistake."""
    config = changed(config, job.changes)
    folder = open_run_folder(config, job.result)
    extended: list[str] = []
    if (folder.path / job.result).is_file():
        extended = finished.additions(folder, config) if job.extends else []
        if not extended:
            notes = [f"run {folder.name} is finished: {folder.path / job.result}"]
            if ignored := finished.unused(folder, config):
                notes.append(
                    f"changed since, and not used by a finished run: {'; '.join(ignored)} (use another run.name)"
                )
            return Prepared(config, folder, notes=tuple(notes))
    _introduce(config, folder, job.stages)
    # Loaded now that people know what is under way: torch, diffusers and Ray take seconds.
    from raydistill.driver import room
    from raydistill.driver.backend import decided
    from raydistill.driver.binding import bind
    from raydistill.driver.preflight import check_inputs
    from raydistill.teachers import speed

    room.check_machine(config, job.roles)  # before `check_inputs`, which makes the tracking store
    config, named = pin_models(config, folder), config
    inputs = check_inputs(config, distils="distill" in job.stages)
    config = decided(config, folder, job.roles)
    binding = bind(config, folder, inputs, asked_sets(named, config))
    if job.check is not None:
        _loaded(job.check)(config, folder, inputs)
    _loaded(job.run)
    notes = [f"run {folder.name} was finished, and is extended: {', '.join(extended)}"] if extended else []
    notes += speed.check(config.teachers, inputs.teacher)
    return Prepared(config, folder, inputs, binding, tuple(extended), (*notes, *_check_gpus(config, job.roles)))


def carry_out(job: Job, prepared: Prepared, dashboard: bool = False) -> Any:
    """Run it on Ray; returns what the job's function returns.

    Args:
        dashboard: as in `driver.cluster.connected`.

    Raises:
        RunLocked: another living job has the run.
        InputError: the cluster could never place it.
        Stopped: it was asked to leave.
        RunLost: another job has taken it over.
        StageFailed, NonFiniteError, OSError: it failed; what it reached is kept.
    """
    # as in `prepare`
    from raydistill.driver import room
    from raydistill.driver.binding import keep
    from raydistill.driver.cluster import connected
    from raydistill.driver.metric_weights import fetch_weights

    config, folder = prepared.config, prepared.folder
    fresh = not folder.path.exists()
    folder.path.mkdir(parents=True, exist_ok=True)
    with _no_trace(folder.path, fresh), lock_run(folder.path), connected(dashboard), stop_on_signals():
        room.check_cluster(config, job.roles)  # before the folder says with which configuration it was begun
        if "distill" in job.stages:
            fetch_weights(config)
        if prepared.extended:
            finished.reopen(folder, config)
        create_run_folder(folder, config)
        keep(prepared.binding, folder)
        return _loaded(job.run)(config, folder, prepared.inputs)


def make_up(job: Job, prepared: Prepared) -> None:
    """What a finished run still lacks through no fault of its own: MLflow may have been away when it ended."""
    if job.extends:
        from raydistill.driver.logged_model import log_if_refused  # as in `prepare`

        log_if_refused(prepared.config, prepared.folder)


def run_job(purpose: str, job: Job, arguments: Sequence[str] | None = None) -> int:
    """Body of a command's `main`; returns the exit code.

    Args:
        purpose: first lines of --help.
        arguments: of the command line; None: the process's own.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    dashboard = DASHBOARD in given
    config = from_command_line(purpose, [argument for argument in given if argument != DASHBOARD], OPTIONS)
    try:
        prepared = prepare(job, config)
    except ValueError as error:  # every error of wrong input is one, and says what to do
        return _refused(error)
    for line in prepared.notes:
        screen.say(line)
    if prepared.inputs is None:
        make_up(job, prepared)
        return 0
    name = prepared.folder.name
    again = f"run {name} can be continued with run.name={name}"
    try:
        carry_out(job, prepared, dashboard)
    except (InputError, RunLocked) as error:
        return _refused(error)
    except (Stopped, RunLost) as stopped:
        print(f"{stopped}\n{again}", file=sys.stderr)
        return RESUMABLE
    except (StageFailed, NonFiniteError, OSError) as error:  # the disk's, or that of a cluster that is not there
        print(f"error: {error}\n{again}", file=sys.stderr)
        return 1
    return 0


def _introduce(config: Config, folder: RunFolder, stages: Sequence[str]) -> None:
    """What the job is about, before the checks that take long."""
    streamed = streams_bridge(config) and "distill" not in stages  # pairs would be the discriminator's alone
    planned = [name for name in stages_of(config) if name in stages and not (streamed and name == "synthesis")]
    screen.plan(planned)
    screen.say(f"run {folder.name}: {config.teacher.model} → {config.student.model}")
    screen.say(f"folder    {folder.path}")
    if len(planned) > 1:
        screen.say("stages    " + ", ".join(f"{number} {name}" for number, name in enumerate(planned, 1)))


@contextmanager
def _no_trace(folder: Place, fresh: bool) -> Iterator[None]:
    """Where the block refuses a run, a fresh folder is removed, which holds nothing but the file of its lock."""
    try:
        yield
    except InputError:
        if fresh and owner_of(folder) is None and [place.name for place in folder.iterdir()] in ([], [LEASE_FILE]):
            (folder / LEASE_FILE).unlink(missing_ok=True)
            if isinstance(folder, Path):  # a bucket has no folders
                folder.rmdir()
        raise


def _refused(error: ValueError) -> int:
    for line in str(error).splitlines():
        print(f"error: {line}", file=sys.stderr)
    return 2


def _loaded(function: str | RunFunction) -> RunFunction:
    return pkgutil.resolve_name(function) if isinstance(function, str) else function


def _check_gpus(config: Config, roles: Sequence[str] | None) -> list[str]:
    """The planner's check, which is not even imported where no GPU is asked for. Raises InputError."""
    asked = (config.distill.gpus_per_worker, config.teachers.gpus_per_rank)
    if not any((*asked, config.prompts.gpus_per_encoder, config.synthesis.gpus_per_encoder)):
        return []
    from raydistill.planning.memory import check_launch  # it builds every network to count it

    return check_launch(config, roles)
