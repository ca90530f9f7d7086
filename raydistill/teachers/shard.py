"""One rank of a replica, as a Ray actor: with its part of the teacher (zero3.py), or with all of it (plain.py).

All ranks of a ZeRO-3 group must receive the same requests in the same order: a forward on one rank waits for the others.
Ranks with whole teachers are treated alike, so that a request has the same answer and the same errors from either kind.
A request is cut into slices of `teachers.slice` samples. Repeats of the last sample fill the last slice, and whole slices
for ranks that have none of their own. So every rank runs equally many forwards of one size. The bits of a sample then
depend on its request alone.

torch, diffusers and deepspeed are imported inside functions: in the rank's own process, after its environment is set.
"""

from __future__ import annotations

import os
import re
import time
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import ray

from raydistill.config.networks import TeacherServiceConfig
from raydistill.imports import left_out
from raydistill.teachers.request import (
    Memory,
    Payload,
    RankBroken,
    TeacherError,
    Wire,
    check_payload,
    rows_from_wire,
)

if TYPE_CHECKING:
    import torch

    from raydistill.teachers.plain import Whole
    from raydistill.teachers.zero3 import Partitioned

# What a library on the device says when it fails at work; what it refuses (a shape, a type) is the request's matter.
DEVICE_FAILURE = re.compile(
    r"(CUBLAS|CUDNN|CUSOLVER|CUSPARSE)_STATUS_(?!NOT_SUPPORTED|INVALID_VALUE|BAD_PARAM|ALLOC_FAILED|ARCH_MISMATCH)"
    r"|CUDA (driver )?error: (?!CU[A-Z]+_STATUS_)|NCCL (error|Error)|Triton Error \[CUDA\](?!: out of memory)"
)
Forward = Callable[[Payload, np.ndarray], "torch.Tensor"]  # (payload, rows) -> latents of these rows


class TeacherRank:
    """Rank `rank` of `world`. It answers pings while it computes."""

    def __init__(self, rank: int, world: int, replica: str = "", config: TeacherServiceConfig | None = None) -> None:
        """Args: replica: what logs call the group. config: with which `load` will be called; None: the defaults."""
        config = config or TeacherServiceConfig()
        self.rank, self.world, self.replica, self.memory = rank, world, replica, Memory()
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
        os.environ["LOCAL_RANK"] = "0"  # Ray shows each rank its own GPU only
        # DeepSpeed still calls it by its old name.
        warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.*", category=FutureWarning)
        # Imported here, all ranks import at the same time; in `load`, they would wait for rank 0 first. A rank runs one
        # network. Without text encoders and LoRAs, diffusers imports most of a second faster. Its pipeline classes, which
        # say what a batch of conditioning looks like, are missing then.
        makes_a_batch = config.compile or config.quantize != "none"
        with left_out(*(() if makes_a_batch else ("transformers", "peft"))):
            import diffusers.models.modeling_utils  # noqa: F401 (all networks import it)

            import raydistill.spaces

            if config.plain:
                import raydistill.teachers.plain  # noqa: F401
            else:
                import raydistill.teachers.zero3  # noqa: F401

        self.facts: dict[str, Any] = {"rank": rank, "pid": os.getpid(), "node": ray.util.get_node_ip_address()}

    def __repr__(self) -> str:
        """Ray writes it before every line of this process: `(TeacherRank teacher-mine/x1y2z3 0/2 pid=…)`."""
        return f"TeacherRank {self.replica} {self.rank}/{self.world}"

    def open_store(self) -> tuple[str, int]:
        """On rank 0: open the store where the group meets, on a free port, and return its address."""
        from torch.distributed import TCPStore

        host = ray.util.get_node_ip_address()
        self.store = TCPStore(host, 0, self.world, is_master=True, wait_for_workers=False)
        return host, self.store.port

    def load(self, model_folder: str, config: TeacherServiceConfig, address: tuple[str, int] | None) -> None:
        """Load the network, or join the group that meets at `address` and load this rank's part.

        Raises InputError, on every rank alike.
        """
        started = time.monotonic()
        # Imported here because they import torch.
        import torch

        from raydistill.device_memory import doing, naming_out_of_memory
        from raydistill.spaces import load_space

        torch.set_num_threads(config.threads_per_rank)
        self.device = torch.device("cuda:0" if os.environ["DS_ACCELERATOR"] == "cuda" else "cpu")
        self.dtype, self.slice_size = getattr(torch, config.dtype), config.counted_slice
        self.space = load_space(model_folder)
        self._role = f"teacher rank {self.rank} of {self.world} on node {self.facts['node']}"
        self._remedies = remedies(config)
        with naming_out_of_memory(self._role, self._remedies), doing("loading the teacher"):
            self.teacher = self._whole(config) if address is None else self._join(config, *address)
        self.facts |= self.teacher.facts() | {"load_s": time.monotonic() - started}

    def _whole(self, config: TeacherServiceConfig) -> Whole:
        from raydistill.teachers.plain import Whole  # it imports torch

        return Whole(self.space, config, self.device)

    def _join(self, config: TeacherServiceConfig, host: str, port: int) -> Partitioned:
        os.environ |= {"MASTER_ADDR": host, "MASTER_PORT": str(port)}
        from torch.distributed import TCPStore

        from raydistill.teachers import zero3  # DeepSpeed reads the environment when it is imported

        store = self.store if self.rank == 0 else TCPStore(host, port, self.world, is_master=False)
        zero3.init_process_group(self.rank, self.world, store, self.device)
        return zero3.Partitioned(self.space, config, self.device, self.rank, self.world)

    @ray.method(concurrency_group="health")
    def describe(self) -> dict[str, Any]:
        """rank, pid, node, numel (that this rank holds), full_numel (of the network), load_s; of a quantised
        network `quantize_cosine`. Also serves as the ping.
        """
        return self.facts

    def predict_x0(self, payload: Payload) -> np.ndarray:
        """x0 estimates of this rank's samples, [b, C, H, W] float32 (b may be 0). Raises TeacherError."""
        check_payload(payload)
        return self._slices(payload, self._predict_rows)

    def sample(self, payload: Payload) -> np.ndarray:
        """Multi-step samples of this rank's noise, [b, C, H, W] float32 (b may be 0). Raises TeacherError."""
        check_payload(payload)
        return self._slices(payload, self._sample_rows)

    def _slices(self, payload: Payload, forward: Forward) -> np.ndarray:
        """Run `forward` on each slice of this rank. Raises TeacherError, or RankBroken where the device has failed."""
        import torch

        from raydistill.device_memory import out_of_memory  # it imports torch

        batch, size = len(payload["latents"]), self.slice_size
        rounds = -(-batch // (size * self.world))
        first = self.rank * rounds * size
        own = max(0, min(rounds * size, batch - first))
        try:
            found, expected = payload["latents"].shape[1:], tuple(self.space.latent_shape)
            if found != expected:
                raise TeacherError(f"latents have shape {found} a sample; {self.space.folder} works on {expected}")
            # Used again for the next request: by then Ray has copied the answer.
            answer = self.memory.tensor("answer", (own, *payload["latents"].shape[1:]), torch.float32)
            with torch.no_grad():
                for start in range(first, first + rounds * size, size):
                    rows = np.minimum(np.arange(start, start + size), batch - 1)
                    wanted = answer[start - first : start - first + size]
                    wanted.copy_(forward(payload, rows)[: len(wanted)])
        except torch.OutOfMemoryError as error:
            at = f"a request of {batch} samples in slices of {size}"
            raise TeacherError(out_of_memory(error, self._role, self._remedies, at)) from None
        except Exception as error:
            if device_failed(error):
                raise RankBroken(f"{self.facts['node']}: {type(error).__name__}: {error}") from None
            text = str(error) if isinstance(error, TeacherError) else f"{type(error).__name__}: {error}"
            raise TeacherError(text) from None
        return answer.numpy()

    def recover(self) -> None:
        """After a forward failed on every rank: make ready for the next one.

        The coordinator calls this once all ranks have reported. A rank that fails must not call it: the others may still
        be inside a forward, and both sides would wait for each other.
        """
        self.teacher.recover()

    def _predict_rows(self, payload: Payload, rows: np.ndarray) -> torch.Tensor:
        x_t, t_B = (self._load(name, payload[name], rows) for name in ("latents", "t"))
        conditioning, unconditional = self._conditioning(payload, rows)
        guidance = payload["guidance_scale"], payload.get("guidance_rescale", 0.0)
        return self.space.predict_x0(self.teacher.network, x_t, t_B, conditioning, unconditional, *guidance)

    def _sample_rows(self, payload: Payload, rows: np.ndarray) -> torch.Tensor:
        noise = self._load("latents", payload["latents"], rows)
        conditioning, unconditional = self._conditioning(payload, rows)
        steps, guidance_scale = payload["steps"], payload["guidance_scale"]
        return self.space.sample(self.teacher.network, noise, conditioning, unconditional, steps, guidance_scale)

    def _conditioning(
        self, payload: Payload, rows: np.ndarray
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor] | None]:
        def load(field: str, rows: np.ndarray) -> dict[str, torch.Tensor]:
            return {
                name: self._load(f"{field}/{name}", wire, rows, self.dtype) for name, wire in payload[field].items()
            }

        guided = payload["unconditional"] is not None
        return load("conditioning", rows), load("unconditional", np.zeros(1, dtype=np.int64)) if guided else None

    def _load(self, name: str, wire: Wire, rows: np.ndarray, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Rows of one array, on the device. On the CPU, the next slice overwrites this memory."""
        return rows_from_wire(wire, rows, dtype, self.memory, name).to(self.device)


def device_failed(error: Exception) -> bool:
    """Whether a device, or the way to another rank's, has failed: every later call of this process would fail as well.

    torch has classes for CUDA's own errors and for NCCL's. Those of the libraries on top are plain RuntimeErrors.
    """
    import torch

    if isinstance(error, torch.AcceleratorError | torch.distributed.DistError):
        return True
    return isinstance(error, RuntimeError) and DEVICE_FAILURE.search(str(error)) is not None


def remedies(config: TeacherServiceConfig) -> list[str]:
    """Settings with which a rank needs less memory."""
    found = [f"teachers.slice={config.counted_slice // 2}"] if config.counted_slice > 1 else []
    if config.dtype == "float32":
        found.append("teachers.dtype=bfloat16")
    if config.plain and not any(config.of_whole.values()):
        found.append("teachers.backend=zero3 with more teachers.shards")
    return found if config.plain else [*found, f"teachers.shards={2 * config.shards}"]


def actor(rank: type[TeacherRank]) -> Any:
    """The Ray actor class of a class of rank."""
    return ray.remote(concurrency_groups={"health": 1}, max_restarts=0, max_task_retries=0)(rank)
