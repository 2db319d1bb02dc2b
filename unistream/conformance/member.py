"""A process that consumes and publishes as it is told: `python -m unistream.conformance.member`.

Commands come in on standard input as lines of JSON, `{"id": 1, "do": "join", …}`; answers (`{"id": 1, "ok": …}` or
`{"id": 1, "error": …}`) and the events of its history (`{"event": …}`) go out on standard output. An event is in the
pipe before anybody acts on it, so a process that is killed loses nothing of what it did. The URL comes through the
pipe too: a command line can be read by everybody on the machine.

At the end of its input it leaves properly.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, suppress
from importlib import import_module
from typing import IO, TYPE_CHECKING, Any, ClassVar

import unistream
from unistream.conformance.history import Event, Phase, Recorder
from unistream.conformance.plan import Handling, Plan
from unistream.conformance.proxy import Proxy, via
from unistream.conformance.recorded import Lent, RecordedMember, RecordedProducer
from unistream.conformance.saboteurs import load_saboteurs
from unistream.conformance.wrap import ConsumerLayer, DriverLayer, stack
from unistream.driver.contract import Driver
from unistream.driver.types import MaybeAwaitable, Settlement, SettleOutcome, Verb
from unistream.errors import UnistreamError
from unistream.message import Receipt

if TYPE_CHECKING:
    from unistream import Client

POLL_SECONDS = 0.5
"""How long a working member waits in one receive: often enough to notice that it should rest."""


class PipedRecorder(Recorder):
    """A recorder whose events go to the other end of a pipe and are kept nowhere else."""

    def __init__(self, proc: str, send: Callable[[dict[str, Any]], None]) -> None:
        super().__init__(time.monotonic_ns, proc=proc)
        self._send = send

    def record(self, op: str, phase: Phase = "event", **data: Any) -> Event:
        """Record and send."""
        event = super().record(op, phase, **data)
        self.events.clear()
        self._send({"event": event.to_json()})
        return event


class _MortalConsumer(ConsumerLayer):
    def settle(self, batch: Sequence[Settlement]) -> MaybeAwaitable[list[SettleOutcome]]:
        driver = self.driver
        assert isinstance(driver, Mortal)
        if driver.dies_at_ack and any(each.verb is Verb.ACK for each in batch):
            os.kill(os.getpid(), signal.SIGKILL)
        return self.inner.settle(batch)


class Mortal(DriverLayer):
    """A driver in whose calls the process can die: the one moment that no signal from outside can hit."""

    consumer_layer = _MortalConsumer
    dies_at_ack: ClassVar[bool] = False


class Worker:
    """What the process does, one method for each command (`do_join` for `join`)."""

    def __init__(self, out: IO[bytes], stack: AsyncExitStack) -> None:
        self._out = out
        self._stack = stack
        self._members: dict[str, RecordedMember] = {}
        self._producers: dict[str, RecordedProducer] = {}
        self._lents: dict[str, Lent] = {}
        self._work: dict[str, asyncio.Task[int]] = {}
        self._resting = asyncio.Event()
        self._proxy: Proxy | None = None
        self._driver: type[Driver] | None = None
        self._client: Client
        self._recorder: PipedRecorder
        self._run = ""

    def send(self, message: dict[str, Any]) -> None:
        """Write one line, whole, before going on."""
        event = message.get("event")
        line = f'{{"event":{event}}}' if event is not None else json.dumps(message)
        self._out.write(line.encode() + b"\n")
        self._out.flush()

    async def obey(self, command: dict[str, Any]) -> None:
        """Carry out one command and answer it."""
        number = command.pop("id")
        do: Callable[..., Awaitable[object]] = getattr(self, f"do_{command.pop('do')}")
        try:
            self.send({"id": number, "ok": await do(**command)})
        except Exception as error:
            # Whatever went wrong is the answer: the other process raises it where it asked.
            stored = getattr(error, "stored", None)
            self.send({"id": number, "error": type(error).__name__, "text": str(error), "stored": stored})

    async def do_open(self, *, url: str, driver: str, layers: list[str], run: str, name: str, wire: bool) -> str:
        """Connect; the driver class is named by its import path, layers are saboteurs."""
        module, _, path = driver.partition(":")
        found: Any = import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
        self._run = run
        self._recorder = PipedRecorder(name, self.send)
        if wire:
            self._proxy = await self._stack.enter_async_context(Proxy())
            found = via(found, self._proxy)
        saboteurs = load_saboteurs() if layers else {}
        self._driver = stack(found, *(saboteurs[layer].layer for layer in layers), Mortal)
        self._client = await self._stack.enter_async_context(unistream.connect(url, driver=self._driver))
        return self._client.capabilities.product

    async def do_join(
        self, *, member: str, topic: str, group: str, options: dict[str, Any], max_in_flight: int
    ) -> None:
        """Join a group."""
        if (retry := options.get("retry")) is not None:
            backoff = unistream.Backoff(**retry["backoff"])
            options["retry"] = unistream.Retry(max_attempts=retry["max_attempts"], backoff=backoff)
        made = RecordedMember(
            self._recorder,
            self._client.group(group, topic, **options),
            name=member,
            run=self._run,
            max_in_flight=max_in_flight,
        )
        await made.__aenter__()
        self._members[member] = made

    async def do_receive(self, *, member: str, timeout: float) -> dict[str, Any] | None:
        """Wait for one delivery and hold it."""
        lent = await self._members[member].receive(timeout)
        if lent is None:
            return None
        self._lents[lent.name] = lent
        key = lent.delivery.key
        return {
            "lending": lent.name,
            "msg": lent.msg,
            "attempt": lent.delivery.attempt,
            "key": None if key is None else key.decode("latin-1"),
        }

    async def do_settle(self, *, lending: str, op: str, **options: Any) -> str:
        """Ack, nack, reject or extend what is held; return the delivery's state."""
        lent = self._lents[lending]
        lent.expired()
        await getattr(lent, op)(**options)
        return str(lent.delivery.state)

    async def do_state(self, *, lending: str) -> str:
        """Return the state of what is held."""
        self._lents[lending].expired()
        return str(self._lents[lending].delivery.state)

    async def do_leave(self, *, member: str, drain: float) -> list[int]:
        """Leave properly."""
        return list(await self._members.pop(member).leave(drain))

    async def do_produce(self, *, producer: str, topic: str, **options: Any) -> None:
        """Open a producer."""
        made = RecordedProducer(self._recorder, self._client, topic, name=producer, run=self._run, **options)
        self._producers[producer] = await self._stack.enter_async_context(made)

    async def do_publish(
        self, *, producer: str, keys: list[str | None], size: int, timeout: float, gap: float
    ) -> dict[str, int]:
        """Publish a message for each key, `gap` seconds apart, many under way at once; return how each ended."""
        hand = self._producers[producer]
        counts = {"ok": 0, "no": 0, "unknown": 0}
        room = asyncio.Semaphore(200)

        async def one(key: bytes | None) -> None:
            async with room:
                try:
                    await hand.publish(key=key, size=size, timeout=timeout)
                    counts["ok"] += 1
                except UnistreamError as error:
                    counts[str(getattr(error, "stored", None) or "unknown")] += 1

        async with asyncio.TaskGroup() as tasks:
            for key in keys:
                async with room:
                    tasks.create_task(one(None if key is None else key.encode("latin-1")))
                await asyncio.sleep(gap)
        return counts

    async def do_publish_one(self, *, producer: str, key: str | None, size: int, timeout: float) -> str:
        """Publish one message; return its name."""
        encoded = None if key is None else key.encode("latin-1")
        name, receipt = await self._producers[producer].publish(key=encoded, size=size, timeout=timeout)
        assert isinstance(receipt, Receipt)
        return name

    async def do_publish_again(self, *, topic: str, bodies: dict[str, str]) -> list[bool | None]:
        """Publish bodies under ids of the caller's own; return for each whether it was known."""
        async with self._client.producer(topic) as producer:
            receipts = [await producer.publish(body.encode(), id=name) for name, body in bodies.items()]
        return [each.duplicate for each in receipts]

    async def do_work(self, *, member: str, seed: int, lease: float, handling: dict[str, Any]) -> None:
        """Let a member receive and settle by itself from now on, as `Plan.deed` says."""
        parts: dict[str, Any] = {name: tuple(e) if isinstance(e, list) else e for name, e in handling.items()}
        how = Handling(**parts)
        plan = Plan(seed, "queue", lease, True, 1, (), (), handling=how)
        self._work[member] = asyncio.create_task(self._labour(self._members[member], plan))

    async def do_rest(self) -> int:
        """Let the members finish what they hold and take nothing new; return how many deliveries they settled."""
        self._resting.set()
        return sum(await asyncio.gather(*self._work.values()))

    async def do_wire(self, *, fault: str, arguments: list[Any]) -> dict[str, int]:
        """Harm or heal the wire; return what it has carried, lost and broken so far."""
        assert self._proxy is not None
        getattr(self._proxy, fault)(*arguments)
        if fault in ("reset", "heal"):
            # Connections end by these; the fault lasts until that was felt.
            await self._client.health()
        return {"carried": self._proxy.carried, "lost": self._proxy.lost, "broken": self._proxy.broken}

    async def do_mortal(self) -> None:
        """Die within the next ack on its way to the broker."""
        Mortal.dies_at_ack = True
        assert self._driver is not None
        self._driver.dies_at_ack = True  # type: ignore[attr-defined]

    async def _labour(self, member: RecordedMember, plan: Plan) -> int:
        handlers: set[asyncio.Task[bool]] = set()
        settled = 0
        while not self._resting.is_set():
            try:
                lent = await member.receive(POLL_SECONDS)
            except unistream.BrokerUnavailableError:
                continue
            if lent is not None:
                handler = asyncio.create_task(self._handle(member, lent, plan))
                handlers.add(handler)
            done = {handler for handler in handlers if handler.done()}
            settled += sum(handler.result() for handler in done)
            handlers -= done
        return settled + sum(await asyncio.gather(*handlers))

    async def _handle(self, member: RecordedMember, lent: Lent, plan: Plan) -> bool:
        deed = plan.deed(member.group.name or "", lent.msg or "", lent.delivery.attempt)
        await asyncio.sleep(deed.hold)
        try:
            if deed.op == "ack":
                await lent.ack(confirm=deed.confirm and bool(self._client.capabilities.ack_confirm))
            elif deed.op == "nack":
                await lent.nack(deed.delay, "the plan says so")
            else:
                await lent.reject("the plan says so")
        except UnistreamError:
            # Recorded. What was refused or is unknown comes again.
            lent.expired()
            return False
        return True

    async def close(self) -> None:
        """Leave and close everything."""
        for member in list(self._members.values()):
            await member.leave()


async def _serve(out: IO[bytes]) -> None:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=1 << 26)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    tasks: set[asyncio.Task[None]] = set()
    async with AsyncExitStack() as stack:
        worker = Worker(out, stack)
        while line := await reader.readline():
            task = asyncio.create_task(worker.obey(json.loads(line)))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        for task in set(tasks):
            task.cancel()
        with suppress(UnistreamError):  # a broker that is out of reach can't be taken leave of
            await worker.close()


def main() -> None:
    """Serve until the input ends."""
    out = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    # Whatever prints, prints to standard error: the pipe belongs to the protocol.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, who closes the pipe
    asyncio.run(_serve(out))


if __name__ == "__main__":
    main()
