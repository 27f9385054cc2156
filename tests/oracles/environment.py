"""Another project's code, run in an environment of its own, so that ours never depends on it."""

from __future__ import annotations

import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parents[2]
VECTORS = ROOT / "tests/hope_runtime/ops/vectors"


def run(script: str, out: Path, *, needs: Sequence[str], alone: Sequence[str]) -> None:
    """Run `script OUT` where `needs` are installed, and `alone` without what they depend on."""
    out.parent.mkdir(exist_ok=True)
    with TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = f"{folder}/bin/python"
        pip = [python, "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, "-c", ROOT / "constraints.txt", *needs], check=True)
        subprocess.run([*pip, "--no-deps", *alone], check=True)
        subprocess.run([python, script, str(out)], check=True)


def recording() -> Path | None:
    """Return the file to record to, inside the environment; None outside it."""
    return Path(sys.argv[1]) if len(sys.argv) > 1 else None
