"""
What run_all.sh needs Python for:

    python -m support.run_all check step1_sft FLAGS -- step2_reward FLAGS -- step3_ppo FLAGS
    python -m support.run_all table output/summary.json
"""

import importlib
import json
import os
import sys

from support.flags import exit_on_usage_error, parse_config


SECTIONS = {"step1_sft": "sft", "step2_reward": "reward", "step3_ppo": "ppo"}


def check(words):
    """
    Every stage's flags, what its folder holds, and whether the data are enough for one of its
    steps, so that what stops the last stage does not show after the hours of the first.
    """
    from data import load_records, rows_of_step
    from support.checkpoints import refuse_to_overwrite

    stages = [[]]
    for word in words:
        if word == "--":
            stages.append([])
        else:
            stages[-1].append(word)
    processes = int(os.environ.get("WORLD_SIZE", 1))
    for number, (name, *flags) in enumerate(stages, 1):
        sys.argv[0] = f"{name}.py"  # the errors speak of that script
        stage = importlib.import_module(name)
        with exit_on_usage_error():
            config = parse_config(stage.Config, "", flags)
            section = "dpo" if getattr(config, "dpo", False) else SECTIONS[name]
            refuse_to_overwrite(config, section)
            train, _ = load_records(config, number, log=lambda sentence: None)
            rows_of_step(len(train), config, number, processes)


def table(path):
    """The headline numbers of a run."""
    with open(path) as file:
        summary = json.load(file)
    about = f"{summary['model']} on {summary['hardware']}, seed {summary['seed']}"
    print(f"\n{'stage':<8}{'seconds':>9}   held-out result        ({about})")
    shown = {"sft": ("perplexity", "gold"), "reward": ("accuracy",), "ppo": ("score", "kl", "gold")}
    for stage, names in shown.items():
        results = [f"{name} {summary[stage][name]:.3f}" for name in names if name in summary[stage]]
        print(f"{stage:<8}{summary[stage]['seconds']:>9.0f}   {'   '.join(results)}")
    print(f"{'all':<8}{summary['seconds']:>9.0f}   (in the stages; launching and importing come on "
          "top)")


if __name__ == "__main__":
    if sys.argv[1] == "check":
        check(sys.argv[2:])
    else:
        table(sys.argv[2])
