import os
import pty
import signal
import threading

import pytest

from phase1.training.interrupts import interrupts_wait

HELD = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.fixture(autouse=True)
def handlers():
    """Those of a program in the foreground, whatever started the tests; both raise, so that no signal ends the tests."""

    def second(number, frame):
        raise InterruptedError(number)

    before = {number: signal.signal(number, second) for number in HELD}
    yield second
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", HELD)
def test_an_interrupt_waits_for_the_end_of_the_block_and_says_so(number, capfd):
    done = []
    with pytest.raises(KeyboardInterrupt), interrupts_wait() as interrupted:
        assert not interrupted()
        signal.raise_signal(number)
        assert interrupted()
        done.append("the rest")
    assert done == ["the rest"] and "once more to end at once" in capfd.readouterr().err


@pytest.mark.parametrize("number", HELD)
def test_a_second_one_does_not_wait(number):
    with pytest.raises(InterruptedError), interrupts_wait():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(number)
        pytest.fail("the block went on")


@pytest.mark.parametrize("error", [None, ValueError("no"), KeyboardInterrupt()], ids=repr)
def test_handlers_are_what_they_were_however_the_block_ends(error, handlers):
    try:
        with interrupts_wait():
            if error:
                raise error
    except BaseException as raised:
        assert raised is error
    assert [signal.getsignal(number) for number in HELD] == [handlers] * 3


def test_without_an_interrupt_a_block_is_like_any_other():
    with interrupts_wait() as interrupted:
        pass
    assert not interrupted()


def test_when_the_terminal_is_gone_what_is_printed_goes_nowhere_and_the_block_goes_on():
    """As when a window is closed: every later write to it would be an error, in the middle of a step."""
    ours, theirs = pty.openpty()
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        os.dup2(theirs, 1)
        os.dup2(theirs, 2)
        os.close(ours)
        os.close(theirs)
        status = 70
        try:
            with interrupts_wait() as interrupted:
                os.kill(os.getpid(), signal.SIGHUP)
                os.write(2, b"progress")
                status = 71 if interrupted() else 72
        except KeyboardInterrupt:
            status = 0 if status == 71 else status
        finally:
            os._exit(status)
    os.close(theirs)
    os.close(ours)
    assert os.waitpid(child, 0)[1] == 0


def test_a_signal_that_is_ignored_stays_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with interrupts_wait() as interrupted:
        signal.raise_signal(signal.SIGINT)
        assert not interrupted()


def test_another_thread_holds_nothing_and_goes_on(handlers):
    seen = []

    def work():
        with interrupts_wait():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [handlers]
