"""
The README files keep what they promise: their commands run, their links lead somewhere, and the
table of tests/README.md names tests that exist.

Every command of a README, a line of a code block or inline code that begins like one, stands in one
of the tables below: it is run as it is printed (AS_PRINTED), or shortened by what the table says
(SHORTENED), or another test runs it (ELSEWHERE), or a CPU without a network cannot (NOT_HERE). A
new command that is in none of them fails the test.

    python tests/test_readme.py         # sets the lines of links like [`gae`](step3_ppo.py#L255)
"""

import functools
import gzip
import json
import re
import shutil
import socket
import subprocess
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from conftest import clean_environment

ROOT = Path(__file__).resolve().parent.parent
READMES = [ROOT / "README.md", *sorted(ROOT.glob("[!.]*/README.md"))]
PAGES = READMES + sorted(ROOT.glob("bench/results/*.md"))

# -----------------------------------------------------------------------------
# the commands

# Run as they are printed -> text that they print, exit code. Those with SLOW take over 20 seconds.
SLOW = pytest.mark.slow
AS_PRINTED = {
    "python step3_ppo.py --help": ("--kl_coef X", 0),
    "python data.py --data_path my_pairs.jsonl": ("Assistant:[[Certainly.</s>]]", 0),
    "python data.py --data_path my_pairs.jsonl --write_records records.jsonl": ("records", 0),
    "python chat.py --path output/actor": ("Assistant: ", 0),
    "python chat.py --path output/sft output/actor --reward_model output/reward --temperature 1":
        ("KL to output/sft", 0),
    "bash run_all.sh setup": ("", 0),
    "export GOMP_SPINCOUNT=1000": ("", 0),
    "python support/report.py output": ("output/report.html", 0),
    "python support/report.py runs/1 runs/2": ("runs/1/comparison.html", 0),
    "python support/doctor.py output": ("", 0),
    "python bench/frontier.py output/actor/evaluations.jsonl": ("gold", 0),
    "python bench/seeds.py runs/*": ("| mean", 0),
    # also held against the output that the README prints
    "python data.py --data_path toy": (
        "Human: Hello! Tell me the opposite of cold.\n\nAssistant:[[hot.</s>]]", 0, SLOW),
    "bash run_all.sh opt-13b 1node --dry_run": ("verdict   fits", 0, SLOW),
    "bash run_all.sh opt-13b 1node --zero_stage 2 --dry_run": (
        "verdict   does not fit: 86.5 GB at the moment 'generate', and a100-80 has 79.1 GB; what does: "
        "--zero_stage 3 (57.3 GB)", 2, SLOW),
}

# A command -> what is replaced in it by what, or added behind it, to make it short.
FEW = " --max_steps 1 --max_eval_samples 8 --max_answer_seq_len 8 --overwrite_output_dir"
SHORTENED = {
    "python step1_sft.py --learning_rate 2e-3 --max_answer_seq_len 40 --max_steps 300 --length_window 1":
        [("--max_steps 300", "--max_steps 2"), ("", FEW.replace("--max_steps 1 ", "") + " --output_dir other")],
    "python step3_ppo.py --advantage rloo --num_generations 4": [("", FEW)],
    "python step3_ppo.py --reward_fn my_rewards.py:polite output/reward --reward_weights 0.5 1": [("", FEW)],
    "python step3_ppo.py --unsupervised_data_path books.txt.gz": [("", FEW)],
    "python step3_ppo.py --eval_steps 10 && python bench/frontier.py output/actor/evaluations.jsonl":
        [("--eval_steps 10", "--eval_steps 1" + FEW)],
    "python step2_reward.py --dpo": [("", FEW + " --output_dir output")],
    "python step3_ppo.py --output_dir runs/3 --actor_model_name_or_path output/sft "
    "--critic_model_name_or_path output/reward": [("", FEW)],
    "python step2_reward.py --dpo --output_dir runs/dpo --model_name_or_path output/sft": [("", FEW)],
    'STEP2_ARGS="--max_steps 150" STEP3_ARGS="--kl_coef 0 --actor_learning_rate 1e-3 --max_steps 50" '
    "bash run_all.sh tiny cpu --output_dir hacked":
        [("--max_steps 150", "--max_steps 1"), ("--max_steps 50", "--max_steps 1"), ("", FEW)],
    "bash run_all.sh /path/to/any/causal/lm cpu --data_path my_pairs.jsonl":
        [("/path/to/any/causal/lm", "./output/sft"), ("", FEW + " --output_dir mine")],
    "bash tests/run.sh -k gae": [("", " --collect-only -q")],
    "OMP_NUM_THREADS=2 python bench/generate.py": [("", " --only tiny --repeats 1")],
    "python bench/kernels.py": [("", " rotary")],
}

# A command -> the test that runs it, or .ci/run, which holds it as it is printed.
ELSEWHERE = {
    "bash run_all.sh tiny cpu": ".ci/run",
    "bash tests/run.sh": ".ci/run",
    "bash run_all.sh tiny cpu --deepspeed_config my.json":
        "test_log.py::test_tensorboard_has_the_stages_apart_and_held_out_numbers",
    "bash run_all.sh tiny cpu --output_dir cut --max_steps 20 --save_steps 5 --resume":
        "test_resume.py::test_stop_then_resume_is_the_uninterrupted_run",
    "python tests/kill_and_resume.py --stage 1 --times 10 --steps 12 --seed 1":
        "test_resume.py::test_killed_processes",
    "python chat.py --path output/sft output/actor --reward_model output/reward --serve":
        "test_readme.py::test_the_server_answers_curl",
    "curl -s http://127.0.0.1:8000/v1/chat/completions -d '{\"model\": \"output/actor\", \"messages\": "
    "[{\"role\": \"user\", \"content\": \"What is the opposite of hot?\"}]}'":
        "test_readme.py::test_the_server_answers_curl",
    "HOSTFILE=hosts STEP3_ARGS=\"--inference_tp_size 2\" bash run_all.sh tiny multinode":
        "test_hosts.py::test_run_all_checks_its_hosts_and_hands_models_to_those_with_disks_of_their_own",
    "python bench/picture.py seeds/* --hacked hacked --output bench/results/gold.png":
        "test_report.py::test_frontier_and_picture_read_evaluations",
}

# A command -> why a CPU without a network cannot run it, or not in a test.
HUB = "needs Hugging Face's hub"
GPUS = "needs GPUs and Hugging Face's hub"
TESTS = "is about this suite"
NOT_HERE = {
    "bash run_all.sh opt-1.3b 1gpu": GPUS,
    "bash run_all.sh opt-13b 1node --data_path Dahoas/rm-static my_pairs.jsonl --data_weights 1 2": GPUS,
    "HOSTFILE=hosts bash run_all.sh opt-66b multinode": GPUS,
    "deepspeed step1_sft.py --model_name_or_path facebook/opt-1.3b --data_path my_pairs.jsonl": GPUS,
    "bash run_all.sh smollm2-135m cpu --data_path PAIRS": HUB,
    "bash run_all.sh MODEL HARDWARE": "is a pattern",
    "bash run_all.sh tiny cpu --seed N": "is a pattern",
    "source .venv/bin/activate": "run_all.sh makes .venv only where Python lacks something",
    "pip install tensorboard": "needs the package index",
    "pip install trl==1.12.0": "needs the package index",
    "apt-get install pdsh": "needs root and a network",
    "tensorboard --logdir output/tensorboard": "is a server that does not end; its files are read by "
                                               "test_log.py",
    "rm -r ~/.cache/huggingface/datasets/rlhf_stages": "removes what is the user's",
    "cat hosts": "shows a file of the user's",
    "cat .deepspeed_env": "shows a file of the user's",
    'bash tests/run.sh -m "not slow"': TESTS,
    "python -m pytest tests/test_losses.py": TESTS,
    "python -m pytest tests -m gpu": "needs a CUDA device",
    "bash bench/gpu.sh": "needs a CUDA device",
    "python bench/decode.py": "a part of bench/gpu.sh, which test_bench_gpu.py runs at toy size",
    "python bench/step3.py": "a part of bench/gpu.sh, which test_bench_gpu.py runs at toy size",
    "OMP_NUM_THREADS=1 python bench/ladder.py RUN --work WORK --plot bench/results/ladder.png":
        "takes 21 CPU minutes and a finished run; test_ladder.py has its parts",
    "OMP_NUM_THREADS=1 python bench/kl_estimators.py RUN/sft RUN/actor WORK/drift-1/actor":
        "needs the ladder's models; test_kl_estimators.py has its parts",
    "python bench/chat_model.py polite MODEL PAIRS TEXT --seeds 1234 --work runs":
        "needs a model and data that are not here, and an hour; test_chat_model.py has its parts",
    "OMP_NUM_THREADS=2 GOMP_SPINCOUNT=1000 python bench/beside_trl.py": "needs TRL, and 15 minutes",
    "OMP_NUM_THREADS=1 python bench/padding.py TOKENIZER FILE...": "takes 10 minutes",
    "OMP_NUM_THREADS=1 python bench/rows.py": "takes 30 minutes",
    "python bench/memory.py": "needs 18 GB of memory, and minutes for each case",
    "python bench/recipes.py": "takes 8 minutes; test_memory_plan.py holds such plans",
    "OMP_NUM_THREADS=1 python bench/real_text.py DATA MODELS": "needs data that are not here",
    "python bench/chat_model.py polite MODEL PAIRS TEXT --seeds 1234 --work runs":
        "needs a model and data that are not here",
    "python bench/real_text.py DATA MODELS --only rasbt --seeds 31 32 33 34 35 36 37 38":
        "needs data that are not here",
}
TABLES = {"AS_PRINTED": AS_PRINTED, "SHORTENED": SHORTENED, "ELSEWHERE": ELSEWHERE, "NOT_HERE": NOT_HERE}

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PROGRAM = r"(?:python|bash|deepspeed|torchrun|tensorboard|pip|apt-get|curl|cat|rm|export|source)"
INLINE = re.compile(rf"`((?:[A-Z_0-9]+=\S+ )*{PROGRAM} [^`]+)`")


def commands(text):
    """A page -> its commands, in order: of bash blocks, of lines after "$ ", of inline code."""
    found = []
    for language, body in BLOCK.findall(text):
        lines = re.sub(r"\s*\\\n\s*", " ", body).splitlines()
        if language == "":
            lines = [line[2:] for line in lines if line.startswith("$ ")]
        elif language != "bash":
            continue
        found += [re.sub(r"\s+#.*", "", line).strip() for line in lines]
    for code in INLINE.findall(BLOCK.sub("", text)):
        found.append(" ".join(code.split()))
    return [command for command in found if command]


def short(command):
    for old, new in SHORTENED[command]:
        assert old in command
        command = command.replace(old, new) if old else command + new
    return command


def test_every_command_is_in_one_table_and_every_entry_is_a_command():
    printed = {}
    for page in READMES:
        for command in commands(page.read_text()):
            printed.setdefault(command, page.relative_to(ROOT))
    for command, page in printed.items():
        tables = [name for name, table in TABLES.items() if command in table]
        assert len(tables) == 1, (
            f"{page}: `{command}` is in {tables or 'none'} of the tables of tests/test_readme.py")
    old = [command for table in TABLES.values() for command in table if command not in printed]
    assert not old, f"no README prints {old}"


def test_what_is_run_elsewhere_is_run_there():
    for command, where in ELSEWHERE.items():
        file, _, name = where.partition("::")
        if name:
            assert f"\ndef {name}(" in (ROOT / "tests" / file).read_text(), (command, where)
        elif (ROOT / file).exists():  # .ci/ may not be beside an exported tree
            assert command in (ROOT / file).read_text(), (command, where)


@pytest.fixture(scope="module")
def place(tokenizer, tmp_path_factory):
    """A copy of the checkout, with models (`tiny`'s shape, untrained) and files that the commands name."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
    place = tmp_path_factory.mktemp("place")
    for name in ("bench", "configs", "kernels", "support", "tests"):
        shutil.copytree(ROOT / name, place / name, ignore=shutil.ignore_patterns("__pycache__"))
    for file in [*ROOT.glob("*.py"), ROOT / "run_all.sh", ROOT / "requirements.txt"]:
        shutil.copy(file, place)
    shape = AutoConfig.from_pretrained(ROOT / "configs/tiny.json", num_labels=1)
    torch.manual_seed(0)
    language_model = AutoModelForCausalLM.from_config(shape)
    reward_model = AutoModelForSequenceClassification.from_config(shape)
    for name, model in (("sft", language_model), ("actor", language_model), ("reward", reward_model)):
        model.save_pretrained(place / "output" / name)
        tokenizer.save_pretrained(place / "output" / name)
    rows = [{"prompt": f"Do you like the number {i}?", "chosen": "Certainly.", "rejected": "Go away."}
            for i in range(200)]
    (place / "my_pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (place / "my_rewards.py").write_text(python_blocks(ROOT / "support/README.md")["polite"])
    with gzip.open(place / "books.txt.gz", "wt") as books:
        books.write("It was a dark night, and the lion said roar.\n" * 400)

    # What a run would have left: support/README.md's table of files.
    metrics = [{"step": step, "objective/kl": 0.1 * step, "objective/scores": 0.1, "ppo/policy/ratio": 1.0,
                "objective/entropy": 1.0, "response/ended": 1.0, "response/length": 9.0} for step in (1, 2)]
    evaluations = [{"step": step, "eval/score": 0.1, "eval/kl": 0.1 * step, "eval/gold": 0.5, "eval/win_rate": 0.5}
                   for step in (0, 2)]
    summary = {"sft": {"seconds": 1.0, "perplexity": 1.3, "gold": 0.5}, "reward": {"seconds": 1.0, "accuracy": 0.9},
               "ppo": {"seconds": 1.0, "score": 0.1, "kl": 0.2, "gold": 0.5, "win_rate": 0.5},
               "doctor": [], "seconds": 3.0, "model": "tiny", "hardware": "cpu", "seed": 1, "versions": {},
               "config": {}}
    for number, run in enumerate(("output", "runs/1", "runs/2")):
        (place / run / "actor").mkdir(parents=True, exist_ok=True)
        for name, lines in (("metrics", metrics), ("evaluations", evaluations)):
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (place / run / "actor" / f"{name}.jsonl").write_text(text)
        (place / run / "summary.json").write_text(json.dumps({**summary, "seed": number}))
    return place


PATIENCE = 1500  # seconds, because a command of 20 may take minutes on a machine with other work


def run(command, place, code=0):
    """A shell's line, in `place` -> what it printed, both streams."""
    done = subprocess.run(["bash", "-c", command], cwd=place, env=clean_environment(), input="Hi!\n", text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=PATIENCE)
    assert done.returncode == code, f"{command}\nexit code {done.returncode}:\n{done.stdout[-3000:]}"
    return done.stdout


@pytest.mark.parametrize("command", [
    pytest.param(command, marks=marks, id=command[:60]) for command, (_, _, *marks) in AS_PRINTED.items()])
def test_runs_as_printed(command, place):
    text, code, *_ = AS_PRINTED[command]
    assert text in run(command, place, code)


@pytest.mark.slow
@pytest.mark.parametrize("command", [pytest.param(command, id=command[:60]) for command in SHORTENED])
def test_runs_shortened(command, place):
    run(short(command), place)


@pytest.mark.slow
def test_the_server_answers_curl(place):
    serve, request = (command for command, where in ELSEWHERE.items() if where.endswith("answers_curl"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(f"exec {serve} --port {port} --max_new_tokens 8", shell=True, cwd=place,
                              env=clean_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        request = request.replace(":8000", f":{port}") + " --retry 300 --retry-delay 1 --retry-connrefused"
        answer = json.loads(run(request, place))
    finally:
        server.terminate()
        server.communicate()
    assert answer["model"] == "output/actor" and {"score", "kl"} <= set(answer["choices"][0])


# -----------------------------------------------------------------------------
# Python in the pages

def python_blocks(page):
    """-> {name: source}: a block by the first function that it defines, else by its last line."""
    blocks = {}
    for language, body in BLOCK.findall(page.read_text()):
        if language == "python":
            name = re.search(r"^def (\w+)", body, re.MULTILINE)
            blocks[name[1] if name else body.strip().splitlines()[-1].strip()] = body
    return blocks


def test_the_python_of_the_pages_is_known():
    names = [name for page in READMES for name in python_blocks(page)]
    assert sorted(set(names)) == [
        "actor_loss, critic_loss = trainer.train_rlhf(out)", "polite",
        "rollout.tokens, rollout.logprobs, rollout.mask      # prompts and answers (B, P + R); the answers' (B, R)"]


@pytest.mark.slow
def test_ppo_from_python(place):
    """As printed, but for two prompts' batches instead of all."""
    [source] = [body for name, body in python_blocks(ROOT / "support/README.md").items() if "train_rlhf" in name]
    short_source = source.replace("load_records(args, stage=3)[0]", "load_records(args, stage=3)[0][:32]")
    assert short_source != source
    (place / "snippet.py").write_text(short_source + "print(sorted(trainer.metrics), actor_loss)\n")
    assert "'objective/kl'" in run("python snippet.py", place)


def test_the_decoder_from_python(make_model, tokenizer):
    [source] = python_blocks(ROOT / "kernels/README.md").values()
    ids = torch.randint(5, len(tokenizer), (2, 4))
    names = {"hf_model": make_model("opt"), "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    exec(source, names)
    rollout = names["rollout"]
    assert rollout.tokens.shape == (2, 4 + rollout.mask.shape[1]) and rollout.logprobs.shape == rollout.mask.shape


# -----------------------------------------------------------------------------
# links, tables, size

LINK = re.compile(r"\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")


def anchors(page):
    """The anchors that GitHub gives a page's headings."""
    text = BLOCK.sub("", page.read_text())
    found = set()
    for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE):
        anchor = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        found.add(anchor if anchor not in found else f"{anchor}-1")
    return found


def links(page):
    """-> (text, target) of a page's relative links."""
    text = BLOCK.sub("", page.read_text())
    return [(" ".join(name.split()), target) for name, target in LINK.findall(text) if "://" not in target]


@functools.cache
def line_of(file, name):
    """The line on which a file defines a function or class, a method too."""
    found = [number for number, line in enumerate(file.read_text().splitlines(), 1)
             if re.match(rf"\s*(def|class) {name}\b", line)]
    assert len(found) == 1, f"{file} defines {name} {len(found)} times"
    return found[0]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for name, target in links(page):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page}: [{name}]({target})"
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file), f"{page}: [{name}]({target}); there are {sorted(anchors(file))}"
        elif anchor:
            line = line_of(file, name.strip("`"))
            assert anchor == f"L{line}", f"{page}: {name} is in line {line} now; python tests/test_readme.py mends it"


def test_the_contents_name_every_section():
    for page in READMES:
        sections = re.findall(r"^## (.*)$", BLOCK.sub("", page.read_text()), re.MULTILINE)
        named = {target for _, target in links(page)}
        if page.parent.name != "tests" and len(sections) > 2:
            for section in sections:
                anchor = "#" + re.sub(r"[^\w\- ]", "", section.lower()).replace(" ", "-")
                assert anchor in named, f"{page}: its contents lack {section}"


def test_the_course_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) < 250


def test_lines_are_short():
    """But for those of tables, which have no line breaks, and of JSON."""
    for page in READMES:
        long = [line for line in page.read_text().splitlines() if len(line) > 120 and line[0] not in "|{"]
        assert not long, page


def test_every_named_test_exists():
    rows = re.findall(r"^\| (\d+) \|.*\| (.*) \|$", (ROOT / "tests/README.md").read_text(), re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, 51))
    for number, cell in rows:
        named = re.findall(r"`(\w+\.py)::(\w+)`", cell)
        for file, function in named:
            text = (ROOT / "tests" / file).read_text()
            assert re.search(rf"^def {function}\(", text, re.MULTILINE), (number, file, function)
        assert named or "does not apply" in cell, number


def test_flags_of_the_pages_exist():
    """Every --flag in the code of a page is one of ours, but for those of other programs."""
    from step1_sft import Config as SFT
    from step2_reward import Config as Reward
    from step3_ppo import Config as PPO
    import chat
    import data
    ours = {f"--{field.name}" for config in (SFT, Reward, PPO, chat.Config, data.Config) for field in fields(config)}
    others = {"--help", "--work", "--stage", "--times", "--steps", "--only", "--seeds", "--plot", "--hacked", "--output",
              "--logdir", "--master_addr", "--master_port", "--launcher"}
    for page in READMES:
        text = page.read_text()
        if page.parent.name == "support":
            text = text[:text.index("## Coming from elsewhere")]
        code = " ".join(re.findall(r"`([^`]+)`", BLOCK.sub("", text)) + commands(text))
        unknown = set(re.findall(r"(?<![\w-])--[a-z]\w*", code)) - ours - others
        assert not unknown, f"{page}: {unknown}"


def test_the_table_of_other_names_is_what_the_error_says():
    """Ours are flags; a flag of theirs is the same, or support/other_names.py gives ours for it."""
    from step1_sft import Config as SFT
    from step2_reward import Config as Reward
    from step3_ppo import Config as PPO
    from support.other_names import OTHER_NAMES
    ours = {f"--{field.name}" for config in (SFT, Reward, PPO) for field in fields(config)}
    text = (ROOT / "support/README.md").read_text()
    rows = text[text.index("| what | here |"):].split("\n\n")[0].splitlines()[2:]
    assert len(rows) > 25
    for row in rows:
        what, here, *theirs = (cell.strip() for cell in row.strip("|").split("|"))
        named = set(re.findall(r"--\w+", here))
        assert named <= ours, (what, named - ours)
        for flag in re.findall(r"--[\w.]+", " ".join(theirs)):
            said = OTHER_NAMES.get(flag, flag)
            same = set(re.findall(r"--\w+", said)) & named
            assert same or said.startswith("nothing"), (what, flag, said)


if __name__ == "__main__":
    for page in PAGES:
        text = page.read_text()
        for name, target in links(page):
            path, _, anchor = target.partition("#")
            if re.fullmatch(r"L\d+", anchor):
                line = line_of((page.parent / path).resolve(), name.strip("`"))
                text = text.replace(f"[{name}]({target})", f"[{name}]({path}#L{line})")
        page.write_text(text)
