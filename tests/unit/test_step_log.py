"""The log of steps: what a run consumed can be read from it, whatever was killed on the way."""

from __future__ import annotations

import pytest

from raydistill.workers.step_log import StepLog, consumed, consumed_by_all, ranges, read_lines, step_file, steps_of


def test_ids_are_kept_as_ranges():
    assert ranges([4, 5, 6, 9, 10, 3]) == [[4, 6], [9, 10], [3, 3]]
    assert ranges([]) == []


def test_of_a_step_that_is_done_again_the_last_line_counts(tmp_path):
    file = step_file(tmp_path, 0)
    log = StepLog(file)
    for step in (1, 2, 3):
        log.add(step, 1, [[2 * step, 2 * step + 1], [100 + step]], {"loss/vsd": 0.1 * step})
    # not closed, as a killed worker would leave it
    again = StepLog(file)
    for step in (3, 4):
        again.add(step, 1, [[2 * step, 2 * step + 1], [200 + step]], {"loss/vsd": 0.3 * step})
    lines = read_lines(file)
    assert [line["step"] for line in lines] == [1, 2, 3, 3, 4]
    assert list(steps_of(lines)) == [1, 2, 3, 4]
    assert steps_of(lines)[3]["values"] == {"loss/vsd": 0.3 * 3}  # the same bits
    assert consumed(lines).tolist() == [2, 3, 101, 4, 5, 102, 6, 7, 203, 8, 9, 204]


def test_a_cut_line_spoils_no_other(tmp_path):
    file = step_file(tmp_path, 0)
    StepLog(file).add(1, 1, [[0]], {})
    with file.open("a") as cut:
        cut.write('{"step":2,"sam')
    StepLog(file).add(2, 1, [[1]], {})
    assert consumed(read_lines(file)).tolist() == [0, 1]


FOREIGN = [
    b"\xff", b"[1]", b"7", b"null", b"{}", b'{"step":"3","world":1,"samples":[],"values":{}}',
    b'{"step":3,"world":1,"samples":[[[0]]],"values":{}}', b'{"step":3,"world":1,"samples":[[]],"values":{"a":"b"}}',
    b'{"step":3,"world":1,"samples":[],"values":[]}', b"[" * 100_000, "\u2028{".encode(),
]  # fmt: skip


@pytest.mark.parametrize("content", FOREIGN, ids=lambda content: repr(content[:24]))
def test_a_damaged_line_is_named_and_spoils_no_other(tmp_path, content, capfd):
    file = step_file(tmp_path, 0)
    log = StepLog(file)
    log.add(1, 1, [[0]], {"loss": 0.5})
    with file.open("ab") as foreign:
        foreign.write(content + b"\n")
    log.add(2, 1, [[1]], {})
    lines = read_lines(file)
    assert [line["step"] for line in lines] == [1, 2]
    assert consumed(lines).tolist() == [0, 1]
    (said,) = set(capfd.readouterr().out.splitlines())
    assert said == f"{file}: damaged lines are left out (2)"


def test_a_log_that_is_something_else_altogether_is_named_in_one_line(tmp_path, capfd):
    file = step_file(tmp_path, 0)
    file.write_bytes(b"\xff\x00\n" * 9)
    assert read_lines(file) == []
    assert capfd.readouterr().out == f"{file}: damaged lines are left out (1, 2, 3, 4, 5, …)\n"
    log = StepLog(file)
    log.add(1, 1, [[0]], {})
    assert consumed_by_all(tmp_path).tolist() == [0]


def test_what_was_never_written_is_empty(tmp_path):
    assert consumed(read_lines(step_file(tmp_path, 0))).tolist() == []


def test_of_steps_that_fewer_workers_did_again_their_lines_count(tmp_path):
    """Two workers, then one from the checkpoint at step 1, then two again from the checkpoint at step 3."""
    lives = [(2, (1, 2, 3)), (1, (2, 3, 4)), (2, (4, 5))]
    for world, steps in lives:
        for rank in range(world):
            log = StepLog(step_file(tmp_path, rank))
            for step in steps:
                ids = range(4 * step, 4 * step + 4)
                log.add(step, world, [ids[rank * 4 // world : (rank + 1) * 4 // world]], {})
            log.close()
    assert sorted(consumed_by_all(tmp_path).tolist()) == list(range(4, 24))
