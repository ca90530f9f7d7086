"""The log of steps: what a run consumed can be read from it, whatever was killed on the way."""

from __future__ import annotations

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
