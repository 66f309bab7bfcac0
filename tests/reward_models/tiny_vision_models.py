"""A vision-language model of a few thousand weights with its processor, made here."""

import numpy as np
import tiny_models
import torch

IMAGE = "<image>"


def processor():
    from transformers import CLIPImageProcessor, LlavaProcessor

    tokenizer = tiny_models.tokenizer()
    tokenizer.add_tokens([IMAGE], special_tokens=True)
    images = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    return LlavaProcessor(
        images, tokenizer, patch_size=4, vision_feature_select_strategy="default", image_token=IMAGE,
        num_additional_image_tokens=1,
    )  # fmt: skip


def model(seed=0):
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaModel

    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    place = tiny_models.tokenizer()
    place.add_tokens([IMAGE], special_tokens=True)
    number = place.convert_tokens_to_ids(IMAGE)
    # LLaVA reads the last layer but one of the vision tower; a larger start lets the image show
    vision = CLIPVisionConfig(image_size=8, patch_size=4, projection_dim=16, initializer_factor=5.0, **sizes)
    text = LlamaConfig(vocab_size=64, pad_token_id=0, initializer_range=0.2, **sizes)
    config = LlavaConfig(
        vision_config=vision.to_dict(), text_config=text.to_dict(), image_token_index=number,
        vision_feature_select_strategy="default", initializer_range=0.2,
    )  # fmt: skip
    config.image_token_id = number
    return LlavaModel(config).eval()


def image(bright, seed=0):
    """An 8 x 8 image whose left half is bright, or whose right half is."""
    from PIL import Image

    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 60, size=(8, 8, 3))
    pixels[:, :4] += 190 if bright else 0
    pixels[:, 4:] += 0 if bright else 190
    return Image.fromarray(pixels.astype(np.uint8))


def question(picture, text="is the cat"):
    return [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": text}]}]


class QwenProcessor:
    """What the processor of Qwen2-VL gives for images, without the video part, which needs torchvision."""

    chat_template = None
    image_token = "<|image_pad|>"

    def __init__(self):
        from transformers import Qwen2VLImageProcessor

        self.tokenizer = tiny_models.tokenizer()
        names = ["<|vision_start|>", "<|vision_end|>", self.image_token, "<|video_pad|>"]
        self.tokenizer.add_tokens(names, special_tokens=True)
        self.numbers = self.tokenizer.convert_tokens_to_ids(names)
        self.image_processor = Qwen2VLImageProcessor(min_pixels=256, max_pixels=256, patch_size=4, merge_size=2)

    def __call__(self, text, images, return_tensors):
        seen = dict(self.image_processor(images=images, return_tensors=return_tensors))
        counts = iter((seen["image_grid_thw"].prod(-1) // 4).tolist())
        written = []
        for one in text:
            first, *rest = one.split(self.image_token)
            written.append(first + "".join(self.image_token * next(counts) + part for part in rest))
        tokens = self.tokenizer(written, return_tensors=return_tensors, padding=True)
        ids = tokens["input_ids"]
        kinds = (ids == self.numbers[2]).long()
        return {"input_ids": ids, "attention_mask": tokens["attention_mask"], "mm_token_type_ids": kinds, **seen}


def qwen(processor, seed=0):
    """A Qwen2-VL, whose images are patches of several in one row and whose positions follow them."""
    from transformers import Qwen2VLConfig, Qwen2VLModel

    start, end, picture, video = processor.numbers
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    text = {
        "vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
        "intermediate_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "initializer_range": 0.2,
        "rope_parameters": rope,
    }  # fmt: skip
    vision = {
        "depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2,
        "mlp_ratio": 2, "initializer_range": 0.2,
    }  # fmt: skip
    torch.manual_seed(seed)
    config = Qwen2VLConfig(
        text_config=text, vision_config=vision, image_token_id=picture, video_token_id=video,
        vision_start_token_id=start, vision_end_token_id=end,
    )  # fmt: skip
    return Qwen2VLModel(config).eval()
