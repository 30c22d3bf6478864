"""Our results are those of the reference implementations; golden/record.py says how those were recorded."""
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent / "golden"))
import sample
import train
import weights
import wuerstchen
from small import last_words, one_core  # noqa: F401
from wuerstchen import Wuerstchen, add_noise, alpha_bar, ddpm_step, load_official, normal_noise, timesteps


def golden(name):
    about, arrays = weights.load(Path(__file__).parent / "golden" / f"{name}.npz")
    return about, {key: torch.from_numpy(array) for key, array in arrays.items()}


PIPELINE, SEEN = golden("pipeline")  # what is in the reduced snapshots, and what the reference generated with them


def reduced(**changes):
    """The reduced snapshots' Config. changes: to their config.json files"""
    files = PIPELINE["snapshot"]["files"]
    return wuerstchen.official_config({
        part: json.loads(files.get(f"{place}/config.json", "{}")) | changes.get(part, {})
        for part, place in wuerstchen.OFFICIAL_FOLDERS.items()})


def filled(part, about, **others):
    """One network with the described weights. others: what its sizes need from the other parts' configurations"""
    with torch.device("meta"):
        model = Wuerstchen(reduced(**{part: about["config"]}, **others), None)
    load_official(model, part, {key: torch.from_numpy(x) for key, x in weights.draw_as_described(about).items()})
    return getattr(model, part).eval()


def last(x):  # (B, C, H, W) -> (B, H, W, C)
    return x.permute(0, 2, 3, 1)


def error(ours, theirs):  # the largest difference, as a share of the largest value
    assert ours.shape == theirs.shape
    return (ours - theirs).abs().max() / theirs.abs().max()


def test_vqgan():
    about, x = golden("vqgan")
    a = filled("a", about)
    assert error(a.encode(last(x["image"])), last(x["latents"])) < 1e-5
    quantized, codes, loss = a.quantizer(last(x["latents"]))
    assert (codes == x["indices"]).all() and len(codes.unique()) > 10
    assert error(quantized, last(x["quantized"])) < 1e-5 and error(loss, x["quantizer_loss"]) < 1e-5
    assert error(a.decode(last(x["latents"])), last(x["decoded"])) < 1e-5
    assert error(a.decode(last(x["quantized"])), last(x["decoded_quantized"])) < 1e-5


def test_semantic_compressor():
    about, x = golden("effnet")
    compressor = filled("compressor", about)
    # the recorded image is already normalised: undo that
    image = last(x["image"]) * torch.tensor([0.229, 0.224, 0.225]) + torch.tensor([0.485, 0.456, 0.406])
    assert error(compressor.backbone(image)[..., ::40], last(x["some_features"])) < 1e-5
    assert error(compressor(image), last(x["semantic"])) < 1e-5


def test_stages_b_and_c_and_the_text_encoder():
    about, x = golden("stage_b")
    b = filled("b", about, text_b=dict(hidden_size=about["config"]["clip_embd"]))
    assert error(b(last(x["x"]), x["r"], last(x["effnet"]), x["clip"]), last(x["noise"])) < 1e-5
    about, x = golden("stage_c")
    c = filled("c", about, text_c=dict(hidden_size=about["config"]["c_cond"]))
    assert error(c(last(x["x"]), x["r"], x["c"]), last(x["noise"])) < 1e-5
    about, x = golden("text")
    text = filled("text_c", about)
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
def snapshot(tmp_path_factory):
    """A reduced copy of the hub's two repositories on disk."""
    folder = tmp_path_factory.mktemp("hub")
    weights.write_snapshot(folder, PIPELINE["snapshot"])
    return folder


@pytest.mark.parametrize("name", ["prompts", "guided", "fast", "unguided"])
def test_pipeline_seed_for_seed(name, snapshot, monkeypatch):
    model, seen, original = Wuerstchen.from_official(snapshot), [], wuerstchen.sample
    monkeypatch.setattr(wuerstchen, "sample", lambda *args, **o: seen.append(original(*args, **o)) or seen[-1])
    run = PIPELINE["runs"][name]
    count = run.get("num_images_per_prompt", 1)
    images = model.generate(
        [prompt for prompt in run["prompt"] for _ in range(count)],
        [negative for negative in run["negative_prompt"] or [] for _ in range(count)] or "",
        size=(run["height"], run["width"]), steps=(run.get("steps", "fast"), run["decoder_steps"]),
        guidance=(run["prior_guidance"], run["decoder_guidance"] or 1.0), seed=run["generator_seed"])
    embeddings, latents = seen
    assert error(embeddings * 42 - 1, last(SEEN[f"{name}_embeddings"])) < 1e-4
    assert error(latents, last(SEEN[f"{name}_latents"])) < 1e-4
    assert list(images.shape[1:3]) == run["size"]
    assert error(images[:, ::5, ::5], last(SEEN[f"{name}_some_pixels"])) < 1e-4
    for pipe, tokenizer in (("prior", model.tokenizer), ("decoder", model.tokenizer_b)):
        ids, mask = tokenizer(PIPELINE["texts"])
        assert torch.equal(ids, SEEN[f"{pipe}_ids"]) and torch.equal(mask, SEEN[f"{pipe}_mask"].bool())


def test_names_and_shapes_of_the_published_model_map_one_to_one():
    with torch.device("meta"):
        full = Wuerstchen(wuerstchen.PRESETS["v2"], None)
        for part, shapes in golden("names")[0]["shapes"].items():
            part = "text_c" if part == "text" else part
            load_official(full, part, {name: torch.empty(shape) for name, shape in shapes.items()})


def test_a_stage_b_of_three_levels():
    """By hand, what the hub would call its layers. D: down, C: residual block, T: time, A: attention, U: up."""
    layers = {"D": ["1"], "U": ["1"], "T": ["mapper"], "C": ["depthwise", *(f"channelwise.{i}" for i in (0, 2, 4))],
              "A": ["kv_mapper.1", *(f"attention.to_{name}" for name in ("q", "k", "v", "out.0"))]}
    theirs = {"embedding.1", "clip_mapper", "clf.1", *(f"effnet_mappers.{i}" for i in range(6))}
    for place, levels in {"down": ("CT", "DCTA", "DCTACTA"), "up": ("CTACTAU", "CTAU", "CT")}.items():
        theirs |= {f"{place}_blocks.{i}.{j}.{layer}" for i, level in enumerate(levels)
                   for j, kind in enumerate(level) for layer in layers[kind]}
    b = dict(c_hidden=[16, 32, 48], nhead=[-1, 2, 3], blocks=[1, 1, 2], inject_effnet=[True] * 3)
    three = Wuerstchen(reduced(b=b), None)
    shapes = {wuerstchen.official_name("b", name, three.config): x.shape for name, x in three.b.state_dict().items()}
    assert {name.rsplit(".", 1)[0] for name in shapes} == theirs and len(shapes) == len(three.b.state_dict())
    load_official(three, "b", {name: torch.from_numpy(x) for name, x in weights.draw(shapes, seed=3).items()})


def test_weight_files(tmp_path):
    """fp16 variants only where there is nothing else; files in parts; .bin files, but no code in them is run."""
    for name, read in {"x.fp16": ["x.fp16"], "x-1-of-2": ["x-1-of-2"], "x-2-of-2": ["x-1-of-2", "x-2-of-2"]}.items():
        weights.write_safetensors(tmp_path / f"{name}.safetensors", {name: np.ones(2, np.float32)})
        assert sorted(wuerstchen.read_weights(tmp_path)) == read
    (tmp_path / "bin").mkdir()
    torch.save({"x": torch.ones(2)}, tmp_path / "bin/model.bin")
    assert wuerstchen.read_weights(tmp_path / "bin")["x"].tolist() == [1, 1]
    torch.save({"x": print}, tmp_path / "bin/model.bin")
    with pytest.raises(wuerstchen.UserError, match="model.bin: it may be damaged") as refused:
        wuerstchen.read_weights(tmp_path / "bin")
    assert "Weights only load failed" in str(refused.value.__cause__)
    pointer, cut = b"version https://git-lfs.github.com/spec/v1\n", (tmp_path / "x.fp16.safetensors").read_bytes()[:-3]
    for damaged in (b"", pointer, cut):
        (tmp_path / "bin/model.safetensors").write_bytes(damaged)
        with pytest.raises(wuerstchen.UserError, match="model.safetensors: it may be damaged"):
            wuerstchen.read_weights(tmp_path / "bin")


def test_safetensors(tmp_path):
    path, written = tmp_path / "model.safetensors", {
        "x": np.float32([[1, 2], [3, 4]]), "h": np.float16([[5], [6]]), "c": np.int64([7]), "a": np.array(8)}
    weights.write_safetensors(path, written)
    read, whole = wuerstchen.read_safetensors(path), path.read_bytes()
    assert repr({name: x.numpy() for name, x in read.items()}) == repr(written)
    path.write_bytes(whole.replace(b' "F16"', b'"BF16"'))
    assert torch.equal(wuerstchen.read_safetensors(path)["h"], read["h"].view(torch.bfloat16))
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError):
            wuerstchen.read_safetensors(path)


@pytest.mark.parametrize("part", ["wuerstchen-prior/prior", "wuerstchen-prior/tokenizer", "wuerstchen/text_encoder",
                                  "wuerstchen/vqgan/diffusion_pytorch_model.safetensors"])
def test_a_snapshot_with_something_missing(part, snapshot, tmp_path):
    shutil.copytree(snapshot, tmp_path, dirs_exist_ok=True)
    (tmp_path / part).rename(tmp_path / "elsewhere")
    assert f"/{part.split('/')[1]}" in last_words("sample.py", "a fox", "--official", tmp_path)


def test_tensors_that_do_not_fit(snapshot):
    tensors = wuerstchen.read_weights(snapshot / "wuerstchen/vqgan")
    tensors |= {"extra": tensors.pop("out_block.0.bias"), "out_block.0.weight": tensors["out_block.0.weight"][1:]}
    with pytest.raises(RuntimeError, match='(?s)Missing.*"to_pixels.bias".*Unexpected.*"extra".*for to_pixels.weight'):
        load_official(Wuerstchen.from_official(snapshot), "a", tensors)


def test_script_half_precision_and_saved_run_give_the_same_image(snapshot, tmp_path, capsys):
    model = Wuerstchen.from_official(snapshot)
    options = dict(prompts=["a cat"], size=(100, 250), steps=(2, 2), guidance=(4.0, 1.0), seed=[0])
    command = f"--official {snapshot} --height 100 --width 250 --steps-c 2 --steps-b 2 --out {tmp_path}/out.png"
    sample.main(["a cat", *command.split()])
    generated = model.generate(**options)
    assert np.array_equal(Image.open(tmp_path / "out.png"), sample.to_pil(generated[0]))
    assert "generating with height 128, width 256: " in capsys.readouterr().out
    half = Wuerstchen.from_official(snapshot, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert half.b.out.weight.dtype == torch.bfloat16 and (half.generate(**options) - generated).abs().mean() < 0.02
    model.save(tmp_path / "run")
    again = Wuerstchen.load(tmp_path / "run")
    # Differently aligned weights round differently.
    torch.testing.assert_close(again.generate(**options), generated, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="no EfficientNetEncoder"):
        again.reconstruct(torch.rand(1, 64, 64, 3))


def test_published_stages_can_be_trained_further(snapshot, tmp_path, monkeypatch):
    config = replace(reduced(), compressor=wuerstchen.PRESETS["tiny"].compressor)  # the full one takes a minute
    monkeypatch.setattr(wuerstchen, "official_config", lambda c: replace(config))
    hub, run = shutil.copytree(snapshot, tmp_path / "hub"), tmp_path / "run"
    command = ["--run", str(run), "--init-from", str(hub), "--image-size", "64", "--steps", "1", "--batch-size", "2",
               "--cache", "2", "--lr", "1e-9"]
    with pytest.raises(ValueError, match="no EfficientNetEncoder"):
        train.main(["b", *command])
    (hub / "EfficientNetEncoder").mkdir()
    compressor = wuerstchen.SemanticCompressor(config).state_dict()
    torch.save({wuerstchen.official_name("compressor", name, config): x for name, x in compressor.items()},
               hub / "EfficientNetEncoder/model.bin")
    for stage in "bc":
        train.main([stage, *command])
    given, fine = Wuerstchen.from_official(hub), Wuerstchen.load(run)
    for (name, x), y in zip(given.named_parameters(), fine.parameters(), strict=True):
        torch.testing.assert_close(x, y, atol=1e-6, rtol=1e-4, msg=name)
    assert fine.config.image_size == 64 and fine.tokenizer_b is not fine.tokenizer
