import json
import sys
import warnings
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from tokenizer import ALPHABET, END, START, Tokenizer, clean

CAPTIONS = ["a red square", "a red circle and a blue square", "the red circle is on the blue square",
            "it's a café, isn't it?", "猫の写真", "😀😀 👍🏽"] * 3
ROUND_TRIP = [
    "a red square", "it's 2024, isn't it?", "they'll say we're sure i've won; i'm sure he'd agree", "o'clock in the dogs' house",
    "a black-and-white close-up, 1/2 price (50% off)!", "3.5 metres at 10:30 with 1,000 cats", "the 1st 3d render in 4k, from the 1990s",
    'a sign saying "hello", on a wall', 'she said "stop."', "“hello” he said: it’s a dog’s life…", "#1 fan @home pays $5", "¿qué? ¡hola!",
    "i ❤️ cats", "family 👩‍👩‍👧‍👦 and 👍🏽, flags 🇩🇪🇫🇷 🏳️‍🌈", "1️⃣ first", "猫の写真、犬。東京「2024年3月」", "고양이 한 마리", "русский київ",
    "ภาพถ่ายบ้านสวยที่ริมทะเล", "बिल्ली", "தமிழ்", "မြန်မာ", "עִבְרִית", "العَرَبِيَّة", "می‌خواهم", "café naïve ångström straße", "",
]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(CAPTIONS, merges=60, length=16)


def tiny(merges, **options):
    tokens = [*ALPHABET, *(left + right for left, right in merges), START, END]
    return Tokenizer({token: i for i, token in enumerate(tokens)}, merges, **options)


def names(tokenizer, text):
    return [tokenizer.tokens[i] for i in tokenizer.encode(text)]


def test_merge_order_decides():
    # "abc": whichever of "ab" and "bc</w>" was learned first takes the b.
    assert names(tiny([("a", "b"), ("b", "c</w>")]), "abc") == ["ab", "c</w>"]
    assert names(tiny([("b", "c</w>"), ("a", "b")]), "abc") == ["a", "bc</w>"]
    # The end of a word matters: "c" in the middle isn't "c</w>".
    assert names(tiny([("b", "c</w>"), ("a", "b")]), "abcd") == ["ab", "c", "d</w>"]
    # Every occurrence, from the left; then later merges on what came of it.
    assert names(tiny([("a", "a"), ("aa", "aa")]), "aaaaaaab") == ["aaaa", "aa", "a", "b</w>"]


def test_ids_come_from_the_vocabulary():
    vocab = {token: 1000 - i for i, token in enumerate([*ALPHABET, START, END])}
    shuffled = Tokenizer(vocab, [])
    assert len(shuffled) == 514
    assert shuffled.encode("hi") == [vocab["h"], vocab["i</w>"]]
    assert (shuffled.start_id, shuffled.end_id, shuffled.pad_id) == (vocab[START], vocab[END], vocab[END])


def test_pieces():
    assert names(tiny([]), "I'M 42?!") == ["i</w>", "'", "m</w>", "4</w>", "2</w>", "?", "!</w>"]
    assert names(tiny([]), "é") == ["Ã", "©</w>"]  # UTF-8: C3 A9
    assert names(tiny([]), "e\u0301") == ["Ã", "©</w>"]  # composed first


def test_cleaning():
    assert clean(" A\t\nRED\u00a0\u3000Square ") == "a red square"
    assert clean("ΟΔΟΣ") == "οδοσ"
    assert clean("caf\u00c3\u00a9 &amp;amp; “it&#39;s”", repair=True) == "café & \"it's\""
    assert clean("rock &amp; roll") == "rock &amp; roll"


def test_training_by_hand():
    # low ×3, lot ×2: l+o 5 times, then lo+w</w> 3 times, then lo+t</w> twice, then nothing is left.
    learned = Tokenizer.train(["low low lot", "lot low"])
    assert list(learned.ranks) == [("l", "o"), ("lo", "w</w>"), ("lo", "t</w>")]
    assert len(learned) == 512 + 3 + 2
    assert names(learned, "low slot") == ["low</w>", "s", "lot</w>"]
    assert Tokenizer.train(["low low lot", "lot low"], merges=1).ranks == {("l", "o"): 0}
    assert not Tokenizer.train(["abc", "xyz"]).ranks  # no pair twice
    assert not Tokenizer.train([]).ranks


def test_training_in_overlapping_runs():
    # "aaaa" holds a+a twice (the last is a</w>); after the first merge, aa and a are left to be counted afresh.
    assert list(Tokenizer.train(["aaaa aaaa"]).ranks)[0] == ("a", "a")
    assert names(Tokenizer.train(["aaaa aaaa"]), "aaaa") == ["aaaa</w>"]


def test_training_is_deterministic():
    first, second = Tokenizer.train(CAPTIONS), Tokenizer.train(reversed(CAPTIONS))
    assert first.ranks == second.ranks and first.vocab == second.vocab
    assert list(Tokenizer.train(["xy ab", "ab xy"]).ranks) == [("a", "b</w>"), ("x", "y</w>")]  # a tie: sorted


def test_trained_words_are_single_tokens(tokenizer):
    assert names(tokenizer, "A red SQUARE") == ["a</w>", "red</w>", "square</w>"]


@pytest.mark.parametrize("pad_token", [END, "!"])
@pytest.mark.parametrize("text", ROUND_TRIP)
def test_round_trip(text, pad_token, tokenizer):
    padded = Tokenizer(tokenizer.vocab, list(tokenizer.ranks), length=200, pad_token=pad_token)
    assert padded.decode(padded.encode(text)) == text
    ids, _ = padded([text.upper() if text.isascii() else text])
    assert padded.decode(ids[0]) == text


def test_decode_bad_bytes_and_ids(tokenizer):
    half = tokenizer.encode("é")[:1] if len(tokenizer.encode("é")) == 2 else [tokenizer.vocab["Ã"]]
    assert tokenizer.decode(half) == "\ufffd"
    assert tokenizer.decode([]) == ""
    with pytest.raises(ValueError, match="99999"):
        tokenizer.decode([99999])


@pytest.mark.parametrize("pad_token", [END, "!"])
def test_padding_and_mask(pad_token, tokenizer):
    tokenizer = Tokenizer(tokenizer.vocab, list(tokenizer.ranks), length=6, pad_token=pad_token)
    ids, mask = tokenizer(["a red square", ""])
    pad, (a, red, square) = tokenizer.vocab[pad_token], tokenizer.encode("a red square")
    start, end = tokenizer.vocab[START], tokenizer.vocab[END]
    assert ids.tolist() == [[start, a, red, square, end, pad], [start, end, pad, pad, pad, pad]]
    assert mask.tolist() == [[True] * 5 + [False], [True] * 2 + [False] * 4]
    assert ids.dtype == torch.int64 and mask.dtype == torch.bool
    assert tokenizer.decode(ids[1]) == ""


def test_truncation_warns_once_a_caption(tokenizer):
    short = Tokenizer(tokenizer.vocab, list(tokenizer.ranks), length=5)
    with pytest.warns(UserWarning) as caught:
        ids, mask = short(["a red square and a blue circle", "a red square", "the blue circle is red and blue"])
    assert [str(w.message) for w in caught] == ['caption cut at 5 tokens; left out: "and a blue circle"',
                                                'caption cut at 5 tokens; left out: "is red and blue"']
    assert mask.all() and ids[:, -1].tolist() == [short.end_id] * 3
    assert short.decode(ids[0]) == "a red square"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        short(["a red square"])  # fits exactly


def test_special_tokens_in_text(tokenizer):
    assert tokenizer.encode(f"red{END}red {START}") == [*tokenizer.encode("red"), tokenizer.end_id,
                                                        *tokenizer.encode("red"), tokenizer.start_id]
    assert tokenizer.end_id not in tokenizer.encode(END.upper())  # only exactly so
    assert tokenizer.decode(tokenizer.encode(f"red {END} square")) == "red square"
    assert START not in [left + right for left, right in Tokenizer.train([START] * 9).ranks]
    assert not Tokenizer.train([START, END]).ranks  # nor are they words to learn from


def test_exclamation_mark_as_padding(tokenizer):
    marked = Tokenizer(tokenizer.vocab, list(tokenizer.ranks), length=12, pad_token="!")
    assert marked.pad_id == 0
    assert marked.encode("red!!") == [*tokenizer.encode("red"), 0, 0]
    assert tokenizer.encode("red!") == [*tokenizer.encode("red"), tokenizer.vocab["!</w>"]]
    assert marked.decode(marked(["red!! a"])[0][0]) == "red!! a"
    assert marked.decode(marked(["red!!"])[0][0]) == "red!!"


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "new" / "folder")
    loaded = Tokenizer.load(tmp_path / "new" / "folder")
    for name in ["vocab", "ranks", "length", "pad_token", "repair", "start_id", "end_id", "pad_id"]:
        assert getattr(loaded, name) == getattr(tokenizer, name), name
    assert loaded.repair and loaded.encode("a &amp; b") == tokenizer.encode("a & b")
    assert (tmp_path / "new/folder/merges.txt").read_text(encoding="utf-8").startswith("#version: 0.2\n")


@pytest.mark.parametrize("config, special, pad, length", [
    (None, None, END, 77),
    ({"pad_token": "!", "model_max_length": 20}, None, "!", 20),
    ({"pad_token": {"content": "!"}}, None, "!", 77),
    ({"model_max_length": 1000000000000000019884624838656}, {"pad_token": {"content": "!"}}, "!", 77),
    ({"pad_token": None, "model_max_length": None}, {"pad_token": "!"}, "!", 77),
])
def test_load_a_snapshot(config, special, pad, length, tmp_path):
    tiny([("a", "b")]).save(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    for name, content in [("tokenizer_config.json", config), ("special_tokens_map.json", special)]:
        if content is not None:
            (tmp_path / name).write_text(json.dumps(content))
    loaded = Tokenizer.load(tmp_path)
    assert (loaded.pad_token, loaded.length, loaded.repair) == (pad, length, False)


@pytest.mark.parametrize("name, content, message", [
    ("vocab.json", None, None),
    ("merges.txt", None, None),
    ("vocab.json", "{", r"vocab\.json isn't JSON"),
    ("vocab.json", b"\xff\xfe", r"vocab\.json isn't JSON"),
    ("vocab.json", "[1]", r"vocab\.json should hold an object"),
    ("vocab.json", json.dumps({START: 0, END: 1}), r"vocab\.json .*lacks"),
    ("vocab.json", json.dumps({token: 0 for token in [*ALPHABET, "ab", START, END]}), r"vocab\.json .*distinct"),
    ("vocab.json", json.dumps({token: i for i, token in enumerate([*ALPHABET, "ab", START])}), r"vocab\.json .*endoftext"),
    ("merges.txt", "#version: 0.2\na b\nx y\n", r"merges\.txt.*'xy'.*'x' 'y'"),
    ("merges.txt", "#version: 0.2\na b\nabc\n", r"merges\.txt, line 3: 'abc'"),
    ("merges.txt", b"#version: 0.2\n\xff b\n", r"merges\.txt isn't UTF-8"),
    ("tokenizer_config.json", "nonsense", r"tokenizer_config\.json isn't JSON"),
    ("tokenizer_config.json", '{"pad_token": "<pad>"}', r"lacks '<pad>'"),
])
def test_bad_files(name, content, message, tmp_path):
    tiny([("a", "b")]).save(tmp_path)
    if content is None:
        (tmp_path / name).unlink()
        with pytest.raises(FileNotFoundError, match=name):
            Tokenizer.load(tmp_path)
    else:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(ValueError, match=message):
            Tokenizer.load(tmp_path)


@pytest.mark.parametrize("text", [None, 3, b"a cat", ["a cat"]])
def test_text_must_be_str(text, tokenizer):
    with pytest.raises(TypeError, match="a caption must be a str"):
        tokenizer.encode(text)
    with pytest.raises(TypeError, match="a caption must be a str"):
        tokenizer([text])
    with pytest.raises(TypeError, match="a caption must be a str"):
        Tokenizer.train([text])


def test_train_refuses_a_single_str():
    with pytest.raises(TypeError, match="several captions"):
        Tokenizer.train("a cat")


def test_too_short_a_length(tokenizer):
    with pytest.raises(ValueError, match="length of 1"):
        Tokenizer(tokenizer.vocab, [], length=1)
