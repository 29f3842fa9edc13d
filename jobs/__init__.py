"""Entry points, for `python -m jobs.X`, for `headrace submit` and for the console script.

Importing takes a second. Until a job takes over the signals, Ctrl-C and SIGTERM end a process that was started with `-m` without a word:
nothing has been begun. (While Python looks for the module that `-m` names, `sys.argv[0]` is "-m".)
"""

import os
import signal
import sys

if sys.argv[:1] == ["-m"]:
    for _number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(_number, lambda *_: os._exit(130))
