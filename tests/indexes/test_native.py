"""How the native kernel is found, compiled, capped and done without; and what a memory checker says of it."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pipeline.indexes import exact, native, score, statistics
from pipeline.indexes.native_kernel import NativeKernel
from pipeline.indexes.torch_kernel import TorchKernel
from pipeline.support import native_build
from pipeline.support.errors import UserError
from tests.indexes import kernels
from tests.indexes.oracle import statistics_of

ROOT = Path(__file__).resolve().parents[2]
UNITS = [name for name in kernels.NAMES if name != "torch"]
needs_compiler = pytest.mark.skipif(not UNITS, reason="no C++ compiler, or not an x86 processor with AVX2")


@pytest.fixture(autouse=True)
def _loaded_anew() -> Iterator[None]:
    native.load.cache_clear()
    yield
    native.load.cache_clear()


@needs_compiler
def test_the_environment_caps_the_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    every = native.available_units()
    monkeypatch.setenv(native.VARIABLE, "avx2")
    assert native.available_units() == ["avx2"] == every[-1:]
    chosen = exact.choose_kernel("native", "cpu", "auto", work=0)
    assert isinstance(chosen, NativeKernel) and chosen.native.unit == "avx2"
    assert chosen.dtype("auto", "cpu") == "float32", "AVX2 has no bfloat16"
    monkeypatch.setenv(native.VARIABLE, "none")
    native.load.cache_clear()
    assert native.available_units() == []
    assert isinstance(exact.choose_kernel("auto", "cpu", "auto", work=1e20), TorchKernel)
    monkeypatch.setenv(native.VARIABLE, "avx51")
    with pytest.raises(UserError, match="(?s)avx51.*avx512"):
        native.available_units()


@needs_compiler
def test_asking_for_what_cannot_be_had_is_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    for device, coarse in (("meta", "auto"), ("cpu", "float16")):
        with pytest.raises(UserError, match="no native kernel"):
            exact.choose_kernel("native", device, coarse, work=1e20)
    monkeypatch.setenv(native.VARIABLE, "none")
    native.load.cache_clear()
    with pytest.raises(UserError, match="no native kernel"):
        exact.choose_kernel("native", "cpu", "auto", work=1e20)


@needs_compiler
def test_small_searches_do_not_compile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native_build._target.cache_clear()
    try:
        assert isinstance(exact.choose_kernel("auto", "cpu", "auto", work=1e6), TorchKernel)
        assert not list(tmp_path.rglob("*.so"))
        assert isinstance(exact.choose_kernel("auto", "cpu", "auto", work=1e20), NativeKernel)
        assert [path.suffix for path in tmp_path.rglob("native-*")] == [".so"]
        assert isinstance(exact.choose_kernel("auto", "cpu", "auto", work=1e6), NativeKernel), "it is there now"
    finally:
        native_build._target.cache_clear()


def test_without_a_compiler_torch_takes_over_and_says_so(
        monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with caplog.at_level(logging.INFO, "pipeline"):
        assert isinstance(exact.choose_kernel("auto", "cpu", "auto", work=1e20), TorchKernel)
    assert "torch" in caplog.text


@needs_compiler
def test_a_compiler_that_fails_is_quoted(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
                                         tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.write_text('#!/bin/sh\n[ "$1" = --version ] && echo 1 && exit\necho "no such option" >&2; exit 1\n')
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with caplog.at_level(logging.WARNING, "pipeline"):
        assert isinstance(exact.choose_kernel("auto", "cpu", "auto", work=1e20), TorchKernel)
    assert "no such option" in caplog.text


@needs_compiler
def test_a_cache_that_others_can_write_to_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
                                                      caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "plumbline" / "native"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    native_build._target.cache_clear()
    try:
        assert isinstance(exact.choose_kernel("auto", "cpu", "auto", work=1e20), TorchKernel)
        assert "can be written by others" in caplog.text
    finally:
        native_build._target.cache_clear()


@needs_compiler
def test_a_library_that_cannot_be_loaded_is_done_without(monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
                                                         caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "native.so").write_bytes(b"made for another system")
    monkeypatch.setattr(native_build.Source, "built", lambda *_: tmp_path / "native.so")
    assert isinstance(exact.choose_kernel("auto", "cpu", "auto", work=1e20), TorchKernel)
    assert "cannot be loaded" in caplog.text


@needs_compiler
def test_no_place_for_a_cache_is_done_without(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    native_build._target.cache_clear()
    try:
        for work in (1e6, 1e20):
            native.load.cache_clear()
            assert isinstance(exact.choose_kernel("auto", "cpu", "auto", work), TorchKernel)
    finally:
        native_build._target.cache_clear()


@needs_compiler
def test_a_build_that_gives_wrong_hits_is_not_used(monkeypatch: pytest.MonkeyPatch,
                                                   caplog: pytest.LogCaptureFixture) -> None:
    exact._is_sound.cache_clear()
    try:
        monkeypatch.setattr(NativeKernel, "attempt", lambda self, search, window, part: True)  # finds nothing
        assert isinstance(exact.choose_kernel("auto", "cpu", "auto", work=1e20), TorchKernel)
        assert "gives wrong hits" in caplog.text
    finally:
        exact._is_sound.cache_clear()


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("dtype", ("float16", "float32"))
def test_norms_and_statistics_have_the_same_bits(unit: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(2)
    vectors_ND = (random.standard_normal((300, 37)) * 10.0 ** random.integers(-4, 4, (300, 1))).astype(dtype)
    vectors_ND[[3, 70]] = 0
    kernel = kernels.kernel(unit)
    assert isinstance(kernel, NativeKernel)
    norms_N = np.empty(300)
    kernel.native("norms", vectors_ND, dtype == "float16", 300, 37, 3, norms_N)
    assert norms_N.tobytes() == score.norms(statistics.as_tensor(vectors_ND)).numpy().tobytes()
    found = []
    for library in (None, kernel.native):
        monkeypatch.setattr(native, "load_if", lambda worth_compiling, library=library: library)
        found.append(statistics_of(vectors_ND))
    assert found[0].sum_of_unit_vectors_D.tobytes() == found[1].sum_of_unit_vectors_D.tobytes()
    assert found[0].zero_vectors == found[1].zero_vectors == 2


def _checked(expression: str) -> None:
    """The exact search's tests, with every native kernel built to notice bad accesses and undefined behaviour."""
    libraries = [subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
                 for name in ("libasan.so", "libubsan.so")]
    if not all(os.path.isabs(path) for path in libraries):
        pytest.skip("this compiler has no sanitizers")
    environment = {**os.environ, "LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0",
                   kernels.EXTRA_FLAGS: "-fsanitize=address,undefined -fno-sanitize-recover=undefined -g -O1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/indexes/test_exact.py",
               "-k", expression]
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-3000:]


@needs_compiler
def test_memory_is_used_soundly() -> None:
    _checked("machine or zero_query or no_queries or collapsed")


@needs_compiler
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_memory_is_used_soundly_in_all_tests() -> None:
    _checked("not importing and not mistakes")
