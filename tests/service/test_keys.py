"""Bearer keys: told once, recognized, counted, revoked; the database cannot tell them."""

import logging
import re
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from decimal import Decimal

import pytest

from agents.service.keys import Keys
from agents.store import ConflictError, Store, StoreError
from LLM import LLMConfigError
from tests.databases import at_once, losing_store
from tests.fakes import FakeClock


@pytest.fixture
def keys(store):
    return Keys(store)


@pytest.fixture
def quick():
    with Store.open(":memory:") as store:
        yield Keys(store)


def everything(store):
    """All that the tables of keys hold, as text."""
    rows = store.run(lambda connection: connection.exec_driver_sql("SELECT * FROM keys").all())
    return repr(rows)


def test_a_key_is_found_by_its_secret_alone(keys):
    assert not keys.any()
    assert keys.find("llm-0123456789-" + "x" * 43) is None
    ann, secret = keys.create("ann")
    bob, other = keys.create("bob", owner="team")
    assert re.fullmatch(rf"llm-{ann.id}-[\w-]{{43}}", secret)
    assert (keys.find(secret).id, keys.find(other).id) == (ann.id, bob.id)
    assert (ann.owner, bob.owner) == ("ann", "team")
    assert keys.any()
    for wrong in (
        secret[:-1] + ("a" if secret[-1] != "a" else "b"),
        secret.replace(ann.id, bob.id),
        secret[:-1],
        secret + "x",
        secret.upper(),
        "",
        "llm-",
        "x" * len(secret),
        "ü" * len(secret),
        "llm-" + "\0" * (len(secret) - 4),
        "llm-\ud800" + "x" * (len(secret) - 5),
        "llm-' OR 1=1 --" + "x" * (len(secret) - 15),
    ):
        assert keys.find(wrong) is None


def test_what_a_key_may_is_kept_with_it(keys):
    made, secret = keys.create(
        "ann", budget_usd="$1.50", budget_period="month", requests_per_minute=60
    )
    found = keys.find(secret)
    assert found == made
    assert (found.budget_usd, found.budget_period) == (Decimal("1.50"), "month")
    assert found.requests_per_minute == 60
    for_ever, _ = keys.create("bob", budget_usd=2, budget_period=None)
    assert (for_ever.budget_usd, for_ever.budget_period) == (2, None)
    free, _ = keys.create("eve")
    assert (free.budget_usd, free.budget_period, free.requests_per_minute) == (None, None, None)
    assert [key.name for key in keys.list()] == ["ann", "bob", "eve"]


@pytest.mark.parametrize(
    "name, options, word",
    [
        ("", {}, "1 to 200"),
        ("  ", {}, "1 to 200"),
        ("x" * 201, {}, "1 to 200"),
        (5, {}, "printed"),
        ("a\nb", {}, "printed"),
        ("a\0b", {}, "printed"),
        ("\ud800", {}, "printed"),
        ("a", {"owner": ""}, "owner"),
        ("a", {"budget_usd": "1 EUR"}, "usd"),
        ("a", {"budget_usd": -1}, "usd"),
        ("a", {"budget_usd": 0}, "usd"),
        ("a", {"budget_usd": 1, "budget_period": "week"}, "period"),
        ("a", {"requests_per_minute": 0}, "requests_per_minute"),
        ("a", {"requests_per_minute": True}, "requests_per_minute"),
        ("a", {"requests_per_minute": 1.5}, "requests_per_minute"),
    ],
)
def test_what_no_key_can_have_is_refused(quick, name, options, word):
    with pytest.raises(LLMConfigError, match=word):
        quick.create(name, **options)
    assert not quick.any()


def test_a_revoked_key_is_nobodys(keys):
    ann, secret = keys.create("ann")
    revoked = keys.revoke(ann.id)
    assert revoked.revoked is not None
    assert keys.find(secret) is None
    assert keys.revoke(ann.id) == revoked  # stays as it is
    assert keys.any()
    assert keys.list() == [revoked]
    again, other = keys.create("ann")  # its name is free again
    assert keys.revoke("ann").id == again.id
    assert keys.find(other) is None
    with pytest.raises(StoreError, match="no key 'ann'") as caught:
        keys.revoke("ann")
    assert caught.value.reason == "missing"


def test_a_name_that_a_key_has_is_refused_unless_the_owner_is_said(keys):
    keys.create("ann")
    keys.create("laptop", owner="team")
    for taken in ("ann", "team"):  # else it would see the conversations of others
        with pytest.raises(ConflictError, match=f"{taken!r}.* --owner "):
            keys.create(taken)
    second, _ = keys.create("ann", owner="ann")
    with pytest.raises(StoreError, match=r"several keys 'ann'.*" + second.id):
        keys.revoke("ann")
    keys.revoke(second.id)


def test_the_use_of_a_key_is_noted_once_a_minute(store):
    clock = FakeClock()
    keys = Keys(store, clock)
    made, secret = keys.create("ann")
    assert made.used is None
    keys.find(secret)
    first = keys.list()[0].used
    assert first == clock.utc()
    clock.sleep(59)
    keys.find(secret)
    assert keys.list()[0].used == first
    clock.sleep(1)
    keys.find(secret)
    assert keys.list()[0].used == first + timedelta(seconds=60)


def test_a_use_that_cannot_be_noted_keeps_nobody_out(tmp_path, caplog):
    url = f"sqlite:///{tmp_path}/chat.db"
    with Store.open(url) as store, Store.open(url, busy_timeout=0.01) as other:
        made, secret = Keys(store).create("ann")
        with store._engine(store._current(), write=True).connect() as writer:
            writer.exec_driver_sql("SELECT 1")  # begins, with the right to write
            assert Keys(other).find(secret).id == made.id
        assert made.id in caplog.text
        assert secret not in caplog.text


def test_the_secret_is_nowhere_but_in_the_hands_of_who_made_it(store, caplog):
    caplog.set_level(logging.DEBUG)
    keys = Keys(store)
    made, secret = keys.create("ann")
    random_part = secret.rpartition(f"{made.id}-")[2]
    keys.find(secret)
    with pytest.raises(ConflictError) as taken:
        keys.create("ann")
    with pytest.raises(StoreError) as unknown:
        keys.revoke("nobody")
    told = (
        everything(store), repr(made), repr(keys), repr(keys.list()), str(taken.value), str(unknown.value),
        repr(vars(keys)), caplog.text,
    )  # fmt: skip
    assert not any(random_part in text for text in told)


def test_no_trouble_of_the_database_tells_the_secret(tmp_path, caplog):
    with Store.open(f"sqlite:///{tmp_path}/chat.db") as store:
        keys = Keys(store)
        _, secret = keys.create("ann")
        store.run(lambda connection: connection.exec_driver_sql("DROP TABLE keys"))
        for work in (lambda: keys.find(secret), lambda: keys.create("bob")):
            with pytest.raises(StoreError) as caught:
                work()
            cause = caught.value.__cause__
            assert secret not in f"{caught.value!r} {caught.value} {cause!r} {cause}"
    assert secret not in caplog.text


def test_of_threads_that_make_a_key_of_one_name_one_can(keys):
    def make(_):
        try:
            keys.create("ann")
        except ConflictError:
            return 0
        return 1

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(make, range(8))) == 1


MAKER = """
import sys
from agents.service.keys import Keys
from agents.store import ConflictError, Store
made = 0
with Store.open(sys.argv[1], busy_timeout=30) as store:
    print(flush=True); sys.stdin.readline()
    for number in range(10):
        try:
            Keys(store).create(f"key {number}")
            made += 1
        except ConflictError:
            pass
print(made)
"""


def test_of_two_processes_that_make_keys_of_the_same_names_each_is_made_once(store, url):
    assert sum(map(int, at_once(MAKER, [url], [url]))) == 10
    assert len(Keys(store).list()) == 10


@pytest.mark.parametrize("after", [True, False])
def test_a_key_whose_writing_lost_its_answer_is_made_once(postgres, after):
    with losing_store(postgres.new(), after=after) as (store, lost):
        keys = Keys(store)
        made, secret = keys.create("ann")
        assert keys.find(secret) == made
        lost.clear()
        assert keys.revoke(made.id).revoked is not None
        assert [key.id for key in keys.list()] == [made.id]
