"""Memory that is locked for the device, on a CPU that has a driver of its own making."""

from __future__ import annotations

import ctypes
import gc
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from qwen2tool.routing import host
from qwen2tool.routing.host import LAG, Copied, Homes, HostStore, _Pages, pinned

SIZE = 8 << 20
SMAPS = Path("/proc/self/smaps")
LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


class Locked(dict):
    """Sizes by address, and the addresses that were asked to be unlocked, in vain or not."""

    def __init__(self):
        super().__init__()
        self.asked = []


@pytest.fixture
def driver(monkeypatch):
    """What is locked, by address; unlocking reads a byte of it, which ends the process where the memory is gone."""
    locked = Locked()

    def register(address, size, flags):
        assert flags == 0
        locked[address] = size
        return 0

    def unregister(address):
        locked.asked.append(address)
        assert ctypes.string_at(address, 1) == b"\x07"
        del locked[address]
        return 0

    fake = SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=unregister)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: fake)
    return locked


def test_locked_as_long_as_any_view_lives(driver):
    memory = pinned(SIZE)
    assert len(memory) == SIZE and not memory.any() and driver == {memory.data_ptr(): SIZE}
    part = memory.fill_(7)[100:108].view(torch.float32)
    del memory
    gc.collect()
    assert len(driver) == 1
    del part
    gc.collect()
    assert not driver


def test_memory_that_was_never_locked_is_not_unlocked(driver, monkeypatch):
    spare = torch.zeros(SIZE, dtype=torch.uint8)
    refuses = SimpleNamespace(cudaHostRegister=lambda *_: 712, cudaHostUnregister=lambda _: pytest.fail("not locked"))
    monkeypatch.setattr(torch, "zeros", lambda *_, device: None)  # the launch that takes the refusal's error along
    monkeypatch.setattr(torch.cuda, "cudart", lambda: refuses)
    monkeypatch.setattr(torch, "empty", lambda size, dtype, pin_memory: spare[:size])
    assert pinned(SIZE).data_ptr() == spare.data_ptr(), "torch's own, where the driver refuses ours"
    gc.collect()


def test_what_the_driver_does_not_let_go_of_stays(driver, monkeypatch):
    """Given back to the system its address would be somebody else's, and copies would still go to the old pages."""
    locks = torch.cuda.cudart().cudaHostRegister
    refuses = SimpleNamespace(cudaHostRegister=locks, cudaHostUnregister=lambda _: 900)  # while a stream is captured
    monkeypatch.setattr(torch.cuda, "cudart", lambda: refuses)
    before = len(_Pages.kept)
    memory = pinned(SIZE).fill_(7)
    address = memory.data_ptr()
    del memory
    gc.collect()
    assert ctypes.string_at(address, 1) == b"\x07" and len(_Pages.kept) == before + 1
    _Pages.kept.pop().unlock = None


def flags_and_large_pages(address):
    """Of the mapping that `address` is in: VmFlags, and kB in large pages."""
    inside, found = False, {}
    for line in SMAPS.read_text().splitlines():
        bounds = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if bounds:
            inside = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif inside:
            name, _, value = line.partition(":")
            found[name] = value.split()
    return found["VmFlags"], int(found["AnonHugePages"][0])


@pytest.mark.skipif(not SMAPS.exists(), reason="Linux tells of its mappings")
def test_no_child_gets_its_pages_and_they_are_large(driver):
    """Shared memory would be in small pages: 0.4 s for 2 GB instead of hundredths."""
    memory = pinned(SIZE).fill_(7)
    flags, large = flags_and_large_pages(memory.data_ptr() + SIZE // 2)
    assert "sh" not in flags and "wf" in flags, "private, and not copied by a fork"
    if LARGE_PAGES.exists() and "[never]" not in LARGE_PAGES.read_text():
        assert "hg" in flags and large >= SIZE // 4 // 1024, f"{large} kB"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a fork")
@pytest.mark.filterwarnings("ignore:This process")
def test_a_child_may_collect_it(driver):
    """A worker's garbage collector finds what the parent had not collected yet: it must not take what the worker has
    put in the same place, nor unlock what is the parent's."""
    memory = pinned(SIZE).fill_(7)
    child = os.fork()
    if child == 0:
        mine = [torch.ones(SIZE // 4, dtype=torch.uint8) for _ in range(8)]
        outside = all(not 0 <= part.data_ptr() - memory.data_ptr() < SIZE for part in mine)
        wiped = not memory[:4096].any()
        del memory
        gc.collect()
        os._exit(0 if outside and wiped and not driver.asked and all(int(part.sum()) for part in mine) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert memory.eq(7).all() and len(driver) == 1


class Stream:
    device = torch.device("cpu")
    waits = 0

    def synchronize(self):
        self.waits += 1


@pytest.fixture
def stream(monkeypatch):
    """In the place of CUDA's; copies to and from the host are under way until somebody waits for them."""
    made = Stream()
    monkeypatch.setattr(host, "pinned", lambda size: torch.zeros(size, dtype=torch.uint8))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: made)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(Copied, "start", lambda stream, layer, tensor, source, out=False: Copied(layer, tensor, None))
    monkeypatch.setattr(Copied, "wait", lambda copied: None)
    return made


@pytest.mark.parametrize("forwards", [(12, 5, 12), (2, 12), (3, 12), (1, 1, 1, 12)], ids=str)
def test_a_forward_that_no_backward_followed_is_not_held_on_to(forwards, stream):
    """What it left under way would stand before all that the next forward puts there."""
    store, most = HostStore(), []
    for layers in forwards:
        store.begin()
        for index in range(layers):
            store.put(index, "x", torch.zeros(4))
            store.let_go(index)
            most.append(len(store._leaving))
    assert max(most) == LAG and stream.waits == len(forwards) - 1, most


@pytest.mark.parametrize("capturing", [False, True])
def test_a_pass_begins_with_nothing_under_way(capturing, stream, monkeypatch):
    """A backward that broke off has fetched what nobody took. A capture may not wait for it: whoever begins one has."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    store = HostStore()
    store.begin()
    for index in range(5):
        store.put(index, "x", torch.zeros(4))
        store.put(index, "gate_up", torch.zeros(4))
    store.fetch_below(4)
    assert len(store._arriving) == 3
    store.begin()
    assert not store._leaving and not store._arriving and stream.waits == (0 if capturing else 1)
    store.fetch_below(4)
    assert not store._arriving, "what an earlier pass put there is of no use to this one"
    store.put(3, "x", torch.zeros(4))
    store.fetch_below(4)
    assert [ticket.name for ticket in store._arriving] == ["x"], "the control: its own is"


def test_homes_stand_side_by_side(monkeypatch):
    monkeypatch.setattr(host, "pinned", lambda size: torch.zeros(size, dtype=torch.uint8))
    bytes_ = [torch.zeros(count, dtype=torch.uint8) for count in (256, 1)]
    tensors = [*bytes_, torch.zeros(3, 25), torch.ones(2)]
    block, places = Homes.of(tensors)
    assert [place.data_ptr() - block.data_ptr() for place in places] == [0, 256, 512, 1024], "at multiples of 256"
    assert len(block) == 1280
    assert [(place.dtype, place.shape) for place in places] == [(x.dtype, x.shape) for x in tensors]
    for place, x in zip(places, tensors, strict=True):
        assert torch.equal(place.copy_(x), x)
