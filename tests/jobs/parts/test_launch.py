"""Stopping a job: asked once it ends its step, asked twice it ends at once, whatever it waits for."""

import signal
import subprocess
import sys
import threading
import time

import pytest
from typer.testing import CliRunner

from ctrlrl.cli import app
from ctrlrl.errors import GroupLost
from jobs.parts.launch import StopRequest, background, mistakes_told

# A job that waits in one of its threads, in what it does at its end, or while the interpreter takes its modules apart.
JOB = """
import atexit, sys, time
from jobs.parts.launch import StopRequest, background, mistakes_told
class Slow:
    def __del__(self):
        time.sleep(600)
slow = Slow() if sys.argv[1] == "leaving" else None
atexit.register(print, "closed", flush=True)
with mistakes_told():
    try:
        with background(1) as beside:
            beside.submit(time.sleep, 0 if slow else 600)
            if sys.argv[1] == "starting":
                print("ready", flush=True)
                time.sleep(600)
            with StopRequest() as stop:
                print("ready", flush=True)
                while not stop:
                    time.sleep(0.01)
                print("asked", flush=True)
                time.sleep(600)
    finally:
        time.sleep(600 if sys.argv[1] == "ending" else 0)
"""


def test_an_interrupted_job_ends_whatever_it_waits_for():
    jobs = {
        where: subprocess.Popen(
            [sys.executable, "-c", JOB, where], stdout=subprocess.PIPE, text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        for where in ("starting", "running", "ending", "leaving")
    }  # fmt: skip
    try:
        for where, job in jobs.items():
            for word in ("ready",) if where == "starting" else ("ready", "asked"):
                assert job.stdout.readline() == f"{word}\n"
                job.send_signal(signal.SIGINT)
        for where, job in jobs.items():
            assert job.wait(60) == 130
            assert job.stdout.read() == ("" if where == "ending" else "closed\n")  # what it has to close, if there is time
    finally:
        for job in jobs.values():
            job.kill()
            job.wait()


class Entered(Exception):
    """That a command came to the context which answers interrupts."""


@pytest.mark.parametrize("command", [command.name or command.callback.__name__ for command in app.registered_commands])
def test_every_command_answers_interrupts_so(command, monkeypatch):
    if command == "doctor":
        pytest.skip("it looks, and runs nothing")

    def enter(self):
        raise Entered

    monkeypatch.setattr(mistakes_told, "__enter__", enter)
    needed = {"submit": ["ppo"], "study": ["scale"], "calibrate": ["runs/x", "--out", "x"]}
    needed |= {"soup": ["a", "b", "--share", ".5", "--out", "x"], "plan": ["x"]}
    needed |= dict.fromkeys(("score", "distill", "inspect", "report", "serve", "chat"), ["runs/x"])
    for more in ([], ["--table", "x"]) if command == "evaluate" else ([],):
        assert isinstance(CliRunner().invoke(app, [command, *needed.get(command, []), *more]).exception, Entered)


def test_calls_beside_the_job_are_waited_for_and_not_begun_after_an_error():
    done, begun = [], threading.Event()
    with background(1) as beside:
        beside.submit(lambda: (time.sleep(0.05), done.append(1)))
    assert done == [1]
    with pytest.raises(GroupLost), background(1) as beside:
        beside.submit(lambda: (begun.set(), time.sleep(0.05), done.append(2)))
        beside.submit(done.append, 3)
        begun.wait()
        raise GroupLost("a rank")
    assert done == [1, 2]


def test_a_second_interrupt_is_left_to_whoever_handled_the_first_kind_before():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    with pytest.raises(KeyboardInterrupt), StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop and stop.exit_code == 130
        signal.raise_signal(signal.SIGINT)
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler
