"""A torch without CUDA that takes the device cuda:0 for one that is there. For processes of their own (`device_cells.py`).

load()              before torch is imported: the guard of pretended_cuda.cpp, built at first use
replace_functions() after everything is imported: what torch.cuda would ask a driver
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("pretended_cuda.cpp")
MEMORY = 80 << 30


def compiler() -> str | None:
    """The C++ compiler that torch.utils.cpp_extension would call; None where there is none."""
    return shutil.which(os.environ.get("CXX", "c++"))


def library() -> Path:
    """The built guard. It belongs to one torch, one Python and one source."""
    torch = Path(importlib.util.find_spec("torch").origin).parent / "version.py"
    facts = (torch.read_text(), sys.version, SOURCE.read_text())
    digest = hashlib.sha256("".join(facts).encode()).hexdigest()[:12]
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return cache / "raydistill-tests" / digest / "pretended_cuda.so"


def build() -> None:
    """Compile it where it is not there, in a process of its own: it would change this one's torch.

    Raises:
        RuntimeError: the compiler's words.
    """
    if library().is_file():
        return
    library().parent.mkdir(parents=True, exist_ok=True)
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{SOURCE}: cannot be built:\n{done.stdout}{done.stderr}")


def load() -> None:
    """Register the guard. torch looks its hooks up once, so it must not be imported yet."""
    if "torch" in sys.modules:
        raise RuntimeError("torch is imported already")
    libraries = Path(importlib.util.find_spec("torch").origin).parent / "lib"
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(libraries / name), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(library()), mode=ctypes.RTLD_GLOBAL)


class Stream:
    """Of the pretended device: everything on it is done already; who waits for it is written down."""

    waited: Callable[[str], None] = staticmethod(lambda what: None)
    cuda_stream = stream_id = 0

    def __init__(self, *args: Any, **settings: Any) -> None:
        import torch

        self.device = torch.device("cuda:0")

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *error: object) -> None: ...

    def wait_stream(self, other: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        return event or Event()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        Stream.waited("synchronize")


class Event:
    """Of a `Stream`."""

    def __init__(self, *args: Any, **settings: Any) -> None: ...

    def record(self, stream: Any = None) -> None: ...

    def wait(self, stream: Any = None) -> None: ...

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        Stream.waited("synchronize")

    def elapsed_time(self, other: Any) -> float:
        return 1.0


class Properties:
    """Of an H100."""

    name, major, minor, total_memory, multi_processor_count = "pretended", 9, 0, MEMORY, 132
    max_threads_per_multi_processor, warp_size, regs_per_multiprocessor = 2048, 32, 65536
    gcnArchName, L2_cache_size, is_integrated = "", 50 << 20, False


def replace_functions() -> None:
    """What asks a driver gets an answer: eight H100, with all of their memory free."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    cuda = torch.cuda

    def answer(value: Any, *names: str) -> None:
        for name in names:
            setattr(cuda, name, lambda *args, **settings: value)

    answer(None, "_lazy_init", "init", "set_device", "empty_cache", "reset_peak_memory_stats", "ipc_collect")
    answer(None, "set_rng_state", "set_rng_state_all", "manual_seed", "manual_seed_all")
    answer(True, "is_available", "is_initialized", "is_bf16_supported")
    answer(False, "is_current_stream_capturing")
    answer(8, "device_count", "_device_count_nvml")
    answer(0, "current_device", "_exchange_device", "_maybe_exchange_device")
    answer(0, "memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved")
    answer({}, "memory_stats")
    answer((MEMORY, MEMORY), "mem_get_info")
    answer((Properties.major, Properties.minor), "get_device_capability")
    answer(Properties.name, "get_device_name")
    answer(Properties, "get_device_properties")
    cuda.get_rng_state = lambda *args: torch.get_rng_state()
    cuda.get_rng_state_all = lambda: [torch.get_rng_state()]
    cuda.current_stream = cuda.default_stream = lambda *args: Stream()
    cuda.synchronize = lambda device=None: Stream.waited("synchronize")
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.Stream, cuda.Event, cuda._initialized = Stream, Event, True
    cuda.nvtx.range_push = cuda.nvtx.range_pop = lambda *args: None
    torch.version.cuda = "13.0"
    FakeTensorMode.avoid_device_init = property(lambda self: True)  # of the library that is not there
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(…, device="cuda") goes through modes then
    torch.autograd.set_multithreading_enabled(False)  # the engine has no threads of this device


if __name__ == "__main__":
    from torch.utils.cpp_extension import load as compile_and_load

    compile_and_load(
        library().stem, [str(SOURCE)], extra_cflags=["-O0"], build_directory=library().parent, is_python_module=False
    )
