"""
support/cache.py: rows are prepared once a host, whatever the rows depend on makes them anew, and
nothing that is broken off passes for whole.
"""

import datetime
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import data
import step1_sft
import step2_reward
import step3_ppo
from conftest import ROOT, clean_environment
from data import load_stage_data, load_tokenizer, longest_sequence
from ranks import run_ranks
from support import cache, run_all, sources
from support.flags import UsageError, parse_config

pytestmark = pytest.mark.usefixtures("process_group")


def rows(count=60):
    pairs = [{"prompt": f"What is {i}?", "chosen": f"It is {i}. " * (i % 4 + 1), "rejected": "No.",
              "number": i} for i in range(count)]
    pairs[7]["rejected"] = pairs[7]["chosen"]  # a row that is dropped, and said to be
    return pairs


def write(folder, pairs):
    path = folder / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, pairs)))
    return str(path)


def config_of(stage, path, **flags):
    flags = {"data_path": [path], "max_steps": 3, "max_seq_len": 64, "max_prompt_seq_len": 32,
             "per_device_train_batch_size": 4, **flags}
    if stage == 3:
        flags |= {"actor_model_name_or_path": "tiny", "critic_model_name_or_path": "tiny",
                  "per_device_generation_batch_size": 4}
    else:
        flags |= {"model_name_or_path": "tiny"}
    return {1: step1_sft, 2: step2_reward, 3: step3_ppo}[stage].Config(**flags)


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """A cache that only this test has -> its folder."""
    monkeypatch.setattr(cache.datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "rlhf_stages"


def start(stage, path, tokenizer, lines=None, **flags):
    log = (lambda line: None) if lines is None else lines.append
    return load_stage_data(config_of(stage, path, **flags), stage, tokenizer, 0, 1, log=log)


def assert_same(one, other):
    """Items with the same names and values; ids are int32 arrays in both."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        if isinstance(value, np.ndarray):
            assert value.dtype == other[name].dtype == np.int32
            assert np.array_equal(value, other[name])
        elif name == "spans":
            assert [tuple(span) for span in value] == [tuple(span) for span in other[name]]
        else:
            assert value == other[name]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_second_start_reads_what_the_first_one_made(stage, tokenizer, tmp_path, own_cache,
                                                      monkeypatch):
    path = write(tmp_path, rows())
    lines = []
    config = config_of(stage, path)
    made = data.prepare(config, stage, tokenizer, lines.append)
    said = []
    first = start(stage, path, tokenizer, said)
    assert any("1 rows with two equal answers left out (row 8)" in line for line in lines)
    assert said[:len(lines)] == lines

    # Nothing is read, rendered or tokenised any more.
    for name in ("load_records", "encode_records"):
        monkeypatch.setattr(data, name, None)
    said_again = []
    second = start(stage, path, tokenizer, said_again)
    assert said_again[:len(lines)] == lines
    for found in (first, second):
        train = found.train_loader.dataset
        for item, expected in zip(train, made.rows["train"], strict=True):
            assert_same(item, expected)
        assert list(train.lengths()) == [longest_sequence(item) for item in train]
        assert found.held_records == made.held_records and found.held_count == 6
        if stage == 3:
            numbers = [item["record"].columns["number"] for item in train]
            assert numbers == [item["record"].columns["number"] for item in made.rows["train"]]
    batches = [next(iter(found.train_loader)) for found in (first, second)]
    assert str(batches[0]) == str(batches[1])


def test_run_all_prepares_what_it_checks(tokenizer, tmp_path, own_cache, monkeypatch, capsys):
    """
    The stages then read nothing, though their models, and tokenizers, are saved only later. Printed
    is the planned work, for the time that is left.
    """
    path = write(tmp_path, rows())
    flags = ["--data_path", path, "--max_seq_len", "96", "--max_prompt_seq_len", "64",
             "--output_dir", str(tmp_path / "out"), "--data_split", "1,1,1"]
    size = ["--per_device_train_batch_size", "2"]
    run_all.check("cpu", [
        "step1_sft", "--model_name_or_path", "tiny", *flags, *size, "--",
        "step2_reward", "--model_name_or_path", str(tmp_path / "out/sft"), *flags, *size, "--",
        "step3_ppo", "--actor_model_name_or_path", str(tmp_path / "out/sft"),
        "--critic_model_name_or_path", str(tmp_path / "out/reward"), *flags, *size,
        "--per_device_generation_batch_size", "2"])
    work = [float(word) for word in capsys.readouterr().out.split()]
    assert len(work) == 3 and min(work) > 0
    tokenizer.save_pretrained(tmp_path / "saved")
    saved = data.load_tokenizer(str(tmp_path / "saved"))
    assert len(list(own_cache.iterdir())) == 3
    monkeypatch.setattr(data, "load_records", None)
    for stage, module in ((1, step1_sft), (2, step2_reward), (3, step3_ppo)):
        more = ["--per_device_generation_batch_size", "2"] if stage == 3 else []
        config = parse_config(module.Config, "", [*flags, *size, *more])
        found = load_stage_data(config, stage, saved, 0, 1, log=lambda line: None)
        assert len(found.train_loader.dataset) > 2


def test_a_dialogues_spans_and_any_column_come_back(tokenizer, tmp_path):
    dialogue = [{"role": role, "content": f"{role} {turn}"} for turn in range(2)
                for role in ("user", "assistant")]
    columns = {"when": datetime.date(2020, 1, 2), "image": b"\xff\x00", "deep": [{"a": None}]}
    records, _ = data.to_records([{"messages": dialogue, **columns}], "here")
    for stage in (1, 3):
        items = data.encode_records(records, tokenizer, stage, 99, log=lambda line: None)
        cache.write_rows(items, tmp_path / f"{stage}.arrow")
        [item] = cache.Rows(tmp_path / f"{stage}.arrow")
        assert_same(item, items[0])
        if stage == 1:
            assert len(item["spans"]) == 2
        else:
            assert item["record"] == records[0] and item["record"].columns["image"] == b"\xff\x00"
            assert item["record"].columns == records[0].columns


def test_the_text_of_ppo_is_cached_too(tokenizer, tmp_path, own_cache, monkeypatch):
    path = write(tmp_path, rows())
    text = tmp_path / "text.txt"
    text.write_text("Some words. " * 100)
    flags = dict(unsupervised_data_path=[str(text)], max_seq_len=16)
    expected = [str(batches) for batches in start(3, path, tokenizer, **flags).text_batches]
    with monkeypatch.context() as patch:
        patch.setattr(data, "encode_text", None)
        found = start(3, path, tokenizer, **flags)
        assert [str(batches) for batches in found.text_batches] == expected
    text.write_text("Other words. " * 100)
    found = start(3, path, tokenizer, **flags)
    assert [str(batches) for batches in found.text_batches] != expected


# -----------------------------------------------------------------------------
# the key

def test_all_that_the_rows_depend_on_changes_the_key(tokenizer, tmp_path, monkeypatch):
    path = write(tmp_path, rows())

    def key(stage=1, tokenizer=tokenizer, **flags):
        return data.key_of_stage(config_of(stage, path, **flags), stage, tokenizer)

    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    keys = [key(), key(2), key(3), key(seed=1), key(max_seq_len=63), key(data_split="1,0,0"),
            key(data_weights=[2.0]), key(columns=["prompt=number"]), key(max_eval_samples=3),
            key(sft_data_path=[path]), key(3, unsupervised_data_path=[path]),
            key(tokenizer=load_tokenizer("tiny", template + data.CHAT_TEMPLATE))]
    assert key() == keys[0]
    os.utime(path, (1, 1))
    assert key() == keys[0], "content counts, and not the time of a file"
    assert key(learning_rate=1.0) == keys[0]

    # Another word in a file or in a file of a folder, another version of the code.
    changed = rows()
    changed[30]["chosen"] = "It is thirty."
    write(tmp_path, changed)
    keys.append(key())
    for name in ("train.jsonl", "test.jsonl"):
        folder = tmp_path / "folder"
        folder.mkdir(exist_ok=True)
        shutil.copy(path, folder / name)
        keys.append(key(data_path=[str(folder)]))
    for name in cache.CODE:
        copy = tmp_path / name.replace("/", "_")
        shutil.copytree(ROOT / "support", copy / "support")
        shutil.copy(ROOT / "data.py", copy)
        with open(copy / name, "a") as file:
            file.write("\n")
        monkeypatch.setattr(cache, "ROOT", copy)
        keys.append(key())
    assert len(set(keys)) == len(keys)


def test_files_that_cannot_be_read_do_not_hide_the_others(tmp_path, monkeypatch):
    """A file that is for others' eyes: root may read any, so opening it fails here by a patch."""
    for name in ("train.jsonl", "secret"):
        (tmp_path / name).write_text(name)

    def refuse(file, mode):
        if file.name == "secret":
            raise PermissionError(13, "Permission denied")
        return io.open(file, mode)

    monkeypatch.setattr(sources, "open", refuse, raising=False)
    before = sources.content_of(str(tmp_path))
    (tmp_path / "train.jsonl").write_text("other rows")
    assert sources.content_of(str(tmp_path)) != before
    with pytest.raises(UsageError, match="/dev/zero is a pipe or a device"):
        sources.content_of("/dev/zero")


def test_a_changed_file_is_read_again(tokenizer, tmp_path, own_cache):
    path = write(tmp_path, rows())
    start(1, path, tokenizer)
    changed = rows()
    for row in changed:
        row["chosen"] = "Now it is something else."
    write(tmp_path, changed)
    found = start(1, path, tokenizer)
    for item in found.train_loader.dataset:
        assert "something else" in tokenizer.decode(item["input_ids"])
    assert len(list(own_cache.iterdir())) == 2


# -----------------------------------------------------------------------------
# one process of a host

def two_starts(rank, ranks, path, folder):
    cache.datasets.config.HF_DATASETS_CACHE = folder
    prepare = data.prepare

    def counted(*arguments):
        with open(folder / "prepared", "a") as file:
            file.write(f"{rank}\n")
        return prepare(*arguments)

    data.prepare = counted
    for stage in (1, 3):
        for _ in range(2):
            found = load_stage_data(config_of(stage, path), stage, load_tokenizer("tiny"), rank,
                                    ranks, log=lambda line: None)
    numbers = [item["record"].columns["number"] for item in found.train_loader.dataset]
    (folder / f"{rank}.json").write_text(json.dumps(numbers))


def test_one_rank_of_a_host_prepares_for_all(tmp_path):
    run_ranks(2, two_starts, write(tmp_path, rows()), tmp_path)
    assert (tmp_path / "prepared").read_text() == "0\n" * 2  # once a stage
    numbers = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert numbers[0] == numbers[1] and len(numbers[0]) > 15


def test_what_cannot_be_used_is_said_each_time(tokenizer, tmp_path, own_cache):
    path = write(tmp_path, rows()[:2])
    for _ in range(2):
        with pytest.raises(UsageError, match="do not fill one step|leaves no rows"):
            start(1, path, tokenizer)


# -----------------------------------------------------------------------------
# broken off, full, damaged

KILLED = """
import os, signal, sys
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import data, test_cache
from pathlib import Path
from support.processes import setup
config = test_cache.config_of(1, {path!r})
setup(config)
Path.rename = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
data.load_stage_data(config, 1, data.load_tokenizer("tiny"), 0, 1)
"""


def test_a_killed_start_leaves_nothing_that_passes_for_whole(tokenizer, tmp_path, own_cache):
    """SIGKILL when all is written but for the name."""
    path = write(tmp_path, rows())
    environment = {**clean_environment(), "HF_DATASETS_CACHE": str(own_cache.parent)}
    code = KILLED.format(root=str(ROOT), path=path)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    [left] = own_cache.iterdir()
    assert left.suffix == ".tmp" and (left / "train.arrow").exists()
    start(1, path, tokenizer)
    assert len(list(own_cache.iterdir())) == 2

    # It is swept away a day later.
    os.utime(left, (1, 1))
    start(1, path, tokenizer, seed=1)
    assert all(folder.suffix != ".tmp" for folder in own_cache.iterdir())


def test_a_full_disk_is_a_sentence(tokenizer, tmp_path, own_cache):
    path = write(tmp_path, rows(4000))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size, error in ((1000, "the tokenizer cannot be written.*Make room"),
                        (200_000, "cannot be written.*HF_DATASETS_CACHE")):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            with pytest.raises(UsageError, match=error):
                start(1, path, tokenizer, data_split="1,0,0")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(own_cache.iterdir()) == []
    start(1, path, tokenizer, data_split="1,0,0")


def test_a_cache_that_cannot_be_written_to_is_a_sentence(tokenizer, tmp_path, own_cache):
    """A file in the folder's place, because root may write to a folder that is read-only."""
    own_cache.parent.write_text("")
    with pytest.raises(UsageError, match="cannot be written.*HF_DATASETS_CACHE"):
        start(1, write(tmp_path, rows()), tokenizer)


@pytest.mark.parametrize("name", ["about.pickle", "train.arrow"])
@pytest.mark.parametrize("size", [0, 30, None], ids=["empty", "cut", "missing"])
def test_a_damaged_cache_is_named(tokenizer, tmp_path, own_cache, name, size):
    path = write(tmp_path, rows())
    start(1, path, tokenizer)
    [folder] = own_cache.iterdir()
    file = folder / name
    content = file.read_bytes()
    file.unlink()
    if size is not None:
        file.write_bytes(content[:size])
    with pytest.raises(UsageError, match=f"{folder}.*delete it"):
        start(1, path, tokenizer)
