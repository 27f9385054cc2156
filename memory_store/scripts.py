"""The Lua scripts of this package, read from the files beside this one."""

from __future__ import annotations

from importlib import resources


def script(name: str) -> str:
    return resources.files("memory_store").joinpath(name).read_text(encoding="utf-8")
