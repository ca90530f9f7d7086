"""Conditioning columns: the pipelines' own numbers, whatever else is in the batch."""

from __future__ import annotations

import threading

import diffusers
import numpy as np
import pytest
import torch

from raydistill.data import encode
from raydistill.data.encode import PromptEncoder, TextEncoder, conditioning
from raydistill.data.stream import Early
from raydistill.spaces import load_space
from raydistill.spaces.meta import open_space
from raydistill.spaces.text_lengths import are_cut

PROMPTS = ["a red circle", "a blue square on a green background", "", "two circles", "a red circle"]


def batch_of(prompts):
    return {"prompt": np.array(prompts, dtype=object), "sample_id": np.arange(len(prompts))}


@pytest.fixture(scope="module")
def encoder(sd_folder, flux_folder):
    return PromptEncoder({"student": str(sd_folder), "teacher": str(flux_folder)}, chunk=4)


def test_columns_are_what_the_diffusers_pipelines_encode(encoder, sd_folder, flux_folder):
    batch = encoder(batch_of(PROMPTS))
    assert set(batch) == {
        "prompt",
        "sample_id",
        "cut",
        "student.prompt_embeds",
        "teacher.prompt_embeds",
        "teacher.pooled_prompt_embeds",
    }
    student = diffusers.StableDiffusionPipeline.from_pretrained(sd_folder)
    expected = student.encode_prompt(PROMPTS, "cpu", 1, do_classifier_free_guidance=False)[0]
    torch.testing.assert_close(conditioning(batch, "student")["prompt_embeds"], expected)
    teacher = diffusers.FluxPipeline.from_pretrained(flux_folder)
    embeds, pooled, _ = teacher.encode_prompt(PROMPTS, None, max_sequence_length=20)
    torch.testing.assert_close(conditioning(batch, "teacher")["prompt_embeds"], embeds)
    torch.testing.assert_close(conditioning(batch, "teacher")["pooled_prompt_embeds"], pooled)


def test_a_prompt_is_encoded_bit_for_bit_alike_in_any_company(flux_folder):
    space = load_space(flux_folder)
    together = TextEncoder(space).encode(PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        alone = TextEncoder(space).encode([prompt])
        for name, value in together.items():
            assert torch.equal(value[row], alone[name][0]), (name, prompt)


def test_repeated_prompts_are_encoded_once(sd_folder, monkeypatch):
    text = TextEncoder(load_space(sd_folder), chunk=2)
    chunks = []
    encode_prompts = text.space.encode_prompts
    monkeypatch.setattr(text.space, "encode_prompts", lambda t, p: chunks.append(list(p)) or encode_prompts(t, p))
    first = text.encode(["a", "b", "a", "c"])
    assert chunks == [["a", "b"], ["c", ""]]
    again = text.encode(["c", "a"])
    assert len(chunks) == 2  # remembered
    assert torch.equal(again["prompt_embeds"], first["prompt_embeds"][[3, 0]])


def test_memory_of_prompts_is_bounded(sd_folder, monkeypatch):
    text = TextEncoder(load_space(sd_folder), chunk=2)
    row_bytes = text.encode(["a"])["prompt_embeds"].nbytes
    monkeypatch.setattr(encode, "CACHE_BYTES", 3 * row_bytes)
    for prompt in "abcdef":
        text.encode([prompt, "a"])
    assert set(text._rows) == {"e", "f", "a"}  # the least recently used went
    assert len(text.encode(list("abcdefgh"))["prompt_embeds"]) == 8


def test_bfloat16_travels_as_uint16_and_comes_back(sd_folder):
    batch = PromptEncoder({"student": str(sd_folder)}, dtype={"student": "bfloat16"})(batch_of(PROMPTS))
    assert batch["student.prompt_embeds"].dtype == np.uint16
    came_back = conditioning(batch, "student")["prompt_embeds"]
    expected = TextEncoder(load_space(sd_folder), torch.bfloat16).encode(PROMPTS)["prompt_embeds"]
    assert came_back.dtype == torch.bfloat16
    assert torch.equal(came_back, expected)


def test_read_only_columns_become_tensors_of_their_own(encoder, recwarn):
    batch = encoder(batch_of(PROMPTS))
    column = batch["student.prompt_embeds"]
    column.flags.writeable = False
    before = column.copy()
    conditioning(batch, "student")["prompt_embeds"].zero_()
    assert (column == before).all()
    assert not any("writable" in str(w.message) for w in recwarn)


def test_unknown_role_is_named(encoder):
    with pytest.raises(KeyError, match="no conditioning of 'judge'.*sample_id"):
        conditioning(batch_of(PROMPTS), "judge")


def test_no_prompts_is_an_error(sd_folder):
    with pytest.raises(ValueError, match="no prompts"):
        TextEncoder(load_space(sd_folder)).encode([])


def test_prompts_that_a_role_reads_only_in_part_are_marked(encoder):
    """The miniature tokenizers give every word a token, and both encoders read 20 with their marks."""
    fits, long = "red " * 17, "red " * 30
    assert encoder(batch_of([fits, long, "", "a"]))["cut"].tolist() == [False, True, False, False]


def test_the_word_that_an_encoder_was_trained_without_is_no_loss_at_the_end_and_any_other_is(encoder):
    read = "a small red circle at the left and a large blue square at the right on a white"  # 18 words and two marks
    whole = [read, f"{read} background", f"{read} BACKGROUND  ", f" {read}\tBackground\n"]
    lost = [f"{read} floor", f"{read} background background", f"{read} background.", f"a {read} background"]
    lost += [f"{read} backgrounds", f"{read} {read}", f"background {read}", "background " * 20]
    assert encoder(batch_of(whole))["cut"].tolist() == [False] * 4
    assert encoder(batch_of(lost))["cut"].tolist() == [True] * 8


def test_a_prompt_is_lost_only_where_no_encoder_of_its_pipeline_reads_it_whole():
    """SD 3.5: CLIP reads 77 tokens, T5 256."""

    class Text:
        def tokenizer(self, prompts, verbose):
            return {"input_ids": [prompt.split() for prompt in prompts]}

        tokenizer_2 = tokenizer_3 = tokenizer

    space = open_space("stabilityai/stable-diffusion-3.5-medium")
    assert sorted(space.text_lengths.values()) == [77, 77, 256]
    assert are_cut(space, Text(), ["a " * 77, "a " * 200, "a " * 256, "a " * 257]).tolist() == [
        False,
        False,
        False,
        True,
    ]


def test_the_first_batch_is_fetched_early_and_the_others_when_asked_for():
    asked = threading.Event()
    made = []

    def batches():
        for number in range(3):
            made.append(number)
            asked.set()
            yield {"sample_id": np.array([number])}

    early = Early(batches())
    assert asked.wait(30)
    assert [batch["sample_id"].item() for batch in early] == [0, 1, 2]
    assert made == [0, 1, 2]
    assert list(Early(iter(()))) == []


def test_an_early_stream_that_fails_says_so_when_it_is_asked():
    def batches():
        raise ZeroDivisionError
        yield

    early = Early(batches())
    with pytest.raises(ZeroDivisionError):
        next(early)
    early.close()
