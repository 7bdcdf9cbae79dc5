"""The keyed storm runs end to end: a few seconds of it; and what it looks with sees every wrong byte."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench.patterns import POISON
from soak.board import Board, Word
from soak.keyed import eyes as eyes_module
from soak.keyed import plan
from soak.keyed.eyes import DeviceEyes, Eyes, HostEyes
from soak.keyed.perils import STEPS
from soak.keyed.words import MADE, NAMES, Ledger, bytes_of, make, version_of, who_puts
from soak.plan import Mail
from soak.process import Process

ROOT = Path(__file__).resolve().parents[2]
NUMBER = 3


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_short_storm(tmp_path: Path, device: str) -> None:
    result = tmp_path / "keyed.json"
    command = [sys.executable, "-m", "tests.soak", "--keyed", "--reads", "10000", "--seed", "1"]
    command += ["--device", device]
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*command, "--minutes", "1", "--out", str(result)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(result.read_text())
    assert figures["reads"]["all"] >= 10_000
    assert figures["poisoned"]["extents"] > 0
    assert figures["lasting_owner"]["hits_by_the_table"] > 0
    assert not any([*figures["wrong"].values(), *figures["lost"].values()])
    assert str(tmp_path) not in figures["command"]


@pytest.fixture
def me(tmp_path: Path) -> Iterator[Process]:
    """A reader's place, and a ledger by which version 5 of a key was put last."""
    places = plan.cast()
    ledger = Ledger(len(places), len(STEPS))
    ledger.begun[0][NUMBER] = 5
    world = plan.KeyedWorld(
        seed=1,
        device="cpu",
        folder=tmp_path,
        places=places,
        board=Board(len(places), str(tmp_path / "faults.txt")),
        mail=Mail.open(len(places)),
        sizes=plan.KeyedSizes.of("cpu"),
        ledger=ledger,
        between_s=1.0,
    )
    yield Process(world, places[2], 1)
    for box in world.mail.boxes:
        for end in box:
            end.close()
    os.close(world.board.faults_fd)


def seen(eyes: Eyes, found: torch.Tensor, least: int = 0) -> tuple[int, int]:
    """What the eyes count of a feature of the key: wrong, and replaced before."""
    eyes.check(NUMBER, found, least)
    eyes.settle(at_once=True)
    row = eyes.me.row
    counted = row[Word.WRONG], row[Word.STALE]
    row[Word.WRONG] = row[Word.STALE] = 0
    return counted


@pytest.mark.parametrize("kind", [HostEyes, DeviceEyes])
@pytest.mark.parametrize("nbytes", [16, 64, 67])
def test_every_wrong_byte_is_seen(me: Process, kind: type[Eyes], nbytes: int) -> None:
    eyes = kind(me)
    right = make(NUMBER, nbytes, 5, "cpu")
    assert seen(eyes, right, least=5) == (0, 0)
    for at in range(nbytes):
        found = right.clone()
        found[at] = POISON
        assert seen(eyes, found)[0] == 1, f"byte {at}"
    assert seen(eyes, right, least=5) == (0, 0)


@pytest.mark.parametrize("kind", [HostEyes, DeviceEyes])
def test_whole_features_that_do_not_belong_there_are_seen(me: Process, kind: type[Eyes]) -> None:
    """Of another key, of a version that nobody put, longer than it was put, or replaced before."""
    eyes = kind(me)
    older, newer = make(NUMBER, 64, 4, "cpu"), make(NUMBER, 64, 5, "cpu")
    assert seen(eyes, make(NUMBER + 1, 64, 5, "cpu"))[0] == 1
    assert seen(eyes, make(NUMBER, 64, 6, "cpu"))[0] == 1
    assert seen(eyes, torch.cat([newer, newer[-8:]]))[0] == 1
    assert seen(eyes, torch.cat([older[:32], newer[32:]]))[0] == 1
    assert seen(eyes, older, least=4) == (0, 0)
    assert seen(eyes, older, least=5) == (0, 1)


def test_keys_that_are_made_have_one_version() -> None:
    made = [number for number in range(len(NAMES)) if who_puts(number) == MADE]
    assert made
    nbytes = plan.lengths_of("cpu").of_made(made[0])
    assert nbytes == plan.lengths_of("cpu").of_made(made[0])
    assert version_of(made[0], bytes_of(made[0], nbytes, 1)) == 1


class Stream:
    """A stream of a device that does its work at once, and tells which one is the current one."""

    now: Any = None
    waits = marks = 0

    def synchronize(self) -> None:
        self.waits += 1

    def record(self) -> None:
        assert Stream.now is not None, "recorded on the default stream"
        Stream.now.marks += 1

    def __enter__(self) -> None:
        self.before, Stream.now = Stream.now, self

    def __exit__(self, *_: object) -> None:
        Stream.now = self.before


class OnStreams(DeviceEyes):
    """The eyes of a GPU, over such streams."""

    @staticmethod
    def has_streams(device: torch.device) -> bool:
        return True


def test_reads_take_streams_by_turns(me: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each gets so far ahead and no further, and each one's count of wrong words is told."""
    worked: list[int] = []
    stubs = SimpleNamespace(
        Stream=lambda _: Stream(),
        Event=Stream,
        stream=lambda stream: stream,
        current_stream=lambda: Stream.now,
        set_device=lambda _: None,
        synchronize=lambda _: None,
        _sleep=worked.append,
    )
    monkeypatch.setattr(eyes_module, "_cuda", stubs)
    eyes = OnStreams(me)
    right, wrong = make(NUMBER, 64, 5, "cpu"), make(NUMBER + 1, 64, 5, "cpu")
    taken = []
    for _ in range(3 * 200):
        with eyes.lane():
            taken.append(Stream.now)
            eyes.work()
            eyes.check(NUMBER, right, 5)
    assert taken[:3] == taken[3:6]
    assert len(set(taken)) == 3
    assert [stream.marks for stream in taken[:3]] == [3, 3, 3]
    assert worked
    for _ in range(3):
        with eyes.lane():
            eyes.check(NUMBER, wrong, 0)
            eyes.finish()
    eyes.settle(at_once=True)
    assert me.row[Word.WRONG] == 1, "one look, which says how many"
    assert "3" in (me.world.folder / "faults.txt").read_text()
