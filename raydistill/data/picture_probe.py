"""A look at a set's first pictures, before all of it is read in vain: no Ray, no networks."""

from __future__ import annotations

import itertools
from collections import Counter

from raydistill.data.images import BadImage
from raydistill.data.pictures import Filters, PictureRow, Pictures
from raydistill.errors import InputError

LOOKED_AT, ENOUGH = 2000, 20  # rows, and how many of them must be usable: fewer are less than 1 %
_TINY = 8  # pixels a side, at which a picture is decoded to see whether it can be


def check_first(pictures: Pictures, seed: int, filters: Filters, wanted: int | None = None) -> None:
    """Refuse a set of which next to nothing can be used, as one that `synthesis.min_pixels` leaves out.

    Reads the first rows of the seed's order until enough of them are usable, so of a good set ENOUGH. A set of fewer than
    LOOKED_AT rows passes: it is soon read whole, and what cannot be used is told then.

    Args:
        wanted: pictures that are enough, where it is fewer than ENOUGH; None: no fewer.

    Raises:
        InputError: of LOOKED_AT rows more than 99 % were left out or failed; it counts them by reason.
        OSError: a store does not answer.
    """
    enough = ENOUGH if wanted is None else min(wanted, ENOUGH)
    reasons, usable, last = Counter[str](), 0, ""
    for row in itertools.islice(pictures.rows(seed, filters=filters), LOOKED_AT):
        if failure := "" if row.left_out else _failure(row):
            last = failure
        usable += row.usable and not failure
        if usable == enough:
            return
        if row.left_out or failure:
            reasons[row.left_out or "failed"] += 1
    if usable + reasons.total() < LOOKED_AT:
        return
    words = {
        "small": f"are smaller than synthesis.min_pixels={filters.min_pixels}",
        "held-out caption": "have captions that are held out",
        "failed": f"cannot be read (the last one: {last})",
    }
    counted = ", ".join(f"{count:,} {words.get(reason, reason)}" for reason, count in reasons.most_common())
    raise InputError(
        f"synthesis.images: {pictures.source}: of the first {LOOKED_AT:,} pictures {usable} can be used: {counted}; name "
        "another set, or change what leaves them out"
    )


def _failure(row: PictureRow) -> str:
    """Why a row's picture cannot be decoded, or ""."""
    try:
        row.picture(_TINY)
    except BadImage as bad:
        return str(bad)
    return ""
