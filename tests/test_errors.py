"""
Bad input ends at once, in one sentence that says what came, what is accepted and the way out, with a code that is not 0
and no traceback.

Each case is a command line. They run in one process that imports the stages once and forks for each, since the imports
take longer than they do.
"""

import gzip
import io
import json
import os
import shutil
import subprocess
import sys

import pytest
import transformers

import chat
import step1_sft
from conftest import ROOT, clean_environment
from support.flags import UsageError, exit_on_usage_error, parse_config
from support.processes import check_launcher, deepspeed_settings

CASES = {  # name: (command line, what the sentence must name)
    # data
    "missing path": ("step1_sft.py --data_path missing.jsonl", ["missing.jsonl does not exist", "--data_path"]),
    "missing hub name": ("step1_sft.py --data_path nobody/nothing", ["nobody/nothing", "hub"]),
    "malformed JSON": ("step1_sft.py --data_path malformed.jsonl", ["malformed.jsonl, line 3", "not JSON"]),
    "malformed JSON list": ("step1_sft.py --data_path malformed.json", ["malformed.json, line 3", "not JSON"]),
    "not objects": ("step1_sft.py --data_path numbers.json", ["numbers.json", "object"]),
    "other file type": ("step1_sft.py --data_path notes.txt", ["notes.txt", ".jsonl"]),
    "cut gzip": ("step1_sft.py --data_path cut.jsonl.gz", ["cut.jsonl.gz cannot be read"]),
    "no parquet": ("step1_sft.py --data_path no.parquet", ["no.parquet cannot be read"]),
    "ragged CSV": ("step1_sft.py --data_path ragged.csv", ["ragged.csv", "row 2", "fields"]),
    "wrong columns": ("step1_sft.py --data_path columns.jsonl",
                      ["columns.jsonl", "ask, reply", "prompt, chosen, rejected"]),
    "not text": ("step1_sft.py --data_path nulls.jsonl", ["nulls.jsonl, row 1"]),
    "empty file": ("step1_sft.py --data_path empty.jsonl", ["empty.jsonl is empty"]),
    "empty CSV": ("step1_sft.py --data_path empty.csv", ["empty.csv is empty"]),
    "folder without train": ("step1_sft.py --data_path folder", ["folder", "train"]),
    "no pairs for stage 2": ("step2_reward.py --model_name_or_path tiny --data_path answers.jsonl",
                             ["0 of 20 rows", "rejected"]),
    "no pairs in any source": ("step2_reward.py --model_name_or_path tiny --data_path answers.jsonl more.jsonl",
                               ["answers.jsonl, more.jsonl", "a chosen and a rejected answer"]),
    "one prompt only": ("step1_sft.py --data_path one.jsonl", ["one.jsonl", "different questions"]),
    "nothing left by the split": ("step1_sft.py --data_path answers.jsonl --data_split 0,1,1",
                                  ["--data_split 0,1,1", "stage 1"]),
    "malformed split": ("step1_sft.py --data_split 2,4", ["--data_split 2,4", "three numbers"]),
    "weights that do not fit": ("step1_sft.py --data_weights 1 2", ["--data_weights", "1 source"]),
    "prompts too long": ("step1_sft.py --data_path answers.jsonl --max_seq_len 3", ["--max_seq_len 3", "longer"]),
    "prompts too long for PPO": ("step3_ppo.py --actor_model_name_or_path LM --critic_model_name_or_path REWARD "
                                 "--data_path answers.jsonl --max_prompt_seq_len 3",
                                 ["--max_prompt_seq_len 3", "longer"]),
    "too few rows": ("step1_sft.py --data_path answers.jsonl --per_device_train_batch_size 64",
                     ["do not fill", "--per_device_train_batch_size"]),
    "too few prompts": ("step3_ppo.py --actor_model_name_or_path LM --critic_model_name_or_path REWARD --data_path "
                        "answers.jsonl BATCH --per_device_generation_batch_size 64",
                        ["do not fill", "lower --per_device_generation_batch_size"]),
    "no answers at all": ("step1_sft.py --data_path prompts.jsonl SMALL", ["0 of 20 rows", "its columns are prompt"]),
    "nothing to evaluate": ("step1_sft.py --data_path answers.jsonl --max_eval_samples 0", ["--max_eval_samples 0"]),
    "a template that is no file": ("step1_sft.py --chat_template nowhere.jinja", ["--chat_template nowhere.jinja"]),
    "a template that is no Jinja": ("step1_sft.py --data_path answers.jsonl SMALL --chat_template {%broken",
                                    ["chat template"]),
    "python data.py": ("data.py --data_path missing.jsonl", ["missing.jsonl does not exist"]),
    # models
    "a folder with a letter missing": ("step1_sft.py --data_path answers.jsonl SMALL --model_name_or_path folder/sf",
                                       ["folder/sf: no such folder", "notes.txt"]),
    "no such model": ("step1_sft.py --model_name_or_path nowhere", ["nowhere", "tokenizer"]),
    "folder without weights": ("step1_sft.py --data_path answers.jsonl SMALL --model_name_or_path no_weights",
                               ["no_weights", "weights"]),
    "folder without config": ("step1_sft.py --data_path answers.jsonl SMALL --model_name_or_path no_config",
                              ["no_config", "config.json"]),
    "cut weights": ("step1_sft.py --data_path answers.jsonl SMALL --model_name_or_path cut_weights",
                    ["cut_weights", "weights"]),
    "a causal LM as reward model": ("step3_ppo.py --actor_model_name_or_path LM --critic_model_name_or_path LM "
                                    "--data_path answers.jsonl BATCH",
                                    ["no reward model", "score.weight"]),
    "a reward model as actor": ("step3_ppo.py --actor_model_name_or_path REWARD --critic_model_name_or_path REWARD "
                                "--data_path answers.jsonl BATCH",
                                ["no language model"]),
    "another vocabulary": ("step3_ppo.py --actor_model_name_or_path LM --critic_model_name_or_path other_words "
                           "--data_path answers.jsonl BATCH",
                           ["other_words", "tokenizer"]),
    "longer than the model": ("step1_sft.py --data_path answers.jsonl SMALL --model_name_or_path LM --max_seq_len 512",
                              ["512 tokens", "128 positions", "--max_seq_len"]),
    "answers longer than the model": ("step3_ppo.py --actor_model_name_or_path LM --critic_model_name_or_path REWARD "
                                      "--data_path answers.jsonl BATCH --max_prompt_seq_len 64 "
                                      "--max_answer_seq_len 128",
                                      ["192 tokens", "128 positions", "--max_answer_seq_len"]),
    "no layer of that name": ("step1_sft.py --data_path answers.jsonl SMALL --lora_dim 4 --lora_module_name nowhere",
                              ["--lora_module_name nowhere"]),
    "LoRA on the head": ("step1_sft.py --data_path answers.jsonl SMALL --model_name_or_path LM --lora_dim 4 "
                         "--lora_module_name lm_head", ["--lora_module_name lm_head", "head"]),
    "LoRA alone without LoRA": ("step1_sft.py --data_path answers.jsonl SMALL --only_optimize_lora",
                                ["--only_optimize_lora", "--lora_dim"]),
    "chat with nobody": ("chat.py --path nowhere", ["--path nowhere"]),
    "chat with a folder without weights": ("chat.py --path no_weights", ["--path no_weights"]),
    "chat with a reward model": ("chat.py --path REWARD --prompt Hello", ["--path", "language model"]),
    # flags
    "unknown flag": ("step1_sft.py --learning_rat 1", ["--learning_rat", "did you mean --learning_rate"]),
    "another stage's flag": ("step1_sft.py --kl_coef 0.1", ["--kl_coef", "STEP3_ARGS"]),
    "no number": ("step1_sft.py --max_steps ten", ["--max_steps", "ten"]),
    "missing DeepSpeed config": ("step1_sft.py --deepspeed_config nowhere.json", ["nowhere.json", "configs"]),
    "malformed DeepSpeed config": ("step1_sft.py --deepspeed_config malformed.json",
                                   ["malformed.json, line 3", "not JSON"]),
    "DeepSpeed config that is a list": ("step1_sft.py --deepspeed_config list.json", ["list.json", "object"]),
    "a section of another name": ("step1_sft.py --deepspeed_config misspelt.json",
                                  ["misspelt.json", "'tensorbord'", "'tensorboard'"]),
    "a monitor without its package": ("step1_sft.py --deepspeed_config comet.json",
                                      ["comet.json", "pip install comet_ml"]),
    "a flag of TRL's": ("step3_ppo.py --beta 0.1", ["--beta", "--kl_coef"]),
    "several unknown flags": ("step1_sft.py --lora_rank 8 --max_length 9",
                              ["--lora_rank; here that is --lora_dim", "--max_seq_len"]),
    "ZeRO stage 7": ("step1_sft.py --zero_stage 7", ["--zero_stage 7", "0, 1, 2"]),
    "batch of 0": ("step1_sft.py --per_device_train_batch_size 0", ["--per_device_train_batch_size 0", "at least 1"]),
    "log every -1 steps": ("step1_sft.py --logging_steps -1", ["--logging_steps -1", "at least 0"]),
    "unknown schedule": ("step1_sft.py --data_path answers.jsonl SMALL --lr_scheduler_type zigzag",
                         ["--lr_scheduler_type", "zigzag", "cosine"]),
    "a schedule with settings of its own": ("step1_sft.py --lr_scheduler_type warmup_stable_decay",
                                            ["--lr_scheduler_type", "warmup_stable_decay", "cosine"]),
    "negative learning rate": ("step1_sft.py --data_path answers.jsonl SMALL --learning_rate -1",
                               ["--learning_rate -1"]),
    "batches that do not divide": ("step3_ppo.py --actor_model_name_or_path LM --critic_model_name_or_path REWARD "
                                   "--data_path answers.jsonl "
                                   "--per_device_generation_batch_size 6 --per_device_train_batch_size 4",
                                   ["--per_device_generation_batch_size 6", "--per_device_train_batch_size 4"]),
    "the stages before were not run": ("step3_ppo.py --data_path answers.jsonl BATCH", ["output/sft", "run_all.sh"]),
    "nor were they in another folder": ("step2_reward.py --data_path answers.jsonl --output_dir runs/1",
                                        ["runs/1/sft", "run_all.sh"]),
    "a KL to steer to, and nothing to steer by": (
        "step3_ppo.py --actor_model_name_or_path LM --critic_model_name_or_path REWARD --data_path answers.jsonl "
        "BATCH --kl_coef 0 --kl_target 6", ["--kl_target", "--kl_coef"]),
    "a reward file without the function's name": (
        "step3_ppo.py --actor_model_name_or_path LM --critic_model_name_or_path REWARD --data_path answers.jsonl "
        "BATCH --reward_fn fn.py", ["fn.py:function"]),
    "no steps": ("step1_sft.py --data_path answers.jsonl --max_steps 0", ["--max_steps 0"]),
    "a negative clip": ("step3_ppo.py --actor_model_name_or_path LM --critic_model_name_or_path REWARD "
                        "--data_path answers.jsonl BATCH --cliprange -1", ["--cliprange -1"]),
    "DPO without beta": ("step2_reward.py --model_name_or_path LM --data_path answers.jsonl --dpo --dpo_beta 0",
                         ["--dpo_beta 0"]),
    "a discount over 1": ("step3_ppo.py --actor_model_name_or_path LM --critic_model_name_or_path REWARD "
                          "--data_path answers.jsonl BATCH --gamma 5", ["--gamma 5.0", "from 0 to 1"]),
    "negative weight decay": ("step1_sft.py --data_path answers.jsonl SMALL --weight_decay -1", ["--weight_decay -1"]),
    "temperature 0": ("step3_ppo.py --actor_model_name_or_path LM --critic_model_name_or_path REWARD "
                      "--data_path answers.jsonl BATCH --temperature 0",
                      ["--temperature 0.0", "over 0"]),
    "top_p 0": ("step3_ppo.py --actor_model_name_or_path LM --critic_model_name_or_path REWARD "
                "--data_path answers.jsonl BATCH --top_p 0", ["--top_p 0.0"]),
    "no epochs of PPO": ("step3_ppo.py --actor_model_name_or_path LM --critic_model_name_or_path REWARD "
                         "--data_path answers.jsonl BATCH --ppo_epochs 0",
                         ["--ppo_epochs 0", "at least 1"]),
    "an advantage that needs a group": ("step3_ppo.py --actor_model_name_or_path LM --critic_model_name_or_path REWARD "
                                        "--data_path answers.jsonl BATCH --advantage rloo",
                                        ["--advantage rloo", "--num_generations"]),
    "an advantage of another name": ("step3_ppo.py --actor_model_name_or_path LM --critic_model_name_or_path REWARD "
                                     "--data_path answers.jsonl BATCH --advantage ppo",
                                     ["--advantage", "ppo", "rloo"]),
    "a reward file that is missing": ("step3_ppo.py --actor_model_name_or_path LM --critic_model_name_or_path REWARD "
                                      "--data_path answers.jsonl BATCH --reward_fn nowhere.py:f",
                                      ["nowhere.py", "--reward_fn"]),
    "no text to mix in": ("step3_ppo.py --actor_model_name_or_path LM --critic_model_name_or_path REWARD "
                          "--data_path answers.jsonl BATCH --unsupervised_data_path nowhere.txt", ["nowhere.txt"]),
    "text for less than a step": ("step3_ppo.py --actor_model_name_or_path LM --critic_model_name_or_path REWARD "
                                  "--data_path answers.jsonl BATCH --unsupervised_data_path long.txt --max_seq_len 64",
                                  ["--unsupervised_data_path", "chunks of --max_seq_len 64"]),
    "too little text to mix in": ("step3_ppo.py --actor_model_name_or_path LM --critic_model_name_or_path REWARD "
                                  "--data_path answers.jsonl BATCH --unsupervised_data_path notes.txt",
                                  ["notes.txt"]),
    "output where none can be": ("step1_sft.py --data_path answers.jsonl SMALL --output_dir /proc/nope",
                                 ["--output_dir /proc/nope"]),
    "output that is a file": ("step1_sft.py --data_path answers.jsonl SMALL --output_dir notes.txt",
                              ["notes.txt", "--output_dir"]),
    "infinity": ("step1_sft.py --learning_rate inf", ["--learning_rate inf", "finite"]),
    "no number for the adapters": ("step1_sft.py --lora_dim 4 --lora_alpha nan",
                                   ["--lora_alpha nan", "at least 0"]),
    "a weight without end": ("PPO --reward_weights inf", ["--reward_weights inf", "finite"]),
    "weights that are all 0": ("PPO --reward_weights 0", ["--reward_weights", "all 0"]),
    "a device that is not in the table": ("step1_sft.py --dry_run --device v100",
                                          ["--device", "v100", "a100-80"]),
    "more epochs than can be counted": ("step1_sft.py --num_train_epochs 99999999999999999999",
                                        ["--num_train_epochs", "1000000000"]),
    "more memory than there is": ("PPO --num_generations 1000000000000",
                                  ["more memory", "batch sizes", "--dry_run"]),
    "a blank source": ("step1_sft.py --data_path EMPTY", ["--data_path ''", "shell variable"]),
    "a blank folder": ("step1_sft.py --output_dir EMPTY", ["--output_dir ''", "shell variable"]),
    "adapters' layers without adapters": ("step1_sft.py --lora_module_name q_proj",
                                          ["--lora_module_name q_proj", "--lora_dim"]),
    "a flag in capitals": ("step1_sft.py --LEARNING_RATE 1", ["did you mean --learning_rate?"]),
    "a flag behind --": ("step1_sft.py -- --max_steps 1", ["--max_steps behind --"]),
    "a flag that is another's default": ("step1_sft.py --packing", ["--packing", "nothing"]),
    "LoRA on the reward head": ("step2_reward.py --data_path pairs.jsonl SMALL --lora_dim 4 "
                                "--model_name_or_path LM --lora_module_name score", ["head"]),
    # data
    "a quote that is never closed": ("step1_sft.py --data_path open.csv",
                                     ["open.csv, line 3", "quote"]),
    "semicolons": ("step1_sft.py --data_path semicolon.csv", ["'prompt;response'", "comma"]),
    "a column twice": ("step1_sft.py --data_path twice.csv", ["twice.csv", "prompt twice"]),
    "an address": ("step1_sft.py --data_path https://huggingface.co/datasets/a/b",
                   ["https://huggingface.co/datasets/a/b: an address", "owner/name"]),
    "a split of a file": ("step1_sft.py --data_path answers.jsonl:train",
                          ["answers.jsonl:train", "no splits"]),
    "a link to nothing": ("step1_sft.py --data_path dead.jsonl", ["dead.jsonl", "/nowhere.jsonl"]),
    "a device": ("step1_sft.py --data_path /dev/zero", ["/dev/zero is a pipe or a device"]),
    "a saved set that is broken": ("step1_sft.py --data_path saved",
                                   ["saved: the `datasets` library cannot read this folder"]),
    # models
    "a file as model": ("SFT --model_name_or_path model.gguf", ["model.gguf: a file", "folder"]),
    "an address as model": ("SFT --model_name_or_path https://huggingface.co/gpt2",
                            ["https://huggingface.co/gpt2: an address", "owner/name"]),
    "no such folder here": ("SFT --model_name_or_path ./nowhere", ["./nowhere: no such folder"]),
    "weights of another shape": ("SFT --model_name_or_path other_shape",
                                 ["other_shape", "fc1.bias has the shape (64,)", "(96,)"]),
    "an unknown activation": ("SFT --model_name_or_path other_activation",
                              ["other_activation: its weights could not be loaded", "swoosh"]),
    "an encoder": ("SFT --model_name_or_path encoder", ["encoder: a model of type bert"]),
    "adapters alone": ("SFT --model_name_or_path adapters", ["adapters holds LoRA adapters"]),
    "a deviation in words": ("PPO --critic_model_name_or_path wordy",
                             ["wordy", "score_std 'large'", "finite numbers"]),
    "chat with weights of another shape": ("chat.py --path other_shape",
                                           ["--path other_shape: no language model"]),
    "chat with an encoder": ("chat.py --path encoder", ["encoder", "bert"]),
    "chat with another model's tokenizer": ("chat.py --path few_embeddings",
                                            ["few_embeddings", "another model's tokenizer"]),
    "chat at no temperature": ("chat.py --path LM --prompt Hi --temperature 1e-320",
                               ["probabilities", "--temperature 1e-320"]),
    "chat from no seed": ("chat.py --path LM --seed -1", ["--seed -1", "from 0"]),
    # rewards
    "a reward file that exits": ("PPO --reward_fn exits.py:f", ["exits.py", "SystemExit: 3"]),
    "a reward function that exits": ("PPO --reward_fn reward.py:exits",
                                     ["reward.py:exits failed", "SystemExit: 4"]),
    "rewards without end": ("PPO --reward_fn reward.py:endless",
                            ["reward.py:endless must return a list of 4 numbers"]),
    "rewards that fail while they are read": ("PPO --reward_fn reward.py:fails_later",
                                              ["reward.py:fails_later", "ZeroDivisionError"]),
    "a reward too large for a float": ("PPO --reward_fn reward.py:huge",
                                       ["reward.py:huge must return a list of 4 numbers"]),
    "an error of several lines": ("PPO --reward_fn reward.py:talks",
                                  ["ValueError: first second", "chosen, rejected"]),
    "an error that cannot be said": ("PPO --reward_fn reward.py:mute", ["Mute: (its message"]),
}
SMALL = "--per_device_train_batch_size 2 --max_seq_len 64 --max_prompt_seq_len 32 --max_answer_seq_len 8 --max_steps 1"
BATCH = ("--per_device_generation_batch_size 4 --per_device_train_batch_size 4 --max_prompt_seq_len 32 "
         "--max_answer_seq_len 8 --max_steps 1")
SFT = f"step1_sft.py --data_path answers.jsonl {SMALL}"
PPO = ("step3_ppo.py --actor_model_name_or_path LM --critic_model_name_or_path REWARD --data_path "
       f"answers.jsonl {BATCH}")
REWARDS = """
import itertools, sys
class Mute(Exception):
    def __str__(self): raise ValueError
def exits(prompts, completions, **columns): sys.exit(4)
def endless(prompts, completions, **columns): return itertools.repeat(1.0)
def fails_later(prompts, completions, **columns): return (1 / 0 for _ in completions)
def huge(prompts, completions, **columns): return [10**400 for _ in completions]
def talks(prompts, completions, **columns): raise ValueError("first\\nsecond")
def mute(prompts, completions, **columns): raise Mute
"""

DRIVER = """
import json, os, runpy, sys, time, traceback
sys.path.insert(0, sys.argv[1])
import chat, support.toy, step1_sft, step2_reward, step3_ppo
import transformers.models.opt.modeling_opt
support.toy.toy_tokenizer()  # made once, not once a case
for name, (script, *flags) in json.load(open("commands.json")).items():
    started = time.time()
    child = os.fork()
    if child == 0:
        out = os.open("out", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1), os.dup2(out, 2)
        sys.argv, code = [script, *flags], 0
        try:
            runpy.run_path(os.path.join(sys.path[0], script), run_name="__main__")
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else (print(end.code), 1)[1]
        except BaseException:
            code = traceback.print_exc() or 1
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps({name: [code, time.time() - started, open("out", errors="replace").read()]}), flush=True)
"""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, model_folders, tokenizer):
    """A folder with everything that a user can get wrong."""
    folder = tmp_path_factory.mktemp("errors")
    rows = [{"prompt": f"What is {i}?", "response": f"It is {i}."} for i in range(20)]
    lines = [json.dumps(row) for row in rows]
    compressed = gzip.compress("\n".join(map(str, range(10_000))).encode())
    for name, content in {
            "answers.jsonl": "\n".join(lines), "more.jsonl": "\n".join(lines),
            "malformed.jsonl": "\n".join([*lines[:2], '{"prompt": "a",', *lines]),
            "malformed.json": '[\n{"prompt": "a"},\n{"prompt" "b"}]', "numbers.json": "[1, 2]",
            "list.json": "[1, 2]", "misspelt.json": '{"tensorbord": {"enabled": true}}',
            "comet.json": '{"comet": {"enabled": true}}', "notes.txt": "Hello!", "long.txt": 60 * "Hello! ",
            "cut.jsonl.gz": compressed[:len(compressed) // 2], "no.parquet": "Hello!",
            "ragged.csv": 'prompt,response\nHi,Hello\nHi,Hello, you\n',
            "prompts.jsonl": "\n".join(json.dumps({"prompt": row["prompt"]}) for row in rows),
            "columns.jsonl": '{"ask": "Hi", "reply": "Hello"}',
            "nulls.jsonl": 2 * '{"prompt": null, "response": "x"}\n', "empty.jsonl": "\n",
            "empty.csv": "prompt,response\n", "one.jsonl": "\n".join(lines[:1] * 20),
            "folder/notes.txt": "Hello!", "saved/state.json": "{", "model.gguf": "GGUF",
            "pairs.jsonl": "\n".join(json.dumps({"prompt": row["prompt"], "chosen": "Yes.",
                                                 "rejected": "No."}) for row in rows),
            "open.csv": 'prompt,response\nHi,Hello\n"Ho,Hey\nHu,Hi\n',
            "semicolon.csv": "prompt;response\nHi;Hello\n", "twice.csv": "prompt,prompt\nHi,Ho\n",
            "exits.py": "import sys\nsys.exit(3)\n", "reward.py": REWARDS}.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    for name, missing in (("no_weights", "model.safetensors"), ("no_config", "config.json")):
        shutil.copytree(model_folders["lm"], folder / name)
        (folder / name / missing).unlink()
    shutil.copytree(model_folders["lm"], folder / "cut_weights")
    os.truncate(folder / "cut_weights" / "model.safetensors", 5000)
    shutil.copytree(model_folders["reward"], folder / "other_words")
    (folder / "dead.jsonl").symlink_to("/nowhere.jsonl")
    bert = transformers.BertConfig(vocab_size=len(tokenizer)).to_dict()
    for name, start, changes in (
            ("other_shape", "lm", {"ffn_dim": 96}), ("few_embeddings", "lm", {}),
            ("other_activation", "lm", {"activation_function": "swoosh"}), ("encoder", "lm", bert),
            ("wordy", "reward", {"score_mean": 0.0, "score_std": "large"}),
            ("adapters", "lm", {})):
        shutil.copytree(model_folders[start], folder / name)
        config = json.loads((folder / name / "config.json").read_text())
        (folder / name / "config.json").write_text(json.dumps({**config, **changes}))
    (folder / "adapters" / "adapter_config.json").write_text("{}")
    few = transformers.OPTConfig(vocab_size=20, hidden_size=32, ffn_dim=64, word_embed_proj_dim=32,
                                 num_hidden_layers=1, num_attention_heads=4, pad_token_id=3)
    transformers.OPTForCausalLM(few).save_pretrained(folder / "few_embeddings")
    vocabulary = json.loads((folder / "other_words" / "tokenizer.json").read_text())
    (folder / "other_words" / "tokenizer.json").write_text(json.dumps({
        **vocabulary, "added_tokens": vocabulary["added_tokens"] + [
            {"id": len(tokenizer), "content": "<another>", "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": True}]}))
    return folder


@pytest.fixture(scope="module")
def outcomes(workplace, model_folders):
    """name of a case -> (exit code, seconds without imports, output)"""
    commands = {}
    stands_for = {"LM": model_folders["lm"], "REWARD": model_folders["reward"], "EMPTY": ""}
    for name, (line, _) in CASES.items():
        for short, long in (("SFT ", SFT), ("PPO ", PPO), ("BATCH", BATCH), ("SMALL", SMALL)):
            line = line.replace(short, f"{long} ")
        commands[name] = [stands_for.get(word, word) for word in line.split()]
    (workplace / "commands.json").write_text(json.dumps(commands))
    done = subprocess.run([sys.executable, "-c", DRIVER, str(ROOT)], cwd=workplace, env=clean_environment(),
                          stdout=subprocess.PIPE, text=True, timeout=300, check=True)
    return {name: outcome for line in done.stdout.splitlines() if line.startswith("{")
            for name, outcome in json.loads(line).items()}


def assert_one_sentence(code, output, script, named):
    assert code not in (0, None) and code > 0, output[-2000:]
    assert "Traceback" not in output, output[-2000:]
    last = output.strip().splitlines()[-1]
    assert last.startswith(f"{script}: error: "), output[-2000:]
    assert "[-h]" not in output and len(last) < 700, "one sentence, not the whole manual"
    for word in named:
        assert word in last, (word, last)


@pytest.mark.parametrize("name", CASES)
def test_bad_input_ends_in_one_sentence(outcomes, name):
    line, named = CASES[name]
    code, seconds, output = outcomes[name]
    script = {"SFT": "step1_sft.py", "PPO": "step3_ppo.py"}.get(line.split()[0], line.split()[0])
    assert_one_sentence(code, output, script, named)
    assert seconds < 10, "at once; nothing is trained or waited for before"


# -----------------------------------------------------------------------------
# as a user types them

def test_a_stage_by_its_command_line(run_script):
    code, output = run_script("step1_sft.py", "--data_path", "missing.jsonl")
    assert code == 2
    assert_one_sentence(code, output, "step1_sft.py", ["missing.jsonl"])


@pytest.mark.parametrize("flags, named", [
    (["gigantic", "cpu"], ["MODEL 'gigantic'", "tiny", "opt-1.3b"]),
    (["tiny", "gpu9"], ["HARDWARE 'gpu9'", "cpu, 1gpu, 1node, multinode"]),
    (["./nowhere", "cpu"], ["./nowhere", "no such folder"]), (["tiny", "multinode"], ["HOSTFILE"]),
    (["tiny"], ["run_all.sh MODEL HARDWARE"]), ([], ["run_all.sh MODEL HARDWARE"])])
def test_run_all_refuses_before_it_installs_anything(run_script, tmp_path, flags, named):
    """A python3 that does nothing but say so: what is wrong with the words is known without it."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python3").write_text("#!/bin/sh\necho python3 was started\nexit 1\n")
    (tmp_path / "bin" / "python3").chmod(0o755)
    code, output = run_script("run_all.sh", *flags, env={"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
                                                         "HOSTFILE": "/nowhere"})
    assert_one_sentence(code, output, "run_all.sh", named)
    assert "python3 was started" not in output


def test_run_all_says_which_python_it_needs(tmp_path):
    """In a fresh checkout, where the only python3 is too old to install anything with."""
    shutil.copy(ROOT / "run_all.sh", tmp_path)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python3").write_text('#!/bin/sh\n[ "$1" != --version ] || echo Python 3.9.1\nexit 1\n')
    (tmp_path / "bin" / "python3").chmod(0o755)
    done = subprocess.run(["bash", tmp_path / "run_all.sh", "tiny", "cpu"], text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, env={"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin"})
    assert_one_sentence(done.returncode, done.stdout, "run_all.sh", ["Python 3.9.1", "3.11"])
    assert not (tmp_path / ".venv").exists()


def test_run_all_checks_all_stages_before_the_first(run_script):
    code, output = run_script("run_all.sh", "tiny", "cpu", env={"STEP3_ARGS": "--kl_coeff 0"})
    assert_one_sentence(code, output, "step3_ppo.py", ["--kl_coeff", "did you mean --kl_coef?"])


def test_run_all_keeps_the_stages_together(run_script):
    """They read each other's models below one --output_dir."""
    code, output = run_script("run_all.sh", "tiny", "cpu", env={"STEP1_ARGS": "--output_dir elsewhere"})
    assert_one_sentence(code, output, "run_all.sh", ["--output_dir", "all three stages"])


# -----------------------------------------------------------------------------
# what no command line can show

def test_an_argument_that_is_not_utf8():
    with pytest.raises(UsageError, match=r"'caf\\udce9.jsonl' is not UTF-8"):
        parse_config(step1_sft.Config, "", ["--data_path", "caf\udce9.jsonl"])


def test_the_sentence_comes_without_standard_output_and_with_an_odd_rank(monkeypatch, capsys):
    """`>&-` closes standard output, and Python has None there."""
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setenv("LOCAL_RANK", "zero")
    with pytest.raises(SystemExit) as end, exit_on_usage_error():
        raise UsageError("a fault.")
    assert end.value.code == 2
    assert "error: a fault." in capsys.readouterr().err


@pytest.mark.parametrize("changes, said", [
    (dict(WORLD_SIZE="two"), "WORLD_SIZE=two: "), (dict(MASTER_PORT=""), "MASTER_PORT=: "),
    (dict(RANK="2"), "RANK=2 WORLD_SIZE=2"), (dict(MASTER_PORT="65536"), "ports end at 65535"),
    (dict(RANK="1", MASTER_PORT="65535"), None)])
def test_a_launchers_variables_are_numbers_that_go_together(changes, said, monkeypatch):
    launcher = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="2", MASTER_ADDR="localhost",
                    MASTER_PORT="29500")
    for name, value in (launcher | changes).items():
        monkeypatch.setenv(name, value)
    if said is None:
        check_launcher()
        return
    with pytest.raises(UsageError, match=said):
        check_launcher()


def test_bf16_by_its_other_name_would_train_in_float32(tmp_path):
    (tmp_path / "ds.json").write_text('{"bfloat16": {"enabled": true}}')
    config = step1_sft.Config(deepspeed_config=str(tmp_path / "ds.json"))
    with pytest.raises(UsageError, match="bfloat16 is read under the name bf16"):
        deepspeed_settings(config)


def test_a_reader_that_has_seen_enough():
    """`python data.py | head -1` ends without a word."""
    program = ("from support.flags import exit_on_usage_error\nwith exit_on_usage_error():\n"
               "    for _ in range(100_000): print('Hello')")
    done = subprocess.run(["bash", "-c", f'{sys.executable} -c "{program}" | head -1; '
                           "exit ${PIPESTATUS[0]}"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (141, "Hello\n")
    assert "Error" not in done.stderr


def test_chat_hears_bytes_that_are_no_text(model_folders, monkeypatch, capsys):
    config = chat.Config(path=[model_folders["lm"]], max_new_tokens=2)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n/quit\n"), "utf-8"))
    chat.main(config)
    assert "Assistant:" in capsys.readouterr().out
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(UsageError, match="standard input is closed"):
        chat.main(config)


@pytest.mark.parametrize("text, said", [
    ("", "is empty"), ("1\n", "is not of a PPO run"),
    ('{"objective/kl": "small"}\n', "line 1: objective/kl is 'small'")])
def test_the_doctor_reads_metrics_alone(tmp_path, text, said):
    file = tmp_path / "metrics.jsonl"
    file.write_text(text)
    done = subprocess.run([sys.executable, ROOT / "support" / "doctor.py", file], text=True,
                          capture_output=True)
    assert done.returncode == 2
    assert_one_sentence(done.returncode, done.stderr, "doctor.py", [said])
