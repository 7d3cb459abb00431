"""Small pictures inside a page: data URIs, so that one file holds everything.

A picture that is missing or broken becomes a reason in words, never an exception: a report of a finished run must not
fail because data were moved since.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass, field
from typing import NamedTuple

from pipeline.images import Flaw, ImageStore, decode
from pipeline.support.errors import UserError

SIDE = 144       # pixels of the longer side
QUALITY = 62     # of WebP, which all browsers of the last five years read
_HELD = 4096     # small pictures in memory: some 16 MB


class Picture(NamedTuple):
    """`address` is a data URI; empty if there is none, and then `flaw` says why. Sizes in pixels."""

    address: str
    width: int
    height: int
    flaw: str


@dataclass
class Thumbnails:
    """Pictures of one benchmark, each made once."""

    images: ImageStore
    side: int = SIDE
    _made: dict[str, Picture] = field(default_factory=dict)

    def of(self, reference: str) -> Picture:
        if reference not in self._made:
            if len(self._made) >= _HELD:
                self._made.pop(next(iter(self._made)))
            self._made[reference] = self._make(reference)
        return self._made[reference]

    def _make(self, reference: str) -> Picture:
        try:
            image = decode(self.images.read(reference), reference, at_least=(self.side, self.side))
        except Flaw as flaw:
            return Picture("", 0, 0, flaw.kind.replace("_", " "))
        except (UserError, OSError):  # it leaves the root, or the disk does not answer: no reason to lose the report
            return Picture("", 0, 0, "unreadable image")
        image.thumbnail((self.side, self.side))
        written = io.BytesIO()
        image.save(written, "WEBP", quality=QUALITY, method=4)
        address = "data:image/webp;base64," + base64.b64encode(written.getvalue()).decode()
        return Picture(address, image.width, image.height, "")
