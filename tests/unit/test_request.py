"""What travels to a teacher: refused unless finite, cut and converted without changing a bit, never the shared memory itself."""

from __future__ import annotations

import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from raydistill.config.networks import TeacherServiceConfig

from raydistill.benchmark.idle import IdleRank
from raydistill.teachers.client import TeacherClient
from raydistill.teachers.request import (
    GenerateRequest,
    ScoreRequest,
    TeacherError,
    all_finite,
    check_payload,
    rows_from_wire,
    to_wire,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_one_bad_element_anywhere_is_found(dtype, bad):
    value = torch.randn(3, 1001, dtype=torch.float32).to(dtype)
    assert all_finite(value)
    for place in (0, 1500, 3002):
        spoiled = value.clone()
        spoiled.view(-1)[place] = bad
        assert not all_finite(spoiled)
    assert all_finite(torch.full((4,), torch.finfo(dtype).max, dtype=dtype))
    assert all_finite(torch.empty(2, 0, dtype=dtype))
    assert not all_finite(torch.tensor([float("inf"), 1.0, float("-inf")], dtype=dtype))
    limits = torch.finfo(dtype)
    assert all_finite(torch.tensor([limits.min, -0.0, limits.max, limits.tiny], dtype=dtype))
    assert not all_finite(torch.full((4, 3), bad, dtype=dtype).t()), "not contiguous"


def test_a_request_without_guidance_needs_no_empty_prompt_and_a_wrong_scale_is_refused():
    def payload(scale):
        x_t, conditioning = torch.zeros(2, 1, 4, 4), {"prompt_embeds": torch.zeros(2, 3)}
        return ScoreRequest(x_t, torch.zeros(2), conditioning, None, scale).payload()

    assert [payload(scale)["unconditional"] for scale in (0, 0.5, 1)] == [None] * 3
    with pytest.raises(TeacherError, match="guidance_scale 1.5 needs unconditional rows"):
        payload(1.5)
    for scale in (-1, 101, float("nan")):
        with pytest.raises(TeacherError, match="must lie between 0 and 100|must be a finite number"):
            payload(scale)


def test_looking_for_infinity_starts_no_threads():
    """A thread of OpenMP would spin on for milliseconds, where a teacher on this machine needs the core."""
    value = torch.zeros(1 << 24)

    def started(work):  # threads that it started
        before = set(os.listdir("/proc/self/task"))
        work()
        return len(set(os.listdir("/proc/self/task")) - before)

    def both():
        torch.set_num_threads(2)
        found = started(lambda: all_finite(value)), torch.get_num_threads()
        return *found, started(value.sum)

    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(1) as new:  # a Python thread that has none of OpenMP yet
            assert new.submit(both).result() == (0, 2, 1)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("rows", [[0, 1, 2], [3, 4], [4, 4, 4], [2, 3, 4, 4], [0]])
def test_rows_are_those_of_the_tensor_in_memory_of_their_own(kind, rows):
    """As Ray hands them out: read-only. In order and filled up with repeats, in their own dtype and in another."""
    tensor = torch.randn(5, 3, 7).mul(100).to(kind)
    wire = to_wire(tensor.clone())
    (wire[1] if isinstance(wire, tuple) else wire).flags.writeable = False
    for dtype in (None, torch.bfloat16, torch.float32):
        expected = tensor[rows] if dtype is None or not kind.is_floating_point else tensor[rows].to(dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = rows_from_wire(wire, np.array(rows), dtype)
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
        found.zero_()  # a network may work in place
        assert torch.equal(rows_from_wire(wire, np.array(rows), dtype), expected)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_rank_copies_slice_by_slice_into_the_same_memory_and_answers_with_every_row(world):
    payload = ScoreRequest(
        torch.randn(10, 4, 3, 3), torch.rand(10), {"a": torch.randn(10, 5)}, {"a": torch.randn(1, 5)}, 2.0
    ).payload()
    places, answers = set(), []
    for number in range(world):
        rank = IdleRank(number, world)
        rank.device, rank.dtype, rank.slice_size = torch.device("cpu"), torch.bfloat16, 4
        rank.space = SimpleNamespace(latent_shape=(4, 3, 3), folder="none")

        def forward(payload, rows, rank=rank):
            x_t = rank._load("latents", payload["latents"], rows)
            conditioning, unconditional = rank._conditioning(payload, rows)
            for tensor in (x_t, conditioning["a"], unconditional["a"]):
                assert tensor.untyped_storage().nbytes() <= 4 * tensor[0].nbytes
                places.add((rank.rank, tensor.data_ptr()))
            return x_t

        answers += [rank._slices(payload, forward).copy() for _ in range(2)][1:]
    assert len(places) == 3 * world
    assert np.array_equal(np.concatenate(answers), payload["latents"])


# -- wrong requests ---------------------------------------------------------------------------------------


def scores_of(**wrong) -> ScoreRequest:
    right = {
        "x_t": torch.zeros(3, 4, 2, 2), "t": torch.full((3,), 0.5), "conditioning": {"a": torch.zeros(3, 5)},
        "unconditional": {"a": torch.zeros(1, 5)}, "guidance_scale": 2.0,
    }  # fmt: skip
    return ScoreRequest(**right | wrong)


NOT_NUMBERS = [None, "text", b"text", [1.0, 2.0]]


@pytest.mark.parametrize("wrong", NOT_NUMBERS, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("field", ["x_t", "t", "conditioning", "unconditional", "guidance_scale"])
def test_a_field_that_is_no_tensor_or_number_is_named_at_the_client(field, wrong):
    with pytest.raises(TeacherError, match=rf"^{field} |needs {field} rows"):
        scores_of(**{field: wrong}).payload()
    if field.endswith("conditional") or field == "conditioning":
        with pytest.raises(TeacherError, match=rf"^{field}\['a'\]"):
            scores_of(**{field: {"a": wrong}}).payload()


@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:The PyTorch API of nested")
def test_a_tensor_that_cannot_travel_is_named_with_its_kind():
    dense = torch.zeros(3, 5)
    wrong = [dense.to(torch.float8_e4m3fn), dense.to("meta"), dense.to_sparse(), dense.to_sparse_csr(), dense.to_mkldnn(),
             torch.nested.nested_tensor([dense, dense])]  # fmt: skip
    for value in wrong:
        with pytest.raises(TeacherError, match=rf"^conditioning\['a'\] must be a dense tensor .*{value.dtype}, .* on "):
            scores_of(conditioning={"a": value}).payload()
    for name in ("x_t", "t"):
        with pytest.raises(TeacherError, match=f"^{name} must be a dense tensor .*on meta$"):
            scores_of(**{name: dense.to("meta")}).payload()


@pytest.mark.parametrize("shape", [(0, 4, 2, 2), (3, 0, 2, 2), (3, 4, 0, 2), (3, 4, 2, 0), (3, 4, 2)])
def test_latents_without_samples_channels_or_pixels_are_refused(shape):
    with pytest.raises(TeacherError, match=r"^x_t has shape .*not \[B, C, H, W\]"):
        scores_of(x_t=torch.zeros(shape)).payload()


@pytest.mark.parametrize(
    "wrong", [10**400, -(10**400), 10**5000, Fraction(10**400)], ids=["e400", "-e400", "e5000", "fraction"]
)
def test_a_number_that_no_float_holds_is_refused_in_a_short_line(wrong):
    request = scores_of()
    with pytest.raises(TeacherError, match="^steps must be a finite number") as steps:
        GenerateRequest(request.x_t, request.conditioning, request.unconditional, wrong, 2.0).payload()
    with pytest.raises(TeacherError, match="^guidance_scale must be a finite number") as scale:
        scores_of(guidance_scale=wrong).payload()
    with pytest.raises(TeacherError, match="^guidance_scale must be a finite number"):
        check_payload(scores_of().payload() | {"guidance_scale": wrong})
    assert max(len(str(steps.value)), len(str(scale.value))) < 200


@pytest.mark.parametrize("wrong", [*NOT_NUMBERS, 0, -1, 2.5, float("nan"), True, 10**9], ids=str)
def test_steps_that_are_no_number_of_steps_are_refused(wrong):
    request = scores_of()
    with pytest.raises(TeacherError, match="^steps must be"):
        GenerateRequest(request.x_t, request.conditioning, request.unconditional, wrong, 2.0).payload()


@pytest.mark.parametrize("wrong", [None, {}, GenerateRequest(None, {}, None, 1, 1.0)], ids=lambda v: type(v).__name__)
def test_a_client_refuses_what_is_no_request(wrong):
    client = TeacherClient("teacher", TeacherServiceConfig())
    with pytest.raises(TeacherError, match="must be a ScoreRequest"):
        client.submit(wrong)
    with pytest.raises(TeacherError, match="^x_t must be a tensor"):
        client.submit(scores_of(x_t=None))
    with pytest.raises(TeacherError, match="^noise must be a tensor"):
        client.generate(None, {}, None, 4, 1.0)
    assert client.asked == 0


@pytest.mark.parametrize("field", ["latents", "t", "conditioning", "unconditional", "guidance_scale"])
def test_ranks_check_every_field_of_what_arrives(field):
    right = scores_of().payload()
    check_payload(right)
    check_payload(scores_of(guidance_scale=1.0).payload())
    check_payload(scores_of(conditioning={"a": torch.zeros(3, 5, dtype=torch.bfloat16)}).payload())
    for wrong in (None, "text", 3 + 0j, {}, [], np.array(["a"] * 3), np.zeros(7), ("bfloat16", np.zeros(3))):
        with pytest.raises(TeacherError):
            check_payload(right | {field: wrong})
    with pytest.raises(TeacherError, match="a request has "):
        check_payload({name: value for name, value in right.items() if name != field})
    for wrong in (None, [], "text", {}, right | {"more": 1}, {1: 2}):
        with pytest.raises(TeacherError):
            check_payload(wrong)
