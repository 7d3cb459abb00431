"""A view as one HTML file: no script, no network, pictures inside it as thumbnails.

It follows the reader's light or dark setting; hits are framed and say so in words, so that no meaning hangs on a
colour. What data hold is escaped, texts and references alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from pathlib import Path

from pipeline.artifacts import atomic_path
from pipeline.images import ImageStore
from pipeline.look import Candidate, View
from pipeline.look.text import picture_text
from pipeline.report.thumbnails import Thumbnails

THUMBNAIL = 224  # pixels of the longer side
_STYLE = """
:root { color-scheme: light dark; --ink: #1a1c1f; --paper: #fff; --faint: #5c6066; --line: #d4d7db; --hit: #0a7a3d }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e7e9; --paper: #17191c; --faint: #a3a8ae; --line: #3a3e44; --hit: #4cc47f } }
body { font: 15px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 76rem;
       margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.3rem } h2 { font-size: 1.05rem; margin-top: 2rem } p { margin: .3rem 0; overflow-wrap: anywhere }
.faint { color: var(--faint); font-size: .87rem }
ol, ul { list-style: none; padding: 0; display: grid; gap: .8rem;
         grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)) }
li { border: 1px solid var(--line); border-radius: 6px; padding: .7rem; break-inside: avoid }
li.hit { border: 3px solid var(--hit) } .mark { color: var(--hit); font-weight: 600 }
img { max-width: 100%; height: auto; display: block; margin-bottom: .4rem }
"""


def write_page(view: View, images: ImageStore, path: Path, query_images: ImageStore | None = None) -> None:
    """`query_images` are those of the query, where it is none of the benchmark's."""
    with atomic_path(path) as temporary:
        temporary.write_text("".join(_page(view, images, query_images or images)), encoding="utf-8")


def _page(view: View, images: ImageStore, query_images: ImageStore) -> Iterator[str]:
    title = escape(f"{view.query.query_id or 'typed query'} of {view.task}")
    yield (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
           f'<meta name="viewport" content="width=device-width">\n<style>{_STYLE}</style></head>\n<body><main>\n')
    yield f"<h1>{title}</h1>\n"
    yield from _query(view, query_images)
    if view.relevant:
        yield "<h2>Relevant</h2>\n<ul>\n"
        yield from (_card(candidate, view, images) for candidate in view.relevant)
        yield "</ul>\n"
    yield f"<h2>First {len(view.hits)}</h2>\n<ol>\n"
    yield from (_card(candidate, view, images) for candidate in view.hits)
    yield "</ol>\n</main></body></html>\n"


def _query(view: View, images: ImageStore) -> Iterator[str]:
    query = view.query
    if query.picture:
        yield _image(query.picture.reference, images) + _faint(picture_text(query.picture))
    if query.text is not None:
        yield f"<p>{escape(query.text)}</p>\n"
    for instruction in query.instructions:
        yield _faint(f"instruction: {instruction}")
    for encoded in query.encoded if query.instructions else ():
        yield _faint(f"encoded: {encoded}")
    yield _faint(f"searched {view.pool}, {view.candidates:,} candidates, with {view.encoder}")
    if view.metrics:
        yield _faint(", ".join(f"{name} {value:.3f}" for name, value in view.metrics.items()))


def _card(candidate: Candidate, view: View, images: ImageStore) -> str:
    mark = '<span class="mark">relevant</span> ' if candidate.is_hit else ""
    lines = [f"<p>{mark}{escape(_rank(candidate, view))}</p>",
             _image(candidate.image, images) if candidate.image else "",
             f"<p>{escape(candidate.text)}</p>" if candidate.text else "",
             _faint(" ".join(filter(None, [candidate.candidate_id, candidate.modality, candidate.image])))]
    return f'<li class="{"hit" if candidate.is_hit else "other"}">{"".join(lines)}</li>\n'


def _rank(candidate: Candidate, view: View) -> str:
    if not candidate.in_pool:
        return "not in this pool"
    if candidate.rank is None:
        return f"not among the first {view.depth}"
    return f"rank {candidate.rank}" + ("" if candidate.score is None else f", score {candidate.score:.5f}")


def _faint(text: str) -> str:
    return f'<p class="faint">{escape(text)}</p>\n'


def _image(reference: str, images: ImageStore) -> str:
    picture = Thumbnails(images, THUMBNAIL).of(reference)
    if picture.flaw:
        return _faint(f"{reference}: {picture.flaw}")
    return (f'<img alt="{escape(reference)}" width="{picture.width}" height="{picture.height}" '
            f'src="{picture.address}">\n')
