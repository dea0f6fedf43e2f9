"""Runs that are cut off: killed, interrupted, ended by the system. The long form: kill_test.py."""

import os
import signal

import pytest

import kill_test
import voc_data


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return kill_test.make_data(tmp_path_factory.mktemp("kill"))


def test_killed_run_equals_an_undisturbed_one(data, tmp_path):
    """Three kills. The long form asks that some of its kills fall into a write."""
    reference = kill_test.Run(tmp_path / "alone", data, epochs=8).start()  # beside the other
    run = kill_test.Run(tmp_path / "killed", data, epochs=8)
    counts = kill_test.torture(run, kills=3, seed=3)
    assert reference.wait()[0] == 0
    assert counts["kills"] >= 2 and counts["restarts"] >= 2
    assert kill_test.compare(run, reference) == []


def test_comparison_sees_a_difference(tmp_path):
    """A bit, a key, a length, a type: the comparison above can fail."""
    import torch

    one = {"a": [torch.zeros(3), 1], "b": "x"}
    for other in (
        {"a": [torch.tensor([0, 0, 1e-45]), 1], "b": "x"}, {"a": [torch.zeros(3), 1]},
        {"a": [torch.zeros(3)], "b": "x"}, {"a": [torch.zeros(3).double(), 1], "b": "x"},
        {"a": [torch.zeros(3), 2], "b": "x"},
    ):  # fmt: skip
        assert kill_test.differences(one, other)
    assert not kill_test.differences(one, {"a": [torch.zeros(3), 1], "b": "x"})


def test_signals_end_a_run_cleanly(data, tmp_path):
    """Ctrl-C (to the whole process group, workers too) and SIGTERM (to the process alone).

    The last whole epoch is saved, a line says how to go on, the status is the shell's, no process
    and no unfinished file stays behind. Both runs at once: starting is most of the time.
    """
    runs = {
        signal.SIGINT: (kill_test.Run(tmp_path / "int", data, 500, "none", workers=1), 130),
        signal.SIGTERM: (kill_test.Run(tmp_path / "term", data, 500, "none", workers=1), 143),
    }
    for run, _ in runs.values():
        run.start()
    for number, (run, status) in runs.items():
        assert run.until_epoch(2), run.output.read_text()
        if number == signal.SIGINT:
            os.killpg(run.process.pid, number)
        else:
            run.process.send_signal(number)
    for number, (run, status) in runs.items():
        code, output = run.wait()
        assert code == status, output
        assert "Traceback" not in output, output
        assert "same command again" in output
        saved = kill_test.torch.load(run.last, weights_only=True)["epoch"]
        assert saved >= 2 and f"{saved} whole epochs are saved" in output
        assert [record["epoch"] for record in run.history()] == list(range(1, saved + 1))
        assert not list(run.folder.rglob("*.tmp"))
        with pytest.raises(ProcessLookupError):
            os.killpg(run.process.pid, 0)


@pytest.fixture
def ctrl_c_heard():
    """A shell starts background jobs, and the tests in them, with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a system without fork")
def test_signal_in_a_fork_is_not_lost(ctrl_c_heard):
    """What a handler raises in a hook around fork is dropped by Python; it comes a little later."""
    once = [signal.SIGINT]

    def interrupt():
        if once:
            os.kill(os.getpid(), once.pop())

    os.register_at_fork(after_in_parent=interrupt)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    loader = voc_data.WorkerLoader(
        range(8), workers=1, batch_size=4, multiprocessing_context="fork"
    )
    with pytest.raises(KeyboardInterrupt):
        iter(loader)
    assert not once
    assert [batch.tolist() for batch in loader] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
