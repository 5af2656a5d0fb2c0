"""Which checkpoint comes next, from one poll after the other."""

from __future__ import annotations

from memwatch.scan.arrivals import Arrivals
from memwatch.scan.checkpoint_store import Checkpoint


def checkpoint(step: int, *, size: int = 10, source: str | None = None) -> Checkpoint:
    source = source or f"run-{step}"
    return Checkpoint(step, source, ((source, size, 0),))


A, B, C = (checkpoint(step) for step in (100, 200, 300))


def test_what_has_not_changed_since_the_poll_before_is_next_in_order_of_step():
    arrivals = Arrivals()
    assert arrivals.poll([A, B]).next is None
    assert arrivals.poll([A, B]).next == A
    arrivals.done(A)
    assert arrivals.poll([A, B]).next == B
    arrivals.done(B)
    assert arrivals.poll([A, B]).next is None
    assert arrivals.poll([A, B, C]).next is None
    assert arrivals.poll([A, B, C]).next == C


def test_a_file_that_grows_is_waited_for_and_so_are_those_after_it():
    arrivals = Arrivals()
    sizes = [checkpoint(100, size=size) for size in (1, 5, 10)]
    assert [arrivals.poll([growing, B]).next for growing in sizes] == [None] * 3
    assert arrivals.poll([sizes[-1], B]).next == sizes[-1]


def test_a_smaller_step_that_comes_in_time_goes_first():
    arrivals = Arrivals()
    arrivals.poll([B])
    assert arrivals.poll([A, B]).next is None
    assert arrivals.poll([A, B]).next == A


def test_a_step_that_was_passed_is_late_and_said_once():
    arrivals = Arrivals()
    arrivals.done(B)
    assert arrivals.poll([A, B]).late == (A,)
    again = arrivals.poll([A, B])
    assert (again.late, again.next) == ((), None)


def test_what_is_deleted_before_its_turn_is_gone_and_said_once():
    arrivals = Arrivals()
    arrivals.poll([A, B])
    poll = arrivals.poll([B])
    assert (poll.gone, poll.next) == ((A,), B)
    assert arrivals.poll([B]).gone == ()


def test_what_was_looked_at_may_be_deleted():
    arrivals = Arrivals()
    arrivals.poll([A])
    arrivals.done(A)
    assert arrivals.poll([]).gone == ()


def test_what_was_given_up_is_new_again_once_its_files_change():
    arrivals = Arrivals()
    arrivals.poll([A, B])
    arrivals.give_up(A)
    assert arrivals.poll([A, B]).next == B
    longer = checkpoint(100, size=20)
    arrivals.poll([longer, B])
    assert arrivals.poll([longer, B]).next == longer


def test_a_last_file_without_a_number_is_looked_at_once_though_its_step_moves():
    """It counts as one step after all others, however many there are."""
    arrivals = Arrivals()
    last, moved = checkpoint(101, source="last"), checkpoint(301, source="last")
    arrivals.poll([A, last])
    arrivals.done(A)
    assert arrivals.poll([A, last]).next == last
    arrivals.done(last)
    poll = arrivals.poll([A, C, moved])
    assert (poll.next, poll.late, poll.gone) == (None, (), ())
    assert arrivals.poll([A, C, moved]).next == C


def test_a_file_that_is_written_over_is_new_at_each_step():
    arrivals = Arrivals()
    saves = [checkpoint(step, size=step, source="last") for step in (100, 200, 300)]
    for save in saves[:2]:
        arrivals.poll([save])
        assert arrivals.poll([save]).next == save
        arrivals.done(save)
    arrivals.poll([saves[2]])
    assert arrivals.poll([checkpoint(400, size=400, source="last")]).gone == (saves[2],)


def test_whether_the_folder_has_changed():
    arrivals = Arrivals()
    assert [arrivals.poll(found).has_changed for found in ([], [A], [A], [], [])] == [False, True, False, True, False]
