"""The blocking face: the same names and signatures, one thread, and nothing that waits for ever."""

from __future__ import annotations

import inspect
import multiprocessing
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

import unistream
from unistream import _client, _confirmation, _consumer, _delivery, _group, _producer, sync
from unistream._registry import find_driver
from unistream.driver.checked import checked
from unistream.errors import ClosedError, ConfigError, LeaseLostError

LIMIT = 20.0

PAIRS = [
    (_client.Client, sync.Client),
    (_producer.Producer, sync.Producer),
    (_confirmation.Confirmation, sync.Confirmation),
    (_group.Group, sync.Group),
    (_consumer.Consumer, sync.Consumer),
    (_delivery.Delivery, sync.Delivery),
]
RETURNS = {"Awaitable[None]": "None", "AsyncIterator[Event]": "Iterator[Event]"}


@pytest.fixture
def client() -> Iterator[sync.Client]:
    """A blocking client on a broker of its own, through the checked driver."""
    with sync.connect("memory://", driver=checked(find_driver("memory"))) as client:
        client.create_topic("t")
        yield client


def _public(kind: type) -> dict[str, Any]:
    members: dict[str, Any] = {}
    for each in reversed(kind.__mro__[:-1]):
        members |= {name: value for name, value in vars(each).items() if not name.startswith("_")}
    return {name: value for name, value in members.items() if callable(value) or isinstance(value, property)}


@pytest.mark.parametrize(("one", "other"), PAIRS, ids=lambda kind: kind.__module__ + "." + kind.__name__)
def test_both_faces_have_the_same_names_and_signatures(one: type, other: type) -> None:
    """Name by name, parameter by parameter, default by default, type by type."""
    ours, theirs = _public(one), _public(other)
    # Attributes that instances have there are properties here.
    attributes = {name for name in theirs if name not in ours and isinstance(theirs[name], property)}
    assert set(ours) == set(theirs) - attributes
    assert attributes <= {"topic", "stats", "name", "retry", "dead_letter", "group_name"}
    for name, value in ours.items():
        assert isinstance(value, property) == isinstance(theirs[name], property), name
        if isinstance(value, property):
            continue
        wanted, given = inspect.signature(value), inspect.signature(theirs[name])
        assert list(wanted.parameters.values()) == list(given.parameters.values()), name
        returned = str(wanted.return_annotation)
        assert RETURNS.get(returned, returned) == str(given.return_annotation), name


def test_connect_has_one_signature() -> None:
    """Also the way in."""
    assert inspect.signature(unistream.connect).parameters == inspect.signature(sync.connect).parameters


def test_publish_receive_settle(client: sync.Client) -> None:
    """The whole way, by every way in and out."""
    group = client.group("g", "t")
    group.create()
    with client.producer("t") as producer, group.consumer() as consumer:
        receipt = producer.publish(b"1", key="k", headers={"a": "b"})
        confirmation = producer.submit(b"2")
        assert confirmation.result(timeout=LIMIT).id == confirmation.id
        assert confirmation.failure() is None
        assert len(producer.publish_many(b"%d" % i for i in range(3, 2503))) == 2500
        first = consumer.receive(timeout=LIMIT)
        assert first is not None
        assert (first.value, first.key, first.headers["a"], first.id) == (b"1", b"k", b"b", receipt.id)
        first.ack(confirm=True)
        with next(consumer) as second:
            assert second.value == b"2"
        with pytest.raises(KeyError), next(consumer):
            raise KeyError("nacked")
        third, *more = consumer.receive_many(3, timeout=LIMIT)
        third.extend(5)
        third.reject("bad")
        assert consumer.ack_many(more, confirm=True) == [None, None]
        assert consumer.stats.rejected == 1
        assert group.lag().messages == 2500 - 3
        assert client.health().ok


def test_handlers_run_in_threads_exactly_as_many_as_asked(client: sync.Client) -> None:
    """`run` in the blocking face: `concurrency` threads at a time, settled by how the handler ends."""
    group = client.group("g", "t")
    group.create()
    with client.producer("t") as producer:
        producer.publish_many([b"%d" % i for i in range(30)])
    lock = threading.Lock()
    now, most, seen, names = 0, 0, [], set()
    together = threading.Barrier(3)
    over = threading.Event()

    def handler(delivery: sync.Delivery) -> None:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
            seen.append(delivery.value)
            names.add(threading.current_thread().name)
        together.wait(LIMIT)
        with lock:
            now -= 1
            if len(seen) == 30 and now == 0:
                over.set()

    reports: list[Any] = []
    runner = threading.Thread(target=lambda: reports.append(group.run(handler, concurrency=3)))
    runner.start()
    assert over.wait(LIMIT)
    client.close()
    runner.join(LIMIT)
    assert not runner.is_alive()
    assert most == 3
    assert sorted(seen) == sorted(b"%d" % i for i in range(30))
    assert all(name.startswith("unistream handler") for name in names)
    assert reports[0].handled == 30


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_a_handler_that_stops_the_program_ends_run_in_the_callers_thread(
    client: sync.Client, stop: type[BaseException]
) -> None:
    """SystemExit and KeyboardInterrupt of a handler come out of `run`, the message is given back, the client lives."""
    group = client.group("g", "t")
    group.create()
    with client.producer("t") as producer:
        producer.publish(b"x")

        def handler(delivery: sync.Delivery) -> None:
            raise stop

        with pytest.raises(stop):
            group.run(handler)
        with group.consumer() as consumer:
            delivery = consumer.receive(timeout=LIMIT)
            assert delivery is not None
            assert delivery.attempt == 1
            delivery.ack()


def test_a_bad_concurrency_is_a_config_error(client: sync.Client) -> None:
    """As in the asyncio face."""
    with pytest.raises(ConfigError):
        client.group("g", "t").run(lambda delivery: None, concurrency=0)


def test_an_interrupted_wait_is_cancelled_and_waited_for(client: sync.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a KeyboardInterrupt in `receive` nothing is left that would eat the next message."""
    from unistream import _portal

    group = client.group("g", "t")
    with client.producer("t") as producer, group.consumer() as consumer:
        calls: list[Any] = []

        class Interrupted(_portal._Call[Any]):
            """A call whose caller is interrupted while it waits."""

            def __init__(self, loop: Any, coroutine: Any) -> None:
                super().__init__(loop, coroutine)
                calls.append(self)
                waiting = self.done.result

                def result(timeout: float | None = None) -> Any:
                    self.done.result = waiting  # type: ignore[method-assign]
                    raise KeyboardInterrupt

                self.done.result = result  # type: ignore[method-assign]

        with monkeypatch.context() as patch:
            patch.setattr(_portal, "_Call", Interrupted)
            with pytest.raises(KeyboardInterrupt):
                consumer.receive()
        [call] = calls
        assert call.done.done()
        producer.publish(b"x")
        delivery = consumer.receive(timeout=LIMIT)
        assert delivery is not None
        assert delivery.value == b"x"
        delivery.ack()


def test_a_call_from_the_clients_own_loop_is_refused(client: sync.Client) -> None:
    """It would wait for itself for ever; the iterable of `publish_many` is read in the caller's thread."""
    portal = client._open()
    errors: list[BaseException] = []
    done = threading.Event()

    def inside() -> None:
        try:
            client.topics()
        except ClosedError as error:
            errors.append(error)
        done.set()

    portal.loop.call_soon_threadsafe(inside)
    assert done.wait(LIMIT)
    assert "wait for itself" in str(errors[0])
    with client.producer("t") as producer:
        threads = set()

        def messages() -> Iterator[bytes]:
            threads.add(threading.current_thread())
            yield b"%d" % len(client.topics())

        assert len(producer.publish_many(messages())) == 1
        assert threads == {threading.current_thread()}


def test_closed_clients_and_their_parts_say_so(client: sync.Client) -> None:
    """Every call after `close` is a ClosedError at once, from any thread; leaving blocks afterwards is quiet."""
    with client.producer("t") as producer, client.group("g", "t").consumer() as consumer:
        producer.publish(b"x")
        delivery = consumer.receive(timeout=LIMIT)
        assert delivery is not None
        events = client.events()
        client.close()
        client.close()
        for call in (client.topics, lambda: producer.publish(b"y"), consumer.receive, delivery.ack, client.health):
            with pytest.raises((ClosedError, LeaseLostError)):
                call()
        with pytest.raises(ClosedError):
            next(events)
    with pytest.raises(ClosedError), client:
        pass


def test_closing_wakes_whoever_waits(client: sync.Client) -> None:
    """Threads that wait for a message, an event or a confirm end with ClosedError, or as iteration ends."""
    consumer = client.group("g", "t").consumer().__enter__()
    events = client.events()
    ends: list[object] = []

    def waiting(call: Any) -> None:
        try:
            ends.append(call())
        except (ClosedError, StopIteration) as error:
            ends.append(error)

    started = [threading.Thread(target=waiting, args=(call,)) for call in (consumer.receive, lambda: list(consumer))]
    started += [threading.Thread(target=waiting, args=(lambda: list(events),)) for _ in range(1)]
    for thread in started:
        thread.start()
    deadline = time.monotonic() + LIMIT
    while len(consumer._consumer._intake.waiting) < 2 and time.monotonic() < deadline:
        client.topics()
    client.close()
    for thread in started:
        thread.join(LIMIT)
        assert not thread.is_alive()
    assert len(ends) == 3


def test_events_are_heard_from_the_call_on(client: sync.Client) -> None:
    """What happens between `events()` and the first `next` is not lost."""
    events = client.events()
    client._open().loop.call_soon_threadsafe(client._client._emit, unistream.DataLoss("t", "g", 1))

    assert next(events) == unistream.DataLoss("t", "g", 1)


def test_threads_publish_and_settle_side_by_side(client: sync.Client) -> None:
    """Four threads publish while three settle on one consumer: everything once."""
    group = client.group("g", "t")
    group.create()
    seen: list[bytes] = []
    with client.producer("t", max_unconfirmed=8) as producer, group.consumer(max_in_flight=16) as consumer:

        def publish(name: int) -> None:
            for index in range(50):
                producer.publish(b"%d/%d" % (name, index))

        def settle() -> None:
            while len(seen) < 200:
                delivery = consumer.receive(timeout=0.2)
                if delivery is not None:
                    with delivery:
                        seen.append(delivery.value)

        threads = [threading.Thread(target=publish, args=(name,)) for name in range(4)]
        threads += [threading.Thread(target=settle) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LIMIT)
            assert not thread.is_alive()
        assert sorted(seen) == sorted(b"%d/%d" % (name, index) for name in range(4) for index in range(50))
        assert producer.stats.confirmed == 200


def test_many_closes_race_with_many_calls() -> None:
    """However calls and closes from several threads fall, each call ends: with a result, or with ClosedError."""
    for _ in range(20):
        client = sync.connect("memory://").__enter__()
        ends: list[str] = []

        def call(client: sync.Client = client, ends: list[str] = ends) -> None:
            try:
                while True:
                    client.topics()
            except ClosedError:
                ends.append("closed")

        threads = [threading.Thread(target=call) for _ in range(4)]
        for thread in threads:
            thread.start()
        closers = [threading.Thread(target=client.close) for _ in range(2)]
        for thread in (*closers, *threads):
            if thread in closers:
                thread.start()
            thread.join(LIMIT)
            assert not thread.is_alive()
        assert ends == ["closed"] * 4


def test_a_dropped_delivery_is_logged_with_the_callers_place(
    client: sync.Client, caplog: pytest.LogCaptureFixture
) -> None:
    """DEL-8: the line of the application, not of the loop's thread."""
    with client.producer("t") as producer, client.group("g", "t").consumer() as consumer:
        for receive in (consumer.receive, lambda: consumer.receive_many(1), lambda: next(consumer)):
            caplog.clear()
            producer.publish(b"x")
            receive()
            messages = [record.getMessage() for record in caplog.records if "dropped without" in record.getMessage()]
            assert len(messages) == 1
            assert __file__ in messages[0]


@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork on Windows")
def test_a_forked_process_is_refused(client: sync.Client) -> None:
    """After a fork calls are ClosedErrors that say so, and `close` does not hang."""
    context: Any = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()

    def child() -> None:
        for call in (client.topics, client.close):
            try:
                call()
                answers.put("no error")
            except ClosedError as error:
                answers.put(str(error))

    process = context.Process(target=child)
    process.start()
    process.join(LIMIT)
    assert process.exitcode == 0
    assert "fork" in answers.get()
    assert "fork" in answers.get()
