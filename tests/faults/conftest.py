"""One process that forks servers, and one undisturbed server to compare with, for all files."""

import pytest

from tests.faults.oracle import Twins
from tests.faults.talk import BEFORE, endless_words
from tests.faults.zygote import Zygote
from tests.tools.engines import Engine

EXACT = {"storage": "fp32"}  # what is rounded at rest could hide what differs


@pytest.fixture
def anyio_backend():
    return "asyncio"


@pytest.fixture(scope="session")
def zygote(tmp_path_factory):
    with Zygote(tmp_path_factory.mktemp("zygote")) as zygote:
        yield zygote


@pytest.fixture(scope="session")
def twins(zygote):
    return Twins(zygote.spawn(None, settings=EXACT).url)


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    """One store for whoever does not hurt it."""
    with Engine(tmp_path_factory.mktemp("store")) as engine:
        yield engine


@pytest.fixture(scope="session")
def endless(twins):
    """Words that the tiny model, having heard `BEFORE`, has no end of answers to."""
    return endless_words(twins.line, BEFORE)


@pytest.fixture(scope="session")
def endless_without_memory(twins):
    return endless_words(twins.line, mode="off")


@pytest.fixture
def servers(zygote, store):
    """Start servers that end with the test: `servers("one", url=proxy.url, lease_seconds=2)`."""
    started = []

    def start(name, url=None, **settings):
        habits = {"server_id": name, "lease_seconds": 1, "store_timeout": 0.5}
        chosen = EXACT | habits | settings
        started.append(zygote.spawn(url or store.url, settings=chosen))
        return started[-1]

    yield start
    for server in started:
        server.close()


@pytest.fixture
def name(request):
    """A session that no other test has heard of."""
    return "".join(c if c.isalnum() else "-" for c in request.node.name)[:120].strip("-")
