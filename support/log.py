"""
The log of a stage: what each of its steps and evaluations came to, in files, on the terminal and in
DeepSpeed's monitors.

    output/sft/metrics.jsonl       one object a step
    output/sft/evaluations.jsonl   one object an evaluation on held-out rows, names eval/...
    output/sft/samples.jsonl       one object a held-out answer (of rank 0's share) and evaluation:
                                   step, prompt (messages), answer, ended, and score, kl (nats to
                                   the reference), gold (exact mark) where there are such
"""

import json
import os
import time
from pathlib import Path

import torch.distributed as dist
from deepspeed.monitor.config import get_monitor_config
from deepspeed.monitor.monitor import MonitorMaster

from support.metrics import check_finite, memory_gb
from support.processes import MONITORS, deepspeed_settings, print0
from support.terminal import clock, is_terminal, keep_live, show_live

SECONDS_A_LINE = 90  # between two lines in a file


def monitors(config, section):
    """
    DeepSpeed's monitors that its JSON switches on (TensorBoard, W&B, CSV, Comet), or None.

    section  of summary.json, "sft" or its like: each stage writes into a folder of its own below
             --output_dir, output/tensorboard/sft, unless the JSON names another
    """
    ds_config = deepspeed_settings(config)
    found = {name: dict(ds_config[name]) for name in MONITORS if name in ds_config}
    for name in ("tensorboard", "csv_monitor"):
        if name in found:
            found[name].setdefault("output_path", str(Path(config.output_dir) / name))
            found[name].setdefault("job_name", section)
    if "wandb" in found:
        found["wandb"].setdefault("group", section)
    monitor = MonitorMaster(get_monitor_config(found))
    return monitor if monitor.enabled else None


class MetricsLog:
    """
    The log of one stage, written by rank 0. On a terminal a live line follows the steps. In a file
    stands a line every --logging_steps steps, by default every 90 seconds; its numbers are means
    over the steps since the line before. A resumed run, with `done` steps behind it, appends.
    """

    def __init__(self, folder, total_steps, every, columns, monitor=None, done=0,
                 steps_an_evaluation=0.0, eval_steps=0):
        """
        every                steps between two lines of a file; 0: SECONDS_A_LINE
        columns              (label, name of the metric, format) of what is printed; the live line
                             has the first two
        monitor              of `monitors`
        steps_an_evaluation  as how many steps an evaluation takes, until one has been timed
        eval_steps           steps between evaluations; 0: at the end only
        """
        self.folder = Path(folder)
        self.total_steps = total_steps
        self.every = every
        self.columns = columns
        self.monitor = monitor
        self.done = done
        self.steps_an_evaluation = steps_an_evaluation
        self.eval_steps = eval_steps
        self.an_evaluation = None  # seconds of the last one
        self.evaluated = 0.0       # seconds of all since the first step
        self.unprinted = []
        self.is_rank0 = dist.get_rank() == 0
        if self.is_rank0:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.file = self._open("metrics.jsonl", done)
            # The evaluation at the end is made anew.
            self.evaluations_file = self._open("evaluations.jsonl", min(done, total_steps - 1))
            self.samples_file = self._open("samples.jsonl", min(done, total_steps - 1))
        self.began = self.last_line = time.time()

    def _open(self, name, last_step):
        """A file of JSON lines to append to; a resumed run keeps those up to that step."""
        path = self.folder / name
        kept = []
        if self.done and path.exists():
            for line in path.read_text().splitlines(keepends=True):
                # Without its end, a line is one that was being written when the run was killed.
                if line.endswith("\n") and json.loads(line)["step"] <= last_step:
                    kept.append(line)
        path.write_text("".join(kept))
        return open(path, "a", buffering=1)

    def __call__(self, step, metrics):
        """
        step counts from 1; metrics are floats, over all ranks; None is left out.

        raises UsageError, on all ranks, for one that is no finite number: the run has diverged
        """
        check_finite(f"step {step}", metrics)
        if not self.is_rank0:
            return
        metrics = {name: value for name, value in metrics.items() if value is not None}
        metrics = {"step": step, **metrics, "memory_gb": memory_gb()}
        self.file.write(json.dumps(metrics, allow_nan=False) + "\n")
        self._to_monitor(step, metrics)
        self.unprinted.append(metrics)
        self._show(step)

    def evaluation(self, step, numbers, answers, seconds):
        """
        What the held-out rows came to after a step, 0 for the model that the stage starts from.

        numbers  {name: float}, over all ranks; None is left out
        answers  support.metrics.Answer of this rank's share of the prompts; one of them is printed
        seconds  that it took
        """
        self.an_evaluation = seconds
        self.evaluated += seconds if step else 0
        if not self.is_rank0 or step < self.done:
            return
        numbers = {f"eval/{name}": value for name, value in numbers.items() if value is not None}
        self.evaluations_file.write(json.dumps({"step": step, **numbers}) + "\n")
        self._to_monitor(step, numbers)
        for answer in answers:
            self.samples_file.write(json.dumps({"step": step, **answer.as_dict()}) + "\n")
        if step < self.total_steps:  # at the end the stage says them
            words = [f"{name.removeprefix('eval/')} {value:.3f}" for name, value in numbers.items()]
            print0(f"held-out rows at step {step}: {', '.join(words[:4])} ({seconds:.0f} s)")
        if answers:
            print0(answers[0])

    def evaluates_after(self, step):
        """Whether an evaluation is due; the one at the end is not meant."""
        return self.eval_steps and step % self.eval_steps == 0 and step < self.total_steps

    def _to_monitor(self, step, numbers):
        if self.monitor:
            events = [(name, value, step) for name, value in numbers.items() if name != "step"]
            self.monitor.write_events(events)

    # -------------------------------------------------------------------------
    # what is printed

    def _show(self, step):
        """The live line of a terminal, or now and then a line of a file."""
        now = time.time()
        trained = max(now - self.began - self.evaluated, 1e-6)  # a clock may be set back
        seconds_a_step = trained / (step - self.done)
        speed = f"{1 / seconds_a_step:.2f} steps/s"
        if seconds_a_step > 1:
            speed = f"{seconds_a_step:.1f} s/step"
        seconds_left = self._seconds_left(step, seconds_a_step)

        place, left = place_in_run(self.folder.name, now - self.began, seconds_left)
        words = [place, f"{step}/{self.total_steps}", left, speed, *self._means(self.columns[:2])]
        show_live("  ".join(words), force=step == self.total_steps)
        if step == self.total_steps:
            keep_live()

        is_due = now - self.last_line >= SECONDS_A_LINE
        if self.every:
            is_due = step % self.every == 0
        if is_due or step in (self.done + 1, self.total_steps):
            numbers = "  ".join(self._means(self.columns))
            if not is_terminal():
                print0(f"step {step:>5}/{self.total_steps}  {numbers}  {speed}  "
                       f"{clock(seconds_left)} left")
            self.unprinted = []
            self.last_line = now

    def _means(self, columns):
        """Words on the steps since the last line."""
        words = []
        for label, name, form in columns:
            values = [metrics[name] for metrics in self.unprinted if name in metrics]
            if name in self.unprinted[-1]:
                words.append(f"{label} {sum(values) / len(values):>{form}}")
        return words

    def _seconds_left(self, step, seconds_a_step):
        """Of the stage: its steps, and its evaluations, the one at the end among them."""
        an_evaluation = self.an_evaluation
        if an_evaluation is None:
            an_evaluation = self.steps_an_evaluation * seconds_a_step
        evaluations = 1
        if self.eval_steps:
            due = (self.total_steps - 1) // self.eval_steps - step // self.eval_steps
            evaluations += max(0, due)
        return (self.total_steps - step) * seconds_a_step + evaluations * an_evaluation


def place_in_run(stage, seconds, seconds_left):
    """
    -> which stage of how many this is, and the time that is left of it and of the run.

    RUN_STAGES, which run_all.sh sets, has the planned work of the stages, "1/3 4.0 2.5 2.0" in the
    first of them. How long this one takes says how long the others will.
    """
    left = f"{clock(seconds_left)} left"
    number, *work = os.environ.get("RUN_STAGES", "").split() or [""]
    if not number:
        return stage, left
    done = int(number.split("/")[0])
    if work:
        seconds_a_unit = (seconds + seconds_left) / float(work[done - 1])
        of_run = seconds_left + seconds_a_unit * sum(map(float, work[done:]))
        left += f", run {clock(of_run)}"
    return f"{stage} {number}", left
