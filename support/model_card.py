"""
The model card: a README.md in each folder that a stage saves, with what the model is, what it was
trained from and on, the numbers it ended with, the command, and how to load it. Its head is what a
hub reads (https://huggingface.co/docs/hub/model-cards).
"""

import json
import shlex
from pathlib import Path

from support.metrics import command_words

# folder of a saved model -> what it is, and the class that loads it
KINDS = {
    "sft": ("fine-tuned on demonstrations (SFT, step 1 of 3)", "AutoModelForCausalLM"),
    "reward": ("a reward model, which scores an answer (step 2 of 3)",
               "AutoModelForSequenceClassification"),
    "actor": ("trained by reinforcement learning from a reward model (PPO, step 3 of 3)",
              "AutoModelForCausalLM"),
    "actor_ema": ("the moving average of the weights of the PPO actor beside it",
                  "AutoModelForCausalLM"),
    "critic": ("the critic of the PPO actor beside it, which values every token",
               "AutoModelForSequenceClassification"),
}
DPO = "trained on preference pairs without a reward model (DPO)"


def write_model_cards(config, section, numbers, model):
    """
    Rank 0: the cards of the folders that a stage has saved.

    section  of summary.json: "sft", "reward", "dpo" or "ppo"
    numbers  the stage's, by name; None is left out
    model    what the stage started from
    """
    folders = {"sft": ["sft"], "reward": ["reward"], "dpo": ["actor"],
               "ppo": ["actor", "actor_ema", "critic"]}[section]
    for name in folders:
        folder = Path(config.output_dir) / name
        # An average or a critic may be of an earlier run.
        asked_for = {"actor_ema": getattr(config, "enable_ema", False),
                     "critic": getattr(config, "advantage", "") == "gae"}
        if asked_for.get(name, True):
            kind, loader = KINDS[name]
            kind = DPO if section == "dpo" else kind
            (folder / "README.md").write_text(card(config, kind, loader, numbers, model, folder),
                                              encoding="utf-8")


def card(config, kind, loader, numbers, model, folder):
    """-> the text of one card."""
    data = [path for path in config.data_path if path != "toy"]
    on_hub = [path.partition(":")[0] for path in data if not Path(path).exists()]
    head = {"library_name": "transformers"}
    # Names of a hub alone; a folder of this machine means nothing there.
    if not Path(model).exists() and model != "tiny":
        head["base_model"] = model
    if on_hub:
        head["datasets"] = on_hub
    # A JSON value is a YAML value too.
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in head.items()), "---", "",
             f"# {folder.name}", "",
             f"A language model {kind}." if loader == "AutoModelForCausalLM" else f"This is {kind}.",
             "", f"* started from: `{model}`", f"* data: `{' '.join(config.data_path)}`",
             f"* command: `{shlex.join(command_words())}`", "",
             "| held-out result | |", "|---|---:|"]
    for name, value in numbers.items():
        if value is not None:
            lines.append(f"| {name} | {value:.4g} |")
    lines += ["", "```python", f"from transformers import AutoTokenizer, {loader}",
              f'tokenizer = AutoTokenizer.from_pretrained("{folder}")',
              f'model = {loader}.from_pretrained("{folder}")', "```", ""]
    return "\n".join(lines)
