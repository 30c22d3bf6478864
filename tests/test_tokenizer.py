import doctest
import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import tokenizer as module
from tokenizer import ALPHABET, END, START, Tokenizer, clean, merge

CAPTIONS = ["a red square", "a red circle and a blue square", "the red circle is on the blue square", "a café"] * 3


@pytest.fixture(scope="module")
def trained():
    return Tokenizer.train(CAPTIONS, merges=60, length=6)


def tiny(merges):
    tokens = [*ALPHABET, *(left + right for left, right in merges), START, END]
    return Tokenizer({token: i for i, token in enumerate(tokens)}, merges)


def tokens(tokenizer, text):
    return [tokenizer.tokens[i] for i in tokenizer.encode(text)]


def test_examples_in_docstrings():
    assert doctest.testmod(module).failed == 0


def test_merge():
    assert merge(["a", "b", "b", "a", "b"], ("a", "b")) == ["ab", "b", "ab"]
    assert merge(["a"] * 5, ("a", "a")) == ["aa", "aa", "a"]


def test_merge_order_decides():
    # In "abc", the merge that was learned first gets the "b". In "abcd", the "c" is not the end of the word.
    assert tokens(tiny([("a", "b"), ("b", "c</w>")]), "abc") == ["ab", "c</w>"]
    assert tokens(tiny([("b", "c</w>"), ("a", "b")]), "abc abcd") == ["a", "bc</w>", "ab", "c", "d</w>"]
    assert tokens(tiny([("a", "a"), ("aa", "aa")]), "aaaaaaab") == ["aaaa", "aa", "a", "b</w>"]


def test_ids_come_from_the_vocabulary():
    vocab = {token: 1000 - i for i, token in enumerate([*ALPHABET, START, END])}
    tokenizer = Tokenizer(vocab, [])
    assert len(tokenizer) == 514 and tokenizer.encode("hi") == [vocab["h"], vocab["i</w>"]]
    assert (tokenizer.start_id, tokenizer.end_id, tokenizer.pad_id) == (vocab[START], vocab[END], vocab[END])


def test_cleaning_and_pieces():
    assert clean(" A\t\nRED\u00a0\u3000Square ") == "a red square"
    assert clean("ΟΔΟΣ &amp;") == "οδοσ &amp;"
    assert clean("<b> caf\u00c3\u00a9 &amp;amp; “it&#39;s”", repair=True) == "<b> café & \"it's\""
    assert tokens(tiny([]), "I'M 42?!") == ["i</w>", "'", "m</w>", "4</w>", "2</w>", "?", "!</w>"]
    assert tokens(tiny([]), "é") == tokens(tiny([]), "e\u0301") == ["Ã", "©</w>"]  # the bytes C3 A9


def test_training_by_hand(trained):
    # low x3, lot x2: "l o" occurs 5 times, then "lo w</w>" 3 times, then "lo t</w>" twice, and then nothing is left.
    learned = Tokenizer.train(["low low lot", "lot low"])
    assert list(learned.ranks) == [("l", "o"), ("lo", "w</w>"), ("lo", "t</w>")] and len(learned) == 512 + 3 + 2
    assert tokens(learned, "low slot") == ["low</w>", "s", "lot</w>"]
    assert Tokenizer.train(["low low lot", "lot low"], merges=1).ranks == {("l", "o"): 0}
    assert list(Tokenizer.train(["xy ab", "ab xy"]).ranks) == [("a", "b</w>"), ("x", "y</w>")]  # ties in sorted order
    # "aaaaa" is a a a a a</w>. "a a" occurs 3 times, overlapping; then the word is aa aa a</w>.
    assert list(Tokenizer.train(["aaaaa aaaaa"]).ranks) == [("a", "a"), ("aa", "a</w>"), ("aa", "aaa</w>")]
    assert not Tokenizer.train(["abc", "xyz", *[START, END] * 9]).ranks  # no pair twice; special tokens do not count
    again = Tokenizer.train(reversed(CAPTIONS), merges=60)
    assert (again.ranks, again.vocab) == (trained.ranks, trained.vocab)


@pytest.mark.parametrize("pad_token", [END, "!"])
def test_padding_and_mask(pad_token, trained):
    tokenizer = Tokenizer(trained.vocab, list(trained.ranks), 6, pad_token)
    ids, mask = tokenizer(["A red square", ""])
    start, *words, end, pad = [trained.vocab[t] for t in (START, "a</w>", "red</w>", "square</w>", END, pad_token)]
    assert ids.tolist() == [[start, *words, end, pad], [start, end, pad, pad, pad, pad]]
    assert mask.tolist() == [[True] * 5 + [False], [True] * 2 + [False] * 4]
    assert ids.dtype == torch.int64 and mask.dtype == torch.bool and tokenizer.decode(ids[0]) == "a red square"


@pytest.mark.filterwarnings("error")  # a data set can have thousands of long captions
def test_long_text_is_cut_before_end(trained):
    texts = ["a red square is on the blue circle", "a red square is"]
    ids, mask = trained(texts)
    assert ids.tolist() == [[trained.start_id, *trained.encode("a red square is"), trained.end_id]] * 2 and mask.all()
    assert [trained.overflow(text) for text in texts] == ["on the blue circle", ""]


def test_special_tokens_in_text(trained):
    red, mark = trained.encode("red"), trained.vocab["!</w>"]
    assert trained.encode(f"red!{END}red {START}") == [*red, mark, trained.end_id, *red, trained.start_id]
    assert trained.end_id not in trained.encode(END.upper())
    assert trained.decode(trained.encode(f"red {END} square")) == "red square"
    padded = Tokenizer(trained.vocab, list(trained.ranks), pad_token="!")
    assert padded.encode("red!!") == [*red, 0, 0]
    assert padded.decode(padded("red!!")[0][0]) == "red !!"
    assert padded.decode([padded.vocab["Ã"]]) == "\ufffd"  # half a character


def test_save_and_load(trained, tmp_path):
    trained.save(tmp_path / "new" / "folder")
    loaded = Tokenizer.load(tmp_path / "new" / "folder")
    for name in ["vocab", "ranks", "length", "pad_token", "repair"]:
        assert getattr(loaded, name) == getattr(trained, name), name
    assert loaded.repair and (tmp_path / "new/folder/merges.txt").read_bytes().startswith(b"#version: 0.2")


@pytest.mark.parametrize("config, special, pad, length", [
    ({}, {}, END, 77), ({"pad_token": {"content": "!"}, "model_max_length": 20}, {}, "!", 20),
    ({"pad_token": None, "model_max_length": 1000000000000000019884624838656}, {"pad_token": "!"}, "!", 77)])
def test_load_a_published_tokenizer(config, special, pad, length, tmp_path):
    tiny([("a", "b")]).save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(special))
    loaded = Tokenizer.load(tmp_path)
    assert (loaded.pad_token, loaded.length, loaded.repair, loaded.ranks) == (pad, length, False, {("a", "b"): 0})


def test_wrong_input(trained, tmp_path):
    with pytest.raises(TypeError, match="must be a str"):
        trained([None])
    with pytest.raises(TypeError, match="list of captions"):
        Tokenizer.train("a cat")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ValueError, match=r"bad\.json is not JSON"):
        module.read_json(tmp_path / "bad.json")
