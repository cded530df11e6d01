"""Real processes on one CPU, gloo between them: `run_ranks(2, case)` calls case(rank, ranks) in each."""

import os
import socket
import traceback
from datetime import timedelta

import deepspeed
import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _rank_main(rank, ranks, port, case, arguments, failures):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank),
                      WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks), DS_ACCELERATOR="cpu",
                      DEEPSPEED_LOG_LEVEL="error")
    torch.set_num_threads(1)
    try:
        # not compiled for a test: see support.processes.start_processes
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False, timeout=timedelta(seconds=60))
        case(rank, ranks, *arguments)
        dist.barrier()
        dist.destroy_process_group()
    except Exception:
        failures.put(f"rank {rank}\n{traceback.format_exc()}")
        os._exit(1)


def run_ranks(ranks, case, *arguments):
    """Fails with the first rank's traceback, or when a rank is not done after 400 s."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = mp.get_context("spawn")
    failures = context.SimpleQueue()
    processes = [context.Process(target=_rank_main, args=(rank, ranks, port, case, arguments, failures))
                 for rank in range(ranks)]
    [p.start() for p in processes]
    [p.join(400) for p in processes]
    hung = [rank for rank, p in enumerate(processes) if p.is_alive()]
    codes = [p.exitcode for p in processes]
    [p.kill() for p in processes]
    assert failures.empty(), failures.get()
    assert not hung, f"ranks {hung} hang"
    assert not any(codes), f"exit codes of the ranks: {codes}"  # one that died without a Python exception
