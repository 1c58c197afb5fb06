"""Libraries in C++: made once, kept, done without where there is no compiler."""

from typing import Any

import pytest
from processors import needs_compiler

from nvae.kernels import native
from nvae.kernels.cpu import bottleneck

pytestmark = needs_compiler


def test_without_a_compiler_there_is_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "compiles", lambda kind: False)
    assert native.library.__wrapped__(bottleneck.SOURCE) is None


def test_a_source_that_does_not_compile_is_said_once_and_done_without(tmp_path: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = tmp_path / "broken.cpp"
    source.write_text("int f( {")
    with pytest.warns(UserWarning, match=r"slower without broken\.cpp: .*broken\.cpp:1"):
        assert native.library.__wrapped__(source) is None


def test_a_library_is_kept_where_it_can_be_and_made_again_where_it_is_damaged(tmp_path: Any, monkeypatch: Any) -> None:
    source = tmp_path / "answer.cpp"
    source.write_text('extern "C" int answer() { return 42; }')
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "kept"))
    for _ in range(2):
        assert native.library.__wrapped__(source).answer() == 42
    folder = native.cache_folder()
    assert folder is not None
    (kept,) = folder.iterdir()
    start = kept.read_bytes()[:100]
    kept.unlink()  # it is loaded
    kept.write_bytes(start)
    assert native.library.__wrapped__(source).answer() == 42
    (tmp_path / "full").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "full"))
    assert native.library.__wrapped__(source).answer() == 42
