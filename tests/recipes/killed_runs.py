"""Runs a recipe that is killed again and again: ``killed_runs.py OUT KILLS SEED RECIPE [OPTION ...]``.

The first run, into OUT/whole, is left alone. The others, into OUT/killed, are forks of the process that has
done that one, so that they need not import torch, and are killed after a random share of its time.
"""

import os
import random
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import torch
from tqdm import tqdm

from fastkit.__main__ import main


def start(arguments):
    child = os.fork()
    if child == 0:
        code = 70
        tqdm.set_lock(threading.RLock())  # its own is of all processes, and what holds one may be killed
        try:
            code = main(arguments)
        finally:
            os._exit(code)
    return child


def finished_rows(out):
    try:
        lines = (out / "results.jsonl").read_bytes().splitlines(True)
    except FileNotFoundError:
        return []
    return [line for line in lines if line.endswith(b"\n")]


def run_all(out, kills, seed, recipe, *options):
    out = Path(out)
    torch.set_num_threads(1)  # no pool of threads that a fork would lack
    begun = time.perf_counter()
    assert main(["run", recipe, *options, "--out", str(out / "whole")]) == 0
    whole = time.perf_counter() - begun

    arguments = ["run", recipe, *options, "--out", str(out / "killed"), "--resume"]
    generator = random.Random(int(seed))
    rows, killed, longest = [], 0, whole / int(kills)
    for _ in range(int(kills)):
        child = start(arguments)
        time.sleep(generator.uniform(0, longest))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        killed += os.WIFSIGNALED(status)
        if killed == 0:  # it had ended: once all is loaded, or others have ended, it takes less time
            shutil.rmtree(out / "killed")
            longest /= 2
            continue
        now = finished_rows(out / "killed")
        assert now[: len(rows)] == rows, "a finished row was lost or changed"
        rows = now
        print(f"killed with {len(rows)} rows finished")
    _, status = os.waitpid(start(arguments), 0)
    assert status == 0, status
    assert finished_rows(out / "killed")[: len(rows)] == rows, "a finished row was lost or changed"
    print(f"{killed} of {kills} killed; a whole run takes {whole:.1f} s")


if __name__ == "__main__":
    run_all(*sys.argv[1:])
