"""CLIP's tokenizer (Radford et al. 2021): text in, token ids out. It uses byte-level byte-pair encoding (BPE).

    "A Café!"  --clean-->  "a café!"  --split-->  a | café | !  --bytes, merges-->  a</w> | cafÃ©</w> | !</w>

The text is cut into pieces: words, digits, punctuation. Each piece is encoded separately. First it is written as its
UTF-8 bytes, one symbol per byte ("é" is two bytes, shown as "Ã" and "©"). The last symbol gets "</w>", which marks the
end of a piece. Then neighbouring symbols are merged, in the order in which training learned the merges. All 256 bytes
are in the vocabulary, so no text is ever unknown.
"""
import codecs
import html
import json
import unicodedata
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import ftfy
import regex
import torch

START, END, WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"

# A piece is the end of an English contraction ("'m"), a run of letters, one digit, or a run of other characters. Spaces
# are dropped.
PIECE = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+")

# In the tokenizer's files and symbols, each byte is written as one visible character, as in GPT-2. If a byte is a
# visible character in Latin-1, that character is used (0x61: "a", 0xC3: "Ã"). The others (space, control codes) get the
# characters from U+0100 on.
VISIBLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
INVISIBLE = [byte for byte in range(256) if byte not in VISIBLE]
SYMBOL = {byte: chr(byte) for byte in VISIBLE} | {byte: chr(0x100 + i) for i, byte in enumerate(INVISIBLE)}
BYTE = {symbol: byte for byte, symbol in SYMBOL.items()}
ALPHABET = [*SYMBOL.values(), *(symbol + WORD_END for symbol in SYMBOL.values())]  # the tokens before any merge


def clean(text: str, repair: bool = False) -> str:
    """Normalise a text: composed accents (Unicode NFC), single spaces, lower case. "A  RED Square" -> "a red square".

    With `repair`, first fix common defects of web text: wrong encodings ("cafÃ©"), curly quotes, "&amp;".
    """
    if repair:
        text = html.unescape(html.unescape(ftfy.fix_text(text)))  # twice, because "&amp;amp;" is common
    text = regex.sub(r"\s+", " ", unicodedata.normalize("NFC", text)).strip(" ")
    return "".join(c.lower() for c in text)  # by character: lower() of a whole word turns a final Greek Σ into ς, not σ


def split(text: str, special: Iterable[str] = (START, END), repair: bool = False) -> list[str]:
    """Clean a text and cut it into pieces: "I'm 42" -> ["i", "'m", "4", "2"]. Special tokens are kept as they are."""
    if not isinstance(text, str):
        raise TypeError(f"a caption must be a str, not {text!r}")
    pieces = []
    for part in regex.split("(" + "|".join(map(regex.escape, special)) + ")", text):  # the () keep the separators
        pieces += [part] if part in special else PIECE.findall(clean(part, repair))
    return pieces


def byte_symbols(piece: str) -> list[str]:
    """The symbols of a piece before any merge, one per UTF-8 byte: "café" -> ["c", "a", "f", "Ã", "©</w>"]."""
    symbols = [SYMBOL[byte] for byte in piece.encode("utf-8", errors="replace")]
    symbols[-1] += WORD_END
    return symbols


def merge(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    """Join every occurrence of the pair into one symbol, from left to right. Returns a new list.

    >>> merge(["a", "a", "a", "b", "a", "a"], ("a", "a"))
    ['aa', 'a', 'b', 'aa']
    """
    merged, i = [], 0
    while i < len(symbols):
        if tuple(symbols[i:i + 2]) == pair:
            merged.append(symbols[i] + symbols[i + 1])
            i += 2
        else:
            merged.append(symbols[i])
            i += 1
    return merged


class Tokenizer:
    """Encodes captions. `tokenizer(["a cat", "a dog"])` returns ids and mask, both of shape (2, length).

    vocab      token -> id
    merges     pairs of symbols, in the order in which they were learned
    length     tokens per caption, with START, END and padding; 77 in CLIP
    pad_token  fills the row after END: END itself in CLIP ViT-H/14, "!" in ViT-bigG/14
    repair     see `clean`. True in the code of the CLIP paper; False for the published Stages B and C
    seen       the pieces of the captions that it was trained on; None for a published tokenizer

    START, END and the pad token may also appear in a caption; each is encoded as its own id, as in `transformers`. So
    if "!" is the pad token, "wow!!" is encoded as "wow" and two pad ids.
    """

    def __init__(self, vocab: dict[str, int], merges: list[tuple[str, str]], length: int = 77, pad_token: str = END,
                 repair: bool = False, seen: set[str] | None = None):
        self.vocab, self.length, self.pad_token, self.repair, self.seen = vocab, length, pad_token, repair, seen
        self.tokens = {i: token for token, i in vocab.items()}
        self.ranks = {pair: rank for rank, pair in enumerate(merges)}
        self.special = (START, END, pad_token)
        self.start_id, self.end_id, self.pad_id = (vocab[token] for token in self.special)
        self.cache = {token: [vocab[token]] for token in self.special}  # piece -> ids, because many pieces recur

    @classmethod
    def train(cls, captions: Iterable[str], merges: int = 400, length: int = 77) -> "Tokenizer":
        """Learn merges: again and again, merge the pair of neighbours that is most frequent in the captions.

        Pairs are counted inside the pieces that `split` gives with repair=True, except START and END. "aaab" holds
        (a, a) twice. If two pairs are equally frequent, the one that sorts first wins, so the order of the captions
        does not matter. Training stops after `merges` merges, or when no pair occurs more than once. The vocabulary is
        ALPHABET, then the merged symbols in the order in which they were learned, then START and END, each token once.
        The tokenizer has repair=True, and its `seen` holds the pieces. Raises TypeError if `captions` is a single str.

        >>> list(Tokenizer.train(["low low lot", "lot low"]).ranks)
        [('l', 'o'), ('lo', 'w</w>'), ('lo', 't</w>')]
        """
        if isinstance(captions, str):
            raise TypeError("train() needs a list of captions, not one str")
        pieces = Counter(piece for caption in captions for piece in split(caption, repair=True))
        words = [(byte_symbols(piece), n) for piece, n in pieces.items() if piece not in (START, END)]
        counts = Counter()  # pair -> how often it occurs
        for symbols, n in words:
            for pair in zip(symbols, symbols[1:]):
                counts[pair] += n

        learned = []
        while counts and len(learned) < merges:
            best = min(counts, key=lambda pair: (-counts[pair], pair))
            if counts[best] < 2:
                break
            learned.append(best)
            for w, (symbols, n) in enumerate(words):
                if best[0] in symbols and best[1] in symbols:  # only these can change, and counting all again is slow
                    merged = merge(symbols, best)
                    words[w] = merged, n
                    for pair in zip(symbols, symbols[1:]):
                        counts[pair] -= n
                    for pair in zip(merged, merged[1:]):
                        counts[pair] += n

        tokens = dict.fromkeys([*ALPHABET, *(left + right for left, right in learned), START, END])  # no token twice
        return cls({token: i for i, token in enumerate(tokens)}, learned, length, repair=True, seen=set(pieces))

    @classmethod
    def load(cls, folder: str | Path) -> "Tokenizer":
        """Read the files that `save` wrote, or the tokenizer folder of a published model."""
        folder = Path(folder)
        lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
        merges = [tuple(line.split()) for line in lines if line and not line.startswith("#version")]
        optional = [folder / "tokenizer_config.json", folder / "special_tokens_map.json"]
        config, special = [read_json(path) if path.exists() else {} for path in optional]
        pad_token = config.get("pad_token") or special.get("pad_token") or END
        pad_token = pad_token["content"] if isinstance(pad_token, dict) else pad_token
        length = config.get("model_max_length") or 77
        length = 77 if length > 1_000_000 else length  # some published files hold 10^30, which means "not set"
        seen = set(read_text(path).split()) if (path := folder / "seen.txt").exists() else None
        return cls(read_json(folder / "vocab.json"), merges, length, pad_token, config.get("repair", False), seen)

    def save(self, folder: str | Path) -> None:
        """Write vocab.json, merges.txt and tokenizer_config.json, which `transformers`' CLIPTokenizer can also read.
        Write seen.txt too, unless `seen` is None."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": self.length, "pad_token": self.pad_token,
                  "repair": self.repair}
        merges = ["#version: 0.2", *(f"{left} {right}" for left, right in self.ranks)]
        (folder / "vocab.json").write_text(json.dumps(self.vocab, ensure_ascii=False), encoding="utf-8")
        (folder / "merges.txt").write_text("\n".join(merges) + "\n", encoding="utf-8")
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
        if self.seen is not None:
            (folder / "seen.txt").write_text("\n".join(sorted(self.seen)) + "\n", encoding="utf-8")

    def __len__(self) -> int:
        return len(self.vocab)

    def encode_piece(self, piece: str) -> list[int]:
        """The ids of one piece: of all merges that are possible, apply the one learned first; repeat until none is.

        >>> tokenizer = Tokenizer.train(["low low lot", "lot low"])
        >>> [tokenizer.tokens[i] for i in tokenizer.encode_piece("slot")]
        ['s', 'lot</w>']
        """
        symbols = byte_symbols(piece)
        while known := [pair for pair in zip(symbols, symbols[1:]) if pair in self.ranks]:
            symbols = merge(symbols, min(known, key=self.ranks.get))
        return [self.vocab[symbol] for symbol in symbols]

    def encode(self, text: str) -> list[int]:
        """The ids of a text of any length, without START, END and padding."""
        pieces = split(text, self.special, self.repair)
        self.cache |= {piece: self.encode_piece(piece) for piece in pieces if piece not in self.cache}
        return [i for piece in pieces for i in self.cache[piece]]

    def decode(self, ids: Iterable[int]) -> str:
        """Ids (a list or a 1-D tensor) -> text, without START, END and the padding after END.

        The ids do not show where the text had spaces, so a space is put between all pieces: "It's red!" comes back as
        "it 's red !".
        """
        ids = [int(i) for i in ids]
        end = ids.index(self.end_id) if self.end_id in ids else len(ids)
        ids = ids[:end] + [i for i in ids[end:] if i != self.pad_id]  # before END, the pad token "!" is text
        text = "".join(self.tokens[i] for i in ids if i not in (self.start_id, self.end_id))
        return bytes(BYTE[c] for c in text).decode("utf-8", errors="replace").replace(WORD_END, " ").strip(" ")

    def __call__(self, texts: str | list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """One text or a list of B texts -> ids and mask, (B, length). The mask is False for padding.

        A row of ids is START, text, END, padding. If a text is too long, its last tokens are dropped (END is kept); see
        `overflow`.
        """
        texts = [texts] if isinstance(texts, str) else texts
        ids = torch.full((len(texts), self.length), self.pad_id)
        mask = torch.zeros(len(texts), self.length, dtype=torch.bool)
        for row, text in enumerate(texts):
            tokens = [self.start_id, *self.encode(text)[:self.length - 2], self.end_id]
            ids[row, :len(tokens)] = torch.tensor(tokens)
            mask[row, :len(tokens)] = True
        return ids, mask

    def overflow(self, text: str) -> str:
        """The part at the end of the text that does not fit into `length` tokens; "" if all of it fits."""
        return self.decode(self.encode(text)[self.length - 2:])

    def unseen(self, text: str) -> list[str]:
        """The pieces of the text that were in no training caption; [] if those captions are not known."""
        return [] if self.seen is None else [piece for piece in split(text, self.special, self.repair)
                                             if piece not in self.seen]


class UserError(ValueError):
    """An error that the user can fix. The scripts print it as one line, without a traceback."""


def read_text(path: str | Path) -> str:
    """The text in a file: UTF-8, UTF-16 (if it has no byte order mark, mostly ASCII), or else Windows-1252."""
    data = Path(path).read_bytes()
    encoding = "utf-16" if data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"
    if encoding != "utf-16" and data.count(0) > len(data) / 20:  # zeros are halves of ASCII characters in UTF-16
        encoding = "utf-16-be" if data[::2].count(0) > data[1::2].count(0) else "utf-16-le"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError:
        return data.decode("cp1252", errors="replace")


def read_json(path: str | Path) -> dict | list:
    """What a JSON file holds. Raises UserError, with the name of the file, if it is not JSON."""
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from None
