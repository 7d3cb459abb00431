"""retrieval_results/: runs, retrieved candidates and result tables in the formats other programs read.

Every file is whole or absent, and `exported.json` remembers from which artifacts and options it was made, so
a second export writes only what has changed. What stands in that record is current or gone: a file of a cell that left
the experiment is removed, and so is an outdated one of a format that is no longer asked for; a current one of such a
format stays. Files that the record does not name, or that were changed by hand, are never removed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.artifacts import atomic_path, write_json
from pipeline.plan import Plan
from pipeline.report.exported import File, files_of
from pipeline.report.rows import score_rows

VERSION = 1
_RECORD = "exported.json"


def export(plan: Plan, again: bool = False) -> list[Path]:
    """Write what is missing or made from something else (`again`: everything); returns the files written now.

    NotReady if not everything is scored; UserError if an identifier cannot stand in a TREC file.
    """
    exported = _Exported(plan.experiment.directory / "retrieval_results")
    known, formats = files_of(plan, score_rows(plan)), plan.experiment.settings.export.formats
    written = [exported.write(file) for name in dict.fromkeys(formats) for file in known[name]
               if again or not exported.is_current(file)]
    exported.remove_others([file for files in known.values() for file in files])
    return written


class _Exported:
    """What stands in the directory, by its record: a file that is not the size it had is not trusted."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.record: dict[str, Any] = {}
        try:
            found = json.loads((directory / _RECORD).read_text())
        except (OSError, ValueError):  # absent or damaged: everything is written anew
            return
        if isinstance(found, dict):
            self.record = found

    def is_current(self, file: File) -> bool:
        path = self.directory / file.name
        return path.is_file() and self.record.get(file.name) == _entry(file, path)

    def write(self, file: File) -> Path:
        path = self.directory / file.name
        with atomic_path(path) as temporary:
            file.write(temporary)
        self.record[file.name] = _entry(file, path)
        write_json(self.directory / _RECORD, self.record)
        return path

    def remove_others(self, files: list[File]) -> None:
        """Forget, and remove, what is not one of these files as it would be written now."""
        current = {file.name for file in files if file.name in self.record and self.is_current(file)}
        others = [name for name in self.record if name not in current]
        for name in others:
            if self._is_ours(name):
                (self.directory / name).unlink()
            del self.record[name]
        if others:
            write_json(self.directory / _RECORD, self.record)

    def _is_ours(self, name: str) -> bool:
        """Below this directory, a plain file, and of the size that was recorded."""
        path, entry = self.directory / name, self.record[name]
        is_inside = path.resolve().is_relative_to(self.directory.resolve())
        return is_inside and path.is_file() and isinstance(entry, dict) and entry.get("bytes") == path.stat().st_size


def _entry(file: File, path: Path) -> dict[str, Any]:
    return {"version": VERSION, **file.made_from, "bytes": path.stat().st_size}
