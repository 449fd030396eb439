# SPDX-License-Identifier: Apache-2.0
"""Leases of pages: none is ever two strangers', what is read stays, and who was asked least recently goes first."""

import copy
import pickle
import random
import shlex
import subprocess
import sysconfig
import threading
from pathlib import Path

import pytest
import torch

from hourllava_ext.page_allocator import PageAllocator

ROOT = Path(__file__).resolve().parents[2]


def test_pages_are_taken_in_order_and_come_back():
    pages = PageAllocator(10)
    lease, numbers = pages.take(4)
    assert numbers.tolist() == [0, 1, 2, 3]
    assert pages.counts() == (10, 6, 0)
    assert pages.unpin(lease)
    assert pages.counts() == (10, 6, 4)
    assert pages.take(7) is None
    assert pages.counts() == (10, 6, 4)
    assert pages.release(lease)
    assert pages.counts() == (10, 10, 0)
    assert pages.take(10)[1].tolist() == list(range(10))


@pytest.mark.parametrize("page", [3, 4, 8, 10**9, -1, -(10**9)])
def test_only_pages_of_leases_are_shared(page):
    pages = PageAllocator(8)
    _, held = pages.take(3)
    with pytest.raises(ValueError, match="a shared page is held by no lease"):
        pages.take(1, torch.tensor([0, page]))
    assert pages.counts() == (8, 5, 0)
    for wrong in (held.int(), held[None], held.to("meta")):
        with pytest.raises(ValueError, match=r"shared pages must be int64 \(n,\) on the CPU, got torch.int"):
            pages.take(1, wrong)
    with pytest.raises(ValueError, match="nobody can take -1 pages"):
        pages.take(-1)
    assert pages.take(5, held)[1].tolist() == [3, 4, 5, 6, 7]


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps], ids=lambda c: c.__name__)
def test_leases_are_not_copied(copied):
    with pytest.raises(TypeError, match="page_allocator: its leases belong to one process and cannot be copied"):
        copied(PageAllocator(2))


def test_the_default_device_is_no_concern():
    with torch.device("meta"):
        pages = PageAllocator(4)
        lease, numbers = pages.take(3)
        assert pages.unpin(lease)
        assert pages.counts() == (4, 1, 3)
        assert pages.evict(4) == [lease]
    assert numbers.tolist() == [0, 1, 2]


def test_the_least_recently_pinned_goes_first_and_none_that_is_pinned():
    pages = PageAllocator(9)
    leases = [pages.take(3)[0] for _ in range(3)]
    assert pages.evict(1) is None
    for lease in leases:
        pages.unpin(lease)
    assert pages.pin(leases[0])  # asked again, and being read
    assert pages.evict(7) is None
    assert pages.evict(1) == [leases[1]]
    assert not pages.pin(leases[1])
    assert pages.counts() == (9, 0, 3)
    assert pages.release(leases[1])
    pages.unpin(leases[0])
    assert pages.evict(3) == []
    assert pages.evict(9) == [leases[2], leases[0]]


def test_shared_pages_stay_for_who_reads_them():
    pages = PageAllocator(8)
    short, first = pages.take(4)
    longer, second = pages.take(2, first[:3])
    assert second.tolist() == [4, 5]
    assert pages.release(short)
    assert not pages.pin(short)
    assert pages.counts() == (8, 2, 0)
    pages.unpin(longer)
    assert pages.counts() == (8, 2, 2)  # the three others are still being read by the short one
    assert pages.evict(5) is None
    pages.unpin(short)
    assert pages.counts() == (8, 3, 5)
    assert pages.evict(8) == [longer]
    assert pages.release(longer)
    assert pages.counts() == (8, 8, 0)


def test_nothing_is_undone_twice():
    pages = PageAllocator(2)
    lease, _ = pages.take(2)
    assert pages.unpin(lease)
    assert not pages.unpin(lease)
    assert pages.release(lease)
    assert not any((pages.release(lease), pages.unpin(lease), pages.pin(lease), pages.pin(99)))


def test_no_pages():
    pages = PageAllocator(0)
    assert pages.take(1) is None
    assert pages.evict(0) == []
    assert pages.take(0)[1].tolist() == []
    with pytest.raises(ValueError, match="cannot be -1 pages"):
        PageAllocator(-1)


def test_many_python_threads():
    """Each thread writes its name into pages that it has pinned, and finds it there."""
    pages, owners = PageAllocator(32), torch.zeros(32, dtype=torch.int64)
    wrong, evictions = [], []

    def work(name):
        draw = random.Random(name)
        for _ in range(400):
            wanted = draw.randint(1, 12)
            for lease in pages.evict(wanted) or []:
                evictions.append(lease)
                wrong.extend([lease] * (pages.pin(lease) or not pages.release(lease)))
            taken = pages.take(wanted)
            if taken is None:
                continue
            lease, numbers = taken
            owners[numbers] = name
            for _ in range(draw.randint(0, 3)):
                if pages.pin(lease):
                    wrong.extend([lease] * (not bool((owners[numbers] == name).all())))
                    pages.unpin(lease)
            wrong.extend([lease] * (not bool((owners[numbers] == name).all())))
            pages.unpin(lease)

    threads = [threading.Thread(target=work, args=(name,)) for name in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(evictions) > 100
    for lease in pages.evict(32):
        pages.release(lease)
    assert pages.counts() == (32, 32, 0)


def test_many_threads_without_python(tmp_path):
    """The same in C++, under the thread sanitizer."""
    compiler = shlex.split(sysconfig.get_config_var("CXX") or "c++")[0]
    program = tmp_path / "stress"
    sources = [ROOT / "csrc/page_allocator.cpp", ROOT / "tests/memory/page_allocator_stress.cpp"]
    options = ["-std=c++20", "-O1", "-g", "-pthread", "-fsanitize=thread", f"-I{ROOT / 'csrc'}"]
    subprocess.run([compiler, *options, *map(str, sources), "-o", str(program)], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
