"""`leukemia_nb` and `python -m leukemia_nb` are the command line."""

import os
import signal
import sys
from contextlib import suppress
from types import FrameType


def _stop_at_once(number: int, frame: FrameType | None) -> None:
    """End without a traceback of whatever is being imported."""
    with suppress(OSError):
        os.write(2, b"\nleukemia_nb: stopped before anything was done.\n")
    os._exit(130)


def _leave_this_folder_out() -> None:
    """Python puts the current folder first on the path of `python -m`, where a `json.py` would be taken for the library's."""
    if not sys.flags.safe_path and os.path.isdir(sys.path[0]) and os.path.samefile(sys.path[0], os.getcwd()):
        folder = sys.path.pop(0)
        if os.path.samefile(folder, os.path.dirname(os.path.dirname(os.path.abspath(__file__)))):
            sys.path.append(folder)


def main() -> None:
    """Run the command line."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _stop_at_once)
    with suppress(OSError):
        _leave_this_folder_out()  # the current folder may be gone
    from leukemia_nb.study.command_line import main

    main()


if __name__ == "__main__":
    main()
