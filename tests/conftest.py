"""
What the tests share: one thread, no network, a CPU (but for `-m gpu`); small models in which nothing has its default
value; a process group of one; the stage scripts as commands.

    python -m pytest tests                        # all that this machine can run
    python -m pytest tests -m "not slow"          # without what takes over 20 seconds
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
CACHE = tempfile.TemporaryDirectory()
os.environ["HF_DATASETS_CACHE"] = CACHE.name  # of the commands that tests start too

import pytest
import torch


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes over 20 seconds")
    config.addinivalue_line("markers", "gpu: needs a CUDA device; run with -m gpu")
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # tests of the maths mean the CPU, in float32, wherever they run
    torch.set_num_threads(1)


def pytest_ignore_collect(collection_path, config):
    """The exercises fail until a learner has done them, so they are collected only where they are named."""
    if collection_path.name == "exercises" and not any("exercises" in str(name) for name in config.args):
        return True


@pytest.hookimpl(tryfirst=True)  # before pytest leaves out what -m does not name
def pytest_collection_modifyitems(config, items):
    if config.option.markexpr == "gpu":  # the kernels' tests; without -m gpu they are the CPU's and the interpreter's
        for item in items:
            if item.path.name.startswith("test_kernel_") or item.path.name == "test_decoder_kernels.py":
                item.add_marker("gpu")
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device; run with -m gpu"))


def pytest_sessionfinish():
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


# -----------------------------------------------------------------------------
# tokenizer and models

@pytest.fixture(scope="session")
def tokenizer():
    """The tokenizer of `tiny`; read it, do not change it."""
    from data import load_tokenizer
    return load_tokenizer("tiny")


@pytest.fixture(scope="session")
def make_model(tokenizer):
    """
    make_model("opt" | "llama", head="lm" | "score", seed) -> a Hugging Face model, 2 layers, 4 heads (Llama: 2 of keys
    and values).
    """
    import transformers

    def make(family, head="lm", seed=0):
        torch.manual_seed(seed)
        common = dict(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                      max_position_embeddings=128, pad_token_id=tokenizer.pad_token_id,
                      eos_token_id=tokenizer.eos_token_id, num_labels=1)
        config = {"opt": lambda: transformers.OPTConfig(ffn_dim=64, word_embed_proj_dim=32, dropout=0.0, **common),
                  "llama": lambda: transformers.LlamaConfig(intermediate_size=64,
                                                            num_key_value_heads=2, **common)}[family]()
        auto = transformers.AutoModelForCausalLM if head == "lm" else transformers.AutoModelForSequenceClassification
        model = auto.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():  # biases of 0 and norms of 1 would hide that one is forgotten
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        return model.eval()

    return make


@pytest.fixture(scope="session")
def model_folders(make_model, tokenizer, tmp_path_factory):
    """{"lm": a saved causal LM, "reward": a saved reward model}, both OPT with the tokenizer of `tiny`."""
    folders = {}
    for name, head in (("lm", "lm"), ("reward", "score")):
        folders[name] = str(tmp_path_factory.mktemp(name))
        make_model("opt", head).save_pretrained(folders[name])
        tokenizer.save_pretrained(folders[name])
    return folders


@pytest.fixture(scope="session")
def endless(tokenizer, tmp_path_factory):
    """A model that answers for minutes: random weights, many positions, an EOS that is far from likely."""
    import transformers
    folder = str(tmp_path_factory.mktemp("endless"))
    torch.manual_seed(0)
    model = transformers.OPTForCausalLM(transformers.OPTConfig(
        vocab_size=len(tokenizer), hidden_size=64, word_embed_proj_dim=64, ffn_dim=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=16384, dropout=0.0, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id, tie_word_embeddings=False))
    # its head has no bias, so EOS is made unlikely by a weight that every hidden state is far from
    model.model.decoder.final_layer_norm.bias.data.fill_(1.0)
    model.lm_head.weight.data[tokenizer.eos_token_id] = -1.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# -----------------------------------------------------------------------------
# processes

@pytest.fixture(scope="session")
def settings():
    """DeepSpeed settings in float32 without ZeRO; the process group of one exists from here on."""
    from support.processes import setup
    from step1_sft import Config
    return setup(Config(deepspeed_config=str(ROOT / "configs" / "cpu.json")))


@pytest.fixture(scope="session")
def process_group(settings):
    return settings


def clean_environment():
    """The environment without what `setup` put there for this process: a command must start a group of its own."""
    launchers = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    bin_folder = str(Path(sys.executable).parent)  # run_all.sh takes its python3
    return {**{name: value for name, value in os.environ.items() if name not in launchers},
            "PATH": bin_folder + os.pathsep + os.environ["PATH"]}


@pytest.fixture
def run_script(tmp_path):
    """
    run_script("step1_sft.py", "--max_steps", "2") -> (exit code, standard output and error) of that command in
    tmp_path.
    """

    def run(script, *flags, timeout=120, env=None):
        program = ["bash"] if script.endswith(".sh") else [sys.executable]
        done = subprocess.run(program + [str(ROOT / script), *map(str, flags)], cwd=tmp_path,
                              env={**clean_environment(), **(env or {})},
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout)
        return done.returncode, done.stdout

    return run
