"""The JSON files beside a model's weights, each value asked for by type."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hope_runtime.weights.checkpoint import CheckpointError


@dataclass(frozen=True, slots=True)
class Fields:
    """The fields of a JSON object; null counts as absent, as transformers has it."""

    path: Path
    values: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> Fields:
        try:
            values = json.loads(path.read_bytes())
        except OSError as error:
            raise CheckpointError(
                f"{path}: cannot be read: {error.strerror}; download it, or name another directory"
            ) from error
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: not valid JSON: {error}; download it again") from error
        if not isinstance(values, dict):
            raise CheckpointError(f"{path}: does not hold a JSON object; download it again")
        return cls(path, values)

    @classmethod
    def read_if_there(cls, path: Path) -> Fields:
        return cls.read(path) if path.is_file() else cls(path, {})

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._get(key, int, default)
        assert isinstance(value, int)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._get(key, (int, float), default)
        assert isinstance(value, int | float)
        return float(value)

    def text(self, key: str, default: str | None = None) -> str:
        value = self._get(key, str, default)
        assert isinstance(value, str)
        return value

    def flag(self, key: str, default: bool) -> bool:
        return bool(self._get(key, bool, default))

    def inner(self, key: str) -> Fields:
        values = self._get(key, dict, {})
        assert isinstance(values, dict)
        return Fields(self.path, values)

    def _get(self, key: str, kind: type[Any] | tuple[type[Any], ...], default: object) -> object:
        value = self.values.get(key)
        value = default if value is None else value
        if value is None:
            raise CheckpointError(f"{self.path}: {key!r} is missing; download the file again")
        if not isinstance(value, kind):
            raise CheckpointError(
                f"{self.path}: {key!r} is {str(value)[:60]!r}, which no supported model has; "
                "download the file again or choose another model"
            )
        return value
