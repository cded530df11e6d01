"""
Sources -> rows: what --data_path names, read into memory. A row is a dict, its columns by name.
"""

import csv
import gzip
import io
import json
import os
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
        raise UsageError(f"{path} cannot be read: {error}") from error


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
    rows = list(csv.DictReader(io.StringIO(text)))
    for number, row in enumerate(rows, 1):
        if None in row:  # DictReader's key of fields beyond the header's
            raise UsageError(f"{path}, row {number} has more fields than the header; text that "
                             "holds commas needs quotes around it.")
    return rows


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


def read_folder(folder):
    """-> (rows of the files named train*, rows of those named test*, eval* or valid*, or None)."""
    train = []
    test = []
    for rows, starts in ((train, "train"), (test, ("test", "eval", "valid"))):
        for path in sorted(Path(folder).iterdir()):
            if path.name.startswith(starts):
                rows.extend(read_file(str(path)))
    if not train:
        raise UsageError(f"{folder}: a folder needs files whose names start with train (and, "
                         "optionally, test): train.jsonl, test.jsonl. Or name the files "
                         "themselves.")
    return train, test or None


def read_dataset(name):
    """A hub name, or a folder of datasets' save_to_disk -> (rows, test rows or None)."""
    from datasets import load_dataset, load_from_disk
    try:
        dataset = load_from_disk(name) if os.path.isdir(name) else load_dataset(name)
    except Exception as error:  # of any kind, because the hub's client raises many
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        raise UsageError(f"{name} is neither a local file or folder nor a dataset that could be "
                         f"fetched from the hub ({reason}).") from error
    if "train" not in dataset:
        raise UsageError(f"{name} has no split named train, only {', '.join(dataset)}.")
    for split in ("test", "validation", "eval"):
        if split in dataset:
            return dataset["train"].to_list(), dataset[split].to_list()
    return dataset["train"].to_list(), None


def read_source(source):
    """--data_path entry -> (rows, test rows, or None where the source has no test split)."""
    if source == "toy":
        return toy_rows(), None
    if os.path.isfile(source):
        return read_file(source), None
    if os.path.isdir(source):
        saved_by_datasets = os.path.exists(os.path.join(source, "dataset_dict.json"))
        return read_dataset(source) if saved_by_datasets else read_folder(source)
    endings = (".json", ".jsonl", ".gz", ".csv", ".parquet")
    if source.startswith((".", "/", "~")) or source.endswith(endings):
        raise UsageError(f"{source} does not exist. --data_path takes toy, a file, a folder or a "
                         "dataset's hub name.")
    return read_dataset(source)
