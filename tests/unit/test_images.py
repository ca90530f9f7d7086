"""Real images: what a row's picture and caption are, which sets are refused, and that one bad image is one bad row."""

from __future__ import annotations

import io
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pair_sets import load_pairs
from PIL import Image

from raydistill.data.images import BadImage, open_images
from raydistill.data.pairs import existing_shards
from raydistill.data.synthesis import Recipe, synthesise
from raydistill.data.vae import resized
from raydistill.diffusion.noise import uniform
from raydistill.errors import InputError
from raydistill.spaces import load_space
from raydistill.storage.fingerprint import identify

SETTINGS = {"batch_size": 2, "shard_size": 3, "seed": 5}


def noise_picture(seed: int, width: int = 64, height: int = 64) -> Image.Image:
    pixels = uniform(seed, [0], "picture", shape=(height, width, 3))[0]
    return Image.fromarray((pixels * 255).round().byte().numpy())


def encoded(picture: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Four images (one broken) in a folder and a subfolder, with and without captions."""
    root = tmp_path / "images"
    (root / "more" / ".cache").mkdir(parents=True)
    (root / "b.png").write_bytes(encoded(noise_picture(1)))
    (root / "b.txt").write_text("a blue\n  square \n")
    (root / "a.JPG").write_bytes(encoded(noise_picture(0), "JPEG", quality=95))
    (root / "broken.jpeg").write_bytes(encoded(noise_picture(2), "JPEG")[:700])
    (root / "broken.txt").write_text("a red circle")
    (root / "more" / "c.webp").write_bytes(encoded(noise_picture(3), "WEBP", lossless=True))
    (root / "more" / "c.txt").write_text("\ufeffa blue square", encoding="utf-8")
    (root / "more" / ".cache" / "x.png").write_bytes(b"")
    (root / "notes.md").write_text("no image")
    return root


def test_a_folder_is_read_in_order_of_names_with_captions_from_text_files(folder):
    images = open_images(folder)
    assert [images.name(row) for row in range(4)] == ["a.JPG", "b.png", "broken.jpeg", "more/c.webp"]
    assert images.prompts == ["", "a blue square", "a red circle", "a blue square"]
    assert images.ids.tolist() == [1, 2, 3, 2]  # of a caption's first row; without a caption, its own
    assert str(images) == f"{folder}: 4 images, 3 with captions"
    ids, captions = images.at(99, [3, 0])
    assert (ids.tolist(), captions) == ([2, 1], ["a blue square", ""])
    assert np.array_equal(images.picture(3, 64), np.asarray(noise_picture(3)).transpose(2, 0, 1))


def test_broken_rows_say_what_is_wrong(folder):
    images = open_images(folder)
    with pytest.raises(BadImage, match=r"broken\.jpeg: OSError: image file is truncated"):
        images.picture(2, 64)
    (folder / "b.png").unlink()
    with pytest.raises(BadImage, match=r"b\.png: No such file"):
        images.picture(1, 64)
    (folder / "a.JPG").write_bytes(b"not an image at all")
    with pytest.raises(BadImage, match=r"a\.JPG: UnidentifiedImageError: cannot identify"):
        images.picture(0, 64)
    (folder / "more" / "c.txt").write_bytes(b"caf\xe9")
    images = open_images(folder)
    with pytest.raises(BadImage, match=r"more/c\.webp: the caption is not valid UTF-8"):
        images.picture(2, 64)


def test_pictures_are_upright_opaque_square_and_eight_bit(tmp_path):
    wide = Image.new("RGB", (96, 32), "red")
    wide.paste((0, 0, 255), (32, 0, 64, 32))  # the middle third
    wide.save(tmp_path / "crop.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    half = Image.new("RGB", (32, 32), "red")
    half.paste((0, 0, 255), (0, 0, 32, 16))
    half.save(tmp_path / "exif.png", exif=exif)
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "glass.png")
    Image.new("L", (8, 8), 100).save(tmp_path / "grey.png")
    Image.fromarray(np.full((8, 8), 40000, np.uint16)).save(tmp_path / "deep.png")
    images = open_images(tmp_path)
    picture = {images.name(row).removesuffix(".png"): row for row in range(5)}
    middle = images.picture(picture["crop"], 16)[:, :, 2:-2]  # the filter reaches across the crop's edges
    assert (middle == np.array([0, 0, 255])[:, None, None]).all()
    turned = images.picture(picture["exif"], 32)
    assert turned[:, 16, 31].tolist() == [0, 0, 255]
    assert turned[:, 16, 0].tolist() == [255, 0, 0]
    assert (images.picture(picture["glass"], 8) == 255).all()
    assert (images.picture(picture["grey"], 8) == 100).all()
    with pytest.raises(BadImage, match=r"deep\.png: I;16 has more than 8 bits"):
        images.picture(picture["deep"], 8)


def write_parquet(file, pictures, captions=None, struct=False, name="caption", **options):
    raw = pa.array(pictures, pa.binary())
    column = pa.StructArray.from_arrays([raw, pa.array(["p"] * len(raw))], ["bytes", "path"]) if struct else raw
    table = pa.table({"image": column} | ({} if captions is None else {name: captions}))
    pq.write_table(table, file, **options)
    return file


@pytest.mark.parametrize("struct", [False, True])
def test_parquet_rows_are_found_in_any_row_group_and_file(tmp_path, struct):
    data = [encoded(noise_picture(seed)) for seed in range(7)]
    data[4] = None
    for name, part in (("0.parquet", slice(0, 5)), ("1.parquet", slice(5, 7))):
        captions = [None, "a b ", "c", "c", "d", "e", ""][part]
        write_parquet(tmp_path / name, data[part], captions, struct, row_group_size=2)
    images = open_images(tmp_path)
    assert images.prompts == ["", "a b", "c", "c", "d", "e", ""]
    assert images.ids.tolist() == [1, 2, 3, 3, 5, 6, 7]
    for row in (6, 0, 3, 2, 5, 1):
        assert np.array_equal(images.picture(row, 64), np.asarray(noise_picture(row)).transpose(2, 0, 1))
    with pytest.raises(BadImage, match=r"0\.parquet, row 5: no bytes in column 'image'"):
        images.picture(4, 64)


def test_parquet_of_views_is_read_as_any_other(tmp_path):
    data = [encoded(noise_picture(seed)) for seed in range(2)]
    images = pa.array(data, pa.binary()).cast(pa.binary_view())
    captions = pa.array(["a cup", None]).cast(pa.string_view())
    pq.write_table(pa.table({"image": images, "caption": captions}), tmp_path / "v.parquet")
    read = open_images(tmp_path / "v.parquet")
    assert read.prompts == ["a cup", ""]
    assert np.array_equal(read.picture(1, 64), np.asarray(noise_picture(1)).transpose(2, 0, 1))
    assert read.fingerprint == open_images(write_parquet(tmp_path / "v.parquet", data, ["a cup", None])).fingerprint


def test_captions_may_be_utf_16_and_what_is_no_text_is_a_failed_row(tmp_path):
    for name, caption in (("a", "a cup\r\nof tea".encode("utf-16")), ("b", b"a chef\x92s table")):
        (tmp_path / f"{name}.png").write_bytes(encoded(noise_picture(0)))
        (tmp_path / f"{name}.txt").write_bytes(caption)
    images = open_images(tmp_path)
    assert images.prompts == ["a cup of tea", ""]
    with pytest.raises(BadImage, match=r"b\.png: the caption is not valid UTF-8"):
        images.picture(1, 8)


def test_the_caption_column_can_be_named_and_may_be_absent(tmp_path):
    file = write_parquet(tmp_path / "x.parquet", [encoded(noise_picture(0))], ["one"], name="title")
    assert open_images(file).prompts == [""]
    assert str(open_images(file)).endswith("0 with captions; no captions: its columns are 'image', 'title'")
    assert open_images(file, caption_column="title").prompts == ["one"]
    with pytest.raises(
        InputError, match=r"no column 'caption' of strings \(synthesis.caption_column\); the file has: 'image', 't"
    ):
        open_images(file, caption_column="caption")


def test_sets_that_cannot_be_used_say_why(tmp_path):
    with pytest.raises(InputError, match="no such file or folder"):
        open_images(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"no images \(\.png"):
        open_images(tmp_path)
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(InputError, match=r"neither a folder nor a \.parquet"):
        open_images(tmp_path / "a.csv")
    file = write_parquet(tmp_path / "x.parquet", [b"x"])
    with pytest.raises(InputError, match=r"no column 'jpg' \(synthesis.image_column\); the file has: 'image'"):
        open_images(file, "jpg")
    pq.write_table(pa.table({"image": [1]}), file)
    with pytest.raises(InputError, match=r"column 'image' .* holds int64, not bytes"):
        open_images(file)
    file.write_bytes(b"PAR1 no")
    with pytest.raises(InputError, match="cannot be read"):
        open_images(file)
    noise_picture(0).save(tmp_path / "a.png")
    with pytest.raises(InputError, match="has parquet files and image files"):
        open_images(tmp_path)


def test_another_image_or_caption_makes_another_set(folder):
    before = open_images(folder).fingerprint
    assert open_images(folder).fingerprint == before
    (folder / "b.txt").write_text("a green square")
    captioned = open_images(folder).fingerprint
    (folder / "b.txt").write_text("a blue square")
    (folder / "a.JPG").write_bytes(b"")
    assert len({before, captioned, open_images(folder).fingerprint}) == 3


# -- as a set of pairs --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def spaces(flux_folder, sd_folder):
    return load_space(flux_folder), load_space(sd_folder)


def encode_images(images, teacher, student, folder, *, forbidden=(), max_failed_rows=0) -> int:
    told = Recipe(teacher=teacher, student=student, source=images, count=len(images), **SETTINGS)
    return synthesise(told, folder, forbidden=forbidden, max_failed_rows=max_failed_rows)


def test_images_become_pairs_and_bad_ones_are_recorded(folder, spaces, tmp_path):
    teacher, student = spaces
    images = open_images(folder)
    assert encode_images(images, *spaces, tmp_path / "set", max_failed_rows=1) == 4
    pairs = load_pairs(tmp_path / "set")
    assert pairs.prompts == ["", "a blue square", "a blue square"]
    assert pairs.prompt_ids.tolist() == [1, 2, 2]
    small = noise_picture(1).resize((32, 32), Image.Resampling.BILINEAR)
    for space, picture, z in ((teacher, noise_picture(1), pairs.z_teacher), (student, small, pairs.z_student)):
        x = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None] / 127.5 - 1
        with torch.no_grad():
            expected = space.encode(space.load_vae(), x)
        torch.testing.assert_close(z[1:2].float(), expected, rtol=2e-2, atol=2e-2)  # Pillow rounds the small one
    (line,) = (tmp_path / "set" / "failures.jsonl").read_text().splitlines()
    failure = json.loads(line)
    assert failure["reason"].startswith("broken.jpeg: OSError")
    assert (failure["row"], failure["prompt_id"], failure["prompt"]) == (2, 3, "a red circle")
    assert encode_images(images, *spaces, tmp_path / "set", max_failed_rows=1) == 0


def test_an_interrupted_set_of_images_goes_on_to_the_same_bytes(folder, spaces, tmp_path, monkeypatch):
    images = open_images(folder)
    encode_images(images, *spaces, tmp_path / "whole", max_failed_rows=1)
    whole = {file.name: file.read_bytes() for file in (tmp_path / "whole").iterdir()}
    read = images.read

    def gone(row: int) -> bytes:
        if row == 3:
            raise ConnectionError("gone")
        return read(row)

    monkeypatch.setattr(images, "read", gone)
    with pytest.raises(ConnectionError):
        encode_images(images, *spaces, tmp_path / "set", max_failed_rows=1)
    assert existing_shards(tmp_path / "set") == [0]
    monkeypatch.undo()
    assert encode_images(images, *spaces, tmp_path / "set", max_failed_rows=1) == 1
    assert {file.name: file.read_bytes() for file in (tmp_path / "set").iterdir()} == whole


def test_held_out_captions_and_changed_images_are_refused(folder, spaces, tmp_path):
    with pytest.raises(InputError, match="1 held-out prompts.*'A red  circle'"):
        encode_images(open_images(folder), *spaces, tmp_path / "set", forbidden={"A red  circle"})
    encode_images(open_images(folder), *spaces, tmp_path / "set", max_failed_rows=1)
    (folder / "d.png").write_bytes(encoded(noise_picture(7)))
    with pytest.raises(InputError, match="images was"):
        encode_images(open_images(folder), *spaces, tmp_path / "set", max_failed_rows=1)


# -- which model --------------------------------------------------------------------------------------------


def test_a_cached_hub_model_is_known_by_repository_and_commit(tmp_path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = tmp_path / "hub" / "models--org--some-model" / "snapshots" / commit
    folder.mkdir(parents=True)
    assert identify(folder) == ("org/some-model", commit)


def test_a_folder_is_known_by_its_weights_and_configuration_not_by_where_it_came_from(flux_folder, tmp_path):
    name, revision = identify(flux_folder)
    assert name == flux_folder.name
    shutil.copytree(flux_folder, tmp_path / "copy")
    config = tmp_path / "copy" / "vae" / "config.json"
    told = json.loads(config.read_text())
    config.write_text(json.dumps(told | {"_name_or_path": "/elsewhere"}))
    (tmp_path / "copy" / "README.md").write_text("x")
    tokenizer = tmp_path / "copy" / "tokenizer" / "tokenizer_config.json"
    ends = json.loads(tokenizer.read_text())
    assert ends.pop("trained_without_ending") == "background"  # tells which prompts are cut, and no network
    tokenizer.write_text(json.dumps(ends))
    assert identify(tmp_path / "copy") == ("copy", revision)
    tokenizer.write_text(json.dumps(ends | {"model_max_length": 19}))
    assert identify(tmp_path / "copy")[1] != revision
    tokenizer.write_text(json.dumps(ends))
    config.write_text(json.dumps(told | {"scaling_factor": 0.5}))
    assert identify(tmp_path / "copy")[1] != revision
    config.write_text(json.dumps(told))
    weights = tmp_path / "copy" / "transformer" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert identify(tmp_path / "copy")[1] != revision


def test_resizing_averages_instead_of_skipping_pixels():
    stripes = torch.ones(1, 3, 64, 64)
    stripes[..., ::2] = -1
    assert resized(stripes, 32).abs().max() < 0.2  # nearest or plain bilinear sampling would alias
    assert resized(stripes, 64) is stripes
