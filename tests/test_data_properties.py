"""
data.py's promises for any input, and its readers on broken files: hypothesis draws the cases and
shrinks one that fails. The same cases each time.
"""

import gzip
import io
import json
from collections import Counter

import numpy as np
import pyarrow
import pyarrow.parquet
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data import (MicroBatches, Preference, hold_out, make_dataloader, share_of_stage,
                  split_indices, to_records, training_steps, without_repeats)
from support.flags import UsageError
from support.sources import read_source

settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=100,
                          database=None)
settings.load_profile("repeatable")

seeds = st.integers(0, 2**32 - 1)
parts_of_a_whole = st.tuples(*[st.floats(0, 1e6)] * 3).filter(lambda shares: sum(shares) > 0)


def records_of(questions, answer="x"):
    return [Preference([{"role": "user", "content": question}], answer, None, origin=str(row))
            for row, question in enumerate(questions)]


# -----------------------------------------------------------------------------
# split, blend, hold out

@example(103, (0, 5, 5), 0)
@given(st.integers(0, 300), parts_of_a_whole, seeds)
def test_the_stages_parts_are_disjoint_and_complete(count, shares, seed):
    data_split = ",".join(map(str, shares))
    parts = [split_indices(count, data_split, stage, seed) for stage in (1, 2, 3)]
    assert sorted(np.concatenate(parts)) == list(range(count))
    for part, share in zip(parts, shares):
        # Each part is rounded, and the first absorbs what rounding leaves.
        assert abs(len(part) - count * share / sum(shares)) <= 1.5 + 1e-6


@given(st.lists(st.integers(0, 30), max_size=60), parts_of_a_whole, seeds, st.floats(0, 4))
def test_a_weight_is_that_many_copies(questions, shares, seed, weight):
    records = records_of(map(str, questions))
    data_split = ",".join(map(str, shares))
    for stage in (1, 3):
        once = share_of_stage(records, data_split, stage, seed, 1.0)
        copies = Counter(record.origin for record in share_of_stage(
            records, data_split, stage, seed, weight))
        assert copies.keys() <= {record.origin for record in once}
        assert abs(sum(copies.values()) - weight * len(once)) <= 0.5 + 1e-6
        for record in once:
            assert int(weight) <= copies[record.origin] <= int(weight) + 1


@given(st.lists(st.text("aB \n", max_size=4), min_size=1, max_size=40), seeds, st.randoms())
def test_no_prompt_is_on_both_sides(questions, seed, random):
    records = records_of(questions)
    train, held = hold_out(records, seed)
    held_keys = {record.keys[-1] for record in held}
    assert held and held_keys.isdisjoint(key for record in train for key in record.keys)
    assert sorted(record.origin for record in train + held) == sorted(
        record.origin for record in records)

    # Whatever the order of the rows.
    shuffled = list(records)
    random.shuffle(shuffled)
    assert {record.origin for record in hold_out(shuffled, seed)[1]} == {
        record.origin for record in held}


@given(st.lists(st.lists(st.integers(0, 5), max_size=8), max_size=4))
def test_a_row_is_dealt_from_one_source_alone(sources):
    seen = set()
    kept = [without_repeats(records_of(map(str, questions)), seen, "here", lambda line: None)
            for questions in sources]
    found = [{record.prompt[0]["content"] for record in records} for records in kept]
    assert set().union(*found) == {str(question) for source in sources for question in source}
    assert sum(map(len, found)) == len(set().union(*found))


# -----------------------------------------------------------------------------
# steps

@st.composite
def loaders(draw):
    """f(world) -> the loaders of so many ranks, for any batch, lengths and window."""
    parts = draw(st.integers(1, 4))
    part_rows = 4 * draw(st.integers(1, 3))
    window = draw(st.integers(1, 6))
    seed = draw(seeds)
    lengths = np.random.RandomState(seed).randint(1, 50, draw(st.integers(0, 400)))
    items = [{"row": row, "input_ids": range(length)} for row, length in enumerate(lengths)]
    collate = MicroBatches(list, parts)

    def make(world):
        return [make_dataloader(items, collate, parts * part_rows // world, seed, rank, world,
                                lengths, parts, window) for rank in range(world)]

    return make


def rows_of(step):
    return [item["row"] for part in step for item in part]


@given(loaders(), st.integers(0, 3))
def test_steps_are_the_same_rows_for_any_number_of_ranks(make, epoch):
    found = []
    for world in (1, 2, 4):
        ranks = make(world)
        for loader in ranks:
            loader.sampler.set_epoch(epoch)
        steps = [sorted(row for step in shares for row in rows_of(step))
                 for shares in zip(*ranks, strict=True)]
        assert len(steps) == len(ranks[0])
        found.append(steps)
    assert found[0] == found[1] == found[2]
    rows = sum(found[0], [])
    loader = make(1)[0]
    assert len(rows) == len(set(rows)) == len(loader.dataset) // loader.batch_size * (
        loader.batch_size)


@given(loaders(), st.integers(0, 25), st.integers(0, 25))
def test_a_run_goes_on_wherever_it_was_stopped(make, total, done):
    [loader] = make(1)
    if len(loader) == 0:
        return
    whole = list(training_steps(loader, total))
    assert [step for step, _ in whole] == list(range(1, total + 1))
    assert list(training_steps(loader, total, done)) == whole[done:]


# -----------------------------------------------------------------------------
# broken files

PAIRS = [{"prompt": f"What is {row}?", "chosen": f"It is {row}, \"surely\".", "rejected": None,
          "more": [{"a": row}]} for row in range(4)]


def whole_files():
    """{name: bytes} of a file of every kind."""
    lines = "\n".join(map(json.dumps, PAIRS)).encode()
    table = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(PAIRS), table)
    return {"rows.jsonl": lines, "rows.json": json.dumps(PAIRS).encode(),
            "rows.jsonl.gz": gzip.compress(lines, mtime=0), "rows.parquet": table.getvalue(),
            "rows.csv": b'prompt,response\n"a, ""b""",c\nd,"e\nf"\n'}


@st.composite
def broken_files(draw):
    """-> the name and bytes of a file that was cut, overwritten or mixed up in some places."""
    name, content = draw(st.sampled_from(sorted(whole_files().items())))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(content)))
        end = draw(st.integers(start, min(len(content), start + 20)))
        if draw(st.booleans()):
            inserted = draw(st.binary(max_size=6))
        else:
            inserted = draw(st.sampled_from([b'"', b",", b"\n", b"{", b"[", b"null", b"1e999",
                                             b"\\ud800", b"\x00", b'{"prompt": 3}\n', b"]"]))
        content = content[:start] + inserted + content[end:]
    if draw(st.booleans()):
        content = content[:draw(st.integers(0, len(content)))]
    return name, content


@settings(max_examples=600)
@given(broken_files())
def test_a_broken_file_is_read_or_named_in_a_sentence(tmp_path_factory, file):
    name, content = file
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(content)
    try:
        rows, _ = read_source(str(path))
        if any(rows):
            to_records(rows, str(path))
    except UsageError as error:
        assert name in str(error)


@settings(max_examples=300)
@given(st.lists(st.dictionaries(
    st.sampled_from(["prompt", "chosen", "rejected", "messages", "response", "text", "label",
                     "tools", "hold_out_as", "system", "completions", "instruction"]),
    st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
                 lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
                     st.sampled_from(["role", "content", "from", "value", "text"]), inner,
                     max_size=3), max_leaves=6), min_size=1), min_size=1, max_size=4))
def test_odd_rows_are_counted_or_named(rows):
    try:
        records, dropped = to_records(rows, "rows.jsonl")
    except UsageError as error:
        assert "rows.jsonl" in str(error)
    else:
        assert len(records) + sum(map(len, dropped.values())) == len(rows)
