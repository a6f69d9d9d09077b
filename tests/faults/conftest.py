"""Federations that several files share, since each takes a dozen processes: their tests come next to each other, and it ends with the last of them."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.federation import HOSPITALS, Federation
from tests.faults.proxy import Proxy

SHARING = {
    "hospitals": ("test_courier_confined", "test_network", "test_sites_die", "test_slow_site"),
    "seeded": ("test_same_result", "test_lies"),  # the liar begins to lie in the second
}
SOUTH = HOSPITALS[2]
_open: dict[str, Federation] = {}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The tests of files that share a federation come together; those of other files are elsewhere as they were."""
    places = {name: place for place, name in enumerate(name for names in SHARING.values() for name in names)}
    ours = [index for index, item in enumerate(items) if item.path.parent == Path(__file__).parent]
    for index, item in zip(ours, sorted((items[index] for index in ours), key=lambda item: places.get(item.path.stem, len(places))), strict=True):
        items[index] = item


def pytest_runtest_teardown(nextitem: pytest.Item | None) -> None:
    """A federation that the next test does not share ends."""
    for name in [name for name in _open if nextitem is None or nextitem.path.stem not in SHARING[name]]:
        _open.pop(name).close()


def _shared(name: str, start: Callable[[], Federation]) -> Federation:
    if name not in _open:
        _open[name] = start()
    return _open[name]


@pytest.fixture(scope="session")
def proxy() -> Proxy:
    """The way of one of the hospitals to the coordinator; its threads end with this process."""
    return Proxy().start()


@pytest.fixture
def hospitals(tmp_path_factory: pytest.TempPathFactory, proxy: Proxy) -> Federation:
    """Three hospitals, one of them behind the proxy."""

    def start() -> Federation:
        made = _open["hospitals"] = Federation(tmp_path_factory.mktemp("hospitals"))
        made.start(**{SOUTH: {"HTTPS_PROXY": proxy.url}})
        return made

    return _shared("hospitals", start)


@pytest.fixture
def seeded(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    """Three hospitals whose noise is seeded."""

    def start() -> Federation:
        made = _open["seeded"] = Federation(tmp_path_factory.mktemp("seeded"), (HOSPITALS[0], HOSPITALS[1], HOSPITALS[3]), seed=11)
        made.start()
        return made

    return _shared("seeded", start)
