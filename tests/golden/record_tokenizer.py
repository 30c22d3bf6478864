"""Record tokenizer.json.gz: some thousands of nasty captions, and the ids the reference tokenizers give them.

    python record_tokenizer.py FOLDER    # the published vocab.json and merges.txt: 49,408 tokens, 48,894 merges

Recorded with transformers 5.23.0 (tokenizers 0.23.3), clip-anytorch 2.6.0 (the CLIP paper's own SimpleTokenizer),
ftfy 6.3.1, regex 2026.11.15, Python 3.11. The file holds

    merges    [left, right, published id of what they make]: the merges that these captions apply, in the published
              order. The others would never take part: the ids are those of the whole vocabulary
    vocab     token -> published id: the 512 byte symbols and the two special tokens
    plain     [caption, ids with the end token as padding, ids with "!" as padding]: transformers' CLIPTokenizer
    repaired  [caption, ids]: SimpleTokenizer, which mends text (ftfy, html.unescape) before it reads it. Only captions
              where that changes the ids, and none with what the two references read differently even in sound text:
              Greek sigma (lower() of a whole string), the long s and U+0345 (its pattern ignores case), special tokens
"""
import gzip
import importlib.util
import json
import random
import sys
import unicodedata
from pathlib import Path

from transformers import CLIPTokenizer

WORDS = """a the of on with and red small old photo painting dog cat house street sunset mountain portrait woman man close-up
black-and-white t-shirt 16mm f/2.8 3d 4k 1990s 1st 2nd it's don't we're I've I'm they'll he'd O'Clock DON'T dogs' 'quoted' “hello” "hi"
$5 100% #1 @home 10:30 3.5 1,000 1/2 -- - ... !? !! ! wow! ?! :) (c) [x] {y} & &amp; &lt;b&gt; &#39;s &amp;amp; &nbsp; <br> http://a.b/c?d=e
café cafe\u0301 naïve Ångström A\u030angstro\u0308m İstanbul STRASSE straße ΟΔΟΣ ΣΊΣΥΦΟΣ ǅ ﬁne ſtone 'ſ Ⅷ ½ m² ① ٣ ५ １２ ＡＢＣ
猫の写真 东京塔 2024年 한국어 고양이 ภาพถ่าย บ้าน हिन्दी बिल्ली தமிழ் ខ្មែរ မြန်မာ עִבְרִית العَرَبِيَّة می\u200cخواهم русский Київ
😀 ❤️ 👍🏽 👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪🇫🇷 1️⃣ 🏴󠁧󠁢󠁥󠁮󠁧󠁿 🎉🎉 ♀️ ™ © ° \u200b \u200d \ufeff \u00ad \u202e \u2060 \u180e \u00a0 \u3000 \u2028 \x1c \x85 \t \n \x00 \x7f
<|startoftext|> <|endoftext|> <|endoftext|>x x<|endoftext|> <|end |endoftext|> <|endoftext|><|endoftext|> ##<|startoftext|>!!
cafÃ© itâ€™s â€œhelloâ€\u009d ðŸ˜€ Ã¼ber doesnâ€™t Â£5 ＬＯＵＤ ʼn ŉ""".replace("\n", " ").split(" ")
SCRIPTS = [(0x20, 0x7F), (0x80, 0x24F), (0x300, 0x36F), (0x370, 0x52F), (0x590, 0x6FF), (0x900, 0xDFF), (0xE00, 0xFFF),
           (0x1000, 0x1FFF), (0x2000, 0x2BFF), (0x3000, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0xF900, 0xFFFF),
           (0x10000, 0x1FFFF)]


def captions(vocab: dict[str, int]) -> list[str]:
    rng = random.Random(0)
    whole = [token[:-4] for token in vocab if token.endswith("</w>") and token[:-4].isascii() and len(token) > 6]
    parts = [token for token in vocab if token.isascii() and token.isalpha()]
    found = ["", " ", *WORDS]
    found += [f"{a} {b}" for a, b in zip(WORDS, WORDS[1:])] + [a + b for a, b in zip(WORDS, WORDS[2:])]
    for _ in range(500):  # ordinary captions, with capitals
        found.append(" ".join(rng.choice([str.lower, str.title, str.upper])(rng.choice(whole)) for _ in range(rng.randint(1, 12))))
    for _ in range(400):  # words nobody ever wrote: long chains of merges
        found.append("".join(rng.choice(parts) for _ in range(rng.randint(2, 6))))
    for _ in range(900):  # everything above, joined by anything or nothing
        found.append("".join(rng.choice(WORDS) + rng.choice(["", " ", " ", "  ", "\n"]) for _ in range(rng.randint(2, 9))))
    for _ in range(300):  # numbers and signs
        found.append("".join(rng.choice("0123456789.,:;!?'\"-/()[]&#%$ abs") for _ in range(rng.randint(1, 25))))
    for _ in range(900):  # one script each; only characters that Python 3.11 knows (Unicode 14)
        low, high = rng.choice(SCRIPTS)
        text = [chr(rng.randint(low, high)) for _ in range(rng.randint(1, 12))]
        found.append("".join(c if unicodedata.category(c) not in ("Cn", "Cs", "Co") else rng.choice(" a'1!") for c in text))
    for _ in range(40):  # overlong
        found.append(" ".join(rng.choice(whole[:2000] + WORDS * 9) for _ in range(rng.randint(60, 110))))
    return sorted(set(found))


def main(folder: Path) -> None:
    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    merges = [tuple(line.split()) for line in (folder / "merges.txt").read_text(encoding="utf-8").split("\n")[1:] if line]
    assert len(vocab) == 49_408 and len(merges) == 48_894
    texts = captions(vocab)
    end_pads, mark_pads = CLIPTokenizer.from_pretrained(folder), CLIPTokenizer.from_pretrained(folder, pad_token="!")
    plain = [[text, end_pads(text).input_ids[1:-1], mark_pads(text).input_ids[1:-1]] for text in texts]

    place = Path(importlib.util.find_spec("clip").submodule_search_locations[0]) / "simple_tokenizer.py"
    spec = importlib.util.spec_from_file_location("simple_tokenizer", place)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)  # the file alone: the package around it wants torchvision
    simple = module.SimpleTokenizer()
    repaired = [[text, simple.encode(text)] for text in texts if not any(s in text for s in ["Σ", "ſ", "\u0345", "<|"])]
    repaired = [row for row in repaired if row[1] != end_pads(row[0]).input_ids[1:-1]]

    # The tokens used, and the tokens those were merged from, and so on.
    made_from = {left + right: (left, right) for left, right in merges}
    token_of = {i: token for token, i in vocab.items()}
    todo, used = [token_of[i] for _, *rows in plain + repaired for row in rows for i in row], set()
    while todo:
        token = todo.pop()
        if token not in used:
            used.add(token)
            todo += made_from.get(token, ())
    kept = [[left, right, vocab[left + right]] for left, right in merges if left + right in used]
    small = {token: i for token, i in vocab.items() if i < 512 or i >= 49_406}
    content = {"merges": kept, "vocab": small, "plain": plain, "repaired": repaired}
    data = gzip.compress(json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode(), mtime=0)
    (Path(__file__).parent / "tokenizer.json.gz").write_bytes(data)
    print(f"{len(texts)} captions, {len(kept)} merges, {len(data):,} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
