"""The tokenizer of CLIP (Radford et al. 2021): text in, a row of 77 whole numbers out.

It is a byte-level byte-pair encoding (BPE, Sennrich et al. 2016; on bytes: Radford et al. 2019, "GPT-2"):

    "A Café!"  --clean-->  "a café!"  --split-->  a | café | !  --bytes, merges-->  a</w> | cafÃ©</w> | !</w>

Text is lower-cased and cut into pieces; a piece becomes the bytes of its UTF-8, each byte a symbol; the last symbol is
marked with "</w>", the end of a word. Then the list of merges, learned from many captions, glues neighbours together,
earlier merges first. Whatever the script, nothing is ever unknown: the 256 bytes are all in the vocabulary.
"""
import html
import json
import unicodedata
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

import ftfy
import regex
import torch

START, END, WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"

# Contractions, runs of letters, single digits, runs of anything else. White space only separates, and is dropped.
PIECE = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+")
SPECIAL = regex.compile("|".join(map(regex.escape, [START, END])))

# Files hold one printable character per byte. As in GPT-2, bytes that print in Latin-1 stand for themselves, and the
# others (white space, control codes, the soft hyphen) take the characters from U+0100 on, in order.
PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
HIDDEN = [b for b in range(256) if b not in PRINTABLE]
SYMBOL = {b: chr(b) for b in PRINTABLE} | {b: chr(0x100 + i) for i, b in enumerate(HIDDEN)}
BYTE = {symbol: b for b, symbol in SYMBOL.items()}
ALPHABET = [*SYMBOL.values(), *(symbol + WORD_END for symbol in SYMBOL.values())]  # the first 512 ids

# The spaces that decode() puts between pieces and then takes away again.
GLUE = regex.compile(r"""
    [ ](?=[\p{Terminal_Punctuation}\p{Pe}\p{Pf}…%'])      # before . , ! ? ; : and closing brackets; before 's, 't, ...
  | (?<=[\p{Ps}\p{Pi}¿¡])[ ]                              # after opening brackets and quotes
  | (?<=[\#@\p{Sc}])[ ](?=[\p{L}\p{N}])                   # #1, @home, $5
  | (?<=[\p{L}\p{N}])[ ](?=[-/_][ ][\p{L}\p{N}])          # black-and-white, 1/2: before the sign ...
  | (?<=[\p{L}\p{N}][ ][-/_])[ ](?=[\p{L}\p{N}])          # ... and after it
  | (?<=\p{L}[ ]['’])(?<!s[ ]['’])[ ](?=\p{L})            # o'clock, but the dogs' tails
  | (?<=\p{N})[ ](?=\p{N}|(?:st|nd|rd|th|s|d|k)\b)        # 2024, 1st, 1990s, 3d, 4k
  | (?<=\p{N}[ ][.:])[ ](?=\p{N})                         # 3.5, 10:30
  | (?<=\p{N}[ ],)[ ](?=\p{N}[ ]\p{N}[ ]\p{N}(?![ ]\p{N}))  # 1,000
    # Marks (vowel signs, accents) and joiners aren't letters to PIECE, but stand inside words: hold on to both sides.
    # U+FE0E and U+FE0F are marks too, but end an emoji.
  | [ ](?=[\p{M}\u200c\u200d])
  | (?<=[\p{Mn}\p{Mc}\u200c\u200d])(?<![\uFE0E\uFE0F])[ ](?=\p{L})
    # Chinese and Japanese have no spaces, around their own punctuation neither; Korean has, but not after digits.
  | [ ](?=[\u3001-\u303F\uFF01-\uFF20]) | (?<=[\u3001-\u303F\uFF01-\uFF20])[ ]
  | (?<=\p{N})[ ](?=[\p{Han}\p{Hiragana}\p{Katakana}\p{Hangul}]) | (?<=[\p{Han}\p{Hiragana}\p{Katakana}])[ ](?=\p{N})
""", regex.VERBOSE)
QUOTED = regex.compile(r'" ([^"]*?) ?"')  # straight quotes: the first of a pair opens, the second closes


def clean(text: str, repair: bool = False) -> str:
    """Text as the tokenizer reads it: composed accents (Unicode NFC), single spaces, lower case.

    With `repair`, broken encodings ("cafÃ©"), curly quotes (both by ftfy) and HTML's "&amp;" are mended first.
    """
    if repair:
        text = html.unescape(html.unescape(ftfy.fix_text(text)))  # twice: pages hold "&amp;amp;"
    text = regex.sub(r"\s+", " ", unicodedata.normalize("NFC", text)).strip(" ")
    return "".join(c.lower() for c in text)  # one at a time: a whole string's lower() treats a last Greek sigma apart


def split(text: str, special: regex.Pattern, repair: bool) -> list[str]:
    """The cleaned text's pieces. Special tokens, as they stand before cleaning, are pieces of their own.

    Raises TypeError if text isn't a str.
    """
    if not isinstance(text, str):
        raise TypeError(f"a caption must be a str, not {type(text).__name__}: {text!r}")
    pieces, start = [], 0
    for found in special.finditer(text):
        pieces += [*PIECE.findall(clean(text[start:found.start()], repair)), found.group()]
        start = found.end()
    return pieces + PIECE.findall(clean(text[start:], repair))


def split_bytes(piece: str) -> list[str]:
    """The symbols of a piece before any merge, one a byte, the last with "</w>"."""
    symbols = [SYMBOL[b] for b in piece.encode("utf-8", "replace")]  # "replace": half a surrogate pair becomes "?"
    return [*symbols[:-1], symbols[-1] + WORD_END]


def merge(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    """Glue every occurrence of the pair together, from the left: (a, b) makes [a, b, b, a, b] into [ab, b, ab]."""
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
    """Byte-level BPE as CLIP's: `tokenizer(["a cat", "a dog"])` gives ids and mask, both (2, length).

    vocab: token -> id. Ids may lie in any order; CLIP's has 49,408: 256 byte symbols, the same with "</w>", 48,894
    merges, START, END. merges: pairs of tokens, the first to be glued first. length: START, END and padding included;
    77 in CLIP. pad_token: what fills a row after END; END itself for CLIP ViT-H/14, "!" for ViT-bigG/14.

    repair: whether to mend text before reading it, see clean(). The CLIP paper's code did. The tokenizer that came
    with the published Stages B and C (the `transformers` package's) doesn't, so a loaded snapshot doesn't either,
    and gives the same ids as there; a tokenizer trained here does. Set `tokenizer.repair` to change it.

    Special tokens (START, END, the pad token) written out in a caption, exactly so, become their single ids, as in
    `transformers`. With "!" as the pad token this means every exclamation mark: "wow!!" has the id 0 twice.

    Raises ValueError for a vocabulary that can't work: a token that's missing, ids that aren't distinct whole numbers.
    """

    def __init__(self, vocab: dict[str, int], merges: list[tuple[str, str]], length: int = 77, pad_token: str = END,
                 repair: bool = False):
        for token in [START, END, pad_token, *ALPHABET]:
            if token not in vocab:
                raise ValueError(f"the vocabulary lacks {token!r}")
        for left, right in merges:
            if left + right not in vocab:
                raise ValueError(f"the vocabulary lacks {left + right!r}, which the merge {left!r} {right!r} makes")
        self.tokens = {i: token for token, i in vocab.items() if type(i) is int and i >= 0}
        if len(self.tokens) != len(vocab):
            raise ValueError("the vocabulary's ids must be distinct whole numbers, 0 or more")
        if length < 2:
            raise ValueError(f"a length of {length} has no room for the start and end tokens")
        self.vocab, self.length, self.pad_token, self.repair = vocab, length, pad_token, repair
        self.ranks = {tuple(pair): rank for rank, pair in enumerate(merges)}
        self.start_id, self.end_id, self.pad_id = vocab[START], vocab[END], vocab[pad_token]
        self.special = regex.compile("|".join(map(regex.escape, [START, END, pad_token])))
        self.cache = {token: [vocab[token]] for token in [START, END, pad_token]}  # piece -> ids; words come back often

    @classmethod
    def train(cls, captions: Iterable[str], merges: int = 400, length: int = 77) -> "Tokenizer":
        """Learn merges from captions: again and again, the most frequent pair of neighbours becomes a token.

        Pairs are counted inside pieces only. Ties go to the pair that sorts first, so the same captions, in any order,
        give the same tokenizer. Stops early when no pair occurs twice. The vocabulary has at most 512 + merges + 2 tokens.
        """
        if isinstance(captions, str):
            raise TypeError("train() takes several captions, not a single str")
        counts = Counter(piece for caption in captions for piece in split(caption, SPECIAL, repair=True))
        counts = {piece: n for piece, n in counts.items() if piece not in (START, END)}
        words = [split_bytes(piece) for piece in counts]
        weights = list(counts.values())
        pairs, where = Counter(), defaultdict(set)  # pair -> how often; pair -> the words that hold it (or once did)
        for w, word in enumerate(words):
            for pair in zip(word, word[1:]):
                pairs[pair] += weights[w]
                where[pair].add(w)

        learned = []
        while pairs and len(learned) < merges:
            best = min(pairs, key=lambda pair: (-pairs[pair], pair))
            if pairs[best] < 2:
                break
            learned.append(best)
            for w in where.pop(best):  # only these words change
                for pair in zip(words[w], words[w][1:]):
                    pairs[pair] -= weights[w]
                words[w] = merge(words[w], best)
                for pair in zip(words[w], words[w][1:]):
                    pairs[pair] += weights[w]
                    where[pair].add(w)
            del pairs[best]

        tokens = dict.fromkeys([*ALPHABET, *(left + right for left, right in learned), START, END])  # no token twice
        return cls({token: i for i, token in enumerate(tokens)}, learned, length, repair=True)

    @classmethod
    def load(cls, folder) -> "Tokenizer":
        """Read vocab.json and merges.txt, of save() or of a published snapshot's tokenizer folder.

        The pad token and the length come from tokenizer_config.json (else special_tokens_map.json), if they are there;
        else END and 77. Raises FileNotFoundError, or ValueError naming the file and what is wrong with it.
        """
        folder = Path(folder)
        vocab, merges_file = read_json(folder / "vocab.json"), folder / "merges.txt"
        try:
            lines = merges_file.read_text(encoding="utf-8").rstrip("\n").split("\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"{merges_file} isn't UTF-8 text: {error}") from None
        merges = []
        for number, line in enumerate(lines, start=1):
            if number == 1 and (line.startswith("#version") or not line):
                continue
            pair = tuple(line.split(" "))
            if len(pair) != 2 or not all(pair):
                raise ValueError(f"{merges_file}, line {number}: {line!r} isn't two tokens and a space between them")
            merges.append(pair)

        optional = [folder / "tokenizer_config.json", folder / "special_tokens_map.json"]
        config, special = [read_json(file) if file.exists() else {} for file in optional]
        pad_token = config.get("pad_token") or special.get("pad_token") or END
        if isinstance(pad_token, dict):
            pad_token = pad_token.get("content")
        length = config.get("model_max_length") or 77
        if length > 1_000_000:  # some snapshots hold 10^30 here, for "not known"
            length = 77
        try:
            return cls(vocab, merges, length, pad_token, repair=config.get("repair", False))
        except ValueError as error:
            raise ValueError(f"{folder / 'vocab.json'} with {merges_file.name}: {error}") from None

    def save(self, folder) -> None:
        """Write vocab.json, merges.txt and tokenizer_config.json, as `transformers`' CLIPTokenizer reads them too."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": self.length, "pad_token": self.pad_token,
                  "repair": self.repair}
        merges = ["#version: 0.2", *(f"{left} {right}" for left, right in self.ranks)]
        (folder / "vocab.json").write_text(json.dumps(self.vocab, ensure_ascii=False), encoding="utf-8")
        (folder / "merges.txt").write_text("\n".join(merges) + "\n", encoding="utf-8")
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")

    def __len__(self) -> int:
        """The size of the vocabulary."""
        return len(self.vocab)

    def encode(self, text: str) -> list[int]:
        """The ids of the text alone: no start, end or padding, however long. Raises TypeError if it isn't a str."""
        return [i for piece in split(text, self.special, self.repair) for i in self.encode_piece(piece)]

    def encode_piece(self, piece: str) -> list[int]:
        """BPE proper: as long as some neighbours are a known merge, glue the earliest-learned one."""
        if piece not in self.cache:
            symbols = split_bytes(piece)
            while known := [pair for pair in zip(symbols, symbols[1:]) if pair in self.ranks]:
                symbols = merge(symbols, min(known, key=self.ranks.get))
            self.cache[piece] = [self.vocab[symbol] for symbol in symbols]
        return self.cache[piece]

    def decode(self, ids) -> str:
        """Text from ids (a list or a tensor of one axis), without start, end and padding.

        Gives an ordinary caption back as clean() left it: "it's 2024, isn't it?". Bytes that aren't UTF-8 become U+FFFD.
        Encoding forgets where white space was, so this is a guess: one space between pieces, but none around what
        usually stands close (GLUE). Not recovered: "1 2" (12), "16mm" (16 mm), "a - b" (a-b), "cat :)" (cat:)),
        'single-quoted' words, "www.site.org" (www. site. org), emoji written against a word or split by spaces into
        joined ones; in scripts with vowel signs (Hindi, Thai) no word is split, but words that end in such a sign run
        together. Raises ValueError for an id that isn't in the vocabulary.
        """
        ids = [int(i) for i in ids]
        last = max((n for n, i in enumerate(ids) if i != self.pad_id), default=-1)
        if last >= 0 and ids[last] == self.end_id:  # pad ids are padding only after an end token: "!" may be text too
            ids = ids[:last]
        pieces = [b""]
        for i in ids:
            if i not in self.tokens:
                raise ValueError(f"no token has the id {i}")
            if i in (self.start_id, self.end_id):
                continue
            token = self.tokens[i]
            pieces[-1] += bytes(BYTE[symbol] for symbol in token.removesuffix(WORD_END))
            if token.endswith(WORD_END) or i == self.pad_id:  # before the end, the pad token is text
                pieces.append(b"")
        text = " ".join(piece.decode("utf-8", "replace") for piece in pieces if piece)
        return QUOTED.sub(r'"\1"', GLUE.sub("", text))

    def __call__(self, texts: str | list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """One text or B -> ids, int64 (B, length): START, ids, END, then padding; and mask, bool (B, length): False for padding.

        A text that's too long is cut, END kept, with a warning that names what was left out.
        """
        texts = [texts] if isinstance(texts, str) else texts
        batch = torch.full((len(texts), self.length), self.pad_id)
        mask = torch.zeros(len(texts), self.length, dtype=torch.bool)
        room = self.length - 2
        for row, text_mask, text in zip(batch, mask, texts):
            ids = self.encode(text)
            if len(ids) > room:
                warnings.warn(f'caption cut at {self.length} tokens; left out: "{self.decode(ids[room:])}"', stacklevel=2)
            ids = [self.start_id, *ids[:room], self.end_id]
            row[:len(ids)] = torch.tensor(ids)
            text_mask[:len(ids)] = True
        return batch, mask


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not UTF-8, or not JSON
        raise ValueError(f"{path} isn't JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} should hold an object, {{...}}, not a {type(content).__name__}")
    return content
