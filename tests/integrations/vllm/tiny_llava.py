"""A LLaVA that a CPU runs in seconds: its config, byte tokenizer and processor, and weights if wanted."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

IMAGE_PIXELS = 56
SPECIAL = ("<unk>", "<s>", "</s>", "<pad>", "<image>")


def write(folder: Path, *, weights: bool = False) -> Path:
    """Write the model's files, and return their folder.

    With `weights`, also weights by which its answers tell images apart: vLLM's dummies are near zero, and
    other in each rank of tensor parallel engines.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder.mkdir(parents=True, exist_ok=True)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: at for at, token in enumerate([*SPECIAL, *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=SPECIAL[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in _files(len(vocabulary)).items():
        (folder / name).write_text(json.dumps(content))
    if weights:
        _write_weights(folder)
    return folder


def _write_weights(folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    config = json.loads((folder / "config.json").read_text())
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in _shapes(config["text_config"], config["vision_config"]):
        drawn = torch.randn(shape, generator=generator) * 0.3
        weights[name] = 1 + drawn if "norm" in name else drawn
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def _shapes(text: dict[str, Any], vision: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the weights' names, as checkpoints of LLaVA have them, and their shapes."""
    rows, wide, inner = text["vocab_size"], text["hidden_size"], text["intermediate_size"]
    yield "language_model.lm_head.weight", (rows, wide)
    yield "language_model.model.embed_tokens.weight", (rows, wide)
    yield "language_model.model.norm.weight", (wide,)
    for layer in range(text["num_hidden_layers"]):
        begins = f"language_model.model.layers.{layer}"
        for name in "qkvo":
            yield f"{begins}.self_attn.{name}_proj.weight", (wide, wide)
        for name, shape in (
            ("gate", (inner, wide)),
            ("up", (inner, wide)),
            ("down", (wide, inner)),
        ):
            yield f"{begins}.mlp.{name}_proj.weight", shape
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{begins}.{name}.weight", (wide,)
    seen, side = vision["hidden_size"], vision["patch_size"]
    patches = (vision["image_size"] // side) ** 2
    begins = "vision_tower.vision_model"
    yield f"{begins}.embeddings.class_embedding", (seen,)
    yield f"{begins}.embeddings.patch_embedding.weight", (seen, 3, side, side)
    yield f"{begins}.embeddings.position_embedding.weight", (patches + 1, seen)
    for name in ("pre_layrnorm", "post_layernorm"):
        yield from _with_bias(f"{begins}.{name}", seen)
    for layer in range(vision["num_hidden_layers"]):
        within = f"{begins}.encoder.layers.{layer}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from _with_bias(f"{within}.self_attn.{name}", seen, seen)
        for name in ("layer_norm1", "layer_norm2"):
            yield from _with_bias(f"{within}.{name}", seen)
        yield from _with_bias(f"{within}.mlp.fc1", vision["intermediate_size"], seen)
        yield from _with_bias(f"{within}.mlp.fc2", seen, vision["intermediate_size"])
    yield from _with_bias("multi_modal_projector.linear_1", wide, seen)
    yield from _with_bias("multi_modal_projector.linear_2", wide, wide)


def _with_bias(name: str, *shape: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", shape
    yield f"{name}.bias", shape[:1]


def _files(vocabulary: int) -> dict[str, Any]:
    text = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "vocab_size": vocabulary,
        "max_position_embeddings": 2048,
        "torch_dtype": "float32",
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": IMAGE_PIXELS,
        "patch_size": 14,
        "projection_dim": 64,
    }
    config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": SPECIAL.index("<image>"),
        "image_seq_length": 16,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "torch_dtype": "float32",
        "tie_word_embeddings": False,
        "text_config": text,
        "vision_config": vision,
    }
    pixels = {
        "image_processor_type": "CLIPImageProcessor",
        "crop_size": {"height": IMAGE_PIXELS, "width": IMAGE_PIXELS},
        "size": {"shortest_edge": IMAGE_PIXELS},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.48, 0.46, 0.41],
        "image_std": [0.27, 0.26, 0.28],
        "resample": 3,
        "rescale_factor": 1 / 255,
    }
    processor = {
        "processor_class": "LlavaProcessor",
        "image_token": "<image>",
        "patch_size": 14,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
    }
    names = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "image_token": "<image>",
        "model_max_length": 2048,
        "extra_special_tokens": {"image_token": "<image>"},
    }
    return {
        "config.json": config,
        "preprocessor_config.json": pixels,
        "processor_config.json": processor,
        "tokenizer_config.json": names,
    }


if __name__ == "__main__":
    write(Path(sys.argv[1]))
