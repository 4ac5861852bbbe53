"""ListOps: the generator, the notation, the files, the batches, and every way a file can be wrong."""

import itertools
import os
import statistics
from pathlib import Path

import numpy as np
import pytest

from minigrad import Rng
from models.data import DataError, listops

TOKEN = {token: i for i, token in enumerate(listops.TOKENS)}


def tokens(text):
    return bytes(TOKEN[word] for word in text.split())


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("[MIN 4 7 2 ]", 2),
        ("[MAX 4 7 2 ]", 7),
        ("[SM 4 7 2 ]", 3),
        ("[MED 4 7 2 ]", 4),
        ("[MED 4 7 2 8 ]", 5),  # the mean of the middle two, rounded down
        ("[MAX 2 9 [MIN 4 7 ] 0 ]", 9),
        ("[SM [SM 9 9 ] [MED 1 [MAX 5 6 ] 3 ] ]", 1),
        ("7", 7),
    ],
)
def test_a_sequence_has_the_value_that_its_operations_say(text, value):
    assert listops.evaluate(tokens(text)) == value


def test_the_notation_of_the_published_files():
    text = "( ( ( ( ( [MAX 2 ) 9 ) ( ( ( [MIN 4 ) 7 ) ] ) ) 0 ) ] )"
    assert listops.render(tokens("[MAX 2 9 [MIN 4 7 ] 0 ]")) == text
    assert listops.parse(text) == listops.parse("[MAX 2 9 [MIN 4 7 ] 0 ]") == tokens("[MAX 2 9 [MIN 4 7 ] 0 ]")
    assert listops.parse(text.replace(" ) ", " )  ") + " ") == listops.parse(text)  # spaces beyond one mean nothing
    assert [listops.depth(tokens(t)) for t in ("7", "[SM 1 2 ]", "[SM 1 [MIN 2 3 ] [MAX 4 [MED 5 6 ] ] ]")] == [0, 1, 3]


@pytest.fixture(scope="module")
def many():
    return listops.generate(20_000, seed=3)


def test_generation_is_deterministic_and_without_duplicates(many):
    again = listops.generate(500, seed=1)
    assert again == listops.generate(500, seed=1)
    assert again != listops.generate(500, seed=2)
    assert len({t for t, _ in many}) == 20_000
    assert all(listops.evaluate(t) == value for t, value in many[:2000])
    assert all(listops.parse(listops.render(t)) == t for t, _ in many[:2000])


def test_the_statistics_are_those_of_the_published_sets(many):
    """About 43 tokens, 87 to 89 % with fewer than 100, a mean depth of 4.5, at most 20 levels, labels as there: 895 to
    1141 of 10,000 for each digit. (With fewer draws than the published million a little shorter.)"""
    lengths = [len(t) for t, _ in many]
    assert 38 < statistics.mean(lengths) < 47
    assert 0.86 < np.mean(np.array(lengths) < 100) < 0.90
    assert 4.0 < statistics.mean(listops.depth(t) for t, _ in many) < 5.0
    assert max(listops.depth(t) for t, _ in many) <= 20
    counts = np.bincount([value for _, value in many]) / 2
    assert len(counts) == 10
    assert ((counts > 840) & (counts < 1200)).all()
    operators = np.bincount(np.frombuffer(b"".join(t for t, _ in many), np.uint8), minlength=15)[10:14]
    assert operators.max() / operators.min() < 1.05


def test_each_node_has_two_to_five_arguments(many):
    sizes = []
    for t, _ in many[:3000]:
        stack = [0]
        for token in t:
            if token < 10:
                stack[-1] += 1
            elif token < listops.CLOSE:
                stack.append(0)
            else:
                sizes.append(stack.pop())
                stack[-1] += 1
    share = np.bincount(sizes)[2:] / len(sizes)
    assert len(share) == 4
    assert share.min() > 0.15


@pytest.mark.parametrize("part", ["valid"])
def test_a_published_file_is_read_and_written_back_byte_for_byte(tmp_path, part):
    if not os.environ.get("MINIGRAD_DATA"):
        pytest.skip("set MINIGRAD_DATA to a folder that has listops/")
    path = Path(os.environ["MINIGRAD_DATA"]) / "listops" / f"{part}.tsv"
    sequences = listops.read(path)
    assert len(sequences) == 1000
    listops.write(tmp_path / "copy.tsv", sequences)
    assert (tmp_path / "copy.tsv").read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("3\t( ( ( [MIN 4 ) 7 ) ] )", "the label is '3', but the sequence has the value 4"),
        ("x\t( ( ( [MIN 4 ) 7 ) ] )", "the label is 'x'"),
        ("4\t( ( ( [MIN 4 ) 7 ) ]", "its parentheses are not balanced"),
        ("4\t( ( [MIN 4 ) ( 7 ] ) )", "do not build each list from the left"),
        ("4\t[MIN 4 7", "the operator [MIN is not closed"),
        ("4\t[MIN 4 7 ] ]", "a ] without its operator"),
        ("4\t4 7", "there is more than one list"),
        ("4\t[AVG 4 7 ]", "unknown token '[AVG'"),
        ("4\t[MIN 44 7 ]", "unknown token '44'"),
        ("4\t[MIN 4 () 7 ]", "unknown token '()'"),
        ("4\t[MIN ]", "the operator [MIN has no arguments"),
        ("4\t", "it is empty"),
        ("", "an empty line"),
        ("4 [MIN 4 7 ]", "no tab between a label and a sequence"),
    ],
)
def test_a_line_that_is_wrong_is_named(tmp_path, line, message):
    path = tmp_path / "x.tsv"
    path.write_text(f"2\t( ( ( [MIN 2 ) 7 ) ] )\n{line}\n5\t5\n")
    with pytest.raises(DataError) as caught:
        listops.read(path)
    assert str(caught.value).startswith(f"{path}, line 2: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        listops.read(tmp_path / "absent.tsv")
    (tmp_path / "empty.tsv").write_text("")
    with pytest.raises(DataError, match="is empty"):
        listops.read(tmp_path / "empty.tsv")
    (tmp_path / "binary.tsv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="it is not text"):
        listops.read(tmp_path / "binary.tsv")


def test_splits_share_no_sequence_and_files_come_first(tmp_path, monkeypatch, caplog):
    monkeypatch.delenv("MINIGRAD_DATA", raising=False)
    generated = listops.load(counts=(300, 50, 100), seed=4)
    assert [len(generated[name]) for name in listops.SPLITS] == [300, 50, 100]
    (tmp_path / "listops").mkdir()
    valid = listops.load(counts=(40, 200, 10), seed=4)["valid"]
    listops.write(tmp_path / "listops" / "valid.tsv", valid)
    assert not caplog.messages
    splits = listops.load(tmp_path, counts=(300, 50, 100), seed=4)
    assert caplog.messages == [f"read from {tmp_path / 'listops'}: valid; generated: train, test."]
    assert splits["valid"] == valid
    sets = [{t for t, _ in splits[name]} for name in listops.SPLITS]
    assert [len(s) for s in sets] == [300, 200, 100]
    assert all(a.isdisjoint(b) for a, b in itertools.combinations(sets, 2))


def test_both_tokenisations():
    t = tokens("[MAX 2 9 [MIN 4 7 ] 0 ]")
    one, two = listops.Tokenizer(), listops.Tokenizer(split=True)
    assert [one.tokens[i] for i in one(t)] == ["[MAX", "2", "9", "[MIN", "4", "7", "]", "0", "]"]
    assert [two.tokens[i] for i in two(t)] == ["[", "MAX", "2", "9", "[", "MIN", "4", "7", "]", "0", "]"]
    assert (one.size, one.padding, two.size, two.padding) == (16, 15, 17, 16)


def test_batches_have_every_sequence_once_in_similar_lengths_and_a_fixed_order(many):
    tokenizer = listops.Tokenizer()
    sequences, left_out = listops.within(many[:1000], tokenizer, 99)
    assert len(sequences) + left_out == 1000
    assert 80 < left_out < 160
    rng = Rng(5)
    epochs = [listops.batches(sequences, tokenizer, 16, rng.at(step)) for step in (0, 0, 1)]
    for batches in epochs:
        assert sorted(np.concatenate([b.index for b in batches])) == list(range(len(sequences)))
        for b in batches:
            for row, n, label, i in zip(b.ids, b.lengths, b.labels, b.index, strict=True):
                np.testing.assert_array_equal(row[:n], tokenizer(sequences[i][0]))
                assert (row[n:] == tokenizer.padding).all()
                assert label == sequences[i][1]
        padding = sum((b.ids == tokenizer.padding).sum() for b in batches)
        assert padding < 0.05 * sum(b.ids.size for b in batches)
    order = [[b.index.tolist() for b in batches] for batches in epochs]
    assert order[0] == order[1]
    assert order[0] != order[2]
    plain = listops.batches(sequences, tokenizer, 16)
    assert [b.lengths.max() for b in plain] == sorted(b.lengths.max() for b in plain)
