"""
Runs: what finished and stopped runs left on the disk, read without torch in a moment.
support/report.py and bench/ show it.
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

# section of summary.json -> its name for people, the script that writes it
NAMES = {"sft": "SFT", "reward": "Reward model", "dpo": "DPO", "ppo": "PPO"}
SCRIPTS = {"sft": "step1_sft", "reward": "step2_reward", "dpo": "step2_reward", "ppo": "step3_ppo"}


class RunError(ValueError):
    """There is no such run to read. The message says what came, what is accepted, the way out."""


@dataclass
class Stage:
    rows: list = field(default_factory=list)         # metrics.jsonl, one object a step
    evaluations: list = field(default_factory=list)  # one object an evaluation
    samples: list = field(default_factory=list)      # one object a held-out answer an evaluation
    results: dict = field(default_factory=dict)      # the section of summary.json, if finished
    config: dict = field(default_factory=dict)       # the flags, where known
    finished: bool = False
    total_steps: int | None = None                   # None where not known

    @property
    def last_step(self):
        return self.rows[-1]["step"] if self.rows else 0


@dataclass
class Run:
    name: str
    summary: dict
    stages: dict  # section -> Stage, in the order in which they run


# -----------------------------------------------------------------------------
# files

def read_json(path):
    """-> the object in a file; {} where there is no file. Raises RunError for anything else."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{path} cannot be read as JSON ({error}), as the stages write it; mend it, "
                       "or move it away to go on without it.") from None
    if not isinstance(value, dict):
        raise RunError(f"{path} holds no JSON object, as the stages write it; mend it, or move it "
                       "away to go on without it.")
    return value


def write_json(path, value):
    """Atomic: a reader sees the old file or the new one, never half of either."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(temporary, path)


def read_lines(path):
    """
    -> the objects in a .jsonl file, with a step each; [] where there is no file. The last line may
    be torn, because a run may be killed while it writes: it is left out. Raises RunError.
    """
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise RunError(f"{path} cannot be read ({error}); make it readable, or move it away to go "
                       "on without it.") from None
    objects = []
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            if number == len(lines):
                break
            value = None
        if not isinstance(value, dict):
            raise RunError(f"{path}, line {number}, is no JSON object, and every line must be one "
                           "(only the last may be cut off); mend the line or delete it.")
        step = number_of(value, "step")
        value["step"] = number if step is None else int(step)
        objects.append(value)
    return objects


def number_of(values, name):
    """values[name] as a finite float; None where it is none."""
    value = values.get(name)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number and abs(value) < 1e300 else None


def column(rows, name):
    """-> steps, values: arrays, of the rows where that metric is a finite number."""
    pairs = [(row["step"], number_of(row, name)) for row in rows]
    pairs = [pair for pair in pairs if pair[1] is not None]
    return np.array(pairs, float).reshape(-1, 2).T


# -----------------------------------------------------------------------------
# runs

def read_run(folder):
    """The --output_dir of a run, or the folder of one stage -> Run. Raises RunError."""
    folder = Path(folder)
    if not folder.is_dir():
        raise RunError(f"{folder}: no such folder; name the --output_dir of a run.")
    is_stage = (folder / "metrics.jsonl").exists()
    root = folder.resolve().parent if is_stage else folder
    summary = read_summary(root / "summary.json")
    stages = {}
    for stage_folder in [folder] if is_stage else [root / "sft", root / "reward", root / "actor"]:
        if (stage_folder / "metrics.jsonl").exists():
            section, stage = read_stage(stage_folder.resolve(), summary)
            stages[section] = stage
    for section in NAMES:
        # The folder of a finished stage may be gone, or another stage's by now.
        if section in summary and section not in stages and not is_stage:
            stages[section] = Stage(results=summary[section], finished=True,
                                    config=flags_in(summary, section))
    if not stages:
        raise RunError(
            f"{folder} holds no run: neither summary.json nor sft/metrics.jsonl, "
            "reward/metrics.jsonl or actor/metrics.jsonl, which the stages write; name the "
            "--output_dir of a run (run_all.sh's default is output).")
    return Run(str(folder), summary, {name: stages[name] for name in NAMES if name in stages})


def read_summary(path):
    summary = read_json(path)
    for name in (*NAMES, "versions", "config", "clock", "commands"):
        if not isinstance(summary.get(name, {}), dict):
            raise RunError(f"{path}: {name} is {str(summary[name])[:80]!r}, and an object is "
                           "needed; mend it, or move the file away to go on without it.")
    return summary


def flags_in(record, section=None):
    """The flags in a summary.json or a checkpoint's manifest.json; {} where there are none."""
    flags = record.get("config")
    if section and isinstance(flags, dict):
        flags = flags.get(section)
    if not isinstance(flags, dict):
        return {}
    # A manifest has entries beside the flags, which are named in words.
    return {name: value for name, value in flags.items() if name.isidentifier()}


def read_stage(folder, summary):
    """-> the stage's section of summary.json, Stage."""
    stage = Stage(read_lines(folder / "metrics.jsonl"), read_lines(folder / "evaluations.jsonl"),
                  read_lines(folder / "samples.jsonl"))

    # 1. Which stage it is: what it logs says so, and where it has not, its folder.
    section = {"reward": "reward", "actor": "ppo"}.get(folder.name, "sft")
    if any("rewards/accuracies" in row for row in stage.rows):
        section = "dpo" if folder.name == "actor" else "reward"
    elif any("objective/kl" in row for row in stage.rows):
        section = "ppo"

    # 2. Whether it is finished. A stage that trains once more deletes its run_config.json; the
    # section of summary.json is then of the run before.
    stage.finished = section in summary
    if stage.finished and not (folder / "run_config.json").exists():
        written = (folder / "metrics.jsonl").stat().st_mtime
        stage.finished = written <= (folder.parent / "summary.json").stat().st_mtime
    if stage.finished:
        stage.results = summary[section]
        stage.config = flags_in(summary, section)
        stage.total_steps = stage.last_step
    else:
        # The newest checkpoint says what the stage was to become.
        manifests = folder.glob("checkpoint-*/manifest.json")
        newest = max(manifests, key=lambda path: path.stat().st_mtime, default=None)
        manifest = read_json(newest) if newest else {}
        stage.config = flags_in(manifest)
        stage.total_steps = manifest.get("total_steps")

    # 3. Older runs have their evaluations in metrics.jsonl, and the last one in summary.json.
    if not stage.evaluations:
        stage.evaluations = [row for row in stage.rows
                             if any(name.startswith("eval/") for name in row)]
        if stage.results:
            if stage.evaluations and stage.evaluations[-1]["step"] == stage.last_step:
                stage.evaluations.pop()  # the same weights, evaluated twice
            results = {f"eval/{name}": value for name, value in stage.results.items()}
            stage.evaluations.append({**results, "step": stage.last_step})
    return section, stage
