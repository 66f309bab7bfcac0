"""The executor: a reward costs its time limit and nothing more, whatever it does."""

import asyncio
import functools
import math
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
import types
import warnings

import numpy as np
import psutil
import pytest

from polyreward.errors import InvalidInputError, MissingColumnError, MissingExtraError, PolyrewardError
from polyreward.rewards.composition import affine, weighted_sum
from polyreward.rewards.contract import Reward
from polyreward.rewards.executor import RewardExecutor, RewardFailureWarning, RewardTiming
from polyreward.rewards.executor_pool import LocalPool, _Call
from polyreward.rewards.length import LengthBudget
from polyreward.rewards.sweet_spot import SweetSpotReward
from polyreward.rewards.tool_calls import toolrl
from polyreward.rewards.verifiers import ExactMatch

PATIENCE = 20.0  # for things that take milliseconds


@pytest.fixture(scope="module")
def executor():
    with RewardExecutor(2, time_limit=60) as shared:
        yield shared


@pytest.fixture
def brief():
    with RewardExecutor(2, time_limit=1) as executor:
        yield executor


def length(prompts, completions, **columns):
    return [float(len(text)) for text in completions]


def eventually(condition):
    limit = time.monotonic() + PATIENCE
    while time.monotonic() < limit:
        if condition():
            return True
        time.sleep(0.01)
    return False


def ended(pid):
    """Whether a process is gone or a zombie."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def gone(pid):
    return eventually(lambda: ended(pid))


def failing(action):
    """A reward of 1 that does something terrible at the completion "x"."""

    def reward(prompts, completions, **columns):
        if completions[0] == "x":
            action()
        return [1.0]

    return reward


def spin():
    while True:
        pass


def spin_deaf():
    for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals))
    while True:
        try:
            spin()
        except BaseException:
            continue


def spin_in_c():
    re.match(r"(a+)+$", "a" * 60 + "b")  # holds the interpreter lock


def close_everything():
    os.closerange(0, 1000)
    spin()


def exit_with_a_child_that_holds_the_socket():
    if os.fork() == 0:
        time.sleep(1000)
    os._exit(3)


SLOW = [spin, spin_deaf, spin_in_c, close_everything, functools.partial(time.sleep, 1000)]
DEADLY = [
    functools.partial(os._exit, 3),
    lambda: os.kill(os.getpid(), signal.SIGKILL),
    lambda: __import__("ctypes").string_at(0),
    exit_with_a_child_that_holds_the_socket,
]


def test_results_are_those_of_the_reward(executor):
    texts, columns = ["a", "bcd", "", "ef"] * 5, {"answer": ["a", "x", "", None] * 5}
    for reward in (length, ExactMatch(), LengthBudget(0, 2), toolrl(), lambda prompts, completions, **_: [0.5, None]):
        per_sample = reward in (length, ExactMatch(), LengthBudget(0, 2), toolrl())
        rows = slice(None) if per_sample else slice(2)
        some = {name: column[rows] for name, column in columns.items()}
        wrapped = executor.wrap(reward, per_sample=per_sample)
        assert wrapped(prompts=texts[rows], completions=texts[rows], **some) == reward(None, texts[rows], **some)
        assert wrapped([], []) == []


def test_any_callable_runs(executor):
    weight = 0.5

    class Local(Reward):
        def score(self, sample):
            return weight * len(sample.text)

    async def later(prompts, completions, **columns):
        await asyncio.sleep(0)
        return length(prompts, completions)

    halves = [
        lambda prompts, completions, **_: [weight * len(completions[0])],
        lambda prompts, completions, **_: (weight * len(text) for text in completions),
        lambda prompts, completions, **_: np.array([weight * len(completions[0])], dtype=np.float32),
        functools.partial(lambda prompts, completions, factor: [factor * len(completions[0])], factor=weight),
        Local(),
    ]
    assert [executor.wrap(reward)(None, ["abc"])[0] for reward in halves] == [1.5] * 5
    assert executor.wrap(later)(None, ["abc", "d"]) == [3, 1]


def test_names(executor):
    assert executor.wrap(length).__name__ == "length"
    assert executor.wrap(ExactMatch()).__name__ == "exact_match"
    assert executor.wrap(length, name="size").__name__ == "size"
    assert executor.wrap(ExactMatch("label")).reads == ("label",)


def test_none_and_nan_pass(executor):
    reward = executor.wrap(lambda prompts, completions, answer, **_: answer)
    assert reward(None, ["a"] * 3, answer=[None, math.nan, 2]) == [None, None, 2]


@pytest.mark.parametrize("action", SLOW)
def test_a_loop_costs_its_own_sample(brief, action):
    with pytest.warns(RewardFailureWarning, match=r"(?s)'reward' failed on 1 of 9 samples .*limit of 1 s.*row 4"):
        assert brief.wrap(failing(action))(None, [*"aaaaxaaaa"]) == [1.0] * 4 + [None] + [1.0] * 4
    assert brief.timings()["reward"].timeouts == 1


def test_the_warning_shows_where_a_loop_was(brief):
    def endless(prompts, completions, **columns):
        spin()

    with pytest.warns(RewardFailureWarning, match=r"(?s)killed at the time limit of 1 s.*in spin.*in endless$"):
        brief.wrap(endless)(None, ["a"])


@pytest.mark.parametrize("action", DEADLY)
def test_the_end_of_a_worker_costs_its_own_sample(executor, action):
    with pytest.warns(RewardFailureWarning, match=r"1 by the end of the worker.*row 4: the worker process (ended|was)"):
        assert executor.wrap(failing(action))(None, [*"aaaaxaaaa"]) == [1.0] * 4 + [None] + [1.0] * 4
    assert executor.wrap(length)(None, ["ab"]) == [2]


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyError, SystemExit, KeyboardInterrupt, RecursionError])
def test_an_exception_costs_its_own_sample(executor, error):
    def throw():
        raise error("marmalade")

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert executor.wrap(failing(throw))(None, [*"axaaxx"]) == [1, None, 1, 1, None, None]
    (warning,) = caught
    text = str(warning.message)
    assert "reward 'reward' failed on 3 of 6 samples (3 by an exception)" in text
    assert "First, row 1: Traceback (most recent call last):" in text
    assert "in throw" in text
    assert text.rstrip("'").endswith("marmalade")
    assert "executor_guard" not in text
    assert warning.filename == __file__


def test_a_bad_reference_is_an_exception_of_its_row(executor):
    with pytest.warns(RewardFailureWarning, match=r"(?s)row 1.*InvalidInputError: .*an empty list of accepted"):
        assert executor.wrap(ExactMatch())(None, ["a", "a"], answer=["a", []]) == [1, None]


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (ExactMatch(), "column 'answer', row 2: an empty list"),
        (1e308 * (10 * ExactMatch("other")), "returned inf for completion 2"),
        (
            SweetSpotReward(affine(ExactMatch("other"), 2), ExactMatch("other")),
            "gave 2 for completion 2, expected 0 or 1",
        ),
    ],
)
def test_a_reward_names_the_row_of_the_batch_and_not_of_its_worker(executor, reward, message):
    with pytest.warns(RewardFailureWarning, match=message):
        executor.wrap(reward)(None, ["b", "b", "a"], answer=["a", "a", []], other=["a"] * 3)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ([1.0, 2.0], "'reward' returned 2 values for 1 completions"),
        ([], "returned 0 values"),
        (None, "returned NoneType"),
        (3.0, "returned float"),
        (["x"], "returned 'x' for completion 2"),
        ([math.inf], "returned inf for completion 2; rewards must be finite"),
    ],
)
def test_what_is_no_reward_is_an_error(executor, result, message):
    def reward(prompts, completions, **columns):
        return result if completions[0] == "x" else [1.0]

    with pytest.raises(InvalidInputError, match=message):
        executor.wrap(reward)(None, ["a", "a", "x", "a"])
    assert executor.wrap(length)(None, ["ab"]) == [2]


def test_a_missing_column_is_an_error(executor):
    with pytest.raises(MissingColumnError, match="'exact_match' reads the column 'answer'; did you mean 'answers'"):
        executor.wrap(ExactMatch())(None, ["a"], answers=["a"])


def test_lengths_are_checked(executor):
    with pytest.raises(InvalidInputError, match="column 'answer' has 1 entries for 2 completions"):
        executor.wrap(length)(None, ["a", "b"], answer=["a"])
    with pytest.raises(InvalidInputError, match="1 prompts for 2 completions"):
        executor.wrap(length)(["q"], ["a", "b"])


def test_what_cannot_run_is_an_error(executor):
    lock = threading.Lock()
    with pytest.raises(InvalidInputError, match=r"'guarded' cannot be sent to worker processes.*lock"):
        executor.wrap(lambda prompts, completions: lock.locked(), name="guarded")
    with pytest.raises(InvalidInputError, match="is not a reward function"):
        executor.wrap("length")
    for wrong in (0, "x"):
        with pytest.raises(
            InvalidInputError, match=f"reward 'length': time_limit must be a positive number, got {wrong!r}"
        ):
            executor.wrap(length, time_limit=wrong)
    for name, wrong in (("workers", 0), ("workers", 1.5), ("queue", 0), ("queue", 2.5), ("queue", None)):
        with pytest.raises(InvalidInputError, match=f"{name} must be a positive whole number, got {wrong}"):
            RewardExecutor(**{name: wrong})
    for name, wrong in (("time_limit", -1), ("time_limit", "x"), ("start_limit", math.nan)):
        with pytest.raises(InvalidInputError, match=f"{name} must be a positive number, got {wrong!r}"):
            RewardExecutor(**{name: wrong})
    with pytest.raises(InvalidInputError, match="wrap the whole composition"):
        executor.wrap(executor.wrap(length) + 1.0)


class Unloadable:
    def __init__(self, *action):
        self.action = action

    def __reduce__(self):
        return self.action

    def __call__(self, prompts, completions, **columns):
        return [1.0]


def test_a_reward_that_does_not_load_is_an_error(executor):
    with pytest.raises(InvalidInputError, match=r"(?s)'missing' cannot be loaded.*No module named 'nowhere'"):
        executor.wrap(Unloadable(__import__, ("nowhere",)), name="missing")(None, ["a"])
    with pytest.raises(InvalidInputError, match="'dead' cannot be loaded: the worker process ended with exit code 5"):
        executor.wrap(Unloadable(os._exit, (5,)), name="dead")(None, ["a"])
    with (
        RewardExecutor(1, start_limit=1) as impatient,
        pytest.raises(InvalidInputError, match="is not loaded in a worker process after 1 s"),
    ):
        impatient.wrap(Unloadable(time.sleep, (1000,)), name="slow")(None, ["a"])
    assert executor.wrap(length)(None, ["ab"]) == [2]


def named_like_a_child(process):
    try:
        return process.name() in ("sleep", "bash", "true")
    except psutil.NoSuchProcess:
        return False


def noted(path, then=None):
    """Loads as `length`, and notes the process that loads."""
    with open(path, "a") as notes:
        notes.write(f"{os.getpid()}\n")
    if then is not None:
        then()
    return length


def start_a_thread():
    threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()


def leave_a_file_open():
    start_a_thread.file = open(os.devnull)  # noqa: SIM115


def test_a_reward_is_loaded_once_however_often_workers_are_replaced(brief, tmp_path):
    notes = tmp_path / "notes"
    reward = brief.wrap(Unloadable(noted, (notes,)), name="once")
    assert reward(None, [*"abcdef"]) == [1] * 6
    with pytest.warns(RewardFailureWarning):
        brief.wrap(failing(functools.partial(os._exit, 1)))(None, [*"xaxax"])
    assert reward(None, [*"abcdef"]) == [1] * 6
    assert len(notes.read_text().split()) == 1


@pytest.mark.parametrize("left", [start_a_thread, leave_a_file_open])
def test_workers_load_for_themselves_where_loading_leaves_what_forks_cannot_share(brief, tmp_path, left):
    notes = tmp_path / "notes"
    reward = brief.wrap(Unloadable(noted, (notes, left)), name="each")
    assert reward(None, [*"abcdef"]) == [1] * 6
    with pytest.warns(RewardFailureWarning):
        brief.wrap(failing(functools.partial(os._exit, 1)))(None, [*"xaaa"])
    assert reward(None, [*"abcdef"]) == [1] * 6
    loaders = notes.read_text().split()
    assert 2 <= len(loaders) == len(set(loaders)) <= 4


def test_the_loss_of_idle_workers_and_the_template_goes_unnoticed():
    with RewardExecutor(2) as executor:
        assert executor.wrap(length)(None, ["ab"] * 9) == [2] * 9
        everyone = guard_of(executor).children()
        for process in everyone:
            process.kill()
        assert all(eventually(lambda p=p: not p.is_running()) for p in everyone)
        assert executor.wrap(length)(None, ["abc"] * 9) == [3] * 9


def test_the_loss_of_the_template_during_a_call_costs_nothing_more():
    def fratricide():
        for process in psutil.Process(os.getppid()).children():
            process.kill()

    with RewardExecutor(1) as executor:
        for _ in range(2):
            with pytest.warns(RewardFailureWarning, match="1 by the end of the worker"):
                assert executor.wrap(failing(fratricide))(None, [*"aaxaa"]) == [1, 1, None, 1, 1]


@pytest.mark.parametrize("detach", ["", "setsid ", "exec setsid "])
@pytest.mark.parametrize("end", ["wait", "exit"])
def test_what_a_reward_started_dies_with_it(brief, tmp_path, detach, end):
    pids = tmp_path / "pids"

    def reward(prompts, completions, **columns):
        script = f"(echo $BASHPID >> {pids}; {detach}sleep 1000) & (sleep 1000) & {end}"
        subprocess.Popen(["bash", "-c", script], start_new_session=True)
        while True:
            subprocess.run(["true"])

    with pytest.warns(RewardFailureWarning):
        assert brief.wrap(reward)(None, ["a"]) == [None]
    assert pids.read_text()
    assert all(gone(int(pid)) for pid in pids.read_text().split())
    # no zombies either
    assert eventually(lambda: not [p for p in guard_of(brief).children(recursive=True) if named_like_a_child(p)])


@pytest.mark.parametrize(("workers", "queue"), [(1, 1), (3, 2), (3, 7), (2, 500)])
def test_order_and_results_do_not_depend_on_workers_and_queue(workers, queue):
    def reward(prompts, completions, seed, **columns):
        return [float(completions[0]) + np.random.default_rng(seed[0]).integers(3) / 8]

    rows = list(range(400))
    expected = [row + np.random.default_rng(row).integers(3) / 8 for row in rows]
    with RewardExecutor(workers, queue=queue) as executor:
        wrapped = executor.wrap(reward)
        for _ in range(2):
            assert wrapped(None, [str(row) for row in rows], seed=rows) == expected


@pytest.mark.parametrize("queue", [1, 3, 40])
def test_the_queue_bounds_what_is_pickled_and_unfinished(monkeypatch, queue):
    pool, settled, most = LocalPool(2, queue, 60), [], 0
    settle = _Call.settle
    monkeypatch.setattr(_Call, "settle", lambda call, *rest: (settled.append(rest), settle(call, *rest)))
    with RewardExecutor(2, queue=queue) as executor:
        run = executor._pool.run

        def counted(task, count, encode, limit):
            made = 0

            def count_and_encode(number):
                nonlocal made, most
                made += 1
                most = max(most, made - len(settled))
                return encode(number)

            return run(task, count, count_and_encode, limit)

        monkeypatch.setattr(executor._pool, "run", counted)
        assert executor.wrap(length)(None, ["a"] * 3000) == [1.0] * 3000
    assert 1 <= most <= queue
    pool.close()


def test_large_samples(executor):
    texts = ["a" * 3_000_000, "b", "c" * 2_000_000]
    assert executor.wrap(length)(texts, texts, answer=texts) == [3_000_000, 1, 2_000_000]


def test_a_reward_of_the_whole_batch(executor):
    def rank(prompts, completions, answer, **columns):
        assert len(completions) == len(answer) == 3
        if "x" in completions:
            spin()
        order = sorted(completions)
        return [float(order.index(text)) for text in completions]

    columns = {"answer": [1, 2, 3]}
    assert executor.wrap(rank, per_sample=False)(None, ["b", "c", "a"], **columns) == [1, 2, 0]
    with pytest.warns(
        RewardFailureWarning, match=r"3 of 3 samples \(3 over the time limit of 0.5 s\).*the whole batch"
    ):
        assert executor.wrap(rank, per_sample=False, time_limit=0.5)(None, ["b", "x", "a"], **columns) == [None] * 3
    with pytest.raises(InvalidInputError, match="returned 1 values for 3 completions"):
        executor.wrap(lambda prompts, completions: [1.0], per_sample=False)(None, ["a"] * 3)


def test_the_limit_of_a_whole_batch_grows_with_it():
    with (
        RewardExecutor(1, time_limit=0.25) as executor,
        pytest.warns(RewardFailureWarning, match=r"2 over the time limit of 0.5 s"),
    ):
        assert executor.wrap(failing(spin), per_sample=False)(None, ["x", "a"]) == [None, None]


@pytest.mark.slow
def test_columns_are_split_like_the_completions(executor):
    def reward(prompts, completions, completion_ids, array, tensor, setting, trainer_state, **columns):
        assert "environments" not in columns
        assert setting == {"a": 1}
        assert trainer_state.global_step == 7
        assert not hasattr(trainer_state, "log_history")
        assert array.shape == (1, 2)
        return [prompts[0] + len(completion_ids[0]) + array[0, 1] + float(tensor[0])]

    torch = pytest.importorskip("torch")
    state = types.SimpleNamespace(global_step=7, log_history=[{}], callback=threading.Lock())
    values = executor.wrap(reward)(
        prompts=[100, 200],
        completions=["a", "b"],
        completion_ids=[[1], [2, 3]],
        array=np.array([[0, 10], [0, 20]]),
        tensor=torch.tensor([0.25, 0.5]),
        setting={"a": 1},
        trainer_state=state,
        environments=[threading.Lock(), threading.Lock()],
    )
    assert values == [111.25, 222.5]


def test_the_training_step_reaches_the_reward(executor):
    class State:
        global_step = 30
        history = threading.Lock()

    reward, batch = toolrl("two_stage"), (None, ["<think>t</think>"] * 2)
    columns = {"answer": ["<think>t</think>\n<response>r</response>", "<think>t</think>"]}
    assert executor.wrap(reward)(*batch, **columns, trainer_state=State()) == [0, 0.5]
    assert executor.wrap(reward)(*batch, **columns, step=[0, 40]) == [0, 0.5]
    assert executor.wrap(reward)(*batch, **columns, step=3) == [0, 1]


def test_the_warning_names_columns_that_were_not_sent(executor):
    def reward(prompts, completions, environments, **columns):
        return [1.0]

    with pytest.warns(
        RewardFailureWarning, match=r"(?s)missing 1 required.*Not sent to workers: column 'environments'"
    ):
        assert executor.wrap(reward)(None, ["a"], environments=[threading.Lock()]) == [None]
    with pytest.raises(InvalidInputError, match="row 1 cannot be sent"):
        executor.wrap(length)(None, ["a", threading.Lock()])


def test_timings_and_the_trainers_hooks(brief):
    def reward(prompts, completions, log_extra, log_metric, **columns):
        log_extra("length", [len(completions[0])])
        log_metric("seen", 1.0)
        if completions[0] == "x":
            spin()
        if completions[0] == "y":
            raise ValueError
        return [1.0]

    metrics, extras = [], []
    hooks = {"log_metric": lambda *pair: metrics.append(pair), "log_extra": lambda *pair: extras.append(pair)}
    with pytest.warns(RewardFailureWarning):
        assert brief.wrap(reward, name="r")(None, ["abc", "x", "de", "y"], **hooks) == [1, None, 1, None]
    assert extras == [("length", [3, None, 2, None])]
    assert [pair for pair in metrics if pair[0] == "seen"] == [("seen", 1.0)] * 2
    found = dict(metrics)
    timing = brief.timings()["r"]
    assert (timing.calls, timing.samples, timing.timeouts, timing.exceptions, timing.crashes) == (1, 4, 1, 1, 0)
    assert 1 <= timing.slowest <= timing.busy_seconds
    assert timing.seconds >= 1
    assert timing.mean == timing.busy_seconds / 4
    assert found["executor/r/seconds"] == timing.seconds
    assert found["executor/r/sample_seconds_max"] == timing.slowest
    assert found["executor/r/sample_seconds_mean"] == timing.mean
    assert [found[f"executor/r/{name}"] for name in ("timeouts", "exceptions", "crashes")] == [1, 1, 0]
    brief.wrap(reward, name="r")(None, ["a"], **hooks)
    assert (brief.timings()["r"].calls, brief.timings()["r"].samples) == (2, 5)
    assert RewardTiming().mean == 0


def test_composition(executor):
    reward = executor.wrap(length) + 0.5 * ExactMatch()
    assert reward.__name__ == "length + 0.5*(exact_match)"
    metrics = {}
    assert reward(None, ["a", "bc"], answer=["a", "x"], log_metric=metrics.__setitem__) == [1.5, 2]
    assert "executor/length/seconds" in metrics
    whole = executor.wrap(weighted_sum(ExactMatch(), length, name="both"))
    assert whole(None, ["a", "bc"], answer=["a", "x"]) == [2, 2]


def test_calls_from_several_threads(executor):
    found = {}

    def call(number):
        found[number] = executor.wrap(length)(None, ["a" * number] * 50)

    threads = [threading.Thread(target=call, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: [float(number)] * 50 for number in range(8)}


def guard_of(executor):
    return psutil.Process(executor._pool._finish.peek()[2][0].pid)


def test_workers_stay_and_nothing_remains_after_close():
    with RewardExecutor(2) as executor:
        reward = executor.wrap(lambda prompts, completions: [float(os.getpid())])
        used = {int(pid) for _ in range(5) for pid in reward(None, ["a"] * 40)}
        guard = guard_of(executor)
        everyone = [guard, *guard.children()]
        assert used <= {child.pid for child in everyone[1:]}
        assert 1 <= len(used) <= 2
    assert not guard.is_running()
    assert all(gone(process.pid) for process in everyone)
    with pytest.raises(PolyrewardError, match="executor is closed"):
        reward(None, ["a"])
    executor.close()


def test_an_executor_that_is_dropped_takes_its_processes_along():
    executor = RewardExecutor(1)
    (worker,) = executor.wrap(lambda prompts, completions: [float(os.getpid())])(None, ["a"])
    guard = psutil.Process(int(worker)).ppid()
    del executor
    assert gone(int(worker))
    assert gone(guard)


def test_an_interrupt_ends_the_call_and_its_workers(tmp_path):
    def reward(prompts, completions, **columns):
        (tmp_path / str(os.getpid())).touch()
        spin()

    def interrupt():
        while not list(tmp_path.iterdir()):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    with RewardExecutor(2, time_limit=1000) as executor:
        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            executor.wrap(reward)(None, ["x"] * 6)
        thread.join()
        assert all(gone(int(path.name)) for path in tmp_path.iterdir())
        assert executor.wrap(length)(None, ["ab"] * 10) == [2] * 10


def test_the_loss_of_the_guard_is_an_error_and_the_next_call_works():
    with RewardExecutor(1) as executor:
        (worker,) = executor.wrap(lambda prompts, completions: [float(os.getpid())])(None, ["a"])
        psutil.Process(int(worker)).parent().kill()
        assert gone(int(worker))
        with pytest.raises(PolyrewardError, match="guard process of the reward executor is gone"):
            executor.wrap(length)(None, ["a"])
        assert executor.wrap(length)(None, ["ab"]) == [2]


SCRIPT = """
import os, subprocess, sys, time
from polyreward.rewards.executor import RewardExecutor

def score(prompts, completions, **columns):
    if completions[0] == "x":
        child = subprocess.Popen(["sleep", "1000"], start_new_session=True)
        print(os.getppid(), os.getpid(), child.pid, flush=True)
        while True:
            pass
    return [float(len(completions[0]))]

executor = RewardExecutor(2, time_limit=1000)
"""


@pytest.mark.parametrize("forked", [False, True])
def test_nothing_survives_the_trainer(forked):
    script = SCRIPT
    if forked:  # a data loader, say, which holds the socket to the guard
        script += 'executor.wrap(score)(None, ["a"])\n'
        script += "if (loader := os.fork()) == 0:\n    time.sleep(1000)\nprint(loader)\n"
    script += 'executor.wrap(score)(None, ["a", "x", "bb"])'
    with subprocess.Popen([sys.executable, "-"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as trainer:
        trainer.stdin.write(script)
        trainer.stdin.close()
        loader = int(trainer.stdout.readline()) if forked else None
        pids = [int(pid) for pid in trainer.stdout.readline().split()]
        trainer.kill()
        trainer.wait()
        assert len(pids) == 3
        assert all(gone(pid) for pid in pids)
        if forked:
            os.kill(loader, signal.SIGKILL)


def test_functions_of_a_session_without_a_main_module(tmp_path):
    script = SCRIPT + textwrap.dedent("""
        later = 3.0
        print(executor.wrap(score)(None, ["a", "bb"]))
        print(executor.wrap(lambda prompts, completions: [later])(None, ["a"]))
        if os.fork() == 0:  # a fork has workers of its own
            print(executor.wrap(score)(None, ["ccc"]), flush=True)
            os._exit(0)
        os.wait()
        print(executor.wrap(score)(None, ["dddd"]))
    """)
    done = subprocess.run([sys.executable, "-"], input=script, capture_output=True, text=True, cwd=tmp_path)
    assert done.stderr == ""
    assert sorted(done.stdout.split("\n")) == ["", "[1.0, 2.0]", "[3.0]", "[3.0]", "[4.0]"]


def test_ray_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"polyreward\[ray\]"):
        RewardExecutor(ray_address="local")


@pytest.fixture(scope="module")
def cluster():
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False, logging_level="error")
    yield ray
    ray.shutdown()


@pytest.mark.ray
@pytest.mark.slow
def test_ray_spreads_samples_and_loses_only_the_guilty_one(cluster):
    with RewardExecutor(time_limit=0.5, queue=30, ray_address="local") as executor:
        texts = [*"abcxdefg"] * 3
        expected = [None if text == "x" else 1.0 for text in texts]
        for action in (spin, functools.partial(os._exit, 3), lambda: 1 / 0):
            with pytest.warns(RewardFailureWarning, match=r"failed on 3 of 24 .*row 3"):
                assert executor.wrap(failing(action))(None, texts) == expected
        assert executor.wrap(length)(None, ["a" * (row % 7) for row in range(200)]) == [row % 7 for row in range(200)]
        assert executor.wrap(lambda prompts, completions: [2.0] * 3, per_sample=False)(None, ["a"] * 3) == [2] * 3
        where = executor.wrap(lambda prompts, completions: [float(os.getpid())])
        assert len(set(where(None, ["a"] * 200))) == 2
        with pytest.raises(InvalidInputError, match="returned 0 values for 1"):
            executor.wrap(lambda prompts, completions: [])(None, ["a"] * 4)
        with pytest.raises(InvalidInputError, match="cannot be loaded"):
            executor.wrap(Unloadable(os._exit, (5,)))(None, ["a"])
        pids = {int(pid) for pid in where(None, ["a"] * 200)}
    assert all(gone(pid) for pid in pids)
    assert cluster.is_initialized()


@pytest.mark.ray
@pytest.mark.slow
def test_ray_replaces_a_lost_actor_and_runs_its_samples_again(cluster, tmp_path):
    def reward(prompts, completions, **columns):
        mark = tmp_path / completions[0]
        if completions[0] == "once" and not mark.exists():
            mark.touch()
            os.kill(psutil.Process(os.getppid()).ppid(), signal.SIGKILL)  # the actor
        if completions[0] == "always":
            os.kill(psutil.Process(os.getppid()).ppid(), signal.SIGKILL)
        return [1.0]

    with RewardExecutor(2, time_limit=60, ray_address="local") as executor:
        wrapped = executor.wrap(reward)
        assert wrapped(None, ["a", "b", "once", "c", "d"]) == [1] * 5
        with pytest.warns(RewardFailureWarning, match=r"row 1: the Ray actor is lost"):
            assert wrapped(None, ["a", "always", "c"]) == [1, None, 1]


def test_a_cluster_that_is_not_there_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)  # another test's session may be open
    with (
        RewardExecutor(ray_address="127.0.0.1:1") as executor,
        pytest.raises(InvalidInputError, match=r"cannot connect to a Ray cluster at '127\.0\.0\.1:1'"),
    ):
        executor.wrap(lambda prompts, completions, **columns: [1.0])(["p"], ["c"])
