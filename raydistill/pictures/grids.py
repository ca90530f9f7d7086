"""Pictures of pictures: sample grids with captions, and rows that compare before, after and teacher. Pillow only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from PIL import Image, ImageDraw, ImageFont

MARGIN, GAP = 8, 6
INK, PALE, PAPER = (30, 30, 30), (90, 90, 90), (238, 238, 238)
RIGHT, WRONG, MARK = (30, 130, 60), (190, 40, 40), 15  # a picture's mark: its colours, and its width in pixels
CAPTION_LINES = 5
SMALLEST_CELL = 128  # pixels a picture is enlarged to at least, so that its caption can be read


def to_pil(image: torch.Tensor, scale: int = 1) -> Image.Image:
    """One image [3, H, W] in [-1, 1], enlarged `scale` times without smoothing."""
    pixels = ((image.detach().float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().contiguous()
    picture = Image.fromarray(pixels.numpy(), "RGB")
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def wrap(text: str, font: ImageFont.FreeTypeFont, width: int, lines: int) -> list[str]:
    """Break text into at most `lines` lines no wider than `width` pixels; what does not fit ends in …"""
    result: list[str] = []
    rest = " ".join(text.split())
    while rest and len(result) < lines:
        count = _fitting(rest, font, width)
        if count < len(rest) and rest[count] != " " and " " in rest[:count]:  # between two letters of a later word
            count = rest.rindex(" ", 0, count)
        count = max(1, count)
        result.append(rest[:count].rstrip())
        rest = rest[count:].lstrip()
    if rest:
        kept = _fitting(result[-1], font, width, "…")
        result[-1] = result[-1][:kept].rstrip() + "…"
    return result


def _fitting(text: str, font: ImageFont.FreeTypeFont, width: int, end: str = "") -> int:
    """How many characters fit before `end`; 0: none. Measures few texts, none more than twice as long as what fits."""

    def fits(count: int) -> bool:
        return font.getlength(text[:count] + end) <= width

    high = 1
    while high <= len(text) and fits(high):
        high *= 2
    low, high = high // 2, min(high, len(text) + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _check(images: torch.Tensor, captions: Sequence[str] | None, what: str = "images") -> None:
    if images.ndim != 4 or images.shape[1] != 3 or not len(images):
        raise ValueError(f"{what} must be [N, 3, H, W] with N > 0, got {list(images.shape)}")
    if captions is not None and len(captions) != len(images):
        raise ValueError(f"{len(captions)} captions for {len(images)} {what}")


def _scale(images: torch.Tensor, scale: int | None) -> int:
    if scale is not None and scale < 1:
        raise ValueError(f"scale must be at least 1, got {scale}")
    return scale or max(1, -(-SMALLEST_CELL // images.shape[-1]))


def grid(
    images: torch.Tensor,
    captions: Sequence[str] | None = None,
    columns: int = 8,
    scale: int | None = None,
    title: str | None = None,
) -> Image.Image:
    """Pictures in rows, each with its caption below.

    Args:
        images: [N, 3, H, W] in [-1, 1].
        captions: N texts, or None; what does not fit on CAPTION_LINES lines is cut with an ellipsis.
        scale: whole-number enlargement; None: as much as makes a picture 128 pixels wide.

    Raises:
        ValueError: shapes or counts that do not fit together.
    """
    _check(images, captions)
    if columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}")
    pictures = [to_pil(image, _scale(images, scale)) for image in images]
    cell_width, cell_height = pictures[0].size
    font = ImageFont.load_default(size=min(13, max(10, cell_width // 10)))
    line_height = sum(font.getmetrics())
    texts = [wrap(text, font, cell_width, CAPTION_LINES) for text in captions or [""] * len(pictures)]
    columns = min(columns, len(pictures))
    starts = range(0, len(pictures), columns)
    # each row is as high as its longest caption needs
    text_heights = [line_height * max(map(len, texts[start : start + columns])) for start in starts]
    title_font = ImageFont.load_default(size=16)
    width = 2 * MARGIN + columns * cell_width + (columns - 1) * GAP
    heading = wrap(title, title_font, width - 2 * MARGIN, 2) if title else []
    top = MARGIN + len(heading) * sum(title_font.getmetrics()) + (GAP if heading else 0)
    height = top + sum(cell_height + text + GAP for text in text_heights) - GAP + MARGIN
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.multiline_text((MARGIN, MARGIN), "\n".join(heading), INK, font=title_font)
    for start, text_height in zip(starts, text_heights, strict=True):
        for column, index in enumerate(range(start, min(start + columns, len(pictures)))):
            left = MARGIN + column * (cell_width + GAP)
            sheet.paste(pictures[index], (left, top))
            for number, line in enumerate(texts[index]):
                draw.text((left, top + cell_height + number * line_height), line, INK, font=font)
        top += cell_height + text_height + GAP
    return sheet


def before_after(
    rows: Mapping[str, torch.Tensor],
    captions: Sequence[str],
    scale: int | None = None,
    columns: int = 8,
    title: str | None = None,
    right: Mapping[str, Sequence[bool]] | None = None,
) -> Image.Image:
    """One column a prompt: the pictures of all rows below each other, and the caption.

    Args:
        rows: label -> [N, 3, H, W] in [-1, 1], drawn for the same prompts; all are shown in the first one's size.
        captions: N texts.
        scale: whole-number enlargement of the first row's pictures; None: to 128 pixels.
        columns: prompts side by side; more prompts make more bands.
        right: label -> whether each picture shows what its caption asks for; a row without is not marked.

    Raises:
        ValueError: shapes or counts that do not fit together.
    """
    for label, images in rows.items():
        _check(images, captions, label)
    first = next(iter(rows.values()))
    scale = _scale(first, scale)
    bands = []
    for start in range(0, len(first), columns):
        shown = slice(start, start + columns)
        marks = {label: row[shown] for label, row in (right or {}).items()}
        bands.append(_band({label: images[shown] for label, images in rows.items()}, captions[shown], scale, marks))
    width = max(band.width for band in bands)
    font = ImageFont.load_default(size=16)
    heading = wrap(title, font, width - 2 * MARGIN, 2) if title else []
    top = MARGIN + len(heading) * sum(font.getmetrics()) if heading else 0
    sheet = Image.new("RGB", (width, top + sum(band.height for band in bands)), PAPER)
    ImageDraw.Draw(sheet).multiline_text((MARGIN, MARGIN), "\n".join(heading), INK, font=font)
    for band in bands:
        sheet.paste(band, (0, top))
        top += band.height
    return sheet


def _band(
    rows: Mapping[str, torch.Tensor], captions: Sequence[str], scale: int, right: Mapping[str, Sequence[bool]]
) -> Image.Image:
    """Labelled rows of pictures over one line of captions."""
    images = next(iter(rows.values()))
    size, count = to_pil(images[0], scale).size, len(images)
    font, label_font = ImageFont.load_default(size=min(13, max(10, size[0] // 10))), ImageFont.load_default(size=14)
    indent = MARGIN + round(max(label_font.getlength(label) for label in rows)) + GAP
    texts = [wrap(text, font, size[0], CAPTION_LINES) for text in captions]
    line_height = sum(font.getmetrics())
    height = MARGIN + len(rows) * (size[1] + GAP) + line_height * max(map(len, texts)) + MARGIN
    band = Image.new("RGB", (indent + count * (size[0] + GAP) - GAP + MARGIN, height), PAPER)
    draw, top = ImageDraw.Draw(band), MARGIN
    for label, images in rows.items():
        draw.text((MARGIN, top + size[1] // 2), label, PALE, font=label_font, anchor="lm")
        for column, image in enumerate(images):
            picture = to_pil(image, 1)
            exact = size[0] % picture.width == 0  # whole-number enlargement keeps pixels crisp
            picture = picture.resize(size, Image.Resampling.NEAREST if exact else Image.Resampling.LANCZOS)
            left = indent + column * (size[0] + GAP)
            band.paste(picture, (left, top))
            if label in right:
                _mark(draw, left + size[0] - MARK - 3, top + size[1] - MARK - 3, right[label][column])
        top += size[1] + GAP
    for column, lines in enumerate(texts):
        for number, line in enumerate(lines):
            draw.text((indent + column * (size[0] + GAP), top + number * line_height), line, INK, font=font)
    return band


def _mark(draw: ImageDraw.ImageDraw, left: int, top: int, right: bool) -> None:
    """A tick or a cross on a small square, MARK pixels wide."""
    draw.rectangle((left, top, left + MARK, top + MARK), fill=RIGHT if right else WRONG, outline=PAPER)
    tick, cross = [[(3, 8), (6, 11), (12, 4)]], [[(4, 4), (11, 11)], [(11, 4), (4, 11)]]
    for line in tick if right else cross:
        draw.line([(left + x, top + y) for x, y in line], fill=PAPER, width=2)
