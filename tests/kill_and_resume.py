"""
Kills a stage at random moments, resumes it, and compares weights and metrics bitwise with those of
a run left alone.

    python tests/kill_and_resume.py --stage 1 --times 10

runs two ranks, prints a table, and ends with exit code 1 if a resumed run differs. By turns all
ranks are killed (SIGKILL), one is killed, or one is asked to stop (SIGTERM), in a random step, the
0th being all that precedes the first; when a rank has died, the others are terminated as
`deepspeed` does. The stages are imported once; each rank is a fork.
"""

import argparse
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]
os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")

import torch

import test_resume
from support.flags import exit_on_usage_error

HOWS = ("all ranks, SIGKILL", "one rank, SIGKILL", "one rank, SIGTERM")


def start(stage, config, ranks, log):
    """Process ids of the ranks; both streams of all go to the file `log`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ids = []
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks),
                              MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            run_rank(stage, config, rank, log)
        ids.append(pid)
    return ids


def run_rank(stage, config, rank, log):
    """The stage, in a fork that ends here."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    code = 1
    try:
        with exit_on_usage_error():
            stage.main(config)
        code = 0
    except SystemExit as stop:
        code = stop.code
    except BaseException as error:
        print(f"rank {rank}: {type(error).__name__}: {error}", flush=True)
    finally:
        os._exit(code)


def wait(ids):
    """
    Exit codes of all ranks (negative: the signal). When one is not 0, the others get SIGTERM, and
    SIGKILL 30 s later.
    """
    codes = {}
    failed = None
    while len(codes) < len(ids):
        for pid in set(ids) - codes.keys():
            ended, status = os.waitpid(pid, os.WNOHANG)
            if not ended:
                continue
            codes[pid] = os.waitstatus_to_exitcode(status)
            if codes[pid] and failed is None:
                failed = time.time()
                for other in set(ids) - codes.keys():
                    os.kill(other, signal.SIGTERM)
        if failed and time.time() > failed + 30:
            for other in set(ids) - codes.keys():
                os.kill(other, signal.SIGKILL)
        time.sleep(0.02)
    return [codes[pid] for pid in ids]


def is_running(pid):
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def logged_steps(metrics):
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


def kill(ids, how, draw):
    """Kills or stops those that `how` means and that still run."""
    chosen = ids if how == HOWS[0] else [draw.choice(ids)]
    number = signal.SIGTERM if how == HOWS[2] else signal.SIGKILL
    for pid in chosen:
        if is_running(pid):
            os.kill(pid, number)


def resumed_from(text):
    """What a resumed run says in its log: the step, "start" or "end"."""
    if "resumed from" in text:
        return text.split("checkpoint-")[1].split(":")[0]
    return "end" if "done already" in text else "start"


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", type=int, choices=(1, 2, 3), default=1)
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--zero_stage", type=int, default=2)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    stage, section = list(test_resume.FOLDERS.items())[args.stage - 1]
    draw = random.Random(args.seed)
    differ = 0
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        metrics = folder / "run" / section / "metrics.jsonl"
        test_resume.inputs(folder)

        def config(out, **flags):
            return test_resume.config(
                stage, folder, out, args.ranks, zero_stage=args.zero_stage, max_steps=args.steps,
                logging_steps=1, **flags)

        # The run left alone.
        began = time.time()
        log = folder / "log"
        codes = wait(start(stage, config("whole"), args.ranks, log))
        assert set(codes) == {0}, log.read_text()
        longest = time.time() - began
        whole = test_resume.result(folder / "whole")
        print(f"stage {args.stage}, {args.ranks} ranks, ZeRO {args.zero_stage}, {args.steps} "
              f"steps, a checkpoint every 3; left alone it takes {longest:.1f} s")
        print(f"{'':>3}  {'killed':<20}{'steps':>9}{'exit codes':>12}{'resumed from':>14}   "
              "against the run left alone")

        for number in range(args.times):
            # Start it, wait for a random moment in a random step, kill it.
            how = HOWS[number % 3]
            moment = draw.uniform(0, args.steps)
            log = folder / f"log-{number}"
            began = time.time()
            ids = start(stage, config("run"), args.ranks, log)
            while logged_steps(metrics) < int(moment) and time.time() < began + 3 * longest:
                time.sleep(0.01)
            # About half of a run is its steps, and the other half precedes them.
            step_seconds = longest / (2 * args.steps if moment > 1 else 2)
            time.sleep(moment % 1 * step_seconds)
            kill(ids, how, draw)
            codes = wait(ids)
            reached = logged_steps(metrics)

            # Resume it, and compare.
            log.unlink(missing_ok=True)
            resumed = wait(start(stage, config("run", resume=True), args.ranks, log))
            text = log.read_text()
            try:
                assert set(resumed) == {0}, text
                test_resume.assert_same(whole, test_resume.result(folder / "run"))
                verdict = "same weights, same metrics"
            except AssertionError as error:
                verdict = f"DIFFERS: {str(error)[-1500:]}"
                differ += 1
            shown = " ".join(map(str, codes))
            print(f"{number + 1:>3}  {how:<20}{reached:>9}{shown:>12}{resumed_from(text):>14}   "
                  f"{verdict}", flush=True)
            shutil.rmtree(folder / "run")
    sys.exit(differ > 0)


if __name__ == "__main__":
    main()
