"""
Sources -> rows: what --data_path names, read into memory. A row is a dict, its columns by name.
"""

import csv
import gzip
import hashlib
import io
import json
import os
import re
import zlib
from pathlib import Path

from support.flags import UsageError, first_line
from support.toy import toy_rows


def read_text(path):
    opener = gzip.open if path.endswith(".gz") else open
    try:
        # -sig, because Windows writes a mark in front
        with opener(path, "rt", encoding="utf-8-sig") as file:
            return file.read()
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UsageError(f"{path}, line {line}: not UTF-8 ({error.reason}); save the file as "
                         "UTF-8.") from error
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"{path} cannot be read: {reason}.") from error


def read_parquet(path):
    import pyarrow.parquet
    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise UsageError(f"{path} cannot be read: {first_line(error)}") from error


def read_csv(path):
    text = read_text(path)
    # The default limit of a field, 131,072 characters, is less than a long dialogue.
    csv.field_size_limit(2**31 - 1)
    try:
        check_csv(path, text)
        rows = list(csv.DictReader(io.StringIO(text)))
    except csv.Error as error:
        raise UsageError(f"{path} cannot be read as CSV: {error}.") from error
    for number, row in enumerate(rows, 1):
        if None in row:  # DictReader's key of fields beyond the header's
            raise UsageError(f"{path}, row {number} has more fields than the header; text that "
                             "holds commas needs quotes around it.")
    return rows


def check_csv(path, text):
    """Raises UsageError for a header without columns, and for a quote that is never closed."""
    reader = csv.reader(io.StringIO(text), strict=True)
    header = []
    last_line = 0
    try:
        for row in reader:
            header = header or row
            last_line = reader.line_num
    except csv.Error as error:
        # Of the strict reader's complaints only this one counts, because here all that follows the
        # quote was taken for one field. The others are read as people mean them.
        if "end of data" in str(error):
            raise UsageError(f"{path}, line {last_line + 1}: a quote opens a field there and none "
                             "closes it; a quote within such a field is written twice.") from error
    repeated = [name for name in header if name and header.count(name) > 1]
    if repeated:
        raise UsageError(f"{path}: its header names the column {repeated[0]} twice; give each "
                         "column a name of its own.")
    for separator in (";", "\t"):
        if len(header) == 1 and separator in header[0]:
            raise UsageError(f"{path}: its header {header[0]!r} has no comma; save the file with "
                             f"commas, not {separator!r}, between its columns.")


def read_json(path):
    """.json and .jsonl alike: one list of objects, or one object a line."""
    text = read_text(path)
    is_list = text.lstrip().startswith("[")
    # not splitlines(), because JSON strings may hold U+2028, which it takes for a line's end
    parts = [text] if is_list else text.split("\n")
    rows = []
    for lines_before, part in enumerate(parts):
        if not part.strip():
            continue
        try:
            value = json.loads(part)
        except json.JSONDecodeError as error:
            line = lines_before + error.lineno
            raise UsageError(f"{path}, line {line}: not JSON ({error.msg}). A .json or .jsonl file "
                             "holds one object a line, or one list of objects.") from error
        except (RecursionError, ValueError) as error:  # too deep, a number of thousands of digits
            where = path if is_list else f"{path}, line {lines_before + 1}"
            raise UsageError(f"{where}: JSON that cannot be read ({first_line(error)}).") from error
        rows += value if is_list else [value]
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UsageError(f"{path}, row {number}: every row must be a JSON object; "
                             f"{str(row)[:100]} came.")
    return rows


def read_file(path):
    """A local file -> list of rows, each a dict."""
    suffix = Path(path.removesuffix(".gz")).suffix
    if suffix == ".parquet":
        return read_parquet(path)
    if suffix == ".csv":
        return read_csv(path)
    if suffix in (".json", ".jsonl"):
        return read_json(path)
    raise UsageError(f"{path}: files ending in .json, .jsonl, .csv or .parquet are read (the first "
                     "three .gz too).")


def read_folder(folder, split):
    """
    -> (rows of the files of a split, rows of its test files, or None). Files are train.jsonl, or
    shards of it such as train_01.jsonl; test files begin with test, eval or valid.

    split  "train" where the source names none; else train_prefs, say, tested on test_prefs
    """
    files = {}
    for path in sorted(Path(folder).iterdir()):
        if path.is_file() and path.name.startswith(("train", "test", "eval", "valid")):
            files.setdefault(split_of_file(path.name), []).append(str(path))
    train_splits = [name for name in files if name.startswith("train")]
    wanted = split or "train"
    if wanted not in files and split is None and len(train_splits) == 1:
        wanted = train_splits[0]
    if wanted not in files or split is None and len(train_splits) > 1:
        if not files:
            raise UsageError(f"{folder}: a folder needs files whose names start with train (and, "
                             "optionally, test): train.jsonl, test.jsonl. Or name the files "
                             "themselves.")
        raise UsageError(f"{folder} holds the splits {', '.join(files)}; say which one is meant, "
                         f"{folder}:{(train_splits or list(files))[0]} say.")
    tests = [f"{start}{wanted.removeprefix('train')}"
             for start in ("test", "eval", "valid", "validation") if wanted.startswith("train")]
    test_files = [path for name in tests for path in files.get(name, [])]
    train = [row for path in files[wanted] for row in read_file(path)]
    test = [row for path in test_files for row in read_file(path)]
    return train, test or None


def split_of_file(name):
    """train-00000-of-00002.parquet, train_01.jsonl, train.json.gz -> train."""
    stem = name.split(".")[0]
    return re.sub(r"([-_]?\d+([-_]of[-_]\d+)?)$", "", stem)


def open_dataset(name, config, split, revision):
    """
    A data set that `datasets` reads -> (its Dataset, that of its test rows or None).

    name  on the hub; or a folder: a clone of a hub's repository, or of save_to_disk
    """
    import datasets
    saved = os.path.exists(os.path.join(name, "state.json"))
    saved_splits = os.path.exists(os.path.join(name, "dataset_dict.json"))
    try:
        if saved:
            return datasets.load_from_disk(name), None
        if saved_splits:
            dataset = datasets.load_from_disk(name)
        else:
            # A single word behind the colon is a config where there is one of that name.
            if split and config is None and "/" not in split:
                if split in datasets.get_dataset_config_names(name, revision=revision):
                    config, split = split, None
            dataset = load_from_hub(name, config, revision)
    except Exception as error:  # of any kind, because the hub's client raises many
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        fault = (f"{name} is neither a local file or folder nor a dataset that could be fetched "
                 f"from the hub ({reason}).")
        if os.path.isdir(name):
            fault = f"{name}: the `datasets` library cannot read this folder ({reason})."
        raise UsageError(f"{fault} Where a set has several configs or splits, "
                         "name:config/split@revision says which is meant.") from error

    wanted = split or "train"
    if wanted not in dataset:
        raise UsageError(f"{name} has the splits {', '.join(dataset)}, and no {wanted}; say which "
                         f"one is meant, {name}:{config + '/' if config else ''}{list(dataset)[0]} "
                         "say.")
    for test in ("test", "validation", "eval"):
        test_split = wanted.replace("train", test)
        if test_split != wanted and test_split in dataset:
            return dataset[wanted], dataset[test_split]
    return dataset[wanted], None


def read_dataset(name, config, split, revision):
    """open_dataset's as (rows, test rows or None)."""
    train, test = open_dataset(name, config, split, revision)
    return train.to_list(), test.to_list() if test else None


def load_from_hub(name, config, revision):
    """The set's splits. `datasets` runs no loading scripts, so theirs come from the hub's copy."""
    import datasets
    try:
        return datasets.load_dataset(name, config, revision=revision)
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
        return datasets.load_dataset(name, config, revision="refs/convert/parquet")


def split_name(source):
    """--data_path entry -> (name, config, split, revision), None where it does not say them."""
    if source == "toy" or os.path.exists(source):
        return source, None, None, None
    name, _, revision = source.partition("@")
    name, _, part = name.partition(":")
    config, _, split = part.rpartition("/")
    return name, config or None, split or None, revision or None


def read_source(source):
    """
    --data_path entry -> (rows, test rows, or None where the source has no test split). An entry is
    toy, a file, a folder or a hub's name; of the last two `name:config/split@revision` says more.
    """
    if source == "toy":
        return toy_rows(), None
    if os.path.isfile(source):
        return read_file(source), None
    name, config, split, revision = split_name(source)
    if os.path.isdir(name):
        is_saved = any(os.path.exists(os.path.join(name, file))
                       for file in ("dataset_dict.json", "state.json"))
        has_files = any(file.startswith("train") for file in os.listdir(name))
        is_clone = not has_files and any(os.path.exists(os.path.join(name, file))
                                         for file in ("README.md", "data"))
        if is_saved or is_clone:
            return read_dataset(name, config, split, revision)
        return read_folder(name, split)
    check_missing(source, name)
    return read_dataset(name, config, split, revision)


def content_of(source):
    """
    A digest of what read_source(source) reads, without reading it as rows: of a file's bytes, or of
    all files below a folder; of a set on the hub the fingerprint that `datasets` has for it. Empty
    for the toy, which is code, and for plain text that is missing, which its reader says. Raises
    UsageError for another source that is missing.
    """
    name, config, split, revision = split_name(source)
    path = Path(name)
    if source == "toy":
        return ""
    if path.is_file():
        files = [path]
    elif path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
    elif name.removesuffix(".gz").endswith(".txt"):
        return ""
    else:
        check_missing(source, name)
        parts = open_dataset(name, config, split, revision)
        return " ".join(part._fingerprint for part in parts if part is not None)
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        try:
            with open(file, "rb") as opened:
                content = hashlib.file_digest(opened, "blake2b").hexdigest()
        except OSError as error:
            content = error.strerror
        digest.update(f"{file.relative_to(path)} {content}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def check_missing(source, name):
    """Raises UsageError for a --data_path entry that is no folder and cannot be a hub's name."""
    accepted = "--data_path takes toy, a file, a folder or a dataset's hub name."
    if os.path.exists(source):
        raise UsageError(f"{source} is a pipe or a device, and every stage and process reads its "
                         "data again; save them in a file.")
    if "://" in source:
        raise UsageError(f"{source}: an address is not read; download the file, or name the "
                         "dataset as owner/name.")
    if os.path.isfile(name):
        raise UsageError(f"{source}: a file has no splits or revisions; name {name} alone.")
    if os.path.islink(source):
        raise UsageError(f"{source} is a link to {os.readlink(source)}, which does not exist.")
    endings = (".json", ".jsonl", ".gz", ".csv", ".parquet", "/")
    if not name or source.startswith((".", "/", "~")) or source.endswith(endings):
        raise UsageError(f"{source} does not exist. {accepted}")
