"""Ends a command that has a terminal to itself, by a signal or by closing the terminal.

  terminal.py TERM|INT|QUIT|HUP|closed COMMAND...
"""
import fcntl
import os
import pty
import select
import signal
import struct
import sys
import termios
import time

TIMEOUT_S = 100
LEAVE_ALTERNATE_SCREEN = b'\x1b[?1049l'
SHOW_CURSOR = b'\x1b[?25h'


def main():
    how, command = sys.argv[1], sys.argv[2:]
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ['TERM'] = 'xterm'
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack('HHHH', 25, 80, 0, 0))
        os.execvp(command[0], command)
    deadline = time.monotonic() + TIMEOUT_S
    try:
        shown = read_until(terminal, deadline, lambda text: b'quits' in text)
        for name in ['USR1', 'USR2']:
            os.kill(pid, getattr(signal, f'SIG{name}'))
        if how == 'closed':
            os.close(terminal)
        else:
            os.kill(pid, getattr(signal, f'SIG{how}'))
            shown = read_until(terminal, deadline, lambda _: False)
            assert LEAVE_ALTERNATE_SCREEN in shown, shown
            assert SHOW_CURSOR in shown, shown
        while True:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                break
            assert time.monotonic() < deadline, 'it does not end'
            time.sleep(0.02)
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        raise
    assert os.WIFEXITED(status), f'ended with {status}'
    # Without a terminal it may notice that before the signal.
    assert os.WEXITSTATUS(status) == 0 or how == 'closed', f'ended with {status}'


def read_until(terminal, deadline, is_enough):
    """What the command shows until that is enough, or it has ended."""
    text = b''
    while not is_enough(text):
        left = deadline - time.monotonic()
        assert left > 0 and select.select([terminal], [], [], left)[0], text
        try:
            part = os.read(terminal, 65536)
        except OSError:
            part = b''
        if not part:
            break
        text += part
    return text


main()
