"""Events outlive the processes that write them, also those that die while writing."""

from dash_dist.run.events import EventLog


def test_events_of_several_writers_are_read_in_order(tmp_path):
    assert EventLog(tmp_path).read() == []
    first = EventLog(tmp_path).append("restart", "started again", step=4)
    second = EventLog(tmp_path).append("hang", "rank 1 stood still")
    log = EventLog(tmp_path)
    assert log.read() == [first, second]


def test_a_line_cut_short_loses_only_itself(tmp_path):
    log = EventLog(tmp_path)
    log.append("rollback", "back to step 2", step=9)
    whole = log.path.read_bytes()
    log.path.write_bytes(whole + whole[: len(whole) // 2])
    log.append("batch_skipped", "loss nan", step=3)
    assert [(event.kind, event.step) for event in log.read()] == [("rollback", 9), ("batch_skipped", 3)]
