"""
The model card: a README.md in each folder that a stage saves, with what the model is, what it was
trained from and on, the numbers it ended with, the command, and how to load it. Its head is what a
hub reads (https://huggingface.co/docs/hub/model-cards).
"""

import json
import shlex
from pathlib import Path

from support.metrics import command_words

LOADERS = {"reward": "AutoModelForSequenceClassification",
           "critic": "AutoModelForSequenceClassification"}  # else AutoModelForCausalLM


def write_model_cards(config, section, numbers, model):
    """
    Rank 0: the cards of the folders that a stage has saved.

    section  of summary.json: "sft", "reward", "dpo" or "ppo"
    numbers  the stage's, by name; None is left out
    model    what the stage started from
    """
    if section == "sft":
        cards = {"sft": ("A language model fine-tuned on demonstrations (SFT).", model, numbers)}
    elif section == "reward":
        cards = {"reward": ("A reward model, which scores an answer.", model, numbers)}
    elif section == "dpo":
        cards = {"actor": ("A language model trained on preference pairs (DPO).", model, numbers)}
    else:
        rewards = " and ".join(config.reward_fn) or config.critic_model_name_or_path
        kind = (f"A language model trained by PPO (--advantage {config.advantage}) on the reward "
                f"of `{rewards}`.")
        cards = {"actor": (kind, model, numbers)}
        # What follows is not evaluated by itself.
        if config.enable_ema:
            cards["actor_ema"] = ("The moving average of the weights of the actor beside it.",
                                  model, {})
        if config.advantage == "gae":
            cards["critic"] = ("The critic of the actor beside it, which values every token.",
                               config.critic_model_name_or_path or model, {})
    for name, (kind, start, found) in cards.items():
        folder = Path(config.output_dir) / name
        loader = LOADERS.get(name, "AutoModelForCausalLM")
        text = card(config, kind, loader, found, start, folder)
        (folder / "README.md").write_text(text, encoding="utf-8")


def card(config, kind, loader, numbers, model, folder):
    """-> the text of one card."""
    sources = [*config.data_path, *config.sft_data_path,
               *getattr(config, "unsupervised_data_path", [])]
    data = [path for path in sources if path != "toy"]
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
             kind, "", f"* started from: `{model}`", f"* data: `{' '.join(sources)}`",
             f"* command: `{shlex.join(command_words())}`"]
    known = {name: value for name, value in numbers.items() if value is not None}
    if known:
        lines += ["", "| held-out result | |", "|---|---:|"]
        lines += [f"| {name} | {value:.4g} |" for name, value in known.items()]
    lines += ["", "```python", f"from transformers import AutoTokenizer, {loader}",
              f'tokenizer = AutoTokenizer.from_pretrained("{folder}")',
              f'model = {loader}.from_pretrained("{folder}")', "```", ""]
    return "\n".join(lines)
