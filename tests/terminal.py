"""A program behind a pseudo-terminal, as a user has it: keys go in, and what it writes comes out."""

import fcntl
import os
import pty
import select
import signal
import struct
import termios
import time


class Terminal:
    """Terminal([command], env) runs the command; `screen` is all that it has written."""

    def __init__(self, command, env, columns=80):
        self.screen = ""
        self.seen = 0  # what `expect` has passed
        self.pid, self.file = pty.fork()
        if self.pid == 0:
            os.execvpe(command[0], command, env)
        self.resize(columns)

    def resize(self, columns, rows=24):
        fcntl.ioctl(self.file, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, text):
        os.write(self.file, text.encode())

    def read(self, seconds):
        """What comes within so many seconds; False at the program's end."""
        if not select.select([self.file], [], [], seconds)[0]:
            return True
        try:
            part = os.read(self.file, 65536)
        except OSError:  # the other side is closed
            return False
        self.screen += part.decode(errors="replace")
        for _ in range(part.count(b"\x1b[6n")):  # "where is the cursor?"
            self.type("\x1b[1;1R")
        return bool(part)

    def expect(self, text, seconds=120):
        """Waits until the program has written this, behind what was expected before."""
        deadline = time.time() + seconds
        while text not in self.screen[self.seen:]:
            assert time.time() < deadline and self.read(0.2), (text, self.screen[-2000:])
        self.seen = self.screen.index(text, self.seen) + len(text)

    def exit_code(self, seconds=60):
        """Waits for the end."""
        deadline = time.time() + seconds
        while self.read(0.1):
            assert time.time() < deadline, self.screen[-2000:]
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def kill(self):
        """For a test that fails before its program's end."""
        try:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass
        os.close(self.file)
