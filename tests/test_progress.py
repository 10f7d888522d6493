"""The estimate of a run: by steps from the first batch on; where there is no terminal, a line now and then."""

import fcntl
import io
import os
import struct
import termios

from segresearch.progress import Bar, has_columns


class Terminal(io.StringIO):
    def isatty(self):
        return True


def run(stream, batches=4, rows=8, steps=10, seconds=1.0):
    """A run whose every step takes `seconds`; the clock, and what was said after each step."""
    now, shares = [0.0], []
    with Bar(batches * rows, stream=stream, clock=lambda: now[0]) as bar:
        bar.describe("SEG")
        for _ in range(batches):
            report = bar.callback(rows, rows, steps)
            for i in range(steps):
                now[0] += seconds
                report({"i": i, "rows": slice(0, rows)})
                shares.append(bar.passed / bar.total)
            bar.add(rows)
    return shares


def test_a_terminal_without_columns_gets_lines():
    """As that of a job started by `script`: nothing can be drawn on it."""
    _, end = os.openpty()
    for columns, has in ((0, False), (80, True)):
        fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        with os.fdopen(os.dup(end), "w") as stream:
            assert has_columns(stream) == has and Bar(3, stream=stream).bar.disable == (not has)


def test_progress_is_in_steps_from_the_first_batch_on():
    shares = run(Terminal())
    assert shares == sorted(shares) and abs(shares[0] - 1 / 40) < 1e-9 and abs(shares[19] - 0.5) < 0.005


def test_lines_of_a_pipe_come_every_minute_or_five_percent_and_the_estimate_is_right():
    stream = io.StringIO()
    run(stream, seconds=30.0)  # 40 steps, 20 minutes
    lines = stream.getvalue().splitlines()
    assert len(lines) == 20 and lines[0] == "SEG: 5% of 32 images, 60 s, about 19 min left"
    assert "50% of 32 images, 10 min, about 10 min left" in lines[9]
    slow = io.StringIO()
    run(slow, batches=40, seconds=45.0)  # 400 steps: a line every other step, since a minute has passed
    assert len(slow.getvalue().splitlines()) == 200
    quick = io.StringIO()
    run(quick, seconds=0.1)  # done in 4 s
    assert quick.getvalue() == ""


def test_images_that_run_one_at_a_time_count_as_rows():
    with Bar(4, stream=io.StringIO()) as bar:
        report = bar.callback(4, 4, 2)
        for row in range(4):
            for i in range(2):
                report({"i": i, "rows": slice(row, row + 1)})
            assert abs(bar.passed - min(row + 1, 3.96)) < 1e-9
        report({"i": 9, "rows": slice(0, 4)})  # a sampler with more steps than the schedule
        assert bar.passed <= 4
