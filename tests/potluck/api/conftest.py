from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.api.server import Server


@pytest.fixture
def server() -> Iterator[Server]:
    opened = Server()
    yield opened
    opened.close()
