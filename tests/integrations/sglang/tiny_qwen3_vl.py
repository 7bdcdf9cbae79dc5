"""A Qwen3-VL that a CPU runs in seconds: its config, byte tokenizer and processor, and no weights."""

import json
from pathlib import Path
from typing import Any

SPECIAL = (
    *("<unk>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"),
    *("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"),
)
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


def write(folder: Path) -> Path:
    """Write the model's files, and return their folder."""
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
    return folder


def _files(vocabulary: int) -> dict[str, Any]:
    text = {
        "model_type": "qwen3_vl_text",
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "vocab_size": vocabulary,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": {
            "rope_type": "default",
            "mrope_section": [6, 5, 5],
            "mrope_interleaved": True,
        },
        "torch_dtype": "float32",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "attention_bias": False,
    }
    patches = {"patch_size": 14, "temporal_patch_size": 2}
    vision = patches | {
        "model_type": "qwen3_vl",
        "depth": 2,
        "hidden_size": 64,
        "out_hidden_size": 128,
        "intermediate_size": 128,
        "hidden_act": "gelu_pytorch_tanh",
        "num_heads": 2,
        "in_channels": 3,
        "spatial_merge_size": 2,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1],
    }
    config = {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "text_config": text,
        "vision_config": vision,
        "image_token_id": SPECIAL.index("<|image_pad|>"),
        "video_token_id": SPECIAL.index("<|video_pad|>"),
        "vision_start_token_id": SPECIAL.index("<|vision_start|>"),
        "vision_end_token_id": SPECIAL.index("<|vision_end|>"),
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }
    return {
        "config.json": config,
        "generation_config.json": {"eos_token_id": 2, "do_sample": False},
        "tokenizer_config.json": {
            "tokenizer_class": "Qwen2TokenizerFast",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "unk_token": "<unk>",
            "model_max_length": 2048,
            "extra_special_tokens": {
                "image_token": "<|image_pad|>",
                "video_token": "<|video_pad|>",
            },
        },
        "preprocessor_config.json": patches
        | {
            "image_processor_type": "Qwen2VLImageProcessorFast",
            "processor_class": "Qwen3VLProcessor",
            "merge_size": 2,
            "min_pixels": 3136,
            "max_pixels": 50176,
            "image_mean": [0.5] * 3,
            "image_std": [0.5] * 3,
        },
        "video_preprocessor_config.json": patches
        | {"video_processor_type": "Qwen3VLVideoProcessor", "merge_size": 2},
    }
