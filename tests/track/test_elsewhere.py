"""W&B and trackio get what TensorBoard gets: against stand-ins that record calls, and against the packages, offline."""

from __future__ import annotations

import json
import struct
import sys
import time
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from prism_fast.track.tracker import Tracker, open_views
from tests.track.lines import CURVES, LINES, bytes_of, write

CONFIG = {"seed": 1, "sft": {"optimizer": {"lr": 1e-5}}}
ONE = {"wandb": {"wandb": "digits", "trackio": None}, "trackio": {"wandb": None, "trackio": "digits"}}


class StandIn(ModuleType):
    """Records what is done to the module and to the run that its ``init`` gives."""

    def __init__(self, name: str):
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)
        self.calls: list[tuple[str, tuple, dict]] = []
        self.Settings = lambda **given: given

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)

        def called(*arguments, **named):
            self.calls.append((name, arguments, named))
            return SimpleNamespace(**{n: getattr(self, n) for n in ("define_metric", "log", "finish")})

        return called

    def named(self, name: str) -> list[tuple[tuple, dict]]:
        return [(arguments, named) for called, arguments, named in self.calls if called == name]


def track(folder: Path, name: str, *, mode: str = "offline", kept: int | None = None, until: int | None = None) -> None:
    """One process of a run: with ``kept``, a resumed one that keeps so many lines."""
    views = open_views(folder, **ONE[name], wandb_mode=mode, config=CONFIG)
    keep_bytes = 0 if kept is None else bytes_of(folder)[kept]
    with Tracker(folder, keep_bytes=keep_bytes, views=views, tell=pytest.fail) as tracker:
        write(tracker, LINES[kept or 0 : until])


def broken(folder: Path, name: str, mode: str = "offline") -> None:
    """A run whose first process ends behind line 5 of which 3 are kept."""
    track(folder, name, mode=mode, until=5)
    track(folder, name, mode=mode, kept=3)


def curves(points: list[tuple[int, dict]]) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for step, values in points:
        for tag, value in values.items():
            found.setdefault(tag, []).append((step, value))
    return found


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_what_wandb_is_told(tmp_path, monkeypatch, mode):
    fake = StandIn("wandb")
    monkeypatch.setitem(sys.modules, "wandb", fake)
    folder = tmp_path / "digits-1"
    folder.mkdir()
    broken(folder, "wandb", mode)
    (_, first), (_, second) = fake.named("init")
    assert first == second and first["id"] == (folder / "run_id").read_text()
    wanted = {"project": "digits", "name": "digits-1", "mode": mode, "dir": folder, "config": CONFIG}
    assert {key: first[key] for key in wanted} == wanted
    assert first["resume"] == ("allow" if mode == "online" else None)
    assert fake.named("define_metric")[:2] == [(("global_step",), {}), (("*",), {"step_metric": "global_step"})]
    logged = [dict(arguments[0]) for arguments, _ in fake.named("log")]
    assert curves([(values.pop("global_step"), values) for values in logged]) == CURVES
    assert fake.named("finish") == [((), {"exit_code": 0})] * 2


def test_what_trackio_is_told(tmp_path, monkeypatch):
    fake = StandIn("trackio")
    monkeypatch.setitem(sys.modules, "trackio", fake)
    folder = tmp_path / "digits-1"
    folder.mkdir()
    broken(folder, "trackio")
    (_, first), (_, second) = fake.named("init")
    assert first == second and first["name"] == f"digits-1-{(folder / 'run_id').read_text()}"
    assert (first["project"], first["resume"], first["config"]) == ("digits", "allow", CONFIG)
    assert curves([(named["step"], arguments[0]) for arguments, named in fake.named("log")]) == CURVES
    assert len(fake.named("finish")) == 2


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_run_that_cannot_be_begun_there_is_refused(tmp_path, monkeypatch, name):
    fake = StandIn(name)

    def init(**given):
        raise ConnectionError("not logged in")

    fake.init = init
    monkeypatch.setitem(sys.modules, name, fake)
    with pytest.raises(ValueError, match=rf"track\.{name}\.project=digits: .*\(not logged in\).*null"):
        track(tmp_path, name)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_two_runs_have_two_ids(tmp_path, monkeypatch):
    fake = StandIn("wandb")
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for name in "ab":
        (tmp_path / name).mkdir()
        track(tmp_path / name, "wandb")
    first, second = (named["id"] for _, named in fake.named("init"))
    assert first != second


def installed(name: str):
    return pytest.mark.skipif(find_spec(name) is None, reason=f"the extra {name} is not installed")


def wandb_records(path: Path) -> list:
    """The records of an offline file of W&B: LevelDB's log format behind a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, pending, records = path.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # no room for a header: padding
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        pending += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            records.append(Record.FromString(pending))
            pending = b""
    return records


@installed("wandb")
def test_wandb_itself_keeps_it(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    broken(tmp_path, "wandb")
    files = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2
    points, ids, deadline = [], set(), time.monotonic() + 30
    for path in files:
        while not (records := wandb_records(path)) or not records[-1].HasField("exit"):  # another process writes it
            assert time.monotonic() < deadline
            time.sleep(0.1)
        for record in records:
            if record.HasField("run"):
                ids.add(record.run.run_id)
            if record.HasField("history"):
                row = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                step = row.pop("global_step")
                points.append((step, {tag: value for tag, value in row.items() if not tag.startswith("_")}))
    assert curves(points) == CURVES
    assert ids == {(tmp_path / "run_id").read_text()}


@installed("trackio")
def test_trackio_itself_keeps_it(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when the package is imported
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from trackio import utils
    from trackio.sqlite_storage import SQLiteStorage

    if Path(utils.TRACKIO_DIR) != tmp_path / "trackio":
        pytest.skip("trackio was imported before this test")
    folder = tmp_path / "run"
    folder.mkdir()
    broken(folder, "trackio")
    name = f"run-{(folder / 'run_id').read_text()}"
    assert SQLiteStorage.get_runs("digits") == [name]
    rows = SQLiteStorage.get_logs("digits", name)
    points = [(row["step"], {k: v for k, v in row.items() if k not in ("step", "timestamp")}) for row in rows]
    assert curves(points) == CURVES
