"""A full device in one line: role, part and remedy.

A CPU raises no torch.OutOfMemoryError, and no CUDA device is at hand: the error is a real one of torch's class, raised
where a network allocates.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ray.exceptions import RayTaskError

from raydistill.config.networks import TeacherServiceConfig
from raydistill.config.reading import load
from raydistill.device_memory import naming_out_of_memory
from raydistill.distillation.schedule import distillation_step
from raydistill.errors import OutOfMemory
from raydistill.teachers.replica import _is_the_requests_fault
from raydistill.teachers.request import Memory, RankBroken, TeacherError
from raydistill.teachers.shard import TeacherRank, remedies
from raydistill.workers.more_micro_batches import more_micro_batches
from raydistill.workers.ray_train import fatal_error, is_fatal, recording_fatal_errors
from raydistill.workers.remedies import bridge_remedies, trainer_remedies

SAID = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.64 GiB of which 1.00 GiB is free. "
    "If reserved but unallocated memory is large try setting PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"
)


def full(*_):
    raise torch.OutOfMemoryError(SAID)


@pytest.mark.parametrize(
    ("full_at", "part"),
    [("make", "the student's next batch"), ("fake_update", "the fake score's update"), ("student_update", "the student's update")],
)  # fmt: skip
def test_a_trainer_names_role_part_and_remedy_and_is_not_started_again(full_at, part, tmp_path):
    parts = {"make": lambda: [], "fake_update": lambda: None, "student_update": lambda *_: None}
    config = load(overrides=["distill.batch_size=6", "distill.micro_batches=2", "distill.workers=2"])
    distiller = SimpleNamespace(**parts | {full_at: full}, config=config, metrics={})
    with (
        pytest.raises(OutOfMemory) as error,
        recording_fatal_errors(tmp_path),
        naming_out_of_memory("trainer", trainer_remedies(config)),
    ):
        distillation_step(distiller, None, 1, overlap=False)
    assert str(error.value) == (
        f"trainer: out of device memory at {part}; set distill.micro_batches=3 or distill.gradient_checkpointing=true or "
        "fake_score.shard=true or student.shard=true or a smaller distill.batch_size ('raydistill plan' counts what fits). torch: CUDA out of "
        "memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.64 GiB of which 1.00 GiB is free."
    )
    assert is_fatal(error.value)
    assert fatal_error(tmp_path) == f"OutOfMemory: {error.value}"


def test_what_is_set_already_is_no_remedy():
    config = load(overrides=["distill.batch_size=4", "distill.micro_batches=4", "distill.gradient_checkpointing=true"])
    assert trainer_remedies(config) == ["a smaller distill.batch_size"]
    config = load(overrides=["bridge.batch_size=8", "bridge.micro_batches=2", "bridge.gradient_checkpointing=true"])
    assert bridge_remedies(config)[0] == "bridge.micro_batches=4"
    assert remedies(TeacherServiceConfig(slice=8, shards=2)) == [
        "teachers.slice=4", "teachers.dtype=bfloat16", "teachers.shards=4",
    ]  # fmt: skip
    whole = TeacherServiceConfig(slice=1, dtype="bfloat16", backend="plain")
    assert remedies(whole) == ["teachers.backend=zero3 with more teachers.shards"]


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["distill.batch_size=6"], 2),
        (["distill.batch_size=6", "distill.micro_batches=2"], 3),
        (
            ["distill.batch_size=6", "distill.micro_batches=2", "fake_score.batch_size=3"],
            6,
        ),  # which has no parts of two
        (["distill.batch_size=8", "distill.micro_batches=2", "bridge.trainable=true", "bridge.batch_size=12"], 4),
        (["distill.batch_size=8", "distill.micro_batches=4", "bridge.trainable=true", "bridge.batch_size=12"], None),
        (["distill.batch_size=4", "distill.micro_batches=4"], None),
    ],
)
def test_more_parts_divide_all_that_an_update_takes(overrides, parts):
    assert more_micro_batches(load(overrides=overrides)) == parts


@pytest.fixture
def rank():
    """A rank of a service, without its process."""
    rank = TeacherRank.__new__(TeacherRank)
    rank.rank, rank.world, rank.slice_size, rank.memory = 0, 1, 2, Memory()
    rank.facts, rank.space = {"node": "10.0.0.7"}, SimpleNamespace(latent_shape=(4, 8, 8), folder="none")
    rank._role, rank._remedies = "teacher rank 0 of 1 on node 10.0.0.7", ["teachers.slice=1"]
    return rank


def test_a_teacher_rank_names_its_node_and_request(rank):
    with pytest.raises(TeacherError) as error:
        rank._slices({"latents": np.zeros((3, 4, 8, 8), np.float32)}, full)
    assert str(error.value).startswith(
        "teacher rank 0 of 1 on node 10.0.0.7: out of device memory at a request of 3 samples in slices of 2; set "
        "teachers.slice=1 ('raydistill plan'"
    )


@pytest.mark.parametrize(
    "failure",
    [
        torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(handle, opa, opb)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
        RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
        torch.distributed.DistBackendError("NCCL error in: ncclRemoteError, remote process exited"),
    ],
    ids=["CUDA", "cuBLAS", "cuDNN", "Triton", "NCCL"],
)
def test_a_rank_whose_device_failed_says_that_it_was_not_the_request(rank, failure):
    def broken(*_):
        raise failure

    with pytest.raises(RankBroken) as raised:
        rank._slices({"latents": np.zeros((3, 4, 8, 8), np.float32)}, broken)
    assert str(raised.value) == f"10.0.0.7: {type(failure).__name__}: {failure}"

    def arrived(error):
        """As the coordinator gets it from Ray."""
        return RayTaskError("predict_x0", str(error), error).as_instanceof_cause()

    assert not _is_the_requests_fault([arrived(raised.value)])
    assert _is_the_requests_fault([arrived(TeacherError("of the request"))])


@pytest.mark.parametrize(
    "refusal",
    [
        "mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)",
        "CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasLtMatmul(ltHandle)`",
        "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    ],
)
def test_what_a_library_refuses_is_the_request_s_fault(rank, refusal):
    def refused(*_):
        raise RuntimeError(refusal)

    with pytest.raises(TeacherError, match="^RuntimeError: "):
        rank._slices({"latents": np.zeros((3, 4, 8, 8), np.float32)}, refused)
