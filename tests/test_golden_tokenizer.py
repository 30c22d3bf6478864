"""The published vocabulary's ids for a few thousand nasty captions; golden/record_tokenizer.py describes the file."""
import gzip
import json
import sys
import unicodedata
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from tokenizer import END, Tokenizer


@pytest.fixture(scope="module")
def golden():
    return json.loads(gzip.decompress((Path(__file__).parent / "golden" / "tokenizer.json.gz").read_bytes()))


def published(golden, **options):
    vocab = golden["vocab"] | {left + right: i for left, right, i in golden["merges"]}
    return Tokenizer(vocab, [(left, right) for left, right, _ in golden["merges"]], **options)


@pytest.mark.parametrize("column, pad_token", [(1, END), (2, "!")])
def test_same_ids_as_transformers(column, pad_token, golden):
    tokenizer = published(golden, pad_token=pad_token)
    # The Unicode tables of an older Python lack the lower case of newer scripts.
    rows = [row for row in golden["plain"] if all(unicodedata.category(c) != "Cn" for c in row[0])]
    assert len(rows) > 3000 and not [row[0] for row in rows if tokenizer.encode(row[0]) != row[column]]


def test_repairs_text_like_clips_own_tokenizer(golden):
    tokenizer = published(golden, repair=True)
    wrong = [text for text, ids in golden["repaired"] if tokenizer.encode(text) != ids]
    assert len(golden["repaired"]) > 400 and not wrong
