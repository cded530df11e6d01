"""
A ladder from REINFORCE to PPO, on the built-in task: what each rung adds, and what goes wrong when
one part is left out of the whole. Gold, the exact mark of held-out answers, over the PPO steps.

    bash run_all.sh tiny cpu --output_dir RUN                # the SFT and the reward model
    OMP_NUM_THREADS=1 python bench/ladder.py RUN --work WORK --plot bench/results/ladder.png

A variant is a row of VARIANTS: flags of step3_ppo.py, and where there is no flag, a function below
that replaces one of its functions. Each run is a process of its own, one after another, and what is
finished in WORK is not run again. `--only NAME ...` runs some, `--seeds 1 2 3` repeats each with
other noise in the sampling of rollouts (models, prompts and held-out questions stay the same). The
tables of all finished runs in WORK are printed. The picture needs matplotlib.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # not bench/: its kernels.py would stand before kernels/


# -----------------------------------------------------------------------------
# what has no flag: each replaces a function of step 3 by another

def no_whitening():
    """Advantages as they come: neither their mean is taken off, nor are they divided."""
    import step3_ppo
    step3_ppo.whiten = lambda values, mask: values * mask


def scores_two_higher():
    """Every answer earns 2 more, so that nearly all earn something. No answer's rank changes."""
    import step3_ppo
    shape_rewards = step3_ppo.shape_rewards

    def higher(scores, logprobs, ref_logprobs, mask, kl_coef):
        return shape_rewards(scores + 2, logprobs, ref_logprobs, mask, kl_coef)

    step3_ppo.shape_rewards = higher


def scores_two_higher_no_whitening():
    scores_two_higher()
    no_whitening()


def dropout_on():
    """Actor and critic drop a tenth of their activations, in rollouts' forwards and in updates."""
    import support.models

    def leave_on(hf_config):
        hf_config.dropout = 0.1

    support.models.disable_dropout = leave_on


def eos_not_trained():
    """The loss leaves out each answer's last token, its EOS, while the rewards stay in place."""
    import step3_ppo
    actor_loss = step3_ppo.ppo_actor_loss

    def without_last(logprobs, old_logprobs, advantages, mask, cliprange):
        is_last = mask.cumsum(1) == mask.sum(1, keepdim=True)
        return actor_loss(logprobs, old_logprobs, advantages, mask * ~is_last, cliprange)

    step3_ppo.ppo_actor_loss = without_last


def kl_reward_turned_round():
    """The KL reward with the other sign: a token earns by being likelier than under the reference."""
    import step3_ppo
    shape_rewards = step3_ppo.shape_rewards

    def turned_round(scores, logprobs, ref_logprobs, mask, kl_coef):
        return shape_rewards(scores, logprobs, ref_logprobs, mask, -kl_coef)

    step3_ppo.shape_rewards = turned_round


# -----------------------------------------------------------------------------
# the variants

class Variant(NamedTuple):
    label: str
    flags: str
    replace: object = None   # a function above, called before the stage starts
    weak_reward: bool = False  # a reward model of 150 steps, not 1,200


COMMON = ("--data_path toy --max_answer_seq_len 40 --max_eval_samples 256 --eval_steps 10 "
          "--skip_preflight --actor_learning_rate 3e-4 --critic_learning_rate 3e-4 "
          "--num_warmup_steps 5 --per_device_generation_batch_size 32")
ONE_UPDATE = "--per_device_train_batch_size 32 --ppo_epochs 1"
FOUR_UPDATES = "--per_device_train_batch_size 16 --ppo_epochs 2"
NO_CLIP = "--cliprange inf --cliprange_value inf"
PPO = f"--advantage gae {FOUR_UPDATES} --kl_coef 0.05"
VARIANTS = {
    # the ladder: each rung is the one before and one part more
    "reinforce": Variant("1 REINFORCE", f"--advantage reinforce {ONE_UPDATE} {NO_CLIP} --kl_coef 0",
                         no_whitening),
    "baseline": Variant("2 + baseline", f"--advantage reinforce {ONE_UPDATE} {NO_CLIP} --kl_coef 0"),
    "epochs": Variant("3 + epochs and clip", f"--advantage reinforce {FOUR_UPDATES} --kl_coef 0"),
    "critic": Variant("4 + critic (no KL)", f"--advantage gae {FOUR_UPDATES} --kl_coef 0"),
    "ppo": Variant("5 + KL: PPO", PPO),
    # one part left out of the whole
    "no_epochs": Variant("one update a rollout", f"{PPO} {ONE_UPDATE}"),
    "no_clip": Variant("no clip", f"{PPO} {NO_CLIP}"),
    "no_critic": Variant("no critic", f"{PPO} --advantage reinforce"),
    "no_whitening": Variant("no whitening", PPO, no_whitening),
    "dropout": Variant("dropout on", PPO, dropout_on),
    "no_eos": Variant("EOS not trained", PPO, eos_not_trained),
    # what the parts are for, where the task is less kind
    "higher": Variant("REINFORCE, scores 2 higher",
                      f"--advantage reinforce {ONE_UPDATE} {NO_CLIP} --kl_coef 0",
                      scores_two_higher_no_whitening),
    "weak": Variant("weak reward model, PPO", PPO, weak_reward=True),
    "weak_no_kl": Variant("weak reward model, no KL", f"{PPO} --kl_coef 0", weak_reward=True),
    # for bench/results/kl_estimators.md
    "drift": Variant("KL reward turned round", PPO, kl_reward_turned_round),
}
LADDER = ["reinforce", "baseline", "epochs", "critic", "ppo"]
LEFT_OUT = ["ppo", "no_epochs", "no_clip", "no_critic", "critic", "no_whitening", "dropout", "no_eos"]
HARDER = ["reinforce", "higher", "weak", "weak_no_kl"]


# -----------------------------------------------------------------------------
# a run

def other_noise(seed):
    """Rollouts of training are sampled with other noise; evaluations, whose calls are < 0, not."""
    import torch

    import step3_ppo
    respond = step3_ppo.DeepSpeedPPOTrainer.respond

    def with_other_noise(self, prompt_batch, n, call):
        return respond(self, prompt_batch, n, call + 10_000 * seed if call > 0 else call)

    step3_ppo.DeepSpeedPPOTrainer.respond = with_other_noise
    torch.manual_seed(seed)


def child(name, seed):
    """In a process of its own: step 3 with the flags of sys.argv and what the variant replaces."""
    import step3_ppo
    from support.processes import run_stage
    variant = VARIANTS[name]
    if variant.replace:
        variant.replace()
    other_noise(seed)
    run_stage(step3_ppo.main, step3_ppo.Config, step3_ppo.__doc__)


def start(command, log):
    """Runs a command -> its CPU seconds. Its output is in the file `log`; a failure ends this."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with open(log, "w") as file:
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT,
                              env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if code:
        sys.exit(f"ladder.py: error: {' '.join(command)} failed; {log} says why.")
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def weak_reward_model(run, work):
    """A reward model trained for 150 steps, an eighth of the recipe's -> its folder."""
    folder = work / "weak"
    if not (folder / "reward/config.json").exists():
        start([sys.executable, str(ROOT / "step2_reward.py"), "--model_name_or_path", f"{run}/sft",
               "--data_path", "toy", "--learning_rate", "3e-4", "--num_warmup_steps", "30",
               "--max_steps", "150", "--per_device_train_batch_size", "16", "--length_window", "1",
               "--max_answer_seq_len", "40", "--output_dir", str(folder)], work / "weak.log")
    return folder / "reward"


def run_variant(name, seed, run, work, steps):
    """Makes one run, if it is not there yet."""
    variant = VARIANTS[name]
    folder = work / f"{name}-{seed}"
    spent = folder / "cpu_seconds.json"
    if not spent.exists():
        reward = weak_reward_model(run, work) if variant.weak_reward else f"{run}/reward"
        seconds = start([sys.executable, __file__, "--child", name, str(seed),
                         *f"{COMMON} {variant.flags}".split(), "--max_steps", str(steps),
                         "--actor_model_name_or_path", f"{run}/sft", "--critic_model_name_or_path",
                         str(reward), "--output_dir", str(folder), "--overwrite_output_dir"],
                        work / f"{name}-{seed}.log")
        spent.write_text(json.dumps(seconds))
        print(f"{name} {seed}: {seconds:.0f} CPU s", file=sys.stderr, flush=True)


def finished_runs(name, work):
    """-> [(evaluations, CPU seconds)] of a variant's finished runs; an evaluation is a dict."""
    found = []
    for spent in sorted(work.glob(f"{name}-[0-9]*/cpu_seconds.json")):
        lines = (spent.parent / "actor/evaluations.jsonl").read_text().splitlines()
        found.append(([json.loads(line) for line in lines], json.loads(spent.read_text())))
    return found


# -----------------------------------------------------------------------------
# what is shown

def cell(values, digits=3):
    """Mean, and standard deviation where there are several."""
    text = f"{statistics.mean(values):.{digits}f}"
    return text if len(values) < 2 else f"{text} ± {statistics.stdev(values):.{digits}f}"


def table(names, runs):
    print("| | flags | runs | gold | score | KL, nats | CPU s |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for name in names:
        if not runs[name]:
            continue
        results = [evaluations[-1] for evaluations, _ in runs[name]]
        seconds = [spent for _, spent in runs[name]]
        numbers = [cell([result[f"eval/{key}"] for result in results])
                   for key in ("gold", "score", "kl")]
        flags = f"`{VARIANTS[name].flags}`"
        if VARIANTS[name].replace:
            flags += f", `{VARIANTS[name].replace.__name__}`"
        print(f"| {VARIANTS[name].label} | {flags} | {len(results)} | " + " | ".join(numbers)
              + f" | {statistics.mean(seconds):.0f} |")
    print()


def on_the_way(names, runs):
    """Gold at each evaluation, means of a variant's runs."""
    names = [name for name in names if runs[name]]
    steps = [line["step"] for line in runs[names[0]][0][0]] if names else []
    print("| gold at step | " + " | ".join(str(step) for step in steps) + " |")
    print("|---|" + "---:|" * len(steps))
    for name in names:
        gold = zip(*([line["eval/gold"] for line in evaluations] for evaluations, _ in runs[name]))
        cells = [f"{statistics.mean(values):.3f}" for values in gold]
        print(f"| {VARIANTS[name].label} | " + " | ".join(cells) + " |")
    print()


def draw(axes, title, names, runs):
    """Gold over the steps: the mean of a variant's runs, and between its lowest and highest."""
    styles = ["-", "--", "-.", ":"]
    for number, name in enumerate(name for name in names if runs[name]):
        steps = [line["step"] for line in runs[name][0][0]]
        gold = [[line["eval/gold"] for line in lines] for lines, _ in runs[name]]
        at_step = list(zip(*gold))
        mean = [statistics.mean(values) for values in at_step]
        line, = axes.plot(steps, mean, styles[number % 4], linewidth=1.8,
                          label=VARIANTS[name].label)
        axes.fill_between(steps, [min(values) for values in at_step],
                          [max(values) for values in at_step], color=line.get_color(), alpha=0.12,
                          linewidth=0)
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel("PPO step (one rollout of 32 answers each)")
    axes.grid(color="#e3e6ea", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8.5)


def plot(runs, file):
    try:
        from matplotlib.figure import Figure
    except ImportError:
        sys.exit("ladder.py: error: --plot needs matplotlib; pip install matplotlib")
    figure = Figure(figsize=(15, 4.6), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    draw(panels[0], "The ladder", LADDER, runs)
    draw(panels[1], "One part left out of PPO", LEFT_OUT, runs)
    draw(panels[2], "Where the task is less kind", HARDER, runs)
    panels[0].set_ylabel("gold: mean exact mark of 256 held-out answers (0 to 1)")
    figure.savefig(file, dpi=110)


def main():
    if sys.argv[1:2] == ["--child"]:
        name, seed = sys.argv[2:4]
        sys.argv[1:4] = []
        child(name, int(seed))
        return
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="--output_dir of a run of `tiny` with its SFT and reward model")
    parser.add_argument("--work", required=True, type=Path, help="where the runs are kept")
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), metavar="NAME",
                        default=list(VARIANTS), help=f"some of {', '.join(VARIANTS)}")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1], help="one run each")
    parser.add_argument("--steps", type=int, default=40, help="PPO steps of a run")
    parser.add_argument("--plot", metavar="FILE", help="also draw them")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)

    for seed in options.seeds:
        for name in options.only:
            run_variant(name, seed, options.run, options.work, options.steps)
    runs = {name: finished_runs(name, options.work) for name in VARIANTS}
    for names in (LADDER, LEFT_OUT, HARDER, ["ppo", "drift"]):
        table(names, runs)
        on_the_way(names, runs)
    if options.plot:
        plot(runs, options.plot)


if __name__ == "__main__":
    main()
