"""
Cache: the rows of a stage are read, rendered and tokenised once, by one process of each host. Every
rank, and every later run, maps the result into its memory from the disk, so a start takes no time
and a rank's memory does not grow with the rows.

The cache is a folder of the `datasets` library's (HF_DATASETS_CACHE, ~/.cache/huggingface/datasets
by default) for each key, and the key is a digest of all that the rows depend on. In it are Arrow
files of token ids, which `datasets` maps, and about.pickle, with what was said and counted when
they were made. It can be deleted at any time.
"""

import ctypes
import gc
import hashlib
import os
import pickle
import shutil
import socket
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.compute
import torch.distributed as dist
import transformers
from datasets.arrow_writer import ArrowWriter

from support.flags import UsageError, first_line
from support.processes import raise_on_all_ranks
from support.sources import content_of

ROOT = Path(__file__).resolve().parent.parent
# The code that decides what rows become.
CODE = ["data.py", "support/forms.py", "support/sources.py", "support/toy.py", "support/cache.py"]

ids = datasets.List(datasets.Value("int32"))
FEATURES = {"input_ids": ids, "chosen": ids, "rejected": ids,
            "prompt_len": datasets.Value("int32"), "spans": datasets.List(ids),
            "record": datasets.Value("binary")}  # pickled, because its columns may hold anything


@dataclass
class Prepared:
    """What is cached."""
    rows: dict            # name -> items of data.encode_records: in a list, or Rows of the cache
    held_records: list    # see data.StageData
    checksum: int         # of all token ids
    lines: list = field(default_factory=list)  # of the log


# -----------------------------------------------------------------------------
# the key

def cache_key(sources, tokenizer, settings):
    """
    A digest of what the prepared rows depend on.

    sources   entries of --data_path and its like: their content counts, and their names, which
              errors and logs mention
    settings  whatever else changes the rows; its repr counts
    """
    digest = hashlib.blake2b(digest_size=16)
    for version in (transformers.__version__, datasets.__version__, repr(settings)):
        digest.update(version.encode(errors="surrogateescape"))
    for name in CODE:
        digest.update((ROOT / name).read_bytes())
    for source in sources:
        digest.update(f"{source} {content_of(source)}".encode(errors="surrogateescape"))
    # A tokenizer is the files in which it is saved, its chat template among them.
    with tempfile.TemporaryDirectory() as folder:
        try:
            tokenizer.save_pretrained(folder)
        except Exception as error:  # of any kind, because `tokenizers` raises no other
            raise UsageError(f"{folder}: the tokenizer cannot be written there for a moment "
                             f"({first_line(error)}). Make room.") from error
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


# -----------------------------------------------------------------------------
# rows on the disk

class Rows:
    """Items in an Arrow file, mapped into memory: rows[i] -> a dict, its ids int32 arrays."""

    def __init__(self, path):
        self.table = datasets.Dataset.from_file(str(path)).with_format("arrow")

    def __len__(self):
        return len(self.table)

    def __getitem__(self, number):
        item = {}
        for name, column in zip(self.table.column_names, self.table[number].columns):
            if name == "record":
                item[name] = pickle.loads(column[0].as_py())
            elif FEATURES[name] is ids:
                item[name] = column[0].values.to_numpy()
            else:
                item[name] = column[0].as_py()
        return item

    def lengths(self):
        """(rows,) int32: tokens of each row's longest sequence, without reading the tokens."""
        columns = []
        for name in self.table.column_names:
            if FEATURES[name] is ids:
                column = self.table.data.column(name)
                columns.append(pyarrow.compute.list_value_length(column).to_numpy())
        return np.max(columns, axis=0)


def write_rows(items, path):
    """Items -> an Arrow file for Rows."""
    features = datasets.Features({name: FEATURES[name] for name in items[0]})
    with ArrowWriter(features=features, path=str(path)) as writer:
        for item in items:
            if "record" in item:
                item = {**item, "record": pickle.dumps(item["record"])}
            writer.write(item)
        writer.finalize()


def read_prepared(folder):
    """-> Prepared, its rows mapped into memory. Raises UsageError where the folder is damaged."""
    try:
        prepared = pickle.loads((folder / "about.pickle").read_bytes())
        prepared.rows = {name: Rows(folder / f"{name}.arrow") if count else []
                         for name, count in prepared.rows.items()}
    except Exception as error:  # of any kind, because damaged pickles raise many
        raise UsageError(f"{folder}, the cache of this stage's rows, cannot be read "
                         f"({first_line(error)}); delete it, and it is made again.") from error
    return prepared


def write_prepared(prepared, folder):
    """
    Under a temporary name that is then changed, so that a folder of the right name is complete.
    Raises UsageError for a disk that is full or cannot be written to.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # What a killed run left behind. A day, because another run may be writing.
        for old in folder.parent.glob("*.tmp"):
            with suppress(FileNotFoundError):  # the other run has just finished it
                if time.time() - old.stat().st_mtime > 86400:
                    shutil.rmtree(old, ignore_errors=True)
        staging = folder.with_name(f"{folder.name}.{socket.gethostname()}.{os.getpid()}.tmp")
        staging.mkdir()
        try:
            for name, items in prepared.rows.items():
                if items:
                    write_rows(items, staging / f"{name}.arrow")
            counts = {name: len(items) for name, items in prepared.rows.items()}
            about = pickle.dumps(replace(prepared, rows=counts))
            (staging / "about.pickle").write_bytes(about)
            # Another run, or a host with the same disk, may have been first.
            if not folder.exists():
                staging.rename(folder)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        if folder.exists():
            return
        raise UsageError(f"{folder.parent}: the rows that this stage reads are kept there, and "
                         f"they cannot be written ({error.strerror}). Make room, or name another "
                         "folder: HF_DATASETS_CACHE=/tmp/cache, say.") from error


# -----------------------------------------------------------------------------
# once a host

def prepared_folder(key, build, log):
    """
    -> the folder of this key in this host's cache, made where no earlier run has.

    build   f(log) -> Prepared with rows in lists
    raises  UsageError where that does, and for a cache that cannot be read or written
    """
    folder = Path(datasets.config.HF_DATASETS_CACHE, "rlhf_stages", key)
    if folder.exists():
        for line in read_prepared(folder).lines:
            log(line)
        return folder
    lines = []

    def log_and_keep(line):
        lines.append(line)
        log(line)

    prepared = build(log_and_keep)
    prepared.lines = lines
    write_prepared(prepared, folder)
    # What the rows leave in glibc's heap goes back to the system, because it would otherwise stay
    # resident for the whole run.
    del prepared
    gc.collect()
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return folder


def prepare_once(find_key, build, log):
    """
    -> Prepared of this stage, its rows mapped into memory; made by the first process of each host
    where no earlier run has. Collective.

    find_key, build  () -> cache_key(...); see prepared_folder
    raises           UsageError, on all ranks, where one of those does
    """
    # Ranks are numbered host by host, so the first of this host is this many before this one.
    local_rank = int(os.environ["LOCAL_RANK"])
    folder = None
    with raise_on_all_ranks():
        if local_rank == 0:
            folder = prepared_folder(find_key(), build, log)
    folders = [None] * dist.get_world_size()
    dist.all_gather_object(folders, folder)
    with raise_on_all_ranks():
        prepared = read_prepared(folders[dist.get_rank() - local_rank])
    return prepared
