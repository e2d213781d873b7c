"""Server-sent events from bytes: the same whatever the network does to them, and bounded."""

import tracemalloc
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from LLM.sse import EventTooLargeError, SSEDecoder

BOM = b"\xef\xbb\xbf"


def decode(*chunks, limit=1 << 20, end=True):
    decoder = SSEDecoder(limit)
    events = [event for chunk in chunks for event in decoder.feed(chunk)]
    return events + decoder.finish() if end else events


def cut(data, places):
    borders = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[a:b] for a, b in pairwise(borders)]


@pytest.mark.parametrize(
    "sent, events",
    [
        (b"data: a\n\n", [(b"", b"a")]),
        (b"data:a\n\n", [(b"", b"a")]),
        (b"data:  a \n\n", [(b"", b" a ")]),  # one blank belongs to the field, no more
        (b"data: a\r\n\r\n", [(b"", b"a")]),
        (b"data: a\r\r", [(b"", b"a")]),
        (b"data: a\n\r\ndata: b\r\n\n", [(b"", b"a"), (b"", b"b")]),
        (b"data: a\r\n\rdata: b\n\r", [(b"", b"a"), (b"", b"b")]),
        (b"data: a\ndata: b\n\n", [(b"", b"a\nb")]),
        (b"data: a\ndata\ndata: b\n\n", [(b"", b"a\n\nb")]),
        (b"data:\n\n", [(b"", b"")]),
        (b"data\n\n", [(b"", b"")]),
        (b"event: ping\ndata: a\n\n", [(b"ping", b"a")]),
        (b"data: a\nevent:ping\n\n", [(b"ping", b"a")]),
        (b"event: ping\n\ndata: a\n\n", [(b"", b"a")]),  # a name without data names nothing
        (b"event: one\ndata: a\n\ndata: b\n\n", [(b"one", b"a"), (b"", b"b")]),
        (b": keep-alive\n\n", []),
        (b": c\ndata: a\n: c\n\n", [(b"", b"a")]),
        (b"id: 7\nretry: 10\nfoo: bar\ndata: a\n\n", [(b"", b"a")]),
        (b"\n\n\n", []),
        (b"datax: a\n\n", []),
        (b"Data: a\n\n", []),
        (b" data: a\n\n", []),
        (b"", []),
        (BOM + b"data: a\n\n", [(b"", b"a")]),
        (BOM + BOM + b"data: a\n\n", []),  # a second one is text
        (b"data: a\n\n" + BOM + b"data: b\n\n", [(b"", b"a")]),
        (b"data: " + BOM + b"\n\n", [(b"", BOM)]),
        (BOM, []),
        (BOM[:2], []),
    ],
)
def test_the_format_as_it_is_specified(sent, events):
    assert decode(sent) == events


@pytest.mark.parametrize("character", "\u2028\u2029\x85\x0b\x0c\x1c\x1e\x00\ufeff")
def test_only_cr_and_lf_end_a_line(character):
    text = f"a{character}b".encode()
    assert decode(b"data: " + text + b"\n\n") == [(b"", text)]
    assert decode(b"data: x\n\n", b"data: " + text + b"\n\n")[1:] == [(b"", text)]


@pytest.mark.parametrize(
    "sent, events",
    [
        (b"data: [DONE]", [(b"", b"[DONE]")]),
        (b"data: [DONE]\n", [(b"", b"[DONE]")]),
        (b"data: [DONE]\r", [(b"", b"[DONE]")]),
        (b"event: x\ndata: a\ndata: b", [(b"x", b"a\nb")]),
        (b"event: x", []),
        (b": bye", []),
    ],
)
def test_an_event_without_its_blank_line_comes_at_the_end(sent, events):
    assert decode(sent, end=False) == []
    assert decode(sent) == events


@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r\n", b"\r\r"])
def test_an_event_comes_with_the_byte_that_ends_it(end):
    decoder = SSEDecoder()
    sent = b"data: a" + end
    came = [decoder.feed(sent[i : i + 1]) for i in range(len(sent))]
    # After CR CR nothing more is needed; the LF of a last CRLF says nothing new.
    assert [events for events in came if events] == [[(b"", b"a")]]
    assert decoder.finish() == []


def test_a_crlf_cut_in_two_is_one_line_end():
    assert decode(b"data: a\r", b"\ndata: b\r", b"\n\r", b"\n") == [(b"", b"a\nb")]


def test_an_empty_chunk_changes_nothing():
    assert decode(b"", b"data: a\r", b"", b"\n\r", b"", b"\n", b"") == [(b"", b"a")]


@pytest.mark.parametrize("place", range(4))
def test_a_byte_order_mark_may_be_cut_anywhere(place):
    sent = BOM + b"data: a\n\n"
    assert decode(sent[:place], sent[place:]) == [(b"", b"a")]
    assert decode(*(sent[i : i + 1] for i in range(len(sent)))) == [(b"", b"a")]


# Pieces of which real and hostile streams are made.
PIECES = st.sampled_from(
    [
        b"data: ",
        b"data:",
        b"data",
        b"event: e",
        b": comment",
        b"id: 1",
        b"\n",
        b"\r",
        b"\r\n",
        b"\n\n",
        b"\r\n\r\n",
        b"x",
        b" ",
        b":",
        b"[DONE]",
        BOM,
        b"\xef",
        "\u2028é😀".encode(),
        b"\xff\x00",
        b'data: {"a":1}\n\n',
    ]
)
STREAMS = st.lists(PIECES, max_size=30).map(b"".join)


@given(STREAMS, st.lists(st.integers(0, 1 << 16), max_size=12))
@example(b"data: a\r\n\r\ndata: b\n\n", [8, 10])
@example(b"data: a\n\ndata: b\n\n", [9])
@example(BOM + b"data: a\n\n", [1, 2])
@example(b"event: e\n\ndata: b\n\n", [10])
def test_any_chunking_of_the_same_bytes_gives_the_same_events(data, places):
    whole = decode(data)
    assert decode(*cut(data, places)) == whole
    assert decode(*(data[i : i + 1] for i in range(len(data)))) == whole


def specified(data):
    """The events of WHATWG HTML 9.2.6, read off its text; and the one that the end cut off."""
    text = data.decode("utf-8", "surrogateescape").removeprefix("\ufeff")
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    events, name, values = [], "", []
    for line in [*lines, ""]:
        field, colon, value = line.partition(":")
        if not line:
            if values:
                events.append((name, "\n".join(values)))
            name, values = "", []
        elif field == "data":
            values.append(value.removeprefix(" "))
        elif field == "event" and colon:
            name = value.removeprefix(" ")
    return [tuple(t.encode("utf-8", "surrogateescape") for t in event) for event in events]


@given(STREAMS)
def test_the_events_are_those_of_the_specification(data):
    assert decode(data) == specified(data)


@given(st.lists(st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]))))
def test_what_a_server_says_is_what_is_heard(texts):
    sent = b"".join(b"data: " + text.encode() + b"\n\n" for text in texts)
    assert [data.decode() for _, data in decode(sent)] == texts


LIMIT = 100


@pytest.mark.parametrize(
    "chunks",
    [
        [b"data: " + b"x" * 200],
        [b"x" * 200],
        [b": " + b"x" * 200],
        [b"data: " + b"x" * 60, b"x" * 60],
        [b"data: x\n"] * 100,
        [b"data\n"] * 200,
        [b"\xef\xbb\xbf" + b"x" * 200],
        [b"data: a\n\n", b"data: " + b"x" * 200 + b"\n"],
    ],
    ids=str,
)
def test_what_is_held_of_an_unfinished_event_is_limited(chunks):
    with pytest.raises(EventTooLargeError, match="100 bytes"):
        decode(*chunks, limit=LIMIT, end=False)


@pytest.mark.parametrize("before", [[], [b"data: a\n\n"]], ids=["first", "later"])
@pytest.mark.parametrize("size, fits", [(LIMIT - 1, True), (LIMIT + 1, False)])
def test_an_event_is_held_to_the_limit_however_it_was_cut(before, size, fits):
    whole = b"data: " + b"x" * size + b"\n\n"
    for chunks in ([whole], [whole[:50], whole[50:]], [whole[:-1], whole[-1:]]):
        try:
            events = decode(*before, *chunks, limit=LIMIT)
        except EventTooLargeError:
            events = []
        assert (events[-1:] == [(b"", b"x" * size)]) == fits, f"{len(chunks)} chunks"


def test_a_last_line_without_end_counts_once():
    assert decode(b"data: " + b"x" * 60, limit=LIMIT) == [(b"", b"x" * 60)]


def test_the_limit_is_for_one_event_and_not_for_the_stream():
    assert len(decode(*[b"data: " + b"x" * 50 + b"\n\n"] * 50, limit=LIMIT)) == 50
    assert len(decode(*[b"data: ", b"x" * 50, b"\r\n\r\n"] * 50, limit=LIMIT)) == 50


def test_events_before_one_that_is_too_large_are_not_lost():
    decoder = SSEDecoder(LIMIT)
    events = []
    with pytest.raises(EventTooLargeError):
        for chunk in (b"data: a\n\ndata: " + b"x" * 200, b"x", b"x"):
            events += decoder.feed(chunk)
    assert events == [(b"", b"a")]


def test_one_line_of_20_mb_costs_linear_work():
    """No chunk costs more than itself: what each `feed` allocates does not grow with what is held."""
    chunk = b"x" * 65536
    decoder = SSEDecoder()
    decoder.feed(b"data: ")
    worst = 0
    tracemalloc.start()
    try:
        for _ in range(320):
            held, _ = tracemalloc.get_traced_memory()
            tracemalloc.reset_peak()
            decoder.feed(chunk)
            worst = max(worst, tracemalloc.get_traced_memory()[1] - held)
    finally:
        tracemalloc.stop()
    assert worst < 2 * len(chunk)
    assert decoder.feed(b"\n\n") == [(b"", chunk * 320)]
