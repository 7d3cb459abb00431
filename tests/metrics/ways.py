"""Both ways to look at a run's hits, for tests that hold for either: a fixture to be imported, and its library."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import lru_cache

import pytest

from pipeline.metrics import native
from pipeline.support.native_build import OPTIONS, compiler

EXTRA_FLAGS = "PLUMBLINE_TEST_FLAGS"  # an environment variable: sanitizers, say
needs_compiler = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")


@lru_cache(maxsize=1)
def library() -> native.Native:
    found, extra = compiler(), os.environ.get(EXTRA_FLAGS, "").split()
    assert found is not None
    return native.Native(native.SOURCE.compiled(found, [*OPTIONS, *extra], [], native.LABEL))


@pytest.fixture(scope="module", params=["sorted", pytest.param("native", marks=needs_compiler)])
def way(request: pytest.FixtureRequest) -> Iterator[None]:
    """Runs of any size are searched this way."""
    chosen = library() if request.param == "native" else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "load_for", lambda num_hits: chosen)
        yield
