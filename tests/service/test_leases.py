"""One answer at a time in a conversation, over all processes; what a dead one left is found once."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from agents.service.leases import Abandoned, BusyError, Leases
from agents.store import ConflictError, StoreError
from tests.databases import at_once, losing_store
from tests.fakes import FakeClock


@pytest.fixture
def clock():
    return FakeClock()


@pytest.fixture
def leases(store, clock):
    for name in "abc":
        store.conversations.create(name)
    return Leases(store, clock)


def abandoned(leases):
    """What was left, by who took it away."""
    return [left for left in leases.stale() if leases.end(left)]


def test_one_holder_at_a_time(leases):
    assert leases.take("a", "t1") is None
    with pytest.raises(BusyError, match=r"conversation 'a': wait") as caught:
        leases.take("a", "t2")
    assert isinstance(caught.value, ConflictError)
    assert caught.value.retriable
    leases.take("b", "t3")  # another conversation is another matter
    assert leases.running(["a", "b", "c", "d"]) == {"a", "b"}
    assert leases.running(iter("bc")) == {"b"}
    leases.release("t1")
    leases.release("t1")  # no error
    assert leases.running("abc") == {"b"}
    leases.take("a", "t4")


def test_a_conversation_that_is_not_there_has_no_lease(leases):
    with pytest.raises(StoreError, match="no conversation 'x'") as caught:
        leases.take("x", "t1")
    assert caught.value.reason == "missing"
    assert not leases.cancel("x")


def test_a_deleted_conversation_takes_its_lease_along(leases, store):
    leases.take("a", "t1")
    store.conversations.delete("a")
    assert leases.beat({"t1": ""}) == {"t1"}


def test_a_beat_keeps_a_lease_alive_and_says_who_must_stop(leases, clock):
    assert leases.beat({}) == set()
    leases.take("a", "t1")
    leases.take("b", "t2")
    for _ in range(3):
        clock.sleep(10)
        assert leases.beat({"t1": "Hel", "t2": ""}) == set()
    assert leases.running("ab") == {"a", "b"}
    assert leases.cancel("a")
    assert leases.beat({"t1": "Hello", "t2": "", "t9": "nobody's"}) == {"t1", "t9"}
    assert leases.beat({"t1": "Hello", "t2": ""}) == {"t1"}  # told until it is released
    leases.release("t1")
    assert not leases.cancel("a")
    leases.take("a", "t3")
    assert leases.beat({"t3": ""}) == set()  # a new answer is not cancelled


def test_what_a_dead_holder_left_is_found_once(leases, clock):
    leases.take("a", "t1")
    leases.take("b", "t2")
    leases.beat({"t1": "Hel\0lo \ud800"})
    clock.sleep(14.9)
    assert abandoned(leases) == []
    leases.beat({"t2": "alive"})
    clock.sleep(0.1)
    assert leases.running("ab") == {"b"}
    assert not leases.cancel("a")
    assert abandoned(leases) == [Abandoned("a", "Hel lo ?", "t1")]
    assert abandoned(leases) == []
    assert leases.beat({"t1": "Hello!"}) == {"t1"}  # it was not dead: its lease is lost


def test_a_holder_that_was_only_slow_keeps_its_lease_until_somebody_takes_it_away(leases, clock):
    leases.take("a", "t1")
    clock.sleep(60)
    assert leases.beat({"t1": "Hello"}) == set()
    assert leases.running("a") == {"a"}
    assert abandoned(leases) == []


def test_who_takes_a_stale_lease_gets_what_was_left(leases, clock):
    leases.take("a", "t1")
    leases.beat({"t1": "Hello"})
    assert leases.cancel("a")
    clock.sleep(15)
    assert leases.take("a", "t2") == Abandoned("a", "Hello", "t1")
    assert abandoned(leases) == []
    assert leases.beat({"t1": "x", "t2": "new"}) == {"t1"}
    leases.release("t1")  # of the lease that is lost: the new one stays
    assert leases.running("a") == {"a"}


def test_a_time_of_ones_own_can_be_set(store, clock):
    store.conversations.create("a")
    leases = Leases(store, clock, stale_after=1)
    leases.take("a", "t1")
    clock.sleep(1)
    assert len(abandoned(leases)) == 1


def test_of_many_threads_exactly_one_takes_a_lease(leases, clock):
    def take(number):
        try:
            return (leases.take("a", f"t{number}"),)
        except BusyError:
            return ()

    with ThreadPoolExecutor(8) as pool:
        (first,) = (one for taken in pool.map(take, range(16)) for one in taken)
        assert first is None
        clock.sleep(15)
        (second,) = (one for taken in pool.map(take, range(16, 32)) for one in taken)
        assert second.conversation == "a"
        clock.sleep(15)
        found = [one for some in pool.map(lambda _: abandoned(leases), range(16)) for one in some]
        assert len(found) == 1


TAKER = """
import sys
from agents.service.leases import BusyError, Leases
from agents.store import Store
url, me, taken = *sys.argv[1:], 0
with Store.open(url, busy_timeout=30) as store:
    leases = Leases(store)
    print(flush=True); sys.stdin.readline()
    for number in range(30):
        try:
            leases.take(str(number), f"{me} {number}")
            taken += 1
        except BusyError:
            pass
print(taken)
"""


def test_of_two_processes_exactly_one_takes_each_lease(store, url):
    for number in range(30):
        store.conversations.create(str(number))
    assert sum(map(int, at_once(TAKER, [url, "a"], [url, "b"]))) == 30
    assert len(Leases(store).running(map(str, range(30)))) == 30


FINDER = """
import sys
from agents.service.leases import Leases
from agents.store import Store
found = 0
with Store.open(sys.argv[1], busy_timeout=30) as store:
    leases = Leases(store)
    print(flush=True); sys.stdin.readline()
    for _ in range(20):
        found += sum(leases.end(left) for left in leases.stale())
print(found)
"""


def test_of_two_processes_exactly_one_finds_what_was_left(store, url, clock):
    dead = Leases(store, clock)  # in 1970
    for number in range(30):
        store.conversations.create(str(number))
        dead.take(str(number), str(number))
    assert sum(map(int, at_once(FINDER, [url], [url]))) == 30


@pytest.mark.parametrize("after", [True, False])
def test_a_lease_whose_writing_lost_its_answer_is_taken(postgres, after, clock):
    with losing_store(postgres.new(), after=after) as (store, lost):
        lost.append(True)
        store.conversations.create("a")
        leases = Leases(store, clock)
        lost.clear()
        assert leases.take("a", "t1") is None
        lost.clear()
        assert leases.beat({"t1": "Hello"}) == set()


def test_a_lease_that_comes_and_goes_is_busy(leases, store, monkeypatch):
    """Whoever finds it taken, then gone, again and again, is told to come back."""
    from agents.service import leases as module

    never = (
        "UPDATE answering SET beat = beat WHERE conversation = :id AND token = :token AND :now < 0"
    )
    monkeypatch.setattr(module, "_TAKE", never)
    with pytest.raises(BusyError):
        leases.take("a", "t1")
