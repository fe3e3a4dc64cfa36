"""Runs scripts, each in a fork of this process, which has imported torch and nothing of fastkit.

For each line of JSON on stdin, [script, environment, folder], the exit code is a line on stdout. What the
script prints is in the files stdout and stderr of the folder.
"""

import json
import os
import sys
import traceback
from pathlib import Path

import torch  # noqa: F401 - what takes seconds, once for all scripts


def run(script, environment, folder):
    for number, name in ((1, "stdout"), (2, "stderr")):
        with Path(folder, name).open("wb") as file:
            os.dup2(file.fileno(), number)
    os.environ.update(environment)
    sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    try:
        exec(compile(script, "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as exit:
        return int(exit.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def main():
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                code = run(*json.loads(line))
                sys.stdout.flush()
                sys.stderr.flush()
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
