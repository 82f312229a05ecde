"""Processes that make no progress end and leave their stacks; those that make some live on."""

import signal
import subprocess
import sys
import textwrap

import pytest

from dash_dist.training.faults.watchdog import describe_hang, hang_folder


def run(tmp_path, body, *, seconds=60):
    """`body` in a process of its own, where `folder` is where the dumps go."""
    program = f"""
        import threading, time
        from pathlib import Path
        from dash_dist.training.faults import watchdog
        from dash_dist.training.faults.watchdog import Watchdog
        folder = Path({str(hang_folder(tmp_path, 2))!r})
        watchdog._GRACE_SECONDS = 0.5
    """
    program = textwrap.dedent(program) + textwrap.dedent(body)
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=seconds)


@pytest.mark.parametrize("thread", ["main", "other"])
def test_a_hang_is_dumped_and_ended_in_any_thread(tmp_path, thread):
    body = """
        def stands_still():
            with Watchdog(1.0) as dog:
                dog.start(folder, 3)
                dog.beat()
                time.sleep(600)
    """
    body = textwrap.dedent(body) + (
        "stands_still()" if thread == "main" else "t = threading.Thread(target=stands_still); t.start(); t.join()"
    )
    done = run(tmp_path, body)
    assert done.returncode == -signal.SIGALRM, done.stderr
    dump = hang_folder(tmp_path, 2) / "rank_00003.txt"
    assert "in stands_still" in dump.read_text()
    assert describe_hang(dump.parent) == (
        f"no progress; 1 of the ranks wrote their stacks and were ended: {dump.parent}/ rank_00003.txt"
    )


def test_progress_puts_the_end_off_and_nothing_is_left_behind(tmp_path):
    """Far more beats than fit into one timeout, one of which comes after the dump and within the grace."""
    body = """
        watchdog._GRACE_SECONDS = 600.0
        with Watchdog(0.5) as dog:
            dog.start(folder, 0)
            for _ in range(3):
                time.sleep(0.7)
                dog.beat()
        print("lived", folder.parent.exists())
        time.sleep(1)
    """
    done = run(tmp_path, body)
    assert (done.returncode, done.stdout) == (0, "lived False\n"), done.stderr


def test_without_a_timeout_nothing_is_watched(tmp_path):
    done = run(tmp_path, "with Watchdog(None) as dog:\n    dog.start(folder, 0)\n    dog.beat()\n")
    assert done.returncode == 0, done.stderr
    assert not hang_folder(tmp_path, 2).exists()


def test_of_many_dumps_some_are_named_and_empty_files_are_no_hang(tmp_path):
    folder = hang_folder(tmp_path, 1)
    assert describe_hang(folder) is None
    folder.mkdir(parents=True)
    for rank in range(8):
        (folder / f"rank_{rank:05d}.txt").write_text("File ..." if rank != 2 else "")
    text = describe_hang(folder)
    assert text.startswith("no progress; 7 of the ranks")
    assert text.endswith("rank_00000.txt, rank_00001.txt, rank_00003.txt, rank_00004.txt and 3 more")
    assert not (folder / "rank_00002.txt").exists()
