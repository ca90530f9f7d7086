"""Configurations of model folders from anywhere: whatever they hold becomes one line before anything starts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from model_folders import (
    INDEX,
    SCHEDULER,
    TEXT,
    UNET,
    VAE,
    change,
    lose,
    refused,
    said,
    sd15_copy,
    used,
)

from raydistill.shapes import WEIGHTS
from raydistill.spaces import load_space
from raydistill.spaces.check import check_folder


@pytest.fixture
def folder(tmp_path) -> Path:
    return sd15_copy(tmp_path / "model")


# -- one wrong value ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        (INDEX, "_class_name", ["StableDiffusionPipeline"]),
        (INDEX, "_class_name", 5),
        (INDEX, "_class_name", None),
        (INDEX, "text_encoder", []),
        (INDEX, "tokenizer", ["transformers"]),
        (INDEX, "text_encoder", ["transformers", None]),
        (INDEX, "text_encoder", [[], {}]),
        (INDEX, "text_encoder", ["os", "system"]),
        (INDEX, "tokenizer", ["antigravity", "fly"]),
        (INDEX, "tokenizer", ["transformers", "AutoTokenizer"]),
        (INDEX, "text_encoder", ["transformers", "CLIPTokenizer"]),
        (VAE, "_class_name", {"a": 1}),
        (VAE, "_class_name", "StableDiffusionPipeline"),
        (VAE, "_class_name", "DDIMScheduler"),
        (SCHEDULER, "_class_name", "AutoencoderKL"),
        (VAE, "scaling_factor", "0.18215"),
        (VAE, "scaling_factor", None),
        (VAE, "scaling_factor", float("nan")),
        (VAE, "scaling_factor", 0),
        (VAE, "shift_factor", [0.1]),
        (VAE, "block_out_channels", 64),
        (VAE, "block_out_channels", []),
        (VAE, "block_out_channels", ["64", "64", "64"]),
        (VAE, "down_block_types", "DownEncoderBlock2D"),
        (VAE, "layers_per_block", 10**9),
        (VAE, "latent_channels", 10**12),
        (UNET, "in_channels", "4"),
        (UNET, "sample_size", None),
        (UNET, "sample_size", [8, 16]),
        (UNET, "sample_size", []),
        (UNET, "sample_size", True),
        (UNET, "sample_size", 10**9),
        (UNET, "sample_size", 8.5),
        (UNET, "block_out_channels", 32),
        (UNET, "transformer_layers_per_block", 10**6),
        (UNET, "cross_attention_dim", "wide"),
        (UNET, "norm_eps", {"a": []}),
        (SCHEDULER, "num_train_timesteps", 10**12),
        (SCHEDULER, "num_train_timesteps", 1e12),
        (SCHEDULER, "num_train_timesteps", "1000"),
        (SCHEDULER, "num_train_timesteps", 0),
        (SCHEDULER, "beta_schedule", "my_schedule"),
        (SCHEDULER, "beta_start", "small"),
        (SCHEDULER, "trained_betas", ["a", "b"]),
        (SCHEDULER, "trained_betas", 5),
        (SCHEDULER, "prediction_type", 7),
        (SCHEDULER, "timestep_spacing", "elsewhere"),
        ("tokenizer/tokenizer_config.json", "model_max_length", "long"),
        ("tokenizer/tokenizer_config.json", "model_max_length", -1),
        (TEXT, "num_hidden_layers", 10**9),
        (TEXT, "hidden_size", "wide"),
    ],
)
def test_a_wrong_value_is_one_line_that_names_file_and_key(folder, file, key, value):
    change(folder / file, **{key: value})
    line = refused(folder)
    assert str(folder / file) in line
    assert key in line


@pytest.mark.parametrize("file", [INDEX, VAE, UNET, SCHEDULER, TEXT, "tokenizer/tokenizer_config.json"])
@pytest.mark.parametrize(
    "content",
    ["", "[1]", "5", "null", '{"a": ', "[" * 100_000, '{"a":' * 100_000, "\ud800", b"\xff\xfe\x00", b"\x00" * 64],
    ids=["empty", "list", "number", "null", "cut", "lists", "objects", "surrogate", "utf16", "zeros"],
)
def test_a_damaged_configuration_is_one_line_that_names_it(folder, file, content):
    data = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
    (folder / file).write_bytes(data)
    assert str(folder / file) in refused(folder)


@pytest.mark.parametrize(("key", "depth"), [("norm_eps", 20), ("dropout", 900)])
def test_a_value_that_is_nested_deeply_is_named(folder, key, depth):
    file = folder / UNET
    file.write_text(file.read_text().rstrip().rstrip("}") + f', "{key}": ' + "[" * depth + "]" * depth + "}")
    assert key in refused(folder)


# -- schedulers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3, 999, 1001])
def test_betas_of_another_number_than_the_steps_are_refused(folder, count):
    change(folder / SCHEDULER, trained_betas=[0.01] * 1000)
    check_folder(load_space(folder))
    change(folder / SCHEDULER, trained_betas=[0.01] * count)
    expected = f"{folder / SCHEDULER}: trained_betas holds {count} numbers, but num_train_timesteps is 1000"
    assert refused(folder) == said(lambda: load_space(folder).path) == expected


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"])
def test_a_scheduler_that_takes_no_betas_is_refused_where_its_file_has_some(folder, name):
    change(folder / SCHEDULER, _class_name=name)
    assert refused(folder).startswith(f"{folder / SCHEDULER}: {name} has no beta_schedule")


# -- what diffusers takes -----------------------------------------------------------------------------------


def test_a_vae_without_a_scaling_factor_has_its_classes(folder):
    lose(folder / VAE, "scaling_factor")
    space = load_space(folder)
    check_folder(space)
    assert space.scaling == (0.0, 0.18215)
    assert space.scaling[1] == space.load_vae().config.scaling_factor


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


@pytest.mark.parametrize("file", [UNET, VAE, SCHEDULER])
def test_every_key_that_a_file_leaves_out_is_read_as_diffusers_reads_it(folder, file):
    part = file.split("/")[0]
    for key in json.loads((folder / file).read_text()):
        shutil.copy(WEIGHTS / "sd15" / file, folder / file)
        lose(folder / file, key)
        if key == "_class_name":
            continue
        space = load_space(folder)
        config = space.part_config(part)
        read = getattr(diffusers, config["_class_name"])._dict_from_json_file(folder / file)
        try:
            theirs = getattr(diffusers, config["_class_name"]).from_config(read).config
        except (ValueError, TypeError, IndexError):  # other keys are made for a value that is not the class's own
            continue
        assert {name: _plain(value) for name, value in config.items() if name in theirs} == {
            name: _plain(theirs[name]) for name in config if name in theirs
        }, key


def test_a_square_may_be_written_as_two_sides(folder):
    side = json.loads((folder / UNET).read_text())["sample_size"]
    change(folder / UNET, sample_size=[side, side])
    space = load_space(folder)
    check_folder(space)
    assert space.latent_shape == load_space(WEIGHTS / "sd15").latent_shape


@pytest.mark.parametrize("how", ["no length", "no file", "more than there are positions"])
def test_a_tokenizer_reads_what_its_encoder_has_positions_for(folder, how):
    file = folder / "tokenizer" / "tokenizer_config.json"
    if how == "no file":
        lose(file, "model_max_length")
    elif how == "no length":
        change(file, model_max_length=10**30)
    else:
        change(file, model_max_length=512)
    prompts = ["a small red circle at the left on a white background " * 20]
    space, plain = load_space(folder), load_space(WEIGHTS / "sd15")
    check_folder(space)
    assert space.text_lengths == plain.text_lengths
    found, expected = (s.encode_prompts(s.load_text(), prompts)["prompt_embeds"] for s in (space, plain))
    assert torch.equal(found, expected)


# -- anything else ------------------------------------------------------------------------------------------

VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=8),
    st.lists(st.one_of(st.none(), st.integers(-3, 2**40), st.text(max_size=4)), max_size=5),
    st.dictionaries(st.text(max_size=4), st.integers(), max_size=2),
)


@pytest.mark.full
@pytest.mark.timeout(1800)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from([INDEX, VAE, UNET, SCHEDULER, TEXT, "tokenizer/tokenizer_config.json"]), st.data())
@example(VAE, None)
def test_any_value_of_any_key_passes_or_is_one_line(folder, file, data):
    original = WEIGHTS / "sd15" / file
    content = json.loads(original.read_text())
    if data is not None:
        content[data.draw(st.sampled_from(sorted(content)))] = data.draw(VALUES)
    (folder / file).write_text(json.dumps(content))
    try:
        line = said(lambda: used(folder))  # what passes can be loaded
    finally:
        shutil.copy(original, folder / file)
    assert not line or str(folder) in line
