"""Two processes that share their batches over gloo, against one with all of them."""

import torch

MEET = """

def save(rank, ranks):
    torch.save(found(rank, ranks), f"{folder}/{ranks}-{rank}.pt")


def meet(rank):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    save(rank, 2)
    dist.barrier()
    dist.destroy_process_group()


child = os.fork()
if child == 0:
    meet(1)
    sys.stdout.flush()
    os._exit(0)
meet(0)
save(0, 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


def results_of(run_script, script, cases, folder):
    """What ``found(rank, ranks)`` of the script returns: of one process alone, and of each of two.

    The script has ``cases``, and ``calls``, the sizes of what is reduced over the processes.
    """
    begin = f"""
import os
import sys
import torch
from torch import distributed as dist

folder, cases = {str(folder)!r}, {cases!r}
calls = []
reduce = dist.all_reduce
dist.all_reduce = lambda tensor, *args, **kw: (calls.append(tensor.numel()), reduce(tensor, *args, **kw))
"""
    done = run_script(begin + script + MEET, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / name, weights_only=True) for name in ("1-0.pt", "2-0.pt", "2-1.pt")]
