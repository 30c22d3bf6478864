"""Record what the reference implementations answer, for the tests to compare this project with.

    python tests/golden/record.py [name ...]        names: see RECORDERS; default: all

Run it in an environment with torch 2.13.0, diffusers 0.42.1, transformers 5.23.0 and torchvision 0.28.0; the tests
themselves need none but torch. Everything is computed in float32 on the CPU, with reduced models whose weights follow
from a seed (weights.py) and are therefore not stored. Every file holds `about`, a JSON text with the models' configs,
tensor shapes and seeds and the versions used, and the inputs and outputs as arrays.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import weights

try:
    import torchvision
except RuntimeError:  # a CUDA build of torchvision imports beside a CPU build of torch once its operators are named
    operators = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        operators.define(operator + "(Tensor boxes, Tensor scores, float threshold) -> Tensor")
    import torchvision

import diffusers
import transformers
from diffusers import DDPMWuerstchenScheduler
from diffusers.pipelines.deprecated import wuerstchen as reference
from diffusers.utils import logging
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

logging.set_verbosity_error()
HERE = Path(__file__).parent
VERSIONS = {m.__name__: m.__version__ for m in (torch, diffusers, transformers, torchvision, np)}

VQGAN = {"embed_dim": 24, "bottleneck_blocks": 2, "num_vq_embeddings": 64}
STAGE_B = {"c_hidden": [16, 32, 48, 48], "nhead": [-1, 2, 3, 3], "blocks": [1, 2, 2, 1], "c_cond": 24, "clip_embd": 20}
STAGE_C = {"c": 48, "c_cond": 20, "depth": 3, "nhead": 3}
TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
TEXT |= {"vocab_size": 200, "max_position_embeddings": 16, "bos_token_id": 198, "eos_token_id": 199}


def config_of(model):
    """What the reference itself writes into a model's config.json."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return json.loads(Path(folder, "config.json").read_text())


def describe(model, seed, gain=1.0, adjust=None):
    """Fill a reference model with drawn weights; the description from which weights.py draws the same ones."""
    about = {"class": type(model).__name__, "seed": seed, "gain": gain, "adjust": adjust or {}}
    about["config"] = config_of(model) if hasattr(model, "save_pretrained") else {}
    about["shapes"] = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    tensors = weights.draw(about["shapes"], seed, gain, adjust)
    about["fingerprint"] = weights.fingerprint(tensors)
    model.load_state_dict({name: torch.from_numpy(array) for name, array in tensors.items()}, strict=True)
    model.eval()
    return about


def random_input(seed, *shape, uniform=False):
    """An image (uniform, steps of 1/64) or normal numbers (steps of 1/16); round numbers compress well."""
    rng = np.random.default_rng(seed)
    if uniform:
        return torch.from_numpy((rng.integers(0, 65, shape) / 64).astype(np.float32))
    return torch.from_numpy((np.round(rng.standard_normal(shape) * 16) / 16).astype(np.float32))


def save(name, about, **arrays):
    """Write tests/golden/name.npz and print what is in it."""
    arrays = {key: np.asarray(value) for key, value in arrays.items()}
    np.savez_compressed(HERE / f"{name}.npz", about=json.dumps({**about, "versions": VERSIONS}), **arrays)
    print(f"{name}.npz: {(HERE / f'{name}.npz').stat().st_size / 1000:.0f} kB")
    for key, value in arrays.items():
        if value.dtype == np.float32:
            assert np.isfinite(value).all(), key
            print(f"    {key} {value.shape}: mean {value.mean():.3f}, std {value.std():.3f}")


def vqgan():
    """Stage A: encoding, quantizing, and decoding with and without quantization."""
    model = reference.PaellaVQModel(**VQGAN)
    about = describe(model, seed=1)
    image = random_input(10, 2, 3, 24, 40, uniform=True)
    latents = model.encode(image).latents
    quantized, loss, (_, _, indices) = model.vquantizer(latents)
    save("vqgan", about, image=image, latents=latents, quantized=quantized, quantizer_loss=loss,
         indices=indices.reshape(2, *latents.shape[2:]), decoded=model.decode(latents).sample,
         decoded_quantized=model.decode(latents, force_not_quantize=False).sample)


def effnet():
    """The semantic compressor, at full size: EfficientNetV2-S and its mapper. The image is already normalised."""
    model = torch.nn.Module()
    model.backbone = torchvision.models.efficientnet_v2_s().features
    model.mapper = torch.nn.Sequential(torch.nn.Conv2d(1280, 16, 1, bias=False), torch.nn.BatchNorm2d(16))
    about = describe(model, seed=2, gain=1.2)
    image = random_input(20, 2, 3, 72, 104)
    features = model.backbone(image)
    save("effnet", about, image=image, some_features=features[:, ::40], semantic=model.mapper(features))


def stage_b():
    """Stage B: the predicted noise, and the two images it is made of (every third row and column)."""
    model = reference.WuerstchenDiffNeXt(**STAGE_B)
    about = describe(model, seed=3)
    inputs = {"x": random_input(30, 2, 4, 32, 48), "r": torch.tensor([0.83, 0.127]),
              "effnet": random_input(31, 2, 16, 3, 5), "clip": random_input(32, 2, 7, 20)}
    a, b = model(**inputs, return_noise=False)
    save("stage_b", about, **inputs, noise=model(**inputs), some_a=a[..., ::3, ::3], some_b=b[..., ::3, ::3])


def stage_c():
    """Stage C on an odd grid."""
    model = reference.WuerstchenPrior(**STAGE_C)
    about = describe(model, seed=4, adjust={"out.1.weight": [0.25, 0]})
    inputs = {"x": random_input(40, 3, 16, 3, 5), "r": torch.tensor([1.0, 0.611, 0.05]),
              "c": random_input(41, 3, 7, 20)}
    save("stage_c", about, **inputs, noise=model(**inputs))


def text():
    """A text encoder, without and with the mask of an unpadded beginning, as the pipelines use it."""
    model = CLIPTextModel(CLIPTextConfig(**TEXT, hidden_act="gelu"))
    about = describe(model, seed=5)
    ids = torch.from_numpy(np.random.default_rng(50).integers(0, 198, (3, 16)))
    mask = torch.ones_like(ids)
    ids[:, 0], ids[2, 15] = 198, 199
    for row, length, pad in ((0, 4, 199), (1, 9, 0)):
        ids[row, length - 1], ids[row, length:], mask[row, length:] = 199, pad, 0
    save("text", about, ids=ids, mask=mask, unmasked=model(ids).last_hidden_state,
         masked=model(ids, attention_mask=mask).last_hidden_state)


def scheduler():
    """The noise schedule, adding noise, single steps, and the lists of timesteps."""
    schedule = DDPMWuerstchenScheduler()
    t = torch.cat([torch.linspace(0, 1, 101), torch.tensor([0.001, 0.9999, 1 / 3])])
    x, noise, few = random_input(60, 3, 4, 5, 6), random_input(61, 3, 4, 5, 6), torch.tensor([0.9, 0.4, 0.05])
    arrays = {"t": t, "alpha_bar": schedule._alpha_cumprod(t, t.device), "x": x, "noise": noise, "few_t": few,
              "noised": schedule.add_noise(x, noise, few)}
    for name, steps in (("60", 60), ("12", 12), ("fast", None)):
        fast = [float(value) for value in reference.DEFAULT_STAGE_C_TIMESTEPS]
        schedule.set_timesteps(steps, timesteps=None if steps else fast)
        arrays[f"timesteps_{name}"] = schedule.timesteps
    schedule.set_timesteps(12)
    for name, index in (("first", 0), ("middle", 5), ("last", 11)):
        generator = torch.Generator().manual_seed(62)
        step = schedule.step(noise, schedule.timesteps[index].expand(3), x, generator=generator)
        arrays[f"{name}_step"] = step.prev_sample
    save("scheduler", {"config": dict(schedule.config), "generator_seed": 62, "of": "12 steps: 0, 5 and 11"}, **arrays)


def names():
    """Every tensor's name and shape in the published sizes, from the references' classes; no numbers."""
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    towers = {"text": dict(zip(keys, (1280, 5120, 32, 20))), "text_b": dict(zip(keys, (1024, 4096, 24, 16)))}
    towers = {part: CLIPTextConfig(vocab_size=49408, max_position_embeddings=77, hidden_act="gelu", **sizes)
              for part, sizes in towers.items()}
    with torch.device("meta"):
        compressor = torch.nn.Module()
        compressor.backbone = torchvision.models.efficientnet_v2_s().features
        compressor.mapper = torch.nn.Sequential(torch.nn.Conv2d(1280, 16, 1, bias=False), torch.nn.BatchNorm2d(16))
        models = {"a": reference.PaellaVQModel(), "b": reference.WuerstchenDiffNeXt(), "compressor": compressor,
                  "c": reference.WuerstchenPrior(c_in=16, c=1536, c_cond=1280, c_r=64, depth=32, nhead=24),
                  **{part: CLIPTextModel(config) for part, config in towers.items()}}
    save("names", {"shapes": {part: {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
                              for part, model in models.items()}})


# --- the whole pipeline ----------------------------------------------------------------------------------------------

PROMPTS = ["The cat and the dog!", "a small house on a hill, at night 42"]
NEGATIVE = ["blurry", "the worst"]
MERGES = ("t h|th e</w>|a n|an d</w>|c a|ca t</w>|d o|do g</w>|h o|u s|ho us|hous e</w>|i n|o n</w>|a t</w>|"
          "h i|l l</w>|hi ll</w>|s m|sm a|sma ll</w>|n i|g h|ni gh|nigh t</w>|b l|bl u|r r|blu rr|blurr y</w>|"
          "w o|r s|wo rs|s t</w>|! !</w>").split("|")


def vocabulary():
    """A small CLIP vocabulary: 256 byte symbols, the same at a word's end, MERGES, start and end."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that stand for themselves come first
    symbols = [chr(byte) for byte in shown] + [chr(256 + i) for i in range(256 - len(shown))]
    tokens = symbols + [symbol + "</w>" for symbol in symbols] + [merge.replace(" ", "") for merge in MERGES]
    return {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}


def tokenizer_files(folder, pad):
    """The files of a tokenizer folder as they lie on the hub."""
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    tokens = {key: {"__type": "AddedToken", "content": value, "lstrip": False, "normalized": True, "rstrip": False,
                    "single_word": False} for key, value in special.items()} | {"pad_token": pad}
    config = {**tokens, "add_prefix_space": False, "do_lower_case": True, "errors": "replace", "model_max_length": 16,
              "tokenizer_class": "CLIPTokenizer"}
    return {f"{folder}/vocab.json": json.dumps(vocabulary(), ensure_ascii=False),
            f"{folder}/merges.txt": "\n".join(["#version: 0.2", *MERGES]) + "\n",
            f"{folder}/tokenizer_config.json": json.dumps(config),
            f"{folder}/special_tokens_map.json": json.dumps({**special, "pad_token": pad})}


def build_snapshot():
    """Describe reduced copies of the hub's two repositories: text files, and the weight files' rule."""
    words = {**TEXT, "hidden_act": "gelu", "vocab_size": len(vocabulary()), "bos_token_id": len(vocabulary()) - 2,
             "eos_token_id": len(vocabulary()) - 1}
    # Random networks denoise nothing: a noise close to x - a with a small a keeps latents and images in range.
    out_of_b = {"clf.1.weight": [0.15, 0], "clf.1.bias": [1, [0] * 16 + [3] * 16]}
    out_of_b |= {f"effnet_mappers.{level}.weight": [0.05, 0] for level in range(1, 7)}
    to_grey = {"out_block.0.weight": [0.14, 0], "out_block.0.bias": [0.5, 0.5]}
    parts = {
        "wuerstchen-prior/prior": (reference.WuerstchenPrior(**STAGE_C), 70, {"out.1.weight": [0.1, 0]}),
        "wuerstchen-prior/text_encoder": (CLIPTextModel(CLIPTextConfig(**words | {"hidden_size": 20})), 71, {}),
        "wuerstchen/decoder": (reference.WuerstchenDiffNeXt(**STAGE_B | {"clip_embd": 32}), 72, out_of_b),
        "wuerstchen/text_encoder": (CLIPTextModel(CLIPTextConfig(**words)), 73, {}),
        "wuerstchen/vqgan": (reference.PaellaVQModel(**VQGAN), 74, to_grey),
    }
    snapshot = {"files": {}, "models": {}}
    for folder, (model, seed, adjust) in parts.items():
        about = describe(model, seed, adjust=adjust)
        snapshot["files"][f"{folder}/config.json"] = json.dumps(about["config"])
        is_text = folder.endswith("text_encoder")
        if folder == "wuerstchen-prior/text_encoder":  # named as files by transformers 4 name them, like the hub's
            about["shapes"] = {f"text_model.{name}": shape for name, shape in about["shapes"].items()}
            about["shapes"]["text_model.embeddings.position_ids"] = [1, 16]
            about["fingerprint"] = weights.fingerprint(weights.draw(about["shapes"], seed, adjust=adjust))
        snapshot["models"][f"{folder}/{'model' if is_text else 'diffusion_pytorch_model'}.safetensors"] = about
    numbers = {"wuerstchen-prior": {"latent_mean": 42.0, "latent_std": 1.0, "resolution_multiple": 42.67},
               "wuerstchen": {"latent_dim_scale": 10.67}}
    version = {"_diffusers_version": "0.21.0.dev0"}
    for repository, pad in (("wuerstchen-prior", "!"), ("wuerstchen", "<|endoftext|>")):
        name = "Prior" if repository == "wuerstchen-prior" else "Decoder"
        index = {"_class_name": f"Wuerstchen{name}Pipeline", **version, **numbers[repository],
                 "scheduler": ["diffusers", "DDPMWuerstchenScheduler"],
                 "text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizerFast"]}
        for folder, (model, *_) in parts.items():
            if folder.startswith(f"{repository}/") and not folder.endswith("text_encoder"):
                index[folder.split("/")[1]] = ["wuerstchen", type(model).__name__]
        schedule = {"_class_name": "DDPMWuerstchenScheduler", **version, "s": 0.008, "scaler": 1.0}
        snapshot["files"] |= tokenizer_files(f"{repository}/tokenizer", pad)
        snapshot["files"][f"{repository}/scheduler/scheduler_config.json"] = json.dumps(schedule)
        snapshot["files"][f"{repository}/model_index.json"] = json.dumps(index)
    return snapshot


class DecoderForManyPrompts(reference.WuerstchenDecoderPipeline):
    """The reference repeats each prompt once per image, also if there are several prompts, and then fails."""

    def encode_prompt(self, prompt, device, images, *others):
        return super().encode_prompt(prompt, device, images // len(prompt), *others)


def load_pipelines(folder):
    """The reference's two pipelines from snapshot folders, part by part.

    Published model_index.json files name a module that diffusers no longer has, so it cannot follow them itself.
    """
    def load(kind, part):
        return kind.from_pretrained(f"{folder}/{part}")

    def pipeline_of(kind, repository, **parts):
        index = json.loads(Path(folder, repository, "model_index.json").read_text())
        numbers = {name: value for name, value in index.items() if isinstance(value, float)}
        pipe = kind(load(CLIPTokenizer, f"{repository}/tokenizer"), load(CLIPTextModel, f"{repository}/text_encoder"),
                    scheduler=load(DDPMWuerstchenScheduler, f"{repository}/scheduler"), **parts, **numbers)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    prior = load(reference.WuerstchenPrior, "wuerstchen-prior/prior")
    decoder, vqgan = (load(reference.WuerstchenDiffNeXt, "wuerstchen/decoder"),
                      load(reference.PaellaVQModel, "wuerstchen/vqgan"))
    return (pipeline_of(reference.WuerstchenPriorPipeline, "wuerstchen-prior", prior=prior),
            pipeline_of(DecoderForManyPrompts, "wuerstchen", decoder=decoder, vqgan=vqgan))


def pipeline():
    """Text to image, from snapshot folders: several prompts, several images of one prompt, the short list."""
    snapshot = build_snapshot()
    fast = [float(value) for value in reference.DEFAULT_STAGE_C_TIMESTEPS]
    runs = {
        "prompts": {"prompt": PROMPTS, "negative_prompt": NEGATIVE, "height": 100, "width": 256, "steps": 4,
                    "prior_guidance": 4.0, "decoder_guidance": 0.0},
        "guided": {"prompt": PROMPTS[:1], "negative_prompt": NEGATIVE[:1], "height": 256, "width": 128, "steps": 4,
                   "prior_guidance": 4.0, "decoder_guidance": 1.5, "num_images_per_prompt": 2},
        "fast": {"prompt": PROMPTS[1:], "negative_prompt": None, "height": 128, "width": 128, "timesteps": fast,
                 "prior_guidance": 4.0, "decoder_guidance": 0.0},
        "unguided": {"prompt": PROMPTS[:1], "negative_prompt": None, "height": 128, "width": 128, "steps": 2,
                     "prior_guidance": 1.0, "decoder_guidance": 0.0},
    }
    arrays = {}
    with tempfile.TemporaryDirectory() as folder:
        weights.write_snapshot(folder, snapshot)
        prior, decoder = load_pipelines(folder)
    for name, pipe in (("prior", prior), ("decoder", decoder)):
        tokens = pipe.tokenizer(PROMPTS + NEGATIVE + [""], padding="max_length", max_length=16, truncation=True)
        arrays[f"{name}_ids"], arrays[f"{name}_mask"] = tokens["input_ids"], tokens["attention_mask"]
    for seed, (name, run) in enumerate(runs.items(), start=80):
        run |= {"generator_seed": seed, "decoder_steps": 3}
        generator = torch.Generator().manual_seed(seed)
        embeddings = prior(run["prompt"], height=run["height"], width=run["width"], generator=generator,
                           num_inference_steps=run.get("steps", 60), timesteps=run.get("timesteps"),
                           guidance_scale=run["prior_guidance"], negative_prompt=run["negative_prompt"],
                           num_images_per_prompt=run.get("num_images_per_prompt", 1)).image_embeddings
        latents = {}
        image = decoder(embeddings, run["prompt"], num_inference_steps=3, guidance_scale=run["decoder_guidance"],
                          negative_prompt=run["negative_prompt"], generator=generator, output_type="pt",
                          callback_on_step_end=lambda _, i, t, values: latents.update(values) or {}).images
        clipped = ((image <= 0) | (image >= 1)).float().mean()
        assert clipped < 0.05, f"{clipped:.3f} of the image is clipped"
        run["size"] = list(image.shape[2:])
        arrays |= {f"{name}_embeddings": embeddings, f"{name}_latents": latents["latents"],
                   f"{name}_some_pixels": image[..., ::5, ::5]}
    save("pipeline", {"snapshot": snapshot, "runs": runs, "texts": PROMPTS + NEGATIVE + [""]}, **arrays)


RECORDERS = {"vqgan": vqgan, "effnet": effnet, "stage_b": stage_b, "stage_c": stage_c, "text": text,
             "scheduler": scheduler, "names": names, "pipeline": pipeline}

if __name__ == "__main__":
    with torch.no_grad():
        for choice in sys.argv[1:] or RECORDERS:
            RECORDERS[choice]()
