"""The pictures of a view for a terminal: as such where it can show them (kitty's protocol, sixel), else as blocks.

textual-image asks the terminal what it can; it is an extra, needed for nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pipeline.images import Flaw, ImageStore
from pipeline.look import View
from pipeline.look.text import plain
from pipeline.support.errors import UserError

_COLUMNS = 32


def pictures(view: View, images: ImageStore, query_images: ImageStore) -> Iterator[tuple[str, Any]]:
    """(caption, what rich can print) of the query and of the hits; what cannot be read is left to the text."""
    try:
        from textual_image.renderable import Image
    except ImportError:
        raise UserError("--pictures needs the library textual-image", None,
                        "pip install textual-image\nor write a page instead: --html FILE") from None
    named = [("query", view.query.picture.reference, query_images)] if view.query.picture else []
    named += [(f"{hit.rank}{' hit' if hit.is_hit else ''}", hit.image, images) for hit in view.hits if hit.image]
    for caption, reference, store in named:
        try:
            yield f"{caption}  {plain(reference)}", Image(store.open(reference), width=_COLUMNS)
        except Flaw:
            continue
