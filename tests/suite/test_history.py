"""The record of a run: on disk before it is acted on, merged by time, one outcome per operation."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from unistream.conformance.history import Event, History, Recorder
from unistream.conformance.identity import CorruptBodyError, ForeignBodyError, Identity, new_run, read_body

WRITER = """
import sys, time
from pathlib import Path
from unistream.conformance.history import Recorder
recorder = Recorder(time.monotonic_ns, proc="w", path=Path(sys.argv[1]))
for number in range(100):
    recorder.record("tally", note=str(number))
print("ready", flush=True)
time.sleep(600)
"""


def test_a_killed_process_loses_nothing_it_recorded(tmp_path: Path) -> None:
    """What was recorded is on disk although the process was killed without warning."""
    path = tmp_path / "w.jsonl"
    with subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        os.kill(process.pid, signal.SIGKILL)

    assert [event.note for event in History.load(path)] == [str(number) for number in range(100)]


def test_a_line_cut_short_by_death_is_left_out(tmp_path: Path) -> None:
    """A last line without its end never happened; a bad line in the middle is an error."""
    whole = Event(1, "a", 1, "tally", "event").to_json()
    cut = tmp_path / "cut.jsonl"
    cut.write_text(whole + "\n" + whole[:-5])
    bad = tmp_path / "bad.jsonl"
    bad.write_text(whole[:-5] + "\n" + whole + "\n")

    assert len(History.load(cut)) == 1
    with pytest.raises(ValueError, match=r"Expecting|delimiter|Unterminated"):
        History.load(bad)


def test_an_unknown_field_is_refused(tmp_path: Path) -> None:
    """A history of a newer version is an error, never read in part."""
    path = tmp_path / "new.jsonl"
    path.write_text('{"at":1,"proc":"a","life":1,"op":"tally","phase":"event","mood":"good"}\n')

    with pytest.raises(ValueError, match="mood"):
        History.load(path)


def test_histories_of_several_processes_merge_by_time() -> None:
    """The merged history is in the order of time, whoever recorded it."""
    parts = [[Event(at, proc, 1, "tally", "event") for at in times] for proc, times in (("a", (1, 5)), ("b", (2, 3)))]

    assert [event.at for event in History.merge(*parts)] == [1, 2, 3, 5]


def test_an_operation_has_one_outcome() -> None:
    """A second completion is a defect of the suite, and says so."""
    call = Recorder(lambda: 1).invoke("publish", msg="p.1")
    call.ok()

    with pytest.raises(RuntimeError, match="one outcome"):
        call.info("TimedOutError")


@pytest.mark.parametrize("key", [None, b"", b"k|y\x00\xff"])
@pytest.mark.parametrize("size", [0, 4096])
def test_a_body_proves_who_it_is(key: bytes | None, size: int) -> None:
    """Identity comes back from the body as it went in, whatever the key and the size."""
    identity = Identity(new_run(), "p", 17, key)
    body = identity.body(size)

    assert read_body(body, identity.run) == identity
    assert len(body) >= size
    assert identity.name == "p.17"


def test_an_altered_body_is_corrupt_and_a_strange_one_foreign() -> None:
    """One changed or missing byte is corruption; another run's body is none of ours."""
    run = new_run()
    body = Identity(run, "p", 17, b"k").body(100)

    for altered in (body[:-1], body.replace(b"|17|", b"|18|"), body[:-1] + b"!", body[:20]):
        with pytest.raises(CorruptBodyError):
            read_body(altered, run)
    for strange in (b"", b"hello", Identity(new_run(), "p", 17, b"k").body()):
        with pytest.raises(ForeignBodyError):
            read_body(strange, run)
