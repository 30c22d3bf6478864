"""
A lab: exercises in which you write the core of Würstchen yourself, and tests that grade them.

    python tests/lab.py                          lists the exercises and seven experiments with the trained model
    python tests/lab.py start 3 8 10 --to DIR    copies the project to DIR, without these exercises' code (or "all")
    python tests/lab.py check [3 8]              in the copy: says what is right, what is wrong, and often why
    python tests/lab.py solution 3               prints the reference solution
    python tests/lab.py finale                   in the copy: trains Stage C with your noise, loss and sampler

Each exercise is one to three functions whose code below the docstring was cut out. `check` runs yours on test inputs
(the exercise's probe) and compares the results with the reference's. If they match those of a known wrong answer, it
prints the hint for that answer. Each exercise is graded on its own: all others use the reference's functions. If the
functions are needed to generate images, `check` also writes lab_N.png: images made with yours, above the reference's.

The grading code comes first in this file, then the exercises. To add one, write a probe under an `@exercise` that names
the functions, at least six wrong answers and three other right ones. The test suite checks that empty functions fail,
that the reference passes, that every wrong answer fails with its own hint, and that the other right answers pass."""

import argparse
import ast
import functools
import inspect
import itertools
import shutil
import sys
import textwrap
import threading
import time
import traceback
import types
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent.parent
# A working copy keeps the original files in tests/reference; the project itself is its own reference.
REFERENCE = HERE / "tests" / "reference" if (HERE / "tests" / "reference").exists() else HERE
FILES = ("tokenizer/__init__.py", "wuerstchen.py", "train.py", "sample.py")
SECONDS = 60  # time limit for grading one exercise
CAPTIONS = ["a big red circle to the left of a small blue square", "a yellow star", "a pink triangle"]
sys.path[:0] = [str(REFERENCE), str(HERE / "tests")]

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

import sample  # noqa: E402
import wuerstchen  # noqa: E402


@dataclass
class Exercise:
    title: str
    file: str            # the file with its functions
    names: tuple         # its functions, "Class.method" for methods
    section: str         # of the paper; "CLIP": see the CLIP paper
    learned: str         # in a few words
    minutes: int
    wrong: dict          # hint: the edit of the reference, (old, new, old, new, ...), that gives the wrong answer
    same: tuple          # edits that give other right answers
    generates: bool = False  # whether `check` also generates images with it
    tolerance: float = 1e-4
    probe: callable = None  # module -> {what: value}, values that tell right from wrong answers


EXERCISES = []


def exercise(*columns, **more):
    """A decorator: makes the probe the next exercise."""
    return lambda probe: EXERCISES.append(Exercise(*columns, **more, probe=probe)) or probe


# ----------------------------------------------------------------------------------------------------------------------
# Reading and cutting code.


@functools.cache
def find(source, name):
    """The syntax-tree node of a function "f" or a method "Class.f". KeyError if there is none."""
    node = ast.parse(source)
    for part in name.split("."):
        node = {getattr(inner, "name", None): inner for inner in node.body}[part]
    return node


def body_of(source, name):
    """The numbers of the lines (first, last) below a function's docstring, counted from 1."""
    node = find(source, name)
    return node.body[0].end_lineno + 1, node.end_lineno


def count_lines(source, *names):
    """-> "3 lines": how many lines of code the functions have below their docstrings"""
    spans = [body_of(source, name) for name in names]
    lines = [line.strip() for first, last in spans for line in source.splitlines()[first - 1:last]]
    count = sum(bool(line) and not line.startswith("#") for line in lines)
    return f"{count} line{'s' * (count > 1)}"


def cut(source, number):
    """A file's text without the code of an exercise."""
    task = EXERCISES[number - 1]
    for name in task.names:
        first, last = body_of(source, name)
        expected = (f"exercise {number}: write {name} as the docstrings say; the reference has "
                    f"{count_lines(source, name)}")
        lines = source.splitlines(keepends=True)
        indent = " " * find(source, name).body[0].col_offset
        lines[first - 1:last] = [f'{indent}raise NotImplementedError("{expected}")\n']
        source = "".join(lines)
    return source


def edited(task, edit):
    """The reference file's text with the exercise's functions edited. ValueError unless each old part occurs once."""
    source = (REFERENCE / task.file).read_text("utf-8")
    for old, new in zip(edit[::2], edit[1::2]):
        spans = [body_of(source, name) for name in task.names]
        bodies = ["".join(source.splitlines(keepends=True)[first - 1:last]) for first, last in spans]
        if sum(body.count(old) for body in bodies) != 1:
            raise ValueError(f"{task.title}: {old!r} must occur exactly once in {', '.join(task.names)}")
        body = next(body for body in bodies if old in body)
        source = source.replace(body, body.replace(old, new))
    return source


# ----------------------------------------------------------------------------------------------------------------------
# Grading.


def module_of(task, source, path):
    """Runs the text of an exercise's file as a module of its own; what it imports is the reference's."""
    module = types.ModuleType(Path(path).stem)
    exec(compile(source, path, "exec"), vars(module))
    return module


def students(task):
    """The working copy's module, but with the reference's functions for all other exercises, so that each is graded on
    its own."""
    module = module_of(task, (HERE / task.file).read_text("utf-8"), str(HERE / task.file))
    reference = module_of(task, (REFERENCE / task.file).read_text("utf-8"), task.file)
    for name in (name for other in EXERCISES if other is not task and other.file == task.file for name in other.names):
        *owner, name = name.split(".")
        place, found = (getattr(where, owner[0]) if owner else where for where in (module, reference))
        found = vars(found)[name]
        solved = inspect.unwrap(getattr(found, "__func__", found))
        solved = types.FunctionType(solved.__code__, vars(module), name, solved.__defaults__)
        setattr(place, name, classmethod(solved) if isinstance(found, classmethod) else solved)
    return module


def measure(task, module):
    torch.manual_seed(0)
    return task.probe(module)


@functools.cache
def known_answer(number, hint=None):
    """What the probe of an exercise measures for a wrong answer, or for the reference."""
    task = EXERCISES[number - 1]
    return measure(task, module_of(task, edited(task, task.wrong[hint] if hint else ()), task.file))


def close(task, value, expected):
    """Whether two results of a probe are equal; tensors may differ by rounding."""
    if not (torch.is_tensor(value) and torch.is_tensor(expected)):
        return type(value) is type(expected) and value == expected
    size = 1 + expected.double().nan_to_num(0, 0, 0).abs().max().item()
    return value.shape == expected.shape and value.is_floating_point() == expected.is_floating_point() and (
        torch.allclose(value.double(), expected.double(), rtol=0, atol=task.tolerance * size, equal_nan=True))


def judge(number, found):
    """found: what the probe measured -> (what is wrong, hints), two lists of lines; both are empty if all is right"""
    task, expected = EXERCISES[number - 1], known_answer(number)
    wrong, known, hints = [], [], []
    for what, value in expected.items():
        if not close(task, found.get(what), value):
            kinds = [tuple(x.shape) if torch.is_tensor(x) else type(x).__name__ for x in (found.get(what), value)]
            wrong.append(what + (f": {kinds[0]}, should be {kinds[1]}" if kinds[0] != kinds[1] else ""))
    for hint in task.wrong if wrong else ():
        values = known_answer(number, hint)
        differs = [what for what in expected if not close(task, values.get(what), expected[what])]
        if all(close(task, found.get(what), values.get(what)) for what in differs):
            known.append((hint, {*differs}))
    explained = set()
    for hint, differs in sorted(known, key=lambda answer: -len(answer[1])):  # those that explain most come first
        if differs - explained:
            hints.append(hint)
            explained |= differs
    return wrong, hints


def grade(number):
    """Grades an exercise of the working copy, prints the result, and may generate images. -> whether it is right"""
    task = EXERCISES[number - 1]
    title = f"{number:3}  {{}}  {task.title}"
    try:
        module = students(task)
        found = measure(task, module)
    except Exception as error:
        if str(error).startswith(f"exercise {number}:"):
            print(f"{title.format('empty')}\n       {error}")
            return False
        print(title.format("WRONG"))
        own = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(HERE / task.file)]
        print(textwrap.indent("".join(traceback.format_list(own) + traceback.format_exception_only(error)), " " * 7))
        return False
    wrong, hints = judge(number, found)
    print(title.format("WRONG" if wrong else "right"))
    for line in [f"differs: {what}" for what in wrong] + [f"hint: {hint}" for hint in hints]:
        print(textwrap.fill(line, 100, initial_indent=" " * 7, subsequent_indent=" " * 9))
    if task.generates:
        try:
            rows = [generate_with(module), generate_with(wuerstchen)]
            sample.make_sheet(rows, CAPTIONS).save(f"lab_{number}.png")
            print(f"       lab_{number}.png: your images, above the reference's")
        except Exception as error:
            print(f"       your code can't generate images: {error!r}")
    return not wrong


@functools.cache
@torch.no_grad()
def generate_with(module):
    """What the trained model generates with a module, the tokenizer's or wuerstchen.py's -> (3, H, W, 3) in [0, 1]"""
    model = getattr(module, "Wuerstchen", wuerstchen.Wuerstchen).load(HERE / "tests" / "shapes")
    if not hasattr(module, "Wuerstchen"):
        model.tokenizer = model.tokenizer_b = module.Tokenizer.load(HERE / "tests" / "shapes" / "tokenizer")
    return model.generate(CAPTIONS, steps=(20, 8), guidance=(2.0, 1.0), seed=[0, 1, 2])


# ----------------------------------------------------------------------------------------------------------------------
# The exercises, in reading order.


noise = torch.randn


def randomised(module):
    """The module with random parameters: the zeros that training starts from would hide half of a network."""
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return module.eval()


def small_config(m):
    """Sizes of small networks."""
    config, text = m.Config(semantic_channels=4, time_width=8), m.TextConfig(40, 8, 12, 1, 2, 16)
    config.text_b, config.text_c, config.c = text, text, m.StageCConfig(12, 1, 2, 0.0)
    config.compressor = m.CompressorConfig(4, (("fused", 1, 2, 4, 1),), 6)
    return config


@exercise(
    "Byte-pair encoding: merge, and encode a word", "tokenizer/__init__.py", ("merge", "Tokenizer.encode_piece"),
    "CLIP", "how text becomes tokens", 15,
    wrong={
        "in one pass, a symbol is merged only once: go on after the pair":
            ("i += 2", "i += 1"),
        "all occurrences are merged, not only the first":
            ("i += 2", "return merged + symbols[i + 2:]"),
        "a pair has an order: (a, b) is not (b, a)":
            ("tuple(symbols[i:i + 2]) == pair", "sorted(symbols[i:i + 2]) == sorted(pair)"),
        "yours loses the last symbol when it is not part of a pair":
            ("while i < len(symbols):", "while i < len(symbols) - 1:"),
        "of the pairs in the word, take the one that was learned first, not the leftmost":
            ("min(known, key=self.ranks.get)", "known[0]"),
        "rank 0 was learned first: take the smallest rank, not the largest":
            ("min(known, key=self.ranks.get)", "max(known, key=self.ranks.get)"),
        "merge again and again, until no neighbours can be merged":
            ("while known :=", "if known :="),
        "take the pair that was learned first, not the one with the most letters":
            ("min(known, key=self.ranks.get)", "max(known, key=lambda pair: len(pair[0] + pair[1]))"),
    },
    same=(
        ("min(known, key=self.ranks.get)", "sorted(known, key=lambda pair: self.ranks[pair])[0]"),
        ("tuple(symbols[i:i + 2]) == pair", "i + 1 < len(symbols) and (symbols[i], symbols[i + 1]) == pair"),
        ("while known := [pair for pair in zip(symbols, symbols[1:]) if pair in self.ranks]:\n"
         "            symbols = merge(symbols, min(known, key=self.ranks.get))",
         "for pair in self.ranks:\n            symbols = merge(symbols, pair)"),
    ), generates=True)
def byte_pairs(m):
    learned = [("e", "r</w>"), ("l", "o"), ("lo", "w</w>"), ("o", "w"), ("n", "e"), ("w", "er</w>"), ("lo", "w"),
               ("x", "y"), ("z", "x"), ("s", "t"), ("st", "u"), ("u", "v</w>")]
    tokens = [*m.ALPHABET, *(left + right for left, right in learned), m.START, m.END]
    tokenizer, given = m.Tokenizer({token: i for i, token in enumerate(tokens)}, learned), list("aaab")
    m.merge(given, ("a", "a"))
    return {f"merge({word}, {pair})": m.merge(list(word), tuple(pair))
            for word, pair in (("aaabaa", "aa"), ("abbaab", "ab"), ("abcab", "xy"), ("aaaa", "aa"))} | {
        f"encode_piece({word})": [tokenizer.tokens[i] for i in tokenizer.encode_piece(word)]
        for word in ("low", "lower", "newer", "slowlow", "zxyq", "stuv", "a")} | {
            "the list given to merge, which must not change": given}


@exercise(
    "Byte-pair encoding: learn the merges", "tokenizer/__init__.py", ("Tokenizer.train",), "CLIP",
    "where a vocabulary comes from (counting all pairs again after each merge is fast enough)", 25,
    wrong={
        "count a word's pairs once for each time the word occurs in the captions":
            ("for symbols, n in words:\n            for", "for symbols, n in [(symbols, 1) for symbols, _ in words]:\n"
                                                           "            for"),
        "of equally frequent pairs, take the one that sorts first, not the one seen first":
            ("(-counts[pair], pair)", "-counts[pair]"),
        "of equally frequent pairs, take the one that sorts first, not last":
            ("min(counts, key=lambda pair: (-counts", "max(counts, key=lambda pair: (counts"),
        "a pair that occurs once is not worth a token":
            ("counts[best] < 2", "counts[best] < 1"),
        "after a merge, no longer count the pairs that it replaced":
            ("counts[pair] -= n", "pass"),
        "after a merge, also count the pairs of the new symbol and its neighbours":
            ("for pair in zip(merged, merged[1:]):\n                        counts[pair] += n", "pass"),
        "stop after `merges` merges: yours makes one more":
            ("len(learned) < merges", "len(learned) <= merges"),
        "the vocabulary begins with ALPHABET; START and END come last":
            ("[*ALPHABET, *(left + right for left, right in learned), START, END]",
             "[START, END, *ALPHABET, *(left + right for left, right in learned)]"),
        "START and END are whole tokens: no merges within them":
            (" if piece not in (START, END)]", "]"),
        "pairs are counted within pieces, never across them":
            ("split(caption, repair=True)", "[caption]"),
        "split with repair=True: \"&amp;\" becomes \"&\"":
            ("split(caption, repair=True)", "split(caption)"),
        "the tokenizer must also repair the text that it encodes: repair=True":
            ("learned, length, repair=True, seen", "learned, length, seen"),
        "the tokenizer must have the length that was asked for":
            ("learned, length, repair=True, seen", "learned, repair=True, seen"),
        "ids count up from 0":
            ("{token: i for i, token in enumerate(tokens)}", "{token: i for i, token in enumerate(tokens, 1)}"),
    },
    same=(
        ("min(counts, key=lambda pair: (-counts[pair], pair))",
         "sorted(sorted(counts), key=counts.get, reverse=True)[0]"),
        ("            for w, (symbols, n) in enumerate(words):\n"
         "                if best[0] in symbols and best[1] in symbols:"
         "  # only these can change, and counting all again is slow\n"
         "                    merged = merge(symbols, best)\n"
         "                    words[w] = merged, n\n"
         "                    for pair in zip(symbols, symbols[1:]):\n"
         "                        counts[pair] -= n\n"
         "                    for pair in zip(merged, merged[1:]):\n"
         "                        counts[pair] += n",
         "            words = [(merge(symbols, best), n) for symbols, n in words]\n"
         "            counts = Counter()\n"
         "            for symbols, n in words:\n"
         "                for pair in zip(symbols, symbols[1:]):\n"
         "                    counts[pair] += n"),
        ("if best[0] in symbols and best[1] in symbols:", "if best in zip(symbols, symbols[1:]):"),
    ))
def learning_merges(m):
    found = {}
    for name, captions, limit in (("words of different frequency", ["low low lot", "lot low"], 400),
                                  ("equally frequent pairs", ["cd cd ab ab", "ef ab cd ef"], 400),
                                  ("at most 3 merges", ["banana bandana banana"], 3),
                                  ("repeated symbols", ["aaaa aaaa aaa"], 400),
                                  ("START and END", [f"{m.START}tart{m.END} {m.START}tart{m.END}"], 400),
                                  ("sentences", ["A red star above a RED square", "a blue square, a blue star"], 400),
                                  ("text from the web", ["fish &amp; chips", "salt &amp; amp"], 400)):
        tokenizer = m.Tokenizer.train(captions, limit, length=12)
        found[f"merges: {name}"], found[f"vocabulary: {name}"] = list(tokenizer.ranks), list(tokenizer.vocab.items())
    found["length"], found["repair"] = tokenizer.length, tokenizer.repair
    try:
        m.Tokenizer.train("a red star")
        found["TypeError for one str instead of a list"] = "no error"
    except TypeError:
        found["TypeError for one str instead of a list"] = "TypeError"
    return found


@exercise(
    "Global response normalisation", "wuerstchen.py", ("GlobalResponseNorm.forward",), "E.2, E.3",
    "norms over space, not over channels", 5,
    wrong={
        "yours takes the norm over channels; GRN takes it over space, H and W": ("dim=(1, 2)", "dim=-1"),
        "each image has its own norms: don't sum over the batch": ("dim=(1, 2)", "dim=(0, 1, 2)"),
        "the norm is over H and W: yours is over H only": ("dim=(1, 2)", "dim=1"),
        "G is divided by its mean over channels, not by its sum": ("norm.mean(dim=-1", "norm.sum(dim=-1"),
        "G is the L2 norm: the root is missing": (".sqrt()", ""),
        "G is the L2 norm, not the sum of absolute values": ("(y * y).sum", "y.abs().sum", ".sqrt()", ""),
        "x itself is missing: out = gamma·(x·N) + beta + x": ("(1 + self.gamma * response)", "(self.gamma * response)"),
        "the division of G by its mean is missing": (" / (norm.mean(dim=-1, keepdim=True) + 1e-6)", ""),
        "gamma scales only x·N, not x": ("1 + self.gamma * response", "self.gamma * (1 + response)"),
        "beta is missing": (" + self.beta.to(x.dtype)", ""),
    },
    same=(
        ("((y * y).sum(dim=(1, 2), keepdim=True) + 1e-12).sqrt()", "x.norm(dim=(1, 2), keepdim=True)"),
        ("(y * y).sum(dim", "(y * y).mean(dim"),
        ("x * (1 + self.gamma * response).to(x.dtype) + self.beta.to(x.dtype)",
         "self.gamma * x * response + self.beta + x"),
    ), generates=True)
def grn(m):
    module, x = randomised(m.GlobalResponseNorm(3)), noise(2, 4, 5, 3) * torch.tensor([0.5, 1, 3])
    out = module(x.requires_grad_())
    return {"output": out.detach(), "gradient": torch.autograd.grad(out.square().sum(), x)[0]}


@exercise(
    "Time: its embedding, and TimestepBlock", "wuerstchen.py", ("time_embedding", "TimestepBlock.forward"), "E.2, E.3",
    "how a network is told the time", 10,
    wrong={
        "the frequencies end at 1/10,000: divide k by width/2 − 1, not by width/2": ("(half - 1)", "half"),
        "t is in [0, 1]: multiply it by 10,000 first": ("t[:, None] * 10000 *", "t[:, None] *"),
        "sines come first, then cosines": ("[angles.sin(), angles.cos()]", "[angles.cos(), angles.sin()]"),
        "all sines, then all cosines; yours alternate": ("torch.cat([angles.sin(), angles.cos()], dim=1)",
                                                        "torch.stack([angles.sin(), angles.cos()], 2).flatten(1)"),
        "frequencies fall from 1: the exponent is negative": ("-math.log", "math.log"),
        "x is multiplied by 1 + scale, not by scale: if scale and shift are 0, x is unchanged":
            ("x * (1 + scale) + shift", "x * scale + shift"),
        "scale comes first, then shift": ("scale, shift = self", "shift, scale = self"),
        "the first half of the channels is scale, the second shift; yours alternate":
            (".chunk(2, dim=-1)", ".unflatten(-1, (-1, 2)).unbind(-1)"),
        "shift is missing": ("x * (1 + scale) + shift", "x * (1 + scale)"),
    },
    same=(
        ("torch.exp(torch.arange(half, device=t.device) * (-math.log(10000) / (half - 1)))",
         "10000 ** (-torch.arange(half) / (half - 1))"),
        ("x * (1 + scale) + shift", "x + x * scale + shift"),
        ("torch.exp(torch.arange(half, device=t.device) * (-math.log(10000) / (half - 1)))",
         "torch.logspace(0, -4, half)"),
    ), generates=True)
def time_blocks(m):
    module, x = randomised(m.TimestepBlock(3, 8)), noise(2, 4, 5, 3)
    return {"time_embedding": m.time_embedding(torch.tensor([0.0, 0.001, 0.01, 0.02]), 8),
            "TimestepBlock": module(x, noise(2, 8)).detach()}


@exercise(
    "Attention, and what a text token may see", "wuerstchen.py", ("Attention.attend", "TextEncoder.forward"), "CLIP",
    "heads, the causal mask, padding", 20,
    wrong={
        "divide by √d, d being the width of a head": ("attn_mask=mask)", "attn_mask=mask, scale=1.0)"),
        "d is the width of one head, not of all": ("attn_mask=mask)",
                                                   "attn_mask=mask, scale=(self.heads * q.shape[-1]) ** -0.5)"),
        "a head is a run of neighbouring channels; yours are interleaved":
            ("(self.heads, -1)).transpose(1, 2)", "(-1, self.heads)).permute(0, 3, 1, 2)"),
        "put the heads back beside each other: transpose before you flatten":
            ("attn_mask=mask).transpose(1, 2).flatten(2)", "attn_mask=mask).reshape(len(q), q.shape[2], -1)"),
        "the last Linear is missing": ("self.out(F.scaled", "(F.scaled"),
        "yours ignores the mask": ("attn_mask=mask", "attn_mask=None"),
        "the mask is True where x may attend; yours is inverted": ("attn_mask=mask",
                                                                 "attn_mask=None if mask is None else ~mask"),
        "your causal mask is reversed: a token sees itself and those before it": (".tril()", ".triu()"),
        "no token may see padding": ("causal & mask[:, None, None]", "causal.expand(len(ids), 1, -1, -1)"),
        "a token must not see those after it": ("causal & mask[:, None, None]", "mask[:, None, None]"),
        "mask the padding's keys, not its queries: padding must not be seen, but it may see":
            ("causal & mask[:, None, None]", "causal & (mask[:, None, :, None] | (torch.arange(ids.shape[1]) == 0))"),
        "the position embeddings are missing": (" + self.positions[: ids.shape[1]]", ""),
        "the last LayerNorm is missing": ("return self.norm(x)", "return x"),
    },
    same=(
        ("F.scaled_dot_product_attention(q, k, v, attn_mask=mask)",
         "((q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~(torch.tensor(True) if mask is None else mask), -torch.inf)"
         ".softmax(dim=-1) @ v)"),
        (".transpose(1, 2) for y in (q, k, v))", ".movedim(2, 1) for y in (q, k, v))"),
        ("torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).tril()",
         "torch.arange(ids.shape[1])[:, None] >= torch.arange(ids.shape[1])"),
    ), generates=True)
def attention(m):
    module, encoder = randomised(m.Attention(8, 2)), randomised(m.TextEncoder(m.TextConfig(40, 6, 8, 2, 2, 16)))
    q, k, v, mask = noise(2, 5, 8), noise(2, 7, 8), noise(2, 7, 8), torch.rand(2, 1, 5, 7) < 0.6
    mask[..., 0] = True
    masks = torch.arange(6) < torch.tensor([[4], [6]])
    with torch.no_grad():
        return {"attend": module.attend(q, k, v), "attend with a mask": module.attend(q, k, v, mask),
                "TextEncoder": encoder(torch.randint(40, (2, 6)), masks)}


@exercise(
    "AttnBlock: self- and cross-attention in one", "wuerstchen.py", ("AttnBlock.keys_values", "AttnBlock.forward"),
    "E.2, E.3", "how text enters Stages B and C", 15,
    wrong={
        "the SiLU is missing": ("self.kv(F.silu(text))", "self.kv(text)"),
        "the SiLU comes before the Linear": ("self.kv(F.silu(text))", "F.silu(self.kv(text))"),
        "x attends to the text only: its own positions are missing":
            ("torch.cat([self.attention.k(h), text_kv[0]], dim=1)", "text_kv[0]",
             "torch.cat([self.attention.v(h), text_kv[1]], dim=1)", "text_kv[1]"),
        "x attends to itself only: the text is missing":
            ("torch.cat([self.attention.k(h), text_kv[0]], dim=1)", "self.attention.k(h)",
             "torch.cat([self.attention.v(h), text_kv[1]], dim=1)", "self.attention.v(h)"),
        "the residual is missing: x + attention": ("return x + self", "return self"),
        "the LayerNorm is missing": ("self.norm(x)", "x"),
        "queries are made from the normalised x too": ("self.attention.q(h)", "self.attention.q(x.flatten(1, 2))"),
        "values have a Linear of their own, v": ("self.attention.v(h)", "self.attention.k(h)"),
        "keys come first, then values": ("self.attention.k(text), self.attention.v(text)",
                                         "self.attention.v(text), self.attention.k(text)"),
        "the text passes through the attention's k and v as well": ("self.attention.k(text), self.attention.v(text)",
                                                                   "text, text"),
    },
    same=(
        ("torch.cat([self.attention.k(h), text_kv[0]], dim=1)", "torch.cat([text_kv[0], self.attention.k(h)], dim=1)",
         "torch.cat([self.attention.v(h), text_kv[1]], dim=1)", "torch.cat([text_kv[1], self.attention.v(h)], dim=1)"),
        (".view_as(x)", ".unflatten(1, x.shape[1:3])"),
        ("self.norm(x).flatten(1, 2)", "F.layer_norm(x.flatten(1, 2), x.shape[-1:], eps=1e-6)"),
    ), generates=True)
def attn_block(m):
    block, x = randomised(m.AttnBlock(8, 6, heads=2)), noise(2, 3, 4, 8) + 1
    text_kv = noise(2, 5, 8), noise(2, 5, 8)
    with torch.no_grad():
        keys, values = block.keys_values(noise(2, 5, 6))
        return {"keys": keys, "values": values, "forward": block(x, text_kv)}


@exercise(
    "CLIP: one vector per caption, and the contrastive loss", "wuerstchen.py",
    ("CLIP.embed_text", "CLIP.compare", "contrastive_loss"), "CLIP", "how a text encoder is trained", 20,
    wrong={
        "one position too far: the caption's last token has the index mask.sum() − 1":
            ("mask.sum(dim=1) - 1", "mask.sum(dim=1)"),
        "the last position may be padding: take the caption's own end token":
            ("mask.sum(dim=1) - 1", "torch.full((len(ids),), -1)"),
        "take the end token, not the mean over tokens":
            ("[torch.arange(len(ids), device=ids.device), end]", ".mean(dim=1)"),
        "the vectors have length 1": ("F.normalize(self.text_projection(text).float(), dim=-1)",
                                      "self.text_projection(text).float()"),
        "the projection is missing": ("self.text_projection(text).float()", "text.float()"),
        "logit_scale is the logarithm of the scale": ("self.logit_scale.exp()", "self.logit_scale"),
        "multiply by the scale, don't divide": ("self.logit_scale.exp().clamp(max=100)",
                                               "1 / self.logit_scale.exp().clamp(max=100)"),
        "the scale is at most 100": (".clamp(max=100)", ""),
        "the second cross-entropy is missing: each caption among the images":
            ("(F.cross_entropy(logits, per_image) + F.cross_entropy(logits[:, :B].T, per_caption)) / 2",
             "F.cross_entropy(logits, per_image)"),
        "the first cross-entropy is missing: each image among all captions":
            ("(F.cross_entropy(logits, per_image) + F.cross_entropy(logits[:, :B].T, per_caption)) / 2",
             "F.cross_entropy(logits[:, :B].T, per_caption)"),
        "average the two cross-entropies, don't add them": ("per_caption)) / 2", "per_caption))"),
        "transpose the logits for the second cross-entropy": ("logits[:, :B].T", "logits[:, :B]"),
        "if captions are identical, all of them count as correct": ("(ids[:B, None] == ids[None]).all(dim=-1).float()",
                                                  "torch.eye(B, len(ids))"),
        "hard negatives also compete in the cross-entropy for each image":
            ("F.cross_entropy(logits, per_image)",
             "F.cross_entropy(logits[:, :B], same[:, :B] / same[:, :B].sum(1, keepdim=True))"),
    },
    same=(
        ("F.cross_entropy(logits, per_image)", "-(logits.log_softmax(dim=1) * per_image).sum(dim=1).mean()"),
        ("F.normalize(self.text_projection(text).float(), dim=-1)",
         "(lambda y: y / y.norm(dim=-1, keepdim=True))(self.text_projection(text))"),
        ("mask.sum(dim=1) - 1", "mask.long().cumsum(dim=1).argmax(dim=1)"),
        ("mask.sum(dim=1) - 1", "ids.argmax(dim=1)"),
        ("clamp(max=100) * image @ text.T", "clamp(max=100) * torch.einsum('bc,nc->bn', image, text)"),
    ))
def clip(m):
    model, length, ids = randomised(m.CLIP(small_config(m))), torch.tensor([[3], [5], [7]]), torch.randint(39, (3, 8))
    ids[torch.arange(8) >= length - 1] = 39  # the end token, and padding
    model.logit_scale.data.fill_(2.0)
    image, text, logits = F.normalize(noise(3, 5), dim=1), F.normalize(noise(4, 5), dim=1), noise(3, 5)
    captions = torch.tensor([[1, 2], [3, 4], [1, 3], [4, 4], [5, 6]])
    with torch.no_grad():
        found = {"embed_text": model.embed_text(ids, torch.arange(8) < length),
                 "compare": model.compare(image, text)}
        model.logit_scale.fill_(10.0)
        found["compare at the largest scale"] = model.compare(image, text)
    found["contrastive_loss"] = m.contrastive_loss(logits[:, :3], captions[:3])
    found["contrastive_loss with hard negatives"] = m.contrastive_loss(logits, captions)
    captions[1] = captions[3] = captions[0]
    return found | {"contrastive_loss with equal captions": m.contrastive_loss(logits, captions)}


@exercise(
    "The quantizer of Stage A", "wuerstchen.py", ("Quantizer.forward",), "3.1, E.1",
    "gradients through argmin, which has none", 15,
    wrong={
        "the nearest entry has the smallest distance": (".argmin(dim=1)", ".argmax(dim=1)"),
        "0.25 belongs to the other term, the commitment": (
            "F.mse_loss(quantized, x.detach()) + 0.25 * F.mse_loss(x, quantized.detach())",
            "0.25 * F.mse_loss(quantized, x.detach()) + F.mse_loss(x, quantized.detach())"),
        "the commitment term is missing": (" + 0.25 * F.mse_loss(x, quantized.detach())", ""),
        "the codebook term is missing": ("F.mse_loss(quantized, x.detach()) + 0.25", "0.25"),
        "each term moves one side only: the other has no gradient": (
            "F.mse_loss(quantized, x.detach()) + 0.25 * F.mse_loss(x, quantized.detach())",
            "1.25 * F.mse_loss(quantized, x)"),
        "straight-through: the gradient of the output goes to x, not to the codebook": (
            "x + (quantized - x).detach()", "quantized"),
        "the output's value is the codebook entry; yours is x": ("x + (quantized - x).detach()", "x"),
        "the terms are means, not sums": (
            "F.mse_loss(quantized, x.detach()) + 0.25 * F.mse_loss(x, quantized.detach())",
            "(quantized - x.detach()).square().sum() + 0.25 * (x - quantized.detach()).square().sum()"),
        "codes have the shape of x without channels, (B, h, w)": (
            "codes = codes.view(x.shape[:-1])\n        quantized = F.embedding(codes, self.codebook)",
            "quantized = F.embedding(codes, self.codebook).view_as(x)"),
    },
    same=(
        ("torch.cdist(x.detach().float().flatten(0, 2), self.codebook.detach().float()).argmin(dim=1)",
         "(self.codebook.square().sum(dim=1) - 2 * x.flatten(0, 2) @ self.codebook.T).argmin(dim=1)"),
        ("F.embedding(codes, self.codebook)", "F.one_hot(codes, len(self.codebook)).float() @ self.codebook"),
        ("F.mse_loss(quantized, x.detach()) + 0.25 * F.mse_loss(x, quantized.detach())",
         "((quantized - x.detach()) ** 2 + 0.25 * (quantized.detach() - x) ** 2).mean()"),
        ("x + (quantized - x).detach()", "quantized.detach() + x - x.detach()"),
    ))
def quantizer(m):
    module, x = randomised(m.Quantizer(6, 3)), noise(2, 3, 4, 3).requires_grad_()
    quantized, codes, loss = module(x)

    def gradient(y):
        given = torch.autograd.grad(y, (x, module.codebook), retain_graph=True, allow_unused=True)
        return torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten()
                          for p, g in zip((x, module.codebook), given)])

    return {"quantized": quantized.detach(), "codes": codes, "loss": loss.detach(), "gradient of the loss":
            gradient(loss), "gradient of quantized": gradient((quantized * noise(2, 3, 4, 3)).sum())}


@exercise(
    "Stage C's prediction of the noise", "wuerstchen.py", ("StageC.predict_eps",), "3.2, E.3",
    "a network that is nearly right near t = 1 before any training", 10,
    wrong={
        "1 − b can be negative: take its absolute value": ("(1 - b.float()).abs()", "(1 - b.float())"),
        "that is Stage B's b, with a sigmoid": ("((1 - b.float()).abs() + 1e-5)",
                                               "(b.float().sigmoid() * (1 - 2e-3) + 1e-3)"),
        "the first half of the channels is a, the second b": ("a, b =", "b, a ="),
        "a is missing: eps = (x − a)/(|1 − b| + 1e-5)": ("(x - a)", "x"),
        "1e-5 is missing: |1 − b| can be 0": (" + 1e-5", ""),
        "the last LayerNorm is missing": ("self.out(self.out_norm(h))", "self.out(h)"),
        "divide by |1 − b|, not by |b|: with a = b = 0, eps is x": ("(1 - b.float()).abs()", "b.float().abs()"),
        "yours ignores the time": ("time_embedding(t,", "time_embedding(0 * t,"),
        "yours returns a; eps follows from a and b": ("return (x - a) / ((1 - b.float()).abs() + 1e-5)", "return a"),
    },
    same=(
        ("(1 - b.float()).abs()", "(b - 1).abs()"),
        (".chunk(2, dim=-1)", ".split(x.shape[-1], dim=-1)"),
        ("(x - a) / ((1 - b.float()).abs() + 1e-5)", "torch.div(x, (1 - b).abs() + 1e-5) - a / ((1 - b).abs() + 1e-5)"),
    ), generates=True)
def stage_c(m):
    stage = randomised(m.StageC(small_config(m)))
    x, t, found = noise(2, 3, 3, 4), torch.tensor([0.3, 0.9]), {}
    with torch.no_grad():
        stage.out.weight *= 3
        conditions = stage.encode_conditions(noise(2, 8, 12))
        found["eps"] = stage.predict_eps(x, t, conditions)
        stage.out.weight.zero_()
        for b in (0.0, 1.0, 3.0):
            stage.out.bias[:] = torch.tensor([0.5] * 4 + [b] * 4)
            found[f"eps where a = 0.5, b = {b:.0f}"] = stage.predict_eps(x, t, conditions) * (1e-5 if b == 1 else 1)
    return found


@exercise(
    "The noise schedule, and adding noise", "wuerstchen.py", ("alpha_bar", "add_noise"), "3.2",
    "how much of the image is left at time t", 10,
    wrong={
        "ᾱ is clamped to [0.0001, 0.9999]": (".clamp(0.0001, 0.9999)", ""),
        "square the cosine": ("torch.cos((t + s) / (1 + s) * math.pi / 2) ** 2",
                                  "torch.cos((t + s) / (1 + s) * math.pi / 2)"),
        "square both cosines": ("torch.cos((t + s) / (1 + s) * math.pi / 2) ** 2",
                                "torch.cos((t + s) / (1 + s) * math.pi / 2)",
                                "math.cos(s / (1 + s) * math.pi / 2) ** 2", "math.cos(s / (1 + s) * math.pi / 2)"),
        "divide by the value at t = 0": (" / start)", ")"),
        "the offset s is missing": ("s = 0.008", "s = 0.0"),
        "that is the noise's share, 1 − ᾱ: ᾱ is 1 at t = 0": ("return (torch.cos((t", "return (1 - torch.cos((t"),
        "the signal is scaled by √ᾱ, not by ᾱ": ("signal.sqrt() * x0", "signal * x0"),
        "the noise is scaled by √(1 − ᾱ), not by 1 − ᾱ": ("(1 - signal).sqrt() * eps", "(1 - signal) * eps"),
        "the noise is scaled by √(1 − ᾱ), not by 1 − √ᾱ": ("(1 - signal).sqrt() * eps", "(1 - signal.sqrt()) * eps"),
        "the signal is scaled by √ᾱ, the noise by √(1 − ᾱ): both roots are missing":
            ("signal.sqrt() * x0 + (1 - signal).sqrt() * eps", "signal * x0 + (1 - signal) * eps"),
        "x0 and eps are swapped": ("signal.sqrt() * x0 + (1 - signal).sqrt() * eps",
                                     "signal.sqrt() * eps + (1 - signal).sqrt() * x0"),
        "each image has its own time": ("alpha_bar(t).view(-1,", "alpha_bar(t)[:1].view(-1,"),
    },
    same=(
        ("(torch.cos((t + s) / (1 + s) * math.pi / 2) ** 2 / start)",
         "((1 + torch.cos((t + s) / (1 + s) * math.pi)) / (1 + math.cos(s / (1 + s) * math.pi)))"),
        ("alpha_bar(t).view(-1, *[1] * (x0.dim() - 1))", "alpha_bar(t).reshape((-1,) + (1,) * (x0.ndim - 1))"),
        (".clamp(0.0001, 0.9999)", ".maximum(torch.tensor(1e-4)).minimum(torch.tensor(0.9999))"),
    ), generates=True, tolerance=1e-5)
def noising(m):
    t = torch.tensor([0.3, 0.8])
    return {"alpha_bar": m.alpha_bar(torch.linspace(0, 1, 11)),
            "alpha_bar of a scalar": m.alpha_bar(torch.tensor(0.4)),
            "add_noise to images": m.add_noise(noise(2, 3, 4, 5), noise(2, 3, 4, 5), t),
            "add_noise to vectors": m.add_noise(noise(2, 3), noise(2, 3), t)}


@exercise(
    "The loss with the P2 weight", "wuerstchen.py", ("diffusion_loss",), "3.2",
    "which times count most; where paper and code differ", 10,
    wrong={
        "(1 − ᾱ)/(1 + ᾱ) is what the paper prints; the authors' code, which trained the published weights, has 1 − ᾱ":
            ("(1 - alpha_bar(t)) *", "(1 - alpha_bar(t)) / (1 + alpha_bar(t)) *"),
        "the weight is missing": ("(1 - alpha_bar(t)) * ", ""),
        "the weight is 1 − ᾱ: larger for noisier images": ("(1 - alpha_bar(t)) *", "alpha_bar(t) *"),
        "that is the signal-to-noise ratio; P2 divides by 1 + ratio": ("(1 - alpha_bar(t)) *",
                                                                      "alpha_bar(t) / (1 - alpha_bar(t)) *"),
        "each image has its own weight, not the batch's mean": ("(1 - alpha_bar(t)) *", "(1 - alpha_bar(t)).mean() *"),
        "the mean over positions and channels, not the sum": (".mean(dim=1)", ".sum(dim=1)"),
        "square the error": (".square()", ".abs()"),
        "the weights are not normalised: don't divide by their mean": (
            "return ", "return (1 / (1 - alpha_bar(t)).mean()) * "),
        "each image's error is multiplied by its own factor too": ("factor * ", ""),
    },
    same=(
        ("(1 - alpha_bar(t)) *", "1 / (1 + alpha_bar(t) / (1 - alpha_bar(t))) *"),
        ("factor * (1 - alpha_bar(t)) * (eps - predicted).square().flatten(1).mean(dim=1)",
         "((factor * (1 - alpha_bar(t))).view(-1, 1, 1, 1) * (predicted - eps) ** 2).mean(dim=(1, 2, 3))"),
        ("(eps - predicted).square().flatten(1).mean(dim=1)", "torch.stack([F.mse_loss(p, e) for e, p in "
                                                             "zip(eps, predicted)])"),
    ))
def p2(m):
    eps, predicted, t = noise(3, 4, 4, 2), noise(3, 4, 4, 2).requires_grad_(), torch.tensor([0.1, 0.5, 0.9])
    loss = m.diffusion_loss(eps, predicted, t)
    return {"loss": loss.detach(), "gradient": 10 * torch.autograd.grad(loss.mean(), predicted)[0],
            "loss with a factor": m.diffusion_loss(eps, predicted, t, torch.tensor([0.3, 2.0, 1.0])).detach()}


@exercise(
    "One sampling step: DDPM and DDIM", "wuerstchen.py", ("predict_x0", "ddpm_step", "ddim_step"), "3.3",
    "from noise towards the image", 20,
    wrong={
        "x0: divide by √ᾱ": ("(x - (1 - signal).sqrt() * eps) / signal.sqrt()", "(x - (1 - signal).sqrt() * eps)"),
        "x0: the noise is scaled by √(1 − ᾱ)": ("(1 - signal).sqrt() * eps", "(1 - signal) * eps"),
        "α is ᾱ(t)/ᾱ(t_next), the step's own, not ᾱ(t)": ("alpha = now / after", "alpha = now"),
        "α is ᾱ(t)/ᾱ(t_next), not the inverse": ("alpha = now / after", "alpha = after / now"),
        "no noise at the last step, where t_next = 0": (" * (t_next != 0)", ""),
        "std: (1 − α)·(1 − ᾱ(t_next))/(1 − ᾱ(t)), not 1 − α": ("((1 - alpha) * (1 - after) / (1 - now)).sqrt()",
                                                              "(1 - alpha).sqrt()"),
        "std: the square root is missing": ("(1 - now)).sqrt()", "(1 - now))"),
        "mean: divide by √α": (" / alpha.sqrt()", ""),
        "mean: eps is divided by √(1 − ᾱ(t))": ("eps / (1 - now).sqrt()", "eps / (1 - now)"),
        "DDIM: √ᾱ and √(1 − ᾱ) are those of t_next, not of t": ("after = alpha_bar(t_next)\n    return",
                                                                       "after = alpha_bar(t)\n    return"),
        "DDIM: the noise that x has at t_next is missing": (" + (1 - after).sqrt() * eps", ""),
        "DDIM: x0 is multiplied by √ᾱ, eps by √(1 − ᾱ)": (
            "after.sqrt() * predict_x0(x, eps, t) + (1 - after).sqrt() * eps",
            "(1 - after).sqrt() * predict_x0(x, eps, t) + after.sqrt() * eps"),
    },
    same=(
        ("mean = (x - (1 - alpha) * eps / (1 - now).sqrt()) / alpha.sqrt()",
         "x0 = predict_x0(x, eps, t)\n    mean = (after.sqrt() * (1 - alpha) * x0 "
         "+ alpha.sqrt() * (1 - after) * x) / (1 - now)"),
        ("std * z * (t_next != 0)", "(std * z if t_next > 0 else 0)"),
        ("(x - (1 - signal).sqrt() * eps) / signal.sqrt()", "x / signal ** 0.5 - (1 / signal - 1) ** 0.5 * eps"),
    ), generates=True)
def steps(m):
    x, eps, z = noise(2, 3, 3, 4), noise(2, 3, 3, 4), noise(2, 3, 3, 4)
    found = {}
    for t, t_next in ((0.9, 0.8), (0.5, 0.2), (0.2, 0.0)):
        times = torch.tensor(t), torch.tensor(t_next)
        found[f"predict_x0 at {t}"] = m.predict_x0(x, eps, times[0])
        found[f"ddpm_step from {t} to {t_next}"] = m.ddpm_step(x, eps, *times, z)
        found[f"ddim_step from {t} to {t_next}"] = m.ddim_step(x, eps, *times)
    return found


@exercise(
    "The sampling loop, with classifier-free guidance", "wuerstchen.py", ("guided", "sample"), "3.3",
    "how the model generates images", 25,
    wrong={
        "guidance is reversed: it must lead to the conditional prediction": ("torch.lerp(unconditional, conditional,",
                                                                            "torch.lerp(conditional, unconditional,"),
        "the conditions are B conditional rows, then B unconditional ones: double x the same way":
            ("torch.cat([x, x])", "x.repeat_interleave(2, dim=0)"),
        "with guidance 1, only the conditional prediction is left: your guidance is one too high":
            ("conditional, guidance)", "conditional, 1 + guidance)"),
        "give the network the time of its input x, which is t, not t_next":
            ("guided(network, x, t, conditions", "guided(network, x, t_next, conditions"),
        "your loop stops one step before time 0": ("times[1:])", "times[1:-1])"),
        "return the last x, not the last x0": ("            x = after_step(x, x0, t_next)\n    return x",
                                               "            x = after_step(x, x0, t_next)\n    return x0"),
        "what after_step returns is the new x": ("x = after_step(x, x0, t_next)", "after_step(x, x0, t_next)"),
        "give after_step the x0 that was predicted before the step": (
            "        if after_step is not None:", "        x0 = predict_x0(x, eps, t_next)\n"
                                                   "        if after_step is not None:"),
        "the noise comes from normal_noise with the generator: otherwise, a seed has no effect": (
            "normal_noise(x.shape, generator, x.device)", "torch.randn_like(x)"),
        "draw new noise for each step": ("    for t, t_next in", "    z = normal_noise(x.shape, generator, x.device)\n"
                                    "    for t, t_next in",
                                    "ddpm_step(x, eps, t, t_next, normal_noise(x.shape, generator, x.device))",
                                    "ddpm_step(x, eps, t, t_next, z)"),
        "a scale below 1, for example 0, is valid too": ("conditional, guidance)", "conditional, max(1, guidance))"),
        "yours never calls after_step": ("if after_step is not None:", "if False:"),
        "draw the last step's noise too: Stage B goes on with the same generator": (
            "            x = ddpm_step(", "            if t_next == 0:\n                generator = None\n"
            "            x = ddpm_step("),
        "raise ValueError for an unknown sampler": ("raise ValueError(f\"unknown sampler {sampler}\")", "pass"),
    },
    same=(
        ("torch.lerp(unconditional, conditional, guidance)",
         "unconditional + guidance * (conditional - unconditional)"),
        ("torch.lerp(unconditional, conditional, guidance)", "guidance * conditional - (guidance - 1) * unconditional"),
        ("conditional, unconditional = network(torch.cat([x, x]), t.expand(2 * len(x)), conditions).chunk(2)",
         "B = len(x)\n    both = network(x.repeat(2, 1, 1, 1), t.repeat(2 * B), conditions)\n"
         "    conditional, unconditional = both[:B], both[B:]"),
    ), generates=True)
def sampling(m):
    def network(x, t, conditions):
        if t.shape != (len(x),):
            raise ValueError(f"one time per row of x: t must have the shape ({len(x)},), not {tuple(t.shape)}")
        return 0.1 * x * t.view(-1, 1, 1, 1) + conditions.rows + 0.05 * t.view(-1, 1, 1, 1) ** 2

    def run(guidance, sampler="ddpm", **options):
        rows = torch.tensor([0.3, -0.2, 0.1, -0.4, 0.2, 0.05]).view(-1, 1, 1, 1)
        conditions = types.SimpleNamespace(rows=rows[:3] if guidance == 1 else rows)  # a type that can't be sliced
        torch.manual_seed(5)  # the global generator must not matter
        return m.sample(network, x, torch.tensor([1.0, 0.6, 0.3, 0.0]), conditions, guidance, generator.manual_seed(1),
                        sampler, **options)

    x, seen, generator = noise(3, 2, 2, 4), [], torch.Generator()
    found = {f"{sampler}, guidance {guidance}": run(guidance, sampler)
             for guidance, sampler in itertools.product((1.0, 0.0, 0.5, 3.0), ("ddpm", "ddim"))}
    run(1.0)
    found["the generator's next numbers"] = torch.randn(3, generator=generator)
    found["with after_step"] = run(2.0, after_step=lambda x, x0, t_next: seen.append((x, x0, t_next)) or 0.5 * x + 0.1)
    found |= {f"{what} given to after_step": torch.stack(values)
              for what, values in zip(("x", "x0", "t_next"), zip(*seen))}
    try:
        run(1.0, "heun")
        found["an unknown sampler"] = "no error"
    except ValueError:
        found["an unknown sampler"] = "ValueError"
    return found


@exercise(
    "Stage B's loss", "train.py", ("noisy_conditions", "stage_b_loss"), "3.1, E.2",
    "which conditions are dropped and noised, and why", 25,
    wrong={
        "Stage B's x0 is the latents divided by scale": ("x0 = latents / scale", "x0 = latents"),
        "yours is inverted: drop 25% of the captions, not 75%": ("torch.where(drop_text, null_text, text)",
                                                                "torch.where(drop_text, text, null_text)"),
        "yours drops no captions": ("torch.where(drop_text, null_text, text)", "text"),
        "a dropped caption is replaced by the null caption, not by zeros":
            ("torch.where(drop_text, null_text, text)", "torch.where(drop_text, 0, text)"),
        "zero e after noising it: noised zeros are not zero": (
            "torch.where(drop_semantic, 0, semantic)", "semantic",
            "    noised = add_noise(", "    semantic = torch.where(bernoulli_mask(0.05, semantic), 0, semantic)\n"
            "    noised = add_noise("),
        "each choice needs a mask of its own": (
            "noise_semantic = bernoulli_mask(0.1, semantic)", "same = torch.rand(len(semantic), 1, 1, 1)\n"
            "    noise_semantic = (same < 0.1)", "bernoulli_mask(0.05, semantic)", "same < 0.05"),
        "yours zeroes no semantic latents": ("torch.where(drop_semantic, 0, semantic)", "semantic"),
        "yours is inverted: zero 5% of the semantic latents, not 95%":
            ("torch.where(drop_semantic, 0, semantic)",
             "torch.where(drop_semantic, semantic, 0)"),
        "semantic latents are noised only where there is a caption": (" & ~drop_text[..., None]", ""),
        "yours noises no semantic latents": ("torch.where(noise_semantic, noised, semantic)", "semantic"),
        "semantic latents are noised to times in [0, 0.5], not in [0, 1]": (" / 2)\n", ")\n"),
        "those are Stage C's times; Stage B's are sigmoid(0.5 + normal noise)":
            ("torch.sigmoid(0.5 + torch.randn(len(x0), device=x0.device))", "training_times(len(x0), x0.device)"),
        "the loss has the factor 0.4/√(ᾱ(t) + 0.02)": ("predicted, t, factor)", "predicted, t)"),
        "the noise is normal (randn), not uniform (rand)": ("torch.randn_like(x0)", "torch.rand_like(x0)"),
        "the network is given x_t, not x0": ("b(add_noise(x0, eps, t), t,", "b(x0, t,"),
        "the compressor learns from this loss: use neither detach nor no_grad": ("compressor(resized).float()",
                                                                       "compressor(resized).float().detach()"),
    },
    same=(
        ("torch.rand(len(text), device=text.device) / 2", "torch.empty(len(text)).uniform_(0, 0.5)"),
        ("torch.where(drop_semantic, 0, semantic)",
         "semantic * (torch.rand(len(semantic), 1, 1, 1) >= 0.05)"),
        ("torch.sigmoid(0.5 + torch.randn(len(x0), device=x0.device))",
         "1 / (1 + torch.exp(-torch.normal(0.5, 1.0, (len(x0),))))"),
        ("    drop_text = ", "    torch.rand(3)\n    drop_text = "),
    ), tolerance=0.01)
def stage_b(m):
    rows, latents, seen = 60_000, 0.2, []
    w = torch.tensor(10.0, requires_grad=True)

    def compressor(resized):  # each image's e: 10, in 16 channels
        return (w * torch.ones_like(resized[:, :1, :1, :1])).expand(-1, 1, 1, 16)

    def b(x, t, semantic, text):
        seen.append((x, t, semantic, text))
        return x + 0.1 * semantic[..., :4]

    text, null_text = torch.ones(rows, 3, 2), torch.full((1, 3, 2), -1.0)
    losses, _ = m.stage_b_loss(b, compressor, torch.tensor(0.4), torch.rand(rows, 3, 3, 3),
                               torch.full((rows, 2, 2, 4), latents), text, null_text)
    loss = losses.mean()
    (x, t, semantic, text), = seen
    semantic, signal = semantic.detach().flatten(1), wuerstchen.alpha_bar(t).view(-1, 1, 1, 1)
    eps = (x - signal.sqrt() * latents / 0.4) / (1 - signal).sqrt()
    null, zero = (text == -1).flatten(1).all(dim=1), (semantic == 0).all(dim=1)
    noised = ~zero & ((semantic - 10).abs() > 1e-4).any(dim=1)
    error = eps - x - (0.1 * semantic[:, :4]).view(-1, 1, 1, 4)
    expected = (0.4 / (signal + 0.02).sqrt() * (1 - signal) * error.square()).mean()
    times = t.clamp(1e-4, 1 - 1e-4).logit()
    signal_e = (semantic.mean(dim=1) / 10)[noised]

    def mean(values):
        return values.float().mean() if len(values) else torch.tensor(-1.0)

    return {"share of null captions": mean(null), "captions that are neither kept nor null":
            mean((text != 1).flatten(1).any(dim=1) & ~null),
            "share of zeroed e": mean(zero), "share of zeroed e where there is no caption": mean(zero[null]),
            "share of zeroed e where there is one": mean(zero[~null]),
            "share of noised e": mean(noised[~null & ~zero]), "share of noised e without a caption": mean(noised[null]),
            "signal in noised e": mean(signal_e), "deviation of noised e": mean(semantic.std(dim=1)[noised]),
            "signal in noised e: deviation": signal_e.std() if len(signal_e) else torch.tensor(-1.0),
            "times: a quarter of the mean of their logit": mean(times) / 4,
            "times: deviation of their logit": times.std(),
            "noise: mean": eps.mean(), "noise: deviation": eps.std(), "loss / loss expected for b's inputs":
            (loss / expected).detach(), "gradient of the compressor": (
                torch.autograd.grad(loss, w)[0] / loss.detach() if loss.requires_grad else torch.tensor(0.0))}


EXPERIMENTS = """
Seven experiments with the trained model in tests/shapes, and what to expect. The last three use pictures that this
command writes, with tour/index.html: python tests/tour.py "a small blue square to the right of a big red circle"

guidance    python tests/score.py --run tests/shapes --sweep --count 64
            First table, share of captions fully correct: 0% at guidance 0, where Stage C sees only the null caption;
            89% at 1; 95 to 97% from 2 to 8; 58% at 16, which is too much. Shapes' captions describe the image so
            completely that guidance can add little.
steps       The second table of the same command: 28% with one step of Stage C, 92 to 98% from two on. Stage C
            generates only 144 numbers.
B and C     python sample.py "a red star above a blue square" --out star.png
            python sample.py --vary star.png --count 6 --out vary.png
            python sample.py --vary star.png "a green circle" --count 6 --out told.png
            Stage B decodes the same semantic latents six times: shapes and positions stay, because Stage C has decided
            them (appendix D). But training showed no red star, and without the caption, some stars turn purple. Given
            another caption, Stage B keeps colours and positions; only the corners of the square become round.
null        python sample.py "a red star" --cfg 0 --count 12
            With guidance 0, Stage C sees only the null caption and generates one or two objects of any shape. Stage B
            still reads the caption: half of the images have something red.
cells       tour/3_semantic_2.png: the middle cell of the top or bottom row is replaced by the same cell of another
            image. What does one cell decide? The colour of the object there, and sometimes part of its shape: the
            object reaches into other cells, which still hold the old outline. The other object does not change.
words       tour/6_attention_1.png: which words does Stage C's right cell attend to when it places the blue square?
            Neither "blue" nor "square", but "of a" in "right of a"; the left cell attends to the end token. The text
            encoder is causal: at "square" it cannot know yet that the square is to be on the right. Stage B attends to
            "square" and "circle" themselves (6_attention_3.png): the semantic latents have told it where they are.
noise       tour/4_noise_1.png: at which time does noise in the semantic latents turn the image into another? Between
            0.75 and 1. This suggests that the first quarter of Stage C's steps decides most of the image; the loss
            gives those times the most weight.
"""

# ----------------------------------------------------------------------------------------------------------------------
# The commands.


def start(numbers, folder):
    """Copies the project to a new folder, and cuts the exercises out of the copy; tests/reference keeps them."""
    for name in ("tokenizer", "tests"):
        shutil.copytree(HERE / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "test_lab.py"))
    for name in ("wuerstchen.py", "train.py", "sample.py", "README.md", "LICENSE", "requirements.txt"):
        shutil.copy(HERE / name, folder)
    for file in FILES:
        (folder / "tests" / "reference" / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(HERE / file, folder / "tests" / "reference" / file)
    (folder / "tests" / "reference" / "numbers.txt").write_text(" ".join(map(str, numbers)))
    for number in numbers:
        path = folder / EXERCISES[number - 1].file
        path.write_text(cut(path.read_text("utf-8"), number), "utf-8")
    print(f"{folder}: write exercises {', '.join(map(str, numbers))}\n"
          f"then run in {folder}: python tests/lab.py check")


def check(numbers):
    """Grades exercises one after the other, and stops at a loop that never ends. -> whether all are right"""
    torch.set_num_threads(1)  # two threads are no faster here, and much slower if another program keeps a core busy
    right = []
    for number in numbers:
        thread = threading.Thread(target=lambda: right.append(number) if grade(number) else None, daemon=True)
        thread.start()
        thread.join(SECONDS)
        if thread.is_alive():  # it can't be ended from here, but it ends with this process
            print(f"{number:3}  WRONG  {EXERCISES[number - 1].title}\n"
                  f"       no answer after {SECONDS} s: does a loop never end?")
            break
    print(f"{len(right)} of {len(numbers)} right")
    return len(right) == len(numbers)


def finale(count=96, options=("--steps", "300", "--cache", "4096")):
    """Trains Stage C for a few minutes with the working copy's noise, loss and sampler in place of the reference's. The
    other stages are those that come with the code. Then generates with all of them, and prints the score."""
    import score
    import train
    shipped = wuerstchen.Wuerstchen.load(HERE / "tests" / "shapes")
    _, captions = train.examples(train.Shapes(split="test"), count)
    theirs = shipped.generate(captions[:8], seed=[*range(min(8, count))])
    tasks = [task for task in EXERCISES if task.probe in (noising, p2, steps, sampling)]
    modules = [students(task) for task in tasks]
    own = {name: getattr(module, name) for task, module in zip(tasks, modules) for name in task.names}
    for place, name in itertools.product((wuerstchen, train, sample, *modules), own):
        if hasattr(place, name):
            setattr(place, name, own[name])
    folder = Path("runs", "finale")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(HERE / "tests" / "shapes", folder, ignore=shutil.ignore_patterns("c.pt"))
    begun = time.time()
    train.main(["c", "--run", str(folder), *options])
    minutes, model = (time.time() - begun) / 60, wuerstchen.Wuerstchen.load(folder)
    generated = score.in_batches(lambda some, seeds: model.generate(some, seed=seeds), captions, [*range(count)])
    sample.make_sheet([generated[:8], theirs], captions[:8]).save("lab_finale.png")
    print("lab_finale.png: your images, above those of the model that comes with the code\n"
          f"{score.check_all(generated, captions)['whole']:.0%} of {count} captions fully correct after {minutes:.1f} "
          "minutes")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", nargs="?", default="list", choices=("list", "start", "check", "solution", "finale"))
    parser.add_argument("numbers", nargs="*",
                        help="exercise numbers, or all (the default; for check in a copy: those that were cut out)")
    parser.add_argument("--to", type=Path, metavar="DIR", help="where the working copy goes: a new folder")
    args = parser.parse_intermixed_args(argv)
    sys.stdout.reconfigure(encoding="utf-8")  # for ᾱ, on Windows too
    every = [str(number) for number in range(1, len(EXERCISES) + 1)]
    if not {*args.numbers} <= {*every, "all"}:
        parser.error(f"the exercises are numbered 1 to {len(every)}")
    if args.command in ("check", "finale") and REFERENCE == HERE:
        parser.error(f"{args.command} needs a working copy: python tests/lab.py start 3 8 10 --to DIR; cd DIR")
    if args.command == "check" and not args.numbers:
        args.numbers = (REFERENCE / "numbers.txt").read_text().split()
    chosen = [int(number) for number in every if number in args.numbers or args.numbers in ([], ["all"])]
    if args.command == "list":
        for number, task in enumerate(EXERCISES, 1):
            lines = count_lines((REFERENCE / task.file).read_text("utf-8"), *task.names)
            print(f"{number:3}  {task.title}: {lines}, {task.minutes} minutes\n"
                  f"     paper: {task.section}; you learn: {task.learned}\n     {task.file}: {', '.join(task.names)}")
        print(EXPERIMENTS)
    elif args.command == "start":
        if args.to is None or args.to.exists() or HERE in args.to.resolve().parents:
            parser.error("--to DIR must be a new folder outside the project")
        start(chosen, args.to)
    elif args.command == "check":
        sys.exit(not check(chosen))
    elif args.command == "finale":
        finale()
    else:
        for task in (EXERCISES[number - 1] for number in chosen):
            source = (REFERENCE / task.file).read_text("utf-8")
            for name in task.names:
                print(textwrap.dedent(ast.get_source_segment(source, find(source, name), padded=True)) + "\n")


if __name__ == "__main__":
    main()
