"""Conditioning of prompts: a table of a known set, or an encoder for prompts that keep coming.

The two round differently in the last bits: `PromptTable` encodes batches as they are, `TextEncoder` fills them up.

Columns of a batch of B rows: sample_id (int64, the position), prompt_id (int64), prompt (str), real (bool: the caption of a
teacher sample, which no student reads), cut (bool: longer than a role's text encoders read), and one "role.name" array [B, …] per conditioning tensor, of the roles student, teacher and, where there is a reward, reward. numpy has no bfloat16: such
tensors travel as uint16.
"""

from __future__ import annotations

import contextlib
import logging
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import diffusers
import numpy as np
import torch
import transformers

from raydistill.data.bits import to_numpy, to_torch
from raydistill.data.reward_texts import REWARD, RewardTexts
from raydistill.spaces import load_space
from raydistill.spaces.base import Conditioning, Space
from raydistill.spaces.text_lengths import are_cut

CACHE_BYTES = 256 << 20  # encoded prompts each text encoder keeps
CUT, REAL = "cut", "real"
CHUNK = 16  # prompts per forward of a `TextEncoder`
TABLE_BATCH = 64  # prompts per forward of a `PromptTable`

Batch = dict[str, np.ndarray]


# -- a known set ----------------------------------------------------------------------------------------


class PromptTable:
    """Conditioning of a known set of prompts, encoded once.

    The text encoders are dropped when all prompts are encoded. Conditioning always lies on the CPU.

    Args:
        space: whose text encoders to load; or what a reward knows prompts by.
        prompts: every prompt that may be asked for; batches are cut from the distinct ones in this order.
        dtype: of the text encoders and of the conditioning.
        device: where the text encoders run.
        batch_size: prompts per forward; the last forward may have fewer.
        max_bytes: a larger table is not made; each batch is then encoded when it is asked for.
        text: the space's text encoders, of this dtype and on this device; None: they are loaded.

    Attributes:
        row: row of each distinct prompt.
        columns: the table, [N, …] each; None beyond `max_bytes`.
    """

    def __init__(
        self,
        space: Space | RewardTexts,
        prompts: Iterable[str],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        *,
        batch_size: int = TABLE_BATCH,
        max_bytes: int | None = None,
        text: Any = None,
    ) -> None:
        distinct = list(dict.fromkeys(prompts))
        self.row = {prompt: row for row, prompt in enumerate(distinct)}
        self.columns: Conditioning | None = None
        self._space, self._text = space, space.load_text(dtype).to(device) if text is None else text
        chunk = self._encode(distinct[:batch_size])
        row_bytes = sum(value[0].nbytes for value in chunk.values())
        if max_bytes is not None and len(distinct) * row_bytes > max_bytes:
            return
        self.columns = {name: value.new_empty(len(distinct), *value.shape[1:]) for name, value in chunk.items()}
        for start in range(0, len(distinct), batch_size):
            chunk = self._encode(distinct[start : start + batch_size]) if start else chunk
            for name, value in chunk.items():
                self.columns[name][start : start + batch_size] = value
        self._text = None

    def _encode(self, prompts: Sequence[str]) -> Conditioning:
        return {name: value.cpu() for name, value in self._space.encode_prompts(self._text, prompts).items()}

    def rows(self, prompts: Sequence[str]) -> torch.Tensor:
        """Row [B] of each prompt, int64. Raises KeyError for one that is not of the set."""
        return torch.tensor([self.row[prompt] for prompt in prompts])

    def __call__(self, prompts: Sequence[str]) -> Conditioning:
        """Conditioning [B, …] of some of the prompts."""
        if self.columns is None:
            return self._encode(prompts)
        rows = self.rows(prompts)
        return {name: value[rows] for name, value in self.columns.items()}


# -- prompts that keep coming ---------------------------------------------------------------------------


class TextEncoder:
    """The text encoders of one pipeline folder.

    Prompts are encoded in chunks of one fixed size, filled up with empty prompts, so that a prompt's numbers do not
    depend on how many others came with it.

    Args:
        space, dtype, device: as of `PromptTable`.
        chunk: prompts per forward.
    """

    def __init__(
        self,
        space: Space | RewardTexts,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        chunk: int = CHUNK,
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


class PromptEncoder:
    """Adds the conditioning columns of every role to a batch; made for an actor pool of Ray Data.

    Args:
        folders: pipeline folder of each role, for example {"student": …, "teacher": …}.
        dtype: name of a torch dtype, for all roles or per role.
        device, chunk: as of `TextEncoder`.
        threads: CPU threads of this process; None leaves them as they are.
        reward: what knows prompts for the student's reward, in float32; None: there is none.
    """

    def __init__(
        self,
        folders: Mapping[str, str],
        dtype: str | Mapping[str, str] = "float32",
        device: str = "cpu",
        chunk: int = CHUNK,
        threads: int | None = None,
        *,
        reward: RewardTexts | None = None,
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
        self.reward = None if reward is None else TextEncoder(reward, torch.float32, device, chunk)

    def __call__(self, batch: Batch) -> Batch:
        """Batch with a "prompt" column -> the same with "role.name" columns.

        Of a teacher sample the student's are those of the empty prompt: it costs nothing, and rows stay alike.
        """
        prompts = [str(prompt) for prompt in batch["prompt"]]
        columns = dict(batch) | {CUT: np.zeros(len(prompts), dtype=bool)}
        reals = batch.get(REAL, columns[CUT])
        for role, encoder in self.encoders.items():
            read = (
                prompts
                if role == "teacher"
                else ["" if real else text for text, real in zip(prompts, reals, strict=True)]
            )
            columns[CUT] |= encoder.are_cut(read)
            for name, value in encoder.encode(read).items():
                columns[f"{role}.{name}"] = to_numpy(value)
        if self.reward is not None:
            of_student = ["" if real else text for text, real in zip(prompts, reals, strict=True)]
            for name, value in self.reward.encode(of_student).items():
                columns[f"{REWARD}.{name}"] = to_numpy(value)
        return columns


def conditioning(batch: Mapping[str, Any], role: str) -> Conditioning:
    """The conditioning tensors of one role, by the names its Space gave them.

    Raises:
        KeyError: the batch has no columns of this role.
    """
    found = {
        name.removeprefix(f"{role}."): to_torch(column) for name, column in batch.items() if name.startswith(f"{role}.")
    }
    if not found:
        raise KeyError(f"no conditioning of {role!r} in the batch; its columns are {', '.join(batch)}")
    return found
