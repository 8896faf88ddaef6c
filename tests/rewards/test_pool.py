"""Worker processes: limits, restart, order, no orphans, no dependence on how the parent was started."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import prism_fast.rewards.pool
import prism_fast.rewards.rules
from prism_fast.rewards import AnswerChecker, failures
from prism_fast.rewards.pool import WorkerPool
from prism_fast.rewards.verdict import Probe, ask
from tests.rewards.cases import judged

# Speaks the protocol and does what the question's gold text says: a stand-in that hangs, dies or answers on demand.
STAND_IN = r"""
import json, os, sys, time
def read(n):
    data = b""
    while len(data) < n:
        piece = os.read(0, n - len(data))
        if not piece: sys.exit()
        data += piece
    return data
def write(message):
    body = json.dumps(message).encode()
    os.write(1, len(body).to_bytes(4, "big") + body)
if sys.argv[1:] == ["broken"]: sys.exit("no such library")
write({"ready": True})
while True:
    probe = json.loads(read(int.from_bytes(read(4), "big")))["question"][0][0]
    word, _, seconds = probe["gold"].partition(" ")
    time.sleep(float(seconds or 0))
    if word == "die": os._exit(3)
    write({"holds": word == "yes", "errors": ["cannot read"] if word == "error" else []})
"""


def _ask(pool, *words):
    return pool.ask([((Probe(word, "", "latex"),),) for word in words])


def _stand_in(**options):
    return WorkerPool(command=[sys.executable, "-c", STAND_IN], **options)


def _alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as file:  # a zombie that nobody has waited for yet has ended
        return file.read().rsplit(")", 1)[1].split()[0] != "Z"


def _gone(pid, seconds=5.0):
    deadline = time.monotonic() + seconds
    while _alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not _alive(pid)


@pytest.mark.parametrize("workers", [1, 3])
def test_order_and_endings(workers):
    words = ["yes", "no", "yes 0.2", "error", "die", "no", "yes", "die 0.1", "yes"]
    expected = ["holds", "fails", "holds", "error", "worker_died", "fails", "holds", "worker_died", "holds"]
    with _stand_in(workers=workers) as pool:
        assert _ask(pool, *words) == expected
        assert _ask(pool, *words[::-1]) == expected[::-1]
        assert _ask(pool) == []


def test_timeout_kills_and_restarts():
    with _stand_in(timeout_s=0.1) as pool:
        assert _ask(pool, "yes") == ["holds"]
        (before,) = pool.pids
        start = time.monotonic()
        assert _ask(pool, "yes 60", "yes", "yes 60", "no") == ["timeout", "holds", "timeout", "fails"]
        assert time.monotonic() - start < 8
        assert pool.pids != [before] and _gone(before)


def test_killed_from_outside():
    with _stand_in() as pool:
        _ask(pool, "yes")
        os.kill(pool.pids[0], signal.SIGKILL)
        assert _gone(pool.pids[0])
        assert _ask(pool, "yes", "yes") == ["worker_died", "holds"]


def test_close_ends_the_workers_and_the_pool_can_go_on():
    pool = _stand_in(workers=2)
    _ask(pool, "yes 0.1", "yes 0.1")
    pids = pool.pids
    assert len(pids) == 2 and all(map(_alive, pids))
    pool.close()
    assert all(map(_gone, pids))
    assert _ask(pool, "yes") == ["holds"]
    pids = pool.pids
    del pool
    assert all(map(_gone, pids))


def test_an_exception_while_waiting_leaves_no_busy_worker():
    class Interrupted(Exception):
        pass

    def interrupt(*_):
        raise Interrupted

    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        with _stand_in(timeout_s=20) as pool:
            _ask(pool, "yes")
            (pid,) = pool.pids
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            with pytest.raises(Interrupted):
                _ask(pool, "yes 30")
            assert _gone(pid)
            assert _ask(pool, "no") == ["fails"]
    finally:
        signal.signal(signal.SIGALRM, previous)


def test_a_worker_that_cannot_start_is_an_error():
    with WorkerPool(command=[sys.executable, "-c", STAND_IN, "broken"]) as pool:
        with pytest.raises(RuntimeError, match="did not start: no such library.*install math-verify"):
            _ask(pool, "yes")


@pytest.mark.parametrize("options", [{"workers": 0}, {"timeout_s": 0.0}, {"memory_mb": 10}])
def test_impossible_options(options):
    with pytest.raises(ValueError, match="need workers"):
        WorkerPool(**options)


def test_a_forked_child_leaves_the_parents_worker_alone():
    with _stand_in() as pool:
        _ask(pool, "yes")
        pids = pool.pids
        child = os.fork()
        if child == 0:
            ok = _ask(pool, "yes") == ["holds"] and pool.pids != pids
            pool.close()
            os._exit(0 if ok else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert pool.pids == pids and _ask(pool, "no") == ["fails"]


PROGRAM = """
from prism_fast.rewards import AnswerChecker, Judged
checker = AnswerChecker(timeout_s=20)
text = "<caption>c</caption><think>t</think><answer>{}</answer>"
print(checker.score([Judged(text.format("x+1"), "1+x", "mm_gad")])[0].decided_by, checker.worker_pids[0], flush=True)
{}
"""


def test_works_without_a_main_module_and_leaves_no_orphan():
    program = PROGRAM.format("{}", "")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    name, pid = done.stdout.split()
    assert name == "math_verify" and _gone(int(pid))


def test_a_killed_parent_leaves_no_orphan():
    program = PROGRAM.format("{}", "import time; time.sleep(60)")
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        pid = int(parent.stdout.readline().split()[1])
        assert _alive(pid)
        parent.kill()
    assert _gone(pid)


def test_works_in_a_thread():
    results = []
    with AnswerChecker(timeout_s=20) as checker:
        thread = threading.Thread(target=lambda: results.extend(checker.score([judged("x+1", "1+x")])))
        thread.start()
        thread.join()
    assert [reward.decided_by for reward in results] == ["math_verify"]


def test_the_kernel_ends_a_question_that_holds_the_interpreter():
    """A big-integer power never returns to the interpreter, so no Python timer could end it; the CPU timer does."""
    with WorkerPool(timeout_s=1.0) as pool:
        start = time.monotonic()
        answers = pool.ask([((Probe("7", "9**9**9", "published"),),), ((Probe("7", "7", "published"),),)])
        assert answers == ["timeout", "holds"]
        assert time.monotonic() - start < 30


def test_an_orphan_cannot_run_on():
    """Nobody watches the clock here: the kernel ends the worker all the same."""
    request = {"question": [[{"gold": "7", "answer": "9**9**9", "method": "published"}]], "cpu_s": 0.5}
    body = json.dumps(request).encode()
    worker = Path(prism_fast.rewards.pool.__file__).with_name("worker.py")
    with subprocess.Popen([sys.executable, "-P", str(worker), "1024"], stdin=-1, stdout=-1, stderr=-3) as process:
        try:
            process.stdin.write(len(body).to_bytes(4, "big") + body)
            process.stdin.flush()
            assert process.wait(timeout=60) == -signal.SIGPROF
        finally:
            process.kill()


def test_memory_limit():
    with WorkerPool(timeout_s=20, memory_mb=512) as pool:
        assert pool.ask([((Probe("7", "7", "latex"),),)]) == ["holds"]
        with open(f"/proc/{pool.pids[0]}/limits") as file:
            (line,) = [line for line in file if line.startswith("Max address space")]
        assert line.split()[3:5] == [str(512 * 2**20)] * 2


HUNGRY = r"""
import runpy, sys
worker = runpy.run_path(sys.argv[1])
def eat(gold, answer):
    return len(bytearray(2**30)) > 0 if gold == "much" else True
worker["main"].__globals__["_methods"] = lambda: {"latex": eat}
worker["main"](512)
"""


def test_a_worker_out_of_memory_is_replaced_and_counted(monkeypatch):
    """The next question, of the same call and of a later one, gets a new process; the reward names the cause."""
    program = Path(prism_fast.rewards.pool.__file__).with_name("worker.py")
    with WorkerPool(command=[sys.executable, "-P", "-c", HUNGRY, str(program)]) as pool:
        assert _ask(pool, "little", "much", "little") == ["holds", "worker_died", "holds"]
        assert _ask(pool, "little") == ["holds"]
        with AnswerChecker() as checker:
            monkeypatch.setattr(checker, "_pool", pool)
            monkeypatch.setattr(
                prism_fast.rewards.rules, "compare", lambda gold, answer: ask([Probe(gold, "", "latex")])
            )
            rewards = checker.score([judged("x", "much"), judged("x", "little")])
    assert [(reward.accuracy, reward.decided_by) for reward in rewards] == [(0.0, "worker_died"), (1.0, "math_verify")]
    assert failures(rewards) == {"timeouts": 0, "worker_deaths": 1, "judge_errors": 0}


def test_a_question_that_does_not_fit_is_not_sent():
    with _stand_in() as pool:
        assert _ask(pool, "yes", "x" * 10**6, "no") == ["holds", "too_large", "fails"]
        assert _ask(pool, "x" * 10**6) == ["too_large"]
