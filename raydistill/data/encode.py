"""Conditioning for trainers: text encoders in Ray Data actors, streamed in an order that can be resumed anywhere.

The cursor is a slot number. Slot s is one batch of all workers together, G rows: the positions s G … s G + G - 1 of the
prompt set's endless order (`PromptSet.at`), of which each worker reads its own (`own_rows`). Each position is read
exactly once by construction, whatever the number of restarts, and of workers after each; a resume encodes nothing that
was consumed before.

Columns of a batch of B rows: sample_id (int64, the position), prompt_id (int64), prompt (str), cut (bool: longer than a
role's text encoders read), and one "role.name" array [B, …] per conditioning tensor. numpy has no bfloat16: such tensors travel as uint16.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections import OrderedDict
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import diffusers
import numpy as np
import torch
import transformers

from raydistill.background import in_background
from raydistill.data.prompts import PromptSet
from raydistill.spaces import load_space
from raydistill.spaces.base import Conditioning, Space
from raydistill.spaces.text_lengths import are_cut

if TYPE_CHECKING:  # imported where it is used: encoding alone needs no Ray
    import ray
    import ray.data

CACHE_BYTES = 256 << 20  # encoded prompts each text encoder keeps
MAX_BLOCKS = 4096  # Ray Data spends about 0.6 ms per block before the first batch
CUT = "cut"
CHUNK = 16  # prompts per forward of a text encoder

Batch = dict[str, np.ndarray]


# -- encoding -------------------------------------------------------------------------------------------


class TextEncoder:
    """The text encoders of one pipeline folder.

    Prompts are encoded in chunks of one fixed size, filled up with empty prompts, so that a prompt's numbers do not
    depend on how many others came with it.

    Args:
        space: whose text encoders to load.
        dtype: of the text encoders and of what they return.
        device: where they run; the conditioning is always returned on the CPU.
        chunk: prompts per forward.
    """

    def __init__(
        self, space: Space, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", chunk: int = CHUNK
    ) -> None:
        self.space = space
        self.chunk = chunk
        self._text = space.load_text(dtype).to(device)
        self._rows: OrderedDict[str, Conditioning] = OrderedDict()  # least recently used first

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Conditioning tensors [B, …] on the CPU; a prompt that occurs twice is encoded once."""
        if not prompts:
            raise ValueError("no prompts to encode")
        rows = {prompt: self._rows[prompt] for prompt in dict.fromkeys(prompts) if prompt in self._rows}
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in rows]
        for start in range(0, len(missing), self.chunk):
            rows |= self._encode_chunk(missing[start : start + self.chunk])
        self._remember(rows)
        return {name: torch.stack([rows[prompt][name] for prompt in prompts]) for name in rows[prompts[0]]}

    def are_cut(self, prompts: Sequence[str]) -> np.ndarray:
        """Whether each prompt is longer than these text encoders read; bool [B]."""
        return are_cut(self.space, self._text, prompts)

    def encode_unconditional(self) -> Conditioning:
        """One row [1, …] of every conditioning tensor: what classifier-free guidance contrasts prompts with."""
        return self.space.unconditional(self.encode([""]))

    def _encode_chunk(self, prompts: list[str]) -> dict[str, Conditioning]:
        filled = prompts + [""] * (self.chunk - len(prompts))
        with _without_truncation_warnings():
            encoded = {name: value.cpu() for name, value in self.space.encode_prompts(self._text, filled).items()}
        # cloned: a view would keep the whole chunk in memory for as long as one of its rows is remembered
        return {prompt: {name: value[i].clone() for name, value in encoded.items()} for i, prompt in enumerate(prompts)}

    def _remember(self, rows: dict[str, Conditioning]) -> None:
        row_bytes = sum(value.nbytes for value in next(iter(rows.values())).values())
        for prompt, row in rows.items():
            self._rows[prompt] = row
            self._rows.move_to_end(prompt)
        while len(self._rows) * row_bytes > CACHE_BYTES:
            self._rows.popitem(last=False)


@contextlib.contextmanager
def _without_truncation_warnings() -> Iterator[None]:
    """Every chunk with a prompt beyond the text encoder's length would print all of it: thousands of lines a run."""
    loggers = [logging.getLogger("diffusers"), logging.getLogger("transformers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def encode_prompt_list(
    space: Space,
    prompts: Sequence[str],
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    chunk: int = CHUNK,
) -> Conditioning:
    """Conditioning [B, …] of a few prompts, on the CPU; loads the text encoders and drops them again.

    Bit for bit what `TextEncoder` and `PromptEncoder` of the same chunk return for these prompts.
    """
    return TextEncoder(space, dtype, device, chunk).encode(prompts)


def encode_unconditional(
    space: Space, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", chunk: int = CHUNK
) -> Conditioning:
    """As `TextEncoder.encode_unconditional`; loads the text encoders and drops them again."""
    return TextEncoder(space, dtype, device, chunk).encode_unconditional()


class PromptEncoder:
    """Adds the conditioning columns of every role to a batch; made for an actor pool of Ray Data.

    Args:
        folders: pipeline folder of each role, for example {"student": …, "teacher": …}.
        dtype: name of a torch dtype, for all roles or per role.
        device: where the text encoders run.
        chunk: prompts per forward.
        threads: CPU threads of this process; None leaves them as they are.
    """

    def __init__(
        self,
        folders: Mapping[str, str],
        dtype: str | Mapping[str, str] = "float32",
        device: str = "cpu",
        chunk: int = CHUNK,
        threads: int | None = None,
    ) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
        dtypes = {role: dtype if isinstance(dtype, str) else dtype[role] for role in folders}
        shared: dict[tuple[str, str], TextEncoder] = {}  # roles of one folder share its text encoders
        self.encoders: dict[str, TextEncoder] = {}
        for role, folder in folders.items():
            key = (str(folder), dtypes[role])
            if key not in shared:
                shared[key] = TextEncoder(load_space(folder), getattr(torch, dtypes[role]), device, chunk)
            self.encoders[role] = shared[key]

    def __call__(self, batch: Batch) -> Batch:
        """Batch with a "prompt" column -> the same with "role.name" columns."""
        prompts = [str(prompt) for prompt in batch["prompt"]]
        columns = dict(batch) | {CUT: np.zeros(len(prompts), dtype=bool)}
        for role, encoder in self.encoders.items():
            columns[CUT] |= encoder.are_cut(prompts)
            for name, value in encoder.encode(prompts).items():
                columns[f"{role}.{name}"] = _to_numpy(value)
        return columns


def _to_numpy(value: torch.Tensor) -> np.ndarray:
    return (value.view(torch.uint16) if value.dtype == torch.bfloat16 else value).numpy()


def _to_torch(column: np.ndarray) -> torch.Tensor:
    # what Ray hands out lies read-only in the object store, and torch has no read-only tensors
    value = torch.from_numpy(column if column.flags.writeable else column.copy())
    return value.view(torch.bfloat16) if value.dtype == torch.uint16 else value


def conditioning(batch: Mapping[str, Any], role: str) -> Conditioning:
    """The conditioning tensors of one role, by the names its Space gave them.

    Raises:
        KeyError: the batch has no columns of this role.
    """
    found = {
        name.removeprefix(f"{role}."): _to_torch(column)
        for name, column in batch.items()
        if name.startswith(f"{role}.")
    }
    if not found:
        raise KeyError(f"no conditioning of {role!r} in the batch; its columns are {', '.join(batch)}")
    return found


# -- streaming ------------------------------------------------------------------------------------------


def own_rows(rank: int, world: int, parts: int, part_size: int) -> range:
    """Rows of every slot that worker `rank` of `world` reads: consecutive parts out of `parts`, as evenly as it goes."""
    return range(rank * parts // world * part_size, (rank + 1) * parts // world * part_size)


def slot_positions(slot: int, rows: range, slot_size: int) -> np.ndarray:
    """Positions [B] of a slot's `rows`, int64."""
    return np.arange(rows.start, rows.stop, dtype=np.int64) + slot * slot_size


@functools.lru_cache(maxsize=2)
def _fetch(prompts: ray.ObjectRef) -> PromptSet:
    """The prompt set, whose columns stay where they lie in the object store of this node."""
    import ray

    return ray.get(prompts)


def _rows_of_slots(
    slots: Batch, prompts: ray.ObjectRef, seed: int, rows: range, slot_size: int
) -> dict[str, np.ndarray]:
    """Slot numbers -> sample_id, prompt_id and prompt of their rows."""
    positions = np.concatenate([slot_positions(slot, rows, slot_size) for slot in slots["slot"].tolist()])
    ids, texts = _fetch(prompts).at(seed, positions)
    return {"sample_id": positions, "prompt_id": ids, "prompt": np.array(texts, dtype=object)}


def conditioned_batches(
    prompts: PromptSet,
    folders: Mapping[str, str],
    *,
    seed: int,
    first: int,
    stop: int,
    rows: range,
    slot_size: int,
    dtype: str | Mapping[str, str] = "float32",
    chunk: int = CHUNK,
    encoders: int = 1,
    cpus_per_encoder: float = 0.1,
    gpus_per_encoder: float = 0.0,
    threads: int = 1,
    node_labels: Mapping[str, str] | None = None,
    prefetch: int = 2,
    in_flight_bytes: int = 256 << 20,
) -> Generator[Batch]:
    """Batches of the slots first … stop - 1 for one worker, in order; see the top of this file for the columns.

    Call it inside the worker that consumes the batches; closing the generator ends the encoders.

    Args:
        prompts: the prompt set; stored once in the object store.
        folders, dtype, chunk, threads: see `PromptEncoder`. Folders must exist on every node.
        seed: of the order of prompts.
        first, stop: slots to read; a resume starts at the first slot that was not consumed.
        rows: of each slot, those of this worker: B of them.
        slot_size: rows G of a slot, of all workers together.
        encoders: actors of this worker that encode.
        cpus_per_encoder, gpus_per_encoder: Ray resources of each; with a GPU share they encode on "cuda".
        node_labels: of the nodes that may hold them; None: any.
        prefetch: batches fetched ahead into this process.
        in_flight_bytes: object store memory within which the encoders run ahead.

    Raises:
        ValueError: a number is out of range.
    """
    batch_size = len(rows)
    if not 0 <= rows.start < rows.stop <= slot_size or rows.step != 1:
        raise ValueError(f"rows must lie within 0 … {slot_size} and be at least one, not {rows}")
    if not 0 <= first <= stop:
        raise ValueError(f"need 0 <= first <= stop, not {first} and {stop}")
    if first == stop:
        return
    import ray.data

    quiet_ray_data()
    rows_of_slots = functools.partial(
        _rows_of_slots, prompts=ray.put(prompts), seed=seed, rows=rows, slot_size=slot_size
    )
    encoder = {
        "folders": {role: str(folder) for role, folder in folders.items()},
        "dtype": dtype,
        "device": "cuda" if gpus_per_encoder else "cpu",
        "chunk": chunk,
        "threads": threads,
    }
    share = {"num_cpus": cpus_per_encoder, "num_gpus": gpus_per_encoder, "label_selector": node_labels or None}
    conditioned = (
        _slots(first, stop, in_flight_bytes)
        .map_batches(rows_of_slots, batch_size=None, batch_format="numpy", **share)  # fused into the encoders
        .map_batches(
            PromptEncoder,
            fn_constructor_kwargs=encoder,
            batch_size=batch_size,
            batch_format="numpy",
            compute=ray.data.ActorPoolStrategy(size=encoders, max_tasks_in_flight_per_actor=2),
            **share,
        )
    )
    batches = iter(conditioned.iter_batches(batch_size=batch_size, prefetch_batches=prefetch, batch_format="numpy"))
    try:
        yield from batches
    finally:
        batches.close()


class Early(Iterator[Batch]):
    """The batches of a generator, whose first is fetched from now on, in a thread, while the caller does other things."""

    def __init__(self, batches: Generator[Batch]) -> None:
        self._batches = batches
        self._first: Future[Batch | None] | None = in_background(lambda: next(batches, None))  # until it was asked for

    def __next__(self) -> Batch:
        """Raises StopIteration after the last one."""
        if self._first is None:
            return next(self._batches)
        first, self._first = self._first.result(), None
        if first is None:
            raise StopIteration
        return first

    def close(self) -> None:
        """End the generator; one whose first batch is still under way ends with the process, as nothing can stop it."""
        if self._first is None or self._first.done():
            self._batches.close()


def _slots(first: int, stop: int, in_flight_bytes: int) -> ray.data.Dataset:
    """Slot numbers, one a block where they are not too many, with settings for this data set alone."""
    import ray.data

    slots = ray.data.from_items(
        [{"slot": slot} for slot in range(first, stop)], override_num_blocks=min(stop - first, MAX_BLOCKS)
    )
    options = slots.context.execution_options
    options.preserve_order = True  # the order is part of the maths
    options.resource_limits = options.resource_limits.copy(object_store_memory=in_flight_bytes)
    slots.context.custom_execution_callback_classes = [_unhurried()]
    slots.context.issue_detectors_config.detectors = []
    slots.context.enable_progress_bars = False
    slots.context.print_on_execution_start = False
    return slots


IDLE_S = 0.02  # pause of the executor's loop while the trainer has batches waiting


@functools.cache
def _unhurried() -> type:
    """Callback that slows the executor's loop down while nobody waits for it.

    Ray Data's executor runs in a thread of the process that consumes, and its loop spins without a pause while the
    encoders are held back by a full buffer: it would take half of the trainer's time from under the interpreter's lock.
    """
    from ray.data._internal.execution.execution_callback import ExecutionCallback

    class Unhurried(ExecutionCallback):
        def on_execution_step(self, executor: Any) -> None:
            _, output = executor._output_node
            if len(output.output_queue) > 0:
                time.sleep(IDLE_S)

    return Unhurried


def quiet_ray_data() -> None:
    """Keep Ray Data's lines about every execution off the screen; its own log file still has them."""
    from ray.util.debug import log_once

    log_once("ray_data_progress_manager_disabled")  # or it warns that `enable_progress_bars` is off
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
            handler.setLevel(logging.WARNING)


TEXT_BATCH = 64  # prompts per forward of the text encoders


def encode_table(
    space: Space, prompts: Iterable[str], dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> tuple[Conditioning, dict[str, int]]:
    """Conditioning of the distinct prompts, one row each, on the CPU, and every prompt's row.

    Args:
        dtype: of the text encoders and of the table.
        device: where they run; they are dropped afterwards.
    """
    unique = list(dict.fromkeys(prompts))
    text = space.load_text(dtype).to(device)
    parts = []
    for start in range(0, len(unique), TEXT_BATCH):
        encoded = space.encode_prompts(text, unique[start : start + TEXT_BATCH])
        parts.append({name: value.cpu() for name, value in encoded.items()})
    return {k: torch.cat([p[k] for p in parts]) for k in parts[0]}, {p: i for i, p in enumerate(unique)}
