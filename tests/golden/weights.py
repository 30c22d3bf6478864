"""Weights that need not be stored: drawn from a seed by a rule that depends on names and shapes only.

The golden files describe reduced models by a table of tensor names and shapes and a seed. Both sides of a
comparison draw the same numbers from it: record.py for the references, the tests for this project's models.
Needs numpy alone.
"""

import json
import struct
from pathlib import Path

import numpy as np

SAFETENSORS_TYPES = {"float32": "F32", "float16": "F16", "int64": "I64"}


def draw(shapes, seed, gain=1.0, adjust=None):
    """Draw every tensor of `shapes` ({name: shape}), in the order of their names, from one generator.

    Nothing comes out zero (but for the batch counters), so that parameters which start at zero - gates, response
    norms, output layers - count in a comparison too. Matrices and kernels are normal with standard deviation
    gain/sqrt(fan-in), norm weights lie around 1, biases around 0.
    `adjust` ({name: [scale, shift]}, a shift being a number or a list) changes single tensors afterwards, to keep a
    model's output in range.
    """
    rng = np.random.default_rng(seed)
    tensors = {}
    for name in sorted(shapes):
        shape, last = tuple(shapes[name]), name.split(".")[-1]
        if last == "num_batches_tracked":
            tensors[name] = np.zeros(shape, np.int64)
            continue
        if last == "position_ids":
            tensors[name] = np.arange(shape[-1], dtype=np.int64).reshape(shape)
            continue
        value = rng.standard_normal(shape, dtype=np.float32)
        if last in ("gammas", "gamma", "beta"):
            value *= np.float32(0.3)
        elif last == "running_var":
            value = np.float32(1) + np.float32(0.1) * np.abs(value)
        elif last in ("bias", "running_mean"):
            value *= np.float32(0.1)
        elif len(shape) == 1:
            value = np.float32(1) + np.float32(0.1) * value
        else:
            value *= np.float32(gain / np.sqrt(np.prod(shape[1:])))
        scale, shift = (adjust or {}).get(name, (1, 0))
        tensors[name] = value * np.float32(scale) + np.asarray(shift, np.float32)
    return tensors


def draw_as_described(model):
    """The tensors of one model as a golden file describes it; fails where this numpy draws other numbers."""
    tensors = draw(model["shapes"], model["seed"], model["gain"], model["adjust"])
    if not np.isclose(fingerprint(tensors), model["fingerprint"], rtol=1e-6):
        raise ValueError("this numpy draws other normal numbers than the one that made the golden files")
    return tensors


def fingerprint(tensors):
    """The mean absolute value over all tensors: other draws give another one, other rounding does not."""
    total = sum(float(np.abs(array, dtype=np.float64).sum()) for array in tensors.values())
    return total / sum(array.size for array in tensors.values())


def write_safetensors(path, tensors):
    """Write {name: array} as a safetensors file: header length, JSON header, then the bytes one after another."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    arrays = {name: np.ascontiguousarray(array).reshape(array.shape) for name, array in tensors.items()}
    for name, array in arrays.items():
        header[name] = {
            "dtype": SAFETENSORS_TYPES[str(array.dtype)],
            "shape": list(array.shape),
            "data_offsets": [offset, offset + array.nbytes],
        }
        offset += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for array in arrays.values():
            file.write(array.tobytes())


def write_snapshot(folder, snapshot):
    """Write a described snapshot in the hub's layout: text files as they are, weight files drawn anew."""
    for name, text in snapshot["files"].items():
        path = Path(folder) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    for name, model in snapshot["models"].items():
        path = Path(folder) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_safetensors(path, draw_as_described(model))


def load(path):
    """Read a golden file: its description (a dictionary) and its arrays."""
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    return json.loads(str(arrays.pop("about"))), arrays
