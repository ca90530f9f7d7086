"""The frame of the jobs that start a run: configuration, checks, Ray, and what the exit code says.

0  done, or the run was finished already
1  the run failed; what it reached is kept, and the same run.name continues it
2  wrong input, or another living job has the run; nothing was started
75 asked to leave by SIGTERM or Ctrl-C, or another job has taken the run over (EX_TEMPFAIL: try again); the same
   run.name continues it
"""

from __future__ import annotations

import pkgutil
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from raydistill.config.command_line import from_command_line
from raydistill.config.reading import STAGES, changed, stages_of
from raydistill.config.schema import Config
from raydistill.driver.run_lock import RunLocked, lock_run
from raydistill.errors import NonFiniteError, RunLost, StageFailed
from raydistill.tracking.screen import screen
from raydistill.workers.stop_signal import Stopped, stop_on_signals

if TYPE_CHECKING:  # loaded once the command line is known to be right: torch, diffusers and Ray take seconds
    from raydistill.driver.preflight import Inputs
    from raydistill.driver.run_folder import RunFolder

RESUMABLE = 75

RunFunction = Callable[[Config, "RunFolder", "Inputs"], Any]


def run_job(
    purpose: str,
    run: str | RunFunction,
    result: str,
    *,
    changes: Mapping[str, Mapping[str, Any]] | None = None,
    check: str | RunFunction | None = None,
    roles: Sequence[str] | None = None,
    stages: Sequence[str] = STAGES,
    arguments: Sequence[str] | None = None,
) -> int:
    """Body of a job's `main`; returns the exit code.

    Args:
        purpose: first lines of --help.
        run: the run, which raises StageFailed; "module:function", loaded once the command line is known to be right.
        result: file of the run's folder that exists once the run is finished.
        changes: values of configuration sections that this job sets, whatever was typed.
        check: what this job checks beside `check_inputs`; raises InputError.
        roles: those of `planning.memory.ROLES` that this job runs, if not all; they must fit the GPUs they ask for.
        stages: those of a whole run that this job has.
        arguments: of the command line; None: the process's own.
    """
    config = from_command_line(purpose, arguments)
    # Loaded now that the command line is known to be right: torch, diffusers and Ray take seconds.
    from raydistill.driver.binding import bind, keep
    from raydistill.driver.cluster import connected
    from raydistill.driver.preflight import check_inputs
    from raydistill.driver.run_folder import create_run_folder, open_run_folder, pin_models

    try:
        config = changed(config, changes or {})
        folder = open_run_folder(config)
        if (folder.path / result).is_file():
            screen.say(f"run {folder.name} is finished: {folder.path / result}")
            return 0
        _introduce(config, folder, stages)
        config = pin_models(config, folder)
        inputs = check_inputs(config)
        binding = bind(config, folder, inputs)
        if check is not None:
            _loaded(check)(config, folder, inputs)
        body = _loaded(run)
        for line in _check_gpus(config, roles):
            screen.say(line)
    except ValueError as error:  # every error of wrong input is one, and says what to do
        print(f"error: {error}", file=sys.stderr)
        return 2
    again = f"run {folder.name} can be continued with run.name={folder.name}"
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        with lock_run(folder.path):
            create_run_folder(folder, config)
            keep(binding, folder)
            with connected(), stop_on_signals():
                body(config, folder, inputs)
    except RunLocked as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (Stopped, RunLost) as stopped:
        print(f"{stopped}\n{again}", file=sys.stderr)
        return RESUMABLE
    except (StageFailed, NonFiniteError, OSError) as error:  # the disk's, or that of a cluster that is not there
        print(f"error: {error}\n{again}", file=sys.stderr)
        return 1
    return 0


def _introduce(config: Config, folder: RunFolder, stages: Sequence[str]) -> None:
    """What the job is about, before anything is loaded that takes long."""
    planned = [name for name in stages_of(config) if name in stages]
    screen.plan(planned)
    screen.say(f"run {folder.name}: {config.teacher.model} → {config.student.model}")
    screen.say(f"folder    {folder.path}")
    if len(planned) > 1:
        screen.say("stages    " + ", ".join(f"{number} {name}" for number, name in enumerate(planned, 1)))


def _loaded(function: str | RunFunction) -> RunFunction:
    return pkgutil.resolve_name(function) if isinstance(function, str) else function


def _check_gpus(config: Config, roles: Sequence[str] | None) -> list[str]:
    """The planner's check, which is not even imported where no GPU is asked for. Raises InputError."""
    asked = (config.distill.gpus_per_worker, config.teachers.gpus_per_rank)
    if not any((*asked, config.prompts.gpus_per_encoder, config.synthesis.gpus_per_encoder)):
        return []
    from raydistill.planning.memory import check_launch  # it builds every network to count it

    return check_launch(config, roles)
