"""The caller's side of the sandbox: threads, forks, interrupts, workers that die, and what remains of them."""

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from collections.abc import Callable, Iterator

import psutil
import pytest

from polyreward.rewards import sandbox_launch
from polyreward.rewards.execution import AssertTest, Limits, OutputTest, Program, Sandbox, SandboxError, Script
from polyreward.rewards.executor import RewardExecutor

PATIENCE = 30.0  # for things that take milliseconds
HONEST = Program("def f(x):\n    return x * 2\nprint(f(2))", (AssertTest("assert f(2) == 4"), OutputTest("", "4")))
ENDLESS = Program("while True:\n    pass", (OutputTest(),), Limits(wall_seconds=600))


@pytest.fixture(params=["bubblewrap", "limits"])
def isolation(request: pytest.FixtureRequest) -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            Sandbox(isolation=request.param).close()
        except SandboxError as error:
            pytest.skip(str(error))
        yield request.param


def eventually(condition: Callable[[], bool]) -> bool:
    limit = time.monotonic() + PATIENCE
    while time.monotonic() < limit:
        if condition():
            return True
        time.sleep(0.01)
    return False


def processes(sandbox: Sandbox) -> list[psutil.Process]:
    """All processes of a sandbox."""
    assert sandbox._driver is not None
    found = []
    for worker in list(sandbox._driver.workers):
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(worker.process.pid)
            found += [process, *process.children(recursive=True)]
    return found


def alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def gone(found: list[psutil.Process]) -> bool:
    return not any(map(alive, found))


def childless(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return not process.children()
    return False


def in_background(call: Callable[[], object]) -> tuple[threading.Thread, list[BaseException]]:
    errors: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, errors


def test_closing_leaves_nothing(isolation: str) -> None:
    sandbox = Sandbox(workers=2, isolation=isolation)  # type: ignore[arg-type]
    assert sandbox.run([HONEST])[0].all_passed
    found, driver = processes(sandbox), sandbox._driver
    assert found
    assert driver is not None
    folders = [worker.folder for worker in driver.workers if worker.folder]
    sandbox.close()
    assert eventually(lambda: gone(found))
    assert not any(map(os.path.exists, folders))
    assert not driver.thread.is_alive()


def test_closing_ends_calls_of_other_threads(isolation: str) -> None:
    sandbox = Sandbox(workers=1, isolation=isolation)  # type: ignore[arg-type]
    thread, errors = in_background(lambda: sandbox.run([ENDLESS] * 5))
    assert eventually(lambda: sandbox._driver is not None and any(w.task for w in sandbox._driver.workers))
    found = processes(sandbox)
    sandbox.close()
    thread.join(PATIENCE)
    assert isinstance(errors[0], SandboxError)
    assert eventually(lambda: gone(found))


def test_several_threads(isolation: str) -> None:
    with Sandbox(workers=2, isolation=isolation) as sandbox:  # type: ignore[arg-type]
        results: dict[int, list[bool]] = {}

        def call(number: int) -> None:
            programs = [
                Program(f"print({number * 10 + i})", (OutputTest("", str(number * 10 + i)),)) for i in range(10)
            ]
            results[number] = [result.all_passed for result in sandbox.run(programs)]

        threads = [threading.Thread(target=call, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        assert results == {number: [True] * 10 for number in range(4)}


def test_a_worker_that_dies_takes_only_its_own_test(isolation: str) -> None:
    with Sandbox(workers=1, isolation=isolation) as sandbox:  # type: ignore[arg-type]
        assert sandbox.run([HONEST])[0].all_passed
        answers: list[str] = []
        programs = [ENDLESS, *[HONEST] * 20]

        def call() -> None:
            answers.extend(result.tests[0].status for result in sandbox.run(programs))

        thread, errors = in_background(call)
        driver = sandbox._driver
        assert driver is not None

        def stuck() -> list:  # type: ignore[type-arg]
            return [worker for worker in driver.workers if worker.task and worker.task.limits.wall_seconds == 600]

        assert eventually(lambda: bool(stuck()) and time.monotonic() - stuck()[0].started > 0.2)
        stuck()[0].process.kill()
        thread.join(PATIENCE)
        assert not errors
        assert answers == ["error", *["passed"] * 20]


def test_an_idle_worker_that_dies_is_replaced(isolation: str) -> None:
    with Sandbox(workers=1, isolation=isolation) as sandbox:  # type: ignore[arg-type]
        for victims in ("worker", "innermost", "all"):
            assert all(result.all_passed for result in sandbox.run([HONEST] * 5))
            found = processes(sandbox)
            if victims == "innermost":
                found = [process for process in found if childless(process)]
            elif victims == "worker":
                assert sandbox._driver is not None
                found = [psutil.Process(worker.process.pid) for worker in sandbox._driver.workers]
            for process in found:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            assert eventually(lambda found=found: gone(found))  # type: ignore[misc]
        assert all(result.all_passed for result in sandbox.run([HONEST] * 5))


def test_errors_in_progress_cancel_the_rest(isolation: str) -> None:
    with Sandbox(workers=1, isolation=isolation) as sandbox:  # type: ignore[arg-type]

        def progress(done: int, total: int) -> None:
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            sandbox.run([HONEST, *[ENDLESS] * 50], progress)
        driver = sandbox._driver
        assert driver is not None
        assert eventually(lambda: not any(worker.task for worker in driver.workers) and not driver.pending)
        assert sandbox.run([HONEST])[0].all_passed


def test_after_a_fork_both_work(isolation: str) -> None:
    with Sandbox(workers=1, isolation=isolation) as sandbox:  # type: ignore[arg-type]
        assert sandbox.run([HONEST])[0].all_passed
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                good = sandbox.run([HONEST] * 3)
                assert all(result.all_passed for result in good)
                mine = [process.pid for process in processes(sandbox)]
                sandbox.close()
                os.write(writing, b"good" if mine else b"none")
            finally:
                os._exit(0)
        os.close(writing)
        with os.fdopen(reading, "rb") as pipe:
            assert pipe.read() == b"good"
        os.waitpid(pid, 0)
        assert sandbox.run([HONEST])[0].all_passed


OWNER = """
    import os, signal, sys, threading, time, warnings
    warnings.simplefilter("ignore")
    import psutil
    signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored where the tests run in the background
    from polyreward.rewards.execution import AssertTest, Limits, OutputTest, Program, Sandbox, Script
    sandbox = Sandbox(workers=1, isolation=sys.argv[1])
    code = "import os\\ntry:\\n    os.fork()\\nexcept OSError:\\n    pass\\nwhile True:\\n    pass"
    programs = [Program(code, (OutputTest(), AssertTest("f()")), Limits(wall_seconds=600))]
    def tell():
        while not (sandbox._driver and sum(bool(worker.task) for worker in sandbox._driver.workers) == 2):
            time.sleep(0.01)
        time.sleep(0.3)
        me = psutil.Process()
        print(*[process.pid for process in me.children(recursive=True)], flush=True)
    threading.Thread(target=tell, daemon=True).start()
    try:
        sandbox.run(programs)
    except KeyboardInterrupt:
        print("interrupted", sandbox.execute([Script("print(1)")])[0].stdout.strip(), flush=True)
"""


def owner(isolation: str) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    """A process that runs endless programs, and all the processes of its sandbox."""
    command = [sys.executable, "-c", textwrap.dedent(OWNER), isolation]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    found = [psutil.Process(int(pid)) for pid in process.stdout.readline().split()]
    assert len(found) > 2
    return process, found


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_outlives_a_killed_owner(isolation: str, number: int) -> None:
    process, found = owner(isolation)
    process.send_signal(number)
    process.wait(PATIENCE)
    assert eventually(lambda: gone(found))
    assert process.stdout is not None
    process.stdout.close()


@pytest.mark.slow
def test_an_interrupt_ends_programs_and_leaves_the_sandbox_usable(isolation: str) -> None:
    process, found = owner(isolation)
    os.killpg(process.pid, signal.SIGINT)
    assert process.stdout is not None
    assert process.stdout.read().strip() == "interrupted 1"
    assert process.wait(PATIENCE) == 0
    assert eventually(lambda: gone(found))
    process.stdout.close()


def executes(prompts, completions, **columns):  # type: ignore[no-untyped-def]
    from polyreward.rewards.execution import OutputTest, Program, shared_sandbox

    programs = [Program(completion, (OutputTest("", "4"),)) for completion in completions]
    return [result.pass_rate for result in shared_sandbox().run(programs)]


@pytest.mark.slow
def test_in_a_worker_of_the_reward_executor() -> None:
    with RewardExecutor(2, time_limit=PATIENCE) as executor:
        reward = executor.wrap(executes)
        values = reward(prompts=["a"] * 4, completions=["print(4)", "print(5)", "1 / 0", "print(2 + 2)"])
        assert values == [1.0, 0.0, 0.0, 1.0]
        me = psutil.Process()
        found = [process for process in me.children(recursive=True) if "sandbox_inside" in " ".join(process.cmdline())]
        assert found
    assert eventually(lambda: gone(found))


def test_many_scripts_leave_no_open_files(isolation: str) -> None:
    with Sandbox(workers=1, isolation=isolation) as sandbox:  # type: ignore[arg-type]
        sandbox.run([HONEST] * 4)
        before = psutil.Process().num_fds()
        sandbox.run([HONEST] * 20)
        sandbox.execute([Script("print('x' * 100000)", limits=Limits(output_bytes=10))] * 5)
        assert psutil.Process().num_fds() <= before + 1


def test_a_container_without_user_ids_to_spare(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a user who is not root: each process has a user namespace of its own."""
    monkeypatch.setattr(sandbox_launch, "_spare_users", lambda: None)
    sandbox_launch.find.cache_clear()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                sandbox = Sandbox(workers=1, isolation="bubblewrap")
            except SandboxError as error:
                pytest.skip(str(error))
        with sandbox:
            assert all(result.all_passed for result in sandbox.run([HONEST] * 4))
            code = "import os\nprint(os.getuid(), os.listdir('/tmp'))\nopen('/etc/passwd')"
            (result,) = sandbox.execute([Script(code)])
            assert result.stdout == "1000 ['run']\n"
            assert result.exit_code == 1
            bomb = Program(
                "import os\nwhile True:\n    os.fork()", (OutputTest(),), Limits(wall_seconds=0.5, processes=8)
            )
            assert not sandbox.run([bomb])[0].all_passed
            assert sandbox.run([HONEST])[0].all_passed
    finally:
        sandbox_launch.find.cache_clear()
