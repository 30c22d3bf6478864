"""The same numbers as the reference implementations give; golden/record.py says how they were recorded.

Relative errors are the largest difference, as a share of the largest value.
"""
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent / "golden"))
import sample as script
import train
import weights
import wuerstchen
from conftest import run_script
from wuerstchen import Wuerstchen, add_noise, alpha_bar, ddpm_step, load_official, normal_noise, timesteps

GOLDEN = Path(__file__).parent / "golden"


def golden(name):
    about, arrays = weights.load(GOLDEN / f"{name}.npz")
    return about, {key: torch.from_numpy(array) for key, array in arrays.items()}


def configs():
    """The reduced snapshots' config.json files."""
    files = golden("pipeline")[0]["snapshot"]["files"]
    return {part: json.loads(files[f"{place}/config.json"]) for part, place in wuerstchen.OFFICIAL_FOLDERS.items()
            if part != "compressor"}


def filled(part, about, **others):
    """One network with the described weights. others: what its sizes need of the other parts' configurations"""
    c = configs()
    for name, changes in {part: about["config"], **others}.items():
        c[name] = {**c.get(name, {}), **changes}
    with torch.device("meta"):
        model = Wuerstchen(wuerstchen.official_config(c), None)
    load_official(model, part, {key: torch.from_numpy(x) for key, x in weights.draw_as_described(about).items()})
    return getattr(model, part).eval()


def last(x):
    """(B, C, H, W) -> (B, H, W, C)"""
    return x.permute(0, 2, 3, 1)


def error(ours, theirs):
    assert ours.shape == theirs.shape
    value = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    print(f"{value:.0e}", end=" ")  # for pytest -s
    return value


@torch.no_grad()
def test_vqgan():
    about, x = golden("vqgan")
    a = filled("a", about)
    latents = a.encode(last(x["picture"]))
    assert error(latents, last(x["latents"])) < 1e-5
    quantized, codes, loss = a.quantizer(last(x["latents"]))
    assert (codes == x["indices"]).all() and len(codes.unique()) > 10
    assert error(quantized, last(x["quantized"])) < 1e-5 and error(loss, x["quantizer_loss"]) < 1e-5
    assert error(a.decode(last(x["latents"])), last(x["decoded"])) < 1e-5
    assert error(a.decode(last(x["quantized"])), last(x["decoded_quantized"])) < 1e-5


@torch.no_grad()
def test_semantic_compressor():
    about, x = golden("effnet")
    compressor = filled("compressor", about)
    std, mean = torch.tensor([0.229, 0.224, 0.225]), torch.tensor([0.485, 0.456, 0.406])
    picture = last(x["picture"]) * std + mean  # the recorded one is already normalised
    assert error(compressor.backbone(picture)[..., ::40], last(x["some_features"])) < 1e-5
    assert error(compressor(picture), last(x["semantic"])) < 1e-5


@torch.no_grad()
def test_stage_b():
    about, x = golden("stage_b")
    b = filled("b", about, text_b=dict(hidden_size=about["config"]["clip_embd"]))
    noise = b(last(x["x"]), x["r"], last(x["effnet"]), x["clip"])
    assert error(noise, last(x["noise"])) < 1e-5


@torch.no_grad()
def test_stage_c():
    about, x = golden("stage_c")
    c = filled("c", about, text=dict(hidden_size=about["config"]["c_cond"]))
    assert error(c(last(x["x"]), x["r"], x["c"]), last(x["noise"])) < 1e-5


@torch.no_grad()
def test_text_encoder():
    about, x = golden("text")
    text = filled("text", about)
    assert error(text(x["ids"], x["mask"].bool()), x["masked"]) < 1e-5
    assert error(text(x["ids"], torch.ones_like(x["mask"]).bool()), x["unmasked"]) < 1e-5


def test_diffusion():
    about, x = golden("scheduler")
    assert error(alpha_bar(x["t"]), x["alpha_bar"].flatten()) < 1e-5
    assert error(add_noise(x["x"], x["noise"], x["few_t"]), x["noised"]) < 1e-5
    for name, steps in (("60", 60), ("12", 12), ("fast", "fast")):
        assert torch.equal(timesteps(steps, "cpu"), x[f"timesteps_{name}"])
    times = timesteps(12, "cpu")
    for name, i in (("first", 0), ("middle", 5), ("last", 11)):
        fresh = normal_noise(last(x["x"]).shape, torch.Generator().manual_seed(about["generator_seed"]), "cpu")
        ours = ddpm_step(last(x["x"]), last(x["noise"]), times[i], times[i + 1], fresh)
        assert error(ours, last(x[f"{name}_step"])) < 1e-5


@pytest.fixture(scope="module")
def pipeline():
    return golden("pipeline")


@pytest.fixture(scope="module")
def snapshot(pipeline, tmp_path_factory):
    """A reduced copy of the hub's two repositories on disk."""
    folder = tmp_path_factory.mktemp("hub")
    weights.write_snapshot(folder, pipeline[0]["snapshot"])
    return folder


@pytest.mark.parametrize("name", ["prompts", "guided", "fast", "unguided"])
@pytest.mark.parametrize("low_memory", [False, True])
def test_pipeline_seed_for_seed(name, low_memory, pipeline, snapshot):
    about, x = pipeline
    run, model = about["runs"][name], Wuerstchen.from_official(snapshot, low_memory=low_memory)
    seen, sample = [], wuerstchen.sample
    wuerstchen.sample = lambda *args, **options: seen.append(sample(*args, **options)) or seen[-1]
    try:
        count = run.get("num_images_per_prompt", 1)
        negative = [n for n in run["negative_prompt"] or [] for _ in range(count)] or ""
        images = model.generate([p for p in run["prompt"] for _ in range(count)], negative, run["height"], run["width"],
                                run.get("steps", FAST_TIMES), run["prior_guidance"], run["decoder_steps"],
                                run["decoder_guidance"], run["generator_seed"])
    finally:
        wuerstchen.sample = sample
    embeddings, latents = seen
    assert error(embeddings * 42 - 1, last(x[f"{name}_embeddings"])) < 1e-4
    assert error(latents, last(x[f"{name}_latents"])) < 1e-4
    assert list(images.shape[1:3]) == run["size"]
    assert error(images[:, ::5, ::5], last(x[f"{name}_some_pixels"])) < 1e-4


def test_pipeline_tokenizers(pipeline, snapshot):
    about, x = pipeline
    model = Wuerstchen.from_official(snapshot, low_memory=True)
    for name, tokenizer in (("prior", model.tokenizer), ("decoder", model.tokenizer_b)):
        ids, mask = tokenizer(about["texts"])
        assert torch.equal(ids, x[f"{name}_ids"]) and torch.equal(mask, x[f"{name}_mask"].bool())


@pytest.mark.parametrize("part", ["text", "text_b", "a", "compressor", "b", "c"])
def test_published_sizes_map_one_to_one(part):
    """Names and shapes of the full-size model, without its numbers."""
    theirs = golden("names")[0]["shapes"][part]
    with torch.device("meta"):
        model = Wuerstchen(wuerstchen.PRESETS["v2"], None)
        tensors = {name: torch.empty(shape) for name, shape in theirs.items()}
        known = {name: tensor for name, tensor in getattr(model, part).state_dict().items()
                 if name in ("scale", "latent_mean", "latent_std")}
        fill(getattr(model, part), part, tensors, known=known)
    assert len(tensors) > 100


def tiny_file(folder, header=None, data=bytes(16), length=None):
    """A safetensors file with two float32 tensors of two numbers, or with whatever is given instead."""
    if header is None:
        header = {"x": dict(dtype="F32", shape=[2], data_offsets=[0, 8]),
                  "y": dict(dtype="F32", shape=[1, 2], data_offsets=[8, 16])}
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = folder / "model.safetensors"
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64])
def test_safetensors(dtype, tmp_path):
    kind = {v: k for k, v in wuerstchen.SAFETENSORS_TYPES.items()}[dtype]
    values = torch.arange(6).to(dtype)
    header = {"__metadata__": {"format": "pt"},
              "last": dict(dtype=kind, shape=[2, 2], data_offsets=[2 * values.itemsize, 6 * values.itemsize]),
              "first": dict(dtype=kind, shape=[2], data_offsets=[0, 2 * values.itemsize]),
              "none": dict(dtype=kind, shape=[0, 3], data_offsets=[2 * values.itemsize] * 2)}
    path = tiny_file(tmp_path, header, values.view(torch.uint8).numpy().tobytes())
    read = wuerstchen.read_safetensors(path)
    assert torch.equal(read["first"], values[:2]) and torch.equal(read["last"], values[2:].view(2, 2))
    assert read["none"].shape == (0, 3) and set(read) == {"first", "last", "none"}


ENTRY = dict(dtype="F32", shape=[2], data_offsets=[0, 8])


@pytest.mark.parametrize("broken", [
    dict(data=bytes(15)), dict(data=bytes(17)), dict(data=b""), dict(length=10**15), dict(length=20), dict(header=b"{"),
    dict(header=b"[]"), dict(header=b"\xff\xfe"), dict(header=b"[" * 100_000), dict(header={"x": ENTRY}),
    dict(header={"x": ENTRY, "y": ENTRY}), dict(header={"x": ENTRY | dict(data_offsets=[8, 16])}),
    dict(header={"x": ENTRY | dict(data_offsets=[0, 16])}), dict(header={"x": ENTRY | dict(data_offsets=[16, 0])}),
    dict(header={"x": ENTRY | dict(data_offsets=[0, 10**15], shape=[10**15 // 4])}),
    dict(header={"x": ENTRY | dict(data_offsets=[-8, 8], shape=[4])}), dict(header={"x": ENTRY | dict(dtype="F99")}),
    dict(header={"x": ENTRY | dict(shape=[-2, -2], data_offsets=[0, 16])}), dict(header={"x": ENTRY | dict(shape=2)}),
    dict(header={"x": ENTRY | dict(shape=[2.0, 2], data_offsets=[0, 16])}), dict(header={"x": 3}),
    dict(header={"x": dict(dtype="F32", shape=[4])})])
def test_broken_safetensors(broken, tmp_path):
    with pytest.raises(ValueError, match="model.safetensors is") as caught:
        wuerstchen.read_safetensors(tiny_file(tmp_path, **broken))
    assert "\n" not in str(caught.value)


def test_cut_off_safetensors(tmp_path):
    whole = tiny_file(tmp_path).read_bytes()
    for size in range(len(whole)):
        (tmp_path / "cut.safetensors").write_bytes(whole[:size])
        with pytest.raises(ValueError, match="cut.safetensors is"):
            wuerstchen.read_safetensors(tmp_path / "cut.safetensors")


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_bin_files(tmp_path):
    torch.save({"x": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    assert wuerstchen.read_weights(tmp_path)["x"].tolist() == [1, 1]
    for bad in (dict(x=Trap(tmp_path / "executed")), dict(x=3), [torch.ones(2)]):
        torch.save(bad, tmp_path / "pytorch_model.bin")
        with pytest.raises(ValueError, match="damaged, or holds something else") as caught:
            wuerstchen.read_weights(tmp_path)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "executed").exists()
    (tmp_path / "pytorch_model.bin").write_bytes(b"not a file of torch")
    with pytest.raises(ValueError, match="damaged"):
        wuerstchen.read_weights(tmp_path)


def test_weights_in_parts_and_variants(tmp_path):
    for name, value in (("diffusion_pytorch_model.fp16", 1.0), ("diffusion_pytorch_model", 2.0)):
        weights.write_safetensors(tmp_path / f"{name}.safetensors", {"x": torch.full((2,), value).numpy()})
    assert wuerstchen.read_weights(tmp_path)["x"].tolist() == [2, 2]
    for i in (1, 2):
        weights.write_safetensors(tmp_path / f"model-0000{i}-of-00002.safetensors", {f"x{i}": torch.ones(2).numpy()})
    assert set(wuerstchen.read_weights(tmp_path)) == {"x1", "x2"}


def copied(snapshot, tmp_path):
    return Path(shutil.copytree(snapshot, tmp_path / "hub"))


@pytest.mark.parametrize("part", [
    "wuerstchen-prior/prior", "wuerstchen-prior/tokenizer", "wuerstchen/text_encoder",
    "wuerstchen/vqgan/diffusion_pytorch_model.safetensors", "wuerstchen/decoder/config.json"])
def test_a_snapshot_with_something_missing(part, snapshot, tmp_path):
    folder = copied(snapshot, tmp_path)
    shutil.rmtree(folder / part) if (folder / part).is_dir() else (folder / part).unlink()
    command = [sys.executable, "sample.py", "a fox", "--low-memory", "--official", folder]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=GOLDEN.parents[1])
    assert ran.returncode != 0 and ran.stderr.count("\n") == 1 and part.split("/")[1] in ran.stderr


def test_tensors_that_do_not_fit(snapshot, tmp_path):
    folder = copied(snapshot, tmp_path)
    path = folder / "wuerstchen/vqgan/diffusion_pytorch_model.safetensors"
    tensors = {name: tensor.clone().numpy() for name, tensor in wuerstchen.read_safetensors(path).items()}
    bias, weight = tensors["out_block.0.bias"], tensors["out_block.0.weight"]
    for change, message in (({"out_block.0.bias": None}, "lacks tensor out_block.0.bias$"),
                            ({"extra": bias}, "has an unknown tensor extra$"),
                            ({"out_block.0.bias": weight}, r"out_block.0.bias has shape \[12, ")):
        changed = {name: tensor for name, tensor in (tensors | change).items() if tensor is not None}
        weights.write_safetensors(path, changed)
        with pytest.raises(ValueError, match=message):
            Wuerstchen.from_official(folder)
    (folder / "wuerstchen/decoder/config.json").write_text("{}")
    with pytest.raises(ValueError, match="config.json is not the configuration expected: KeyError.'c_hidden'"):
        Wuerstchen.from_official(folder)


@pytest.mark.parametrize("options", [[], ["--low-memory"]])
def test_sample_with_a_snapshot(options, snapshot, tmp_path):
    command = [sys.executable, "sample.py", "a cat", "--official", snapshot, "--height", "100", "--width", "250",
               "--steps-c", "2", "--steps-b", "2", "--out", tmp_path / "out.png"]
    ran = subprocess.run(command + options, capture_output=True, text=True, cwd=GOLDEN.parents[1])
    assert ran.returncode == 0, ran.stderr
    assert "drawn at 128x256, the nearest size to 100x250" in ran.stdout
    assert Image.open(tmp_path / "out.png").size == (256, 128)


def test_half_precision_stays_close(snapshot):
    full, half = (Wuerstchen.from_official(snapshot, dtype=dtype).generate(["a cat"], height=128, width=128, steps_c=2,
                                                                          steps_b=2, seed=0)
                  for dtype in (torch.float32, torch.bfloat16))
    assert 0 < (full - half).abs().mean() < 0.02


def test_reconstruct_needs_the_compressor(snapshot):
    with pytest.raises(ValueError, match="no EfficientNetEncoder"):
        Wuerstchen.from_official(snapshot, low_memory=True).reconstruct(torch.rand(1, 64, 64, 3))


def test_a_snapshot_can_be_saved_as_a_run(snapshot, tmp_path):
    model = Wuerstchen.from_official(snapshot)
    model.save(tmp_path / "run")
    again = Wuerstchen.load(tmp_path / "run")
    draw = dict(prompts=["a cat!"], height=128, width=128, steps_c=2, steps_b=2, guidance_b=2.0, seed=0)
    # but for rounding: mapped weights lie otherwise aligned
    torch.testing.assert_close(model.generate(**draw), again.generate(**draw), atol=1e-5, rtol=0)


@pytest.mark.parametrize("stage", ["b", "c"])
def test_published_stages_can_be_trained_further(snapshot, tmp_path, stage):
    command = [stage, "--run", str(tmp_path / "run"), "--init-from", str(tmp_path / "hub"), "--image-size", "128",
               "--steps", "1", "--batch-size", "2", "--cache", "2", "--lr", "1e-9"]
    shutil.copytree(snapshot, tmp_path / "hub")
    with pytest.raises(ValueError, match="no EfficientNetEncoder"):
        train.main(command)
    (tmp_path / "hub" / "EfficientNetEncoder").mkdir()
    compressor = SemanticCompressor(CompressorConfig()).state_dict()
    torch.save({wuerstchen.official_name("compressor", name): x for name, x in compressor.items()},
               tmp_path / "hub" / "EfficientNetEncoder" / "model.bin")
    train.main(command)
    given, fine = Wuerstchen.from_official(tmp_path / "hub"), Wuerstchen.load(tmp_path / "run")
    for name in ("text", "text_b", "a", "b", "c"):
        for key, x in getattr(given, name).state_dict().items():
            if "latent_" not in key:
                torch.testing.assert_close(getattr(fine, name).state_dict()[key], x, atol=1e-6, rtol=1e-4, msg=key)
    assert fine.config.image_size == 128 and fine.tokenizer_b is not fine.tokenizer
