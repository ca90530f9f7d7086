"""A small Ray cluster, an MLflow server and a job on them, all of whose processes can be told, killed and started again."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
from ray._private.authentication.authentication_token_setup import ensure_token_if_auth_enabled
from ray._raylet import Config
from ray.cluster_utils import Cluster

from raydistill.driver.cluster import WITHOUT_DASHBOARD, environment

MARK = "RAYDISTILL_WORLD"  # environment variable that all processes of a world inherit
SPOT = {"raydistill-world": "spot"}  # labels of the node that may be lost


class MlflowServer:
    """A tracking server of its own process group, which can be stopped and started again at the same address."""

    def __init__(self, folder: Path) -> None:
        """`folder`: of its database, its artifacts and its log."""
        self.folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self._port}"

    def start(self, timeout: float = 120) -> None:
        """Start it and wait until it answers. Raises RuntimeError if it does not."""
        self.launch()
        deadline = time.monotonic() + timeout
        while not self.answers():
            if time.monotonic() > deadline or self._process.poll() is not None:
                self.kill()
                raise RuntimeError(f"the MLflow server does not start; see {self.folder / 'mlflow.log'}")
            time.sleep(0.2)

    def launch(self) -> None:
        """Begin to start it."""
        store = f"sqlite:///{self.folder}/mlflow.db"
        command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store, "--workers", "1"]
        command += ["--artifacts-destination", str(self.folder / "artifacts"), "--port", str(self._port)]
        quiet = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (self.folder / "mlflow.log").open("a") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, env=quiet, start_new_session=True)

    def answers(self) -> bool:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.uri}/health", timeout=1) as answer:
            return answer.status == 200
        return False

    def signal(self, number: int) -> None:
        """To the server and its workers."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def kill(self) -> None:
        if self._process is not None:
            self.signal(signal.SIGKILL)
            self._process.wait()
            self._process = None


class World:
    """Head node, one node that may be lost, and an MLflow server; a context manager that leaves nothing behind."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.mark = folder, uuid.uuid4().hex
        folder.mkdir(parents=True, exist_ok=True)
        self.server, self.cluster = MlflowServer(folder), None

    def __enter__(self) -> World:
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        Config.initialize("")  # Ray has read its environment already, when it was imported
        with contextlib.ExitStack() as stack:
            os.environ[MARK] = self.mark
            stack.callback(os.environ.pop, MARK, None)
            self._temporary = tempfile.mkdtemp(prefix="rd")  # short: sockets' paths may have 107 characters
            stack.callback(shutil.rmtree, self._temporary, ignore_errors=True)
            ensure_token_if_auth_enabled()  # as ray.init does for a cluster of its own
            stack.callback(self._stop_cluster)
            self._start_cluster()
            stack.callback(self.server.kill)
            self.server.start()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _start_cluster(self) -> None:
        Path(tempfile.gettempdir(), "ray").mkdir(exist_ok=True)  # Ray notes the address there, but makes no folder
        with environment(WITHOUT_DASHBOARD):
            self.cluster = Cluster(
                initialize_head=True,
                head_node_args={"num_cpus": 1, "include_dashboard": False, "temp_dir": self._temporary},
            )
        self.add_node()

    def _stop_cluster(self) -> None:
        if self.cluster is not None:
            address = self.cluster.address
            self.cluster.shutdown()
            note = Path(tempfile.gettempdir(), "ray", "ray_current_cluster")  # `ray.init()` would look for this one
            if note.is_file() and note.read_text().strip() == address:
                note.unlink()

    def lose_head(self) -> None:
        """SIGKILL to everything of the cluster's nodes, the head's too; then another cluster, at another address."""
        for node in (self.cluster.head_node, *self.cluster.worker_nodes):
            node.kill_all_processes(check_alive=False, allow_graceful=False, wait=True)
        self.cluster.shutdown()
        self._start_cluster()

    def add_node(self) -> None:
        self.node = self.cluster.add_node(num_cpus=2, labels=dict(SPOT))

    def kill_node(self) -> None:
        """SIGKILL to the raylet; its workers go with it."""
        self.cluster.remove_node(self.node, allow_graceful=False)

    def raylet(self) -> psutil.Process:
        """Of the node that may be lost. Raises psutil.NoSuchProcess: there is none at the moment."""
        return psutil.Process(self.node.all_processes["raylet"][0].process.pid)

    def workers(self) -> Iterator[tuple[str, psutil.Process]]:
        """(title, process) of every worker process of Ray."""
        for node in (self.cluster.head_node, *self.cluster.worker_nodes):
            for raylet in node.all_processes.get("raylet", ()):
                with contextlib.suppress(psutil.Error):
                    for process in psutil.Process(raylet.process.pid).children(recursive=True):
                        with contextlib.suppress(psutil.Error):
                            title = " ".join(process.cmdline())
                            if title.startswith("ray::") and process.status() != psutil.STATUS_ZOMBIE:
                                yield title, process

    def titled(self, title: str) -> list[psutil.Process]:
        return [process for found, process in self.workers() if found.startswith(title)]

    def marked(self) -> list[psutil.Process]:
        """Every live process of this world but the caller's own, whoever its parent is by now."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                ours = process.pid != os.getpid() and process.environ().get(MARK) == self.mark
                if ours and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def start_job(self, name: str, overrides: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
        """`raydistill NAME`, joined to the cluster; appends what it says to `log`."""
        environment = os.environ | {"RAY_ADDRESS": self.cluster.address}
        with log.open("a") as output:
            return subprocess.Popen(
                [sys.executable, "-m", "raydistill.commands", name, *overrides],
                stdout=output,
                stderr=output,
                env=environment,
            )
