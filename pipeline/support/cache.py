"""Where the user's own cache is: what is dear to make, the same for all experiments, and safe to delete."""

from __future__ import annotations

import os
from pathlib import Path


def user_cache(kind: str) -> Path:
    """The directory for one kind of thing, such as "weights"; it need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "plumbline" / kind
