"""What needs no GPU of the passes: Python's collector is off inside, and as it was afterwards."""

from __future__ import annotations

import gc

import pytest

from qwen2tool.training.passes import _collector_waits


@pytest.fixture
def collector():
    enabled = gc.isenabled()
    yield
    (gc.enable if enabled else gc.disable)()


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("error", [None, RuntimeError])
def test_the_collector_waits_and_is_then_as_it_was(enabled, error, collector):
    inside = []

    @_collector_waits()
    def work():
        inside.append(gc.isenabled())
        if error:
            raise error

    (gc.enable if enabled else gc.disable)()
    for _ in range(2):
        if error:
            with pytest.raises(error):
                work()
        else:
            work()
        assert gc.isenabled() is enabled
    assert inside == [False, False]
