"""
The terminal: while a stage works, one live line says where it is, and is written over again and
again. Other output takes it away first. In a file or a pipe there is no live line.
"""

import os
import shutil
import sys
import time
from contextlib import suppress

SECONDS_BETWEEN = 0.1  # because a terminal over a network is slow

shown = False
last_time = 0.0


def is_terminal():
    """Of rank 0; the other ranks write no live line."""
    is_rank0 = os.environ.get("RANK", "0") == "0"
    return is_rank0 and sys.stdout is not None and sys.stdout.isatty()


def write(text):
    """To the terminal. One that is gone, with the connection to its host, ends no run."""
    with suppress(OSError):
        sys.stdout.write(text)
        sys.stdout.flush()


def show_live(text, force=False):
    """
    Writes the live line, cut to the terminal's width, at most ten times a second unless forced.
    """
    global shown, last_time
    now = time.monotonic()
    if not is_terminal() or (now - last_time < SECONDS_BETWEEN and not force):
        return
    last_time = now
    # One column stays free, because some terminals begin a new line behind a full one.
    columns = shutil.get_terminal_size().columns
    write(f"\r{text[:columns - 1]}\x1b[K")
    shown = True


def clear_live():
    """Takes the live line away, before anything else is printed."""
    global shown
    if shown:
        write("\r\x1b[K")
        shown = False


def keep_live():
    """The live line stays as it is, and what follows stands below."""
    global shown
    if shown:
        write("\n")
        shown = False


def clock(seconds):
    """75 -> "1:15", 3,675 -> "1:01:15"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def watched(batches, text):
    """Yields the batches, of a known number, and says on the live line how far that is."""
    count = len(batches)
    for number, batch in enumerate(batches, 1):
        show_live(f"{text}: batch {number} of {count}", force=number == 1)
        yield batch
    clear_live()
