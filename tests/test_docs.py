"""The docs cannot rot quietly: what the code has, they have, and what they name exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from hope_runtime.weights.random import tiny_config
from server.metrics import Metrics
from server.settings import Settings

ROOT = Path(__file__).parent.parent
RUNNING = (ROOT / "docs/running.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("name", [*Settings.model_fields])
def test_every_setting_has_its_row_with_its_default(name):
    field = Settings.model_fields[name]

    row = re.search(rf"^\| `{name}` \| `HOPE_{name.upper()}` \| (.*?) \| (.*) \|$", RUNNING, re.M)

    assert row is not None
    assert row[2] == field.description
    if field.default_factory is None and not isinstance(field.default, tuple):
        assert row[1] == ("none" if field.default is None else str(field.default))


@pytest.mark.parametrize(
    "family", [*Metrics(tiny_config()).registry.collect()], ids=lambda f: f.name
)
def test_every_metric_has_its_row(family):
    exposed = f"{family.name}_total" if family.type == "counter" else family.name

    assert re.search(rf"^\| `{exposed}` \| {family.type} \|", RUNNING, re.M)


def test_every_metric_that_the_docs_name_exists():
    known = {family.name for family in Metrics(tiny_config()).registry.collect()}

    for page in PAGES:
        for name in re.findall(r"`(hope_[a-z_]+?)(?:_total)?(?:\{[^`]*)?`", page.read_text()):
            if name.startswith("hope_runtime") or page.parent.name == "decisions":
                continue
            assert name in known, f"{page.name} names {name}"


def _codes() -> set[str]:
    """Return the second argument of every ApiError(status, code, ...) in the server."""
    found = set()
    for file in (ROOT / "server").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "ApiError":
                code = node.args[1]
                if isinstance(code, ast.Constant):
                    found.add(code.value)
    return found


@pytest.mark.parametrize("code", sorted(_codes()))
def test_every_error_code_has_its_row(code):
    errors = RUNNING.split("## Errors")[1].split("##")[0]

    assert f"`{code}`" in errors


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_link_and_every_named_file_exists(page):
    text = page.read_text()

    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links {target}"
    for name in re.findall(
        r"`((?:server|hope_runtime|memory_store|clients|tests)/[\w/]+\.\w+)`", text
    ):
        assert (ROOT / name).exists(), f"{page.name} names {name}"


def test_python_in_the_readme_is_python():
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S):
        compile(block, "README.md", "exec")


def test_every_test_that_the_docs_name_exists():
    known = {
        name
        for file in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^(?:async )?def (test_\w+)", file.read_text(), re.M)
    }

    for page in PAGES:
        named = set(re.findall(r"`(test_\w+)`", page.read_text()))
        assert named - known == set(), page.name
