"""Idefics3 and SmolVLM against transformers: tiles, the tokens around them, buckets of positions, the shuffle."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest

import pyengine as pe
import tiny
from cases import Case, Converted, Tokens
from converters import convert
from foreign import Dialect, llama_keys, llama_turned, LlamaCpp, Saved, Tensors, vision_name
from oracle import encoder_of
from pyengine.errors import ContextOverflowError, RequestError, UnsupportedModelError
from pyengine.media.image import Image
from pyengine.models.encoders import idefics3
from pyengine.nn.encoder import buckets
from sight import of_any_backend, Run, Seen, Sight
from tiny import COMMON

try:
    import transformers
    from transformers.video_utils import VideoMetadata
except ImportError:         # the cases are found without it
    transformers = None

pytestmark = pytest.mark.skipif(transformers is None, reason="needs transformers and torch: pip install -r requirements/test.txt")

# What the family's real template does, in other words.
TEMPLATE = """{{ '<|im_start|>' }}
{%- for m in messages -%}
  {{ m['role'] | capitalize + ':' + ('' if m['content'] is not string and m['content'][0]['type'] == 'image' else ' ') }}
  {%- if m['content'] is string -%}{{ m['content'] }}
  {%- else -%}{%- for part in m['content'] -%}{{ '<image>' if part['type'] == 'image' else part['text'] }}{%- endfor -%}
  {%- endif -%}
  {{ '<end_of_utterance>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'Assistant:' }}{%- endif -%}"""
PLACES = tuple(f"<row_{i}_col_{j}>" for i in range(1, 3) for j in range(1, 3))           # others are texts here
TOKENS = Tokens(("<|im_start|>", "<image>", "<end_of_utterance>", "<pad>", "<fake_token_around_image>", "<global-img>", *PLACES), "<|im_start|>",
                "<end_of_utterance>", "<pad>", TEMPLATE, {"image_token_id": "<image>"}, ("\n\n",))


class Idefics3Sight(Sight):
    """Tiles, and the whole. Videos need torchvision and num2words there: here each frame goes through the processor of pictures, without tiles."""

    model_types, marker = ("idefics3", "smolvlm"), "<image>"

    def seen(self, model: Any, folder: Path, parts: Any, fps: float | None, **settings: Any) -> Seen:
        self.fps = fps
        return super().seen(model, folder, parts, fps, **settings)

    def part(self, processor: Any, config: Any, folder: Path, part: Any, **settings: Any) -> tuple[list[int], dict[str, Any]]:
        if not isinstance(part, (list, tuple)):
            return super().part(processor, config, folder, part, **settings)
        made = processor.image_processor(images=list(part), do_image_splitting=False, return_tensors="pt")
        text = film_text(processor, len(part), VideoMetadata(len(part), self.fps, frames_indices=list(range(len(part)))))
        return processor.tokenizer(text, add_special_tokens=False)["input_ids"], made

    def images(self, config: Any, settings: dict[str, Any]) -> Any:
        side = config.vision_config.image_size
        return transformers.Idefics3ImageProcessorPil(**{"size": {"longest_edge": 3 * side}, "max_image_size": {"longest_edge": side}, **settings})

    def processor(self, folder: Path, config: Any, tokenizer: Any) -> Any:
        """SmolVLM's needs a package for videos; what it makes of pictures is the same."""
        package = "transformers.models.idefics3"
        if importlib.util.find_spec("torchvision") is None:
            pillow = importlib.import_module(f"{package}.image_processing_pil_idefics3")
            sys.modules.setdefault(f"{package}.image_processing_idefics3", pillow)
        base = importlib.import_module(f"{package}.processing_idefics3").Idefics3Processor
        side = config.vision_config.image_size // config.vision_config.patch_size // config.scale_factor
        return of_any_backend(base)(transformers.Idefics3ImageProcessorPil.from_pretrained(folder), tokenizer, side**2)

    def run(self, model: Any, tokens: Any, made: list[dict[str, Any]], fps: float | None) -> Run:
        import torch

        if not made:
            return Run({}, [], [], [])
        inputs = {"pixel_values": torch.cat([m["pixel_values"][0] for m in made])[None]}
        features = [model.model.get_image_features(m["pixel_values"]).pooler_output[0] for m in made]
        return Run(inputs, features, [m["pixel_values"][0] for m in made], [])


def film_text(processor: Any, n: int, about: Any) -> str:
    """Return the text of a video as SmolVLM's processor writes it, which takes words for numbers from a package."""
    module = importlib.import_module("transformers.models.smolvlm.processing_smolvlm")
    module.num2words = {1: "one", 2: "two", 3: "three", 5: "five"}.get
    own = SimpleNamespace(image_seq_len=4, image_token="<image>", fake_image_token="<fake_token_around_image>", global_image_token="<global-img>")
    return module.SmolVLMProcessor.replace_video_token(own, {"pixel_values": np.zeros((1, n)), "video_metadata": [about]}, 0)


class Idefics3Dialect(Dialect):
    """llama.cpp's `conversion/smolvlm.py`."""

    model_types, converters = ("idefics3", "smolvlm"), ("now",)
    arch, names, projector = "llama", gguf.MODEL_ARCH.LLAMA, "idefics3"

    def text_keys(self, w: gguf.GGUFWriter, saved: Saved) -> None:
        llama_keys(w, saved.text)

    def text_tensor(self, saved: Saved, source: str, value: np.ndarray) -> Tensors:
        yield self.text_name(source), llama_turned(source, value, saved.text)

    def vision_keys(self, w: gguf.GGUFWriter, saved: Saved) -> None:
        w.add_vision_attention_layernorm_eps(saved.vision["layer_norm_eps"])
        w.add_vision_projector_scale_factor(saved.config["scale_factor"])
        w.add_vision_use_gelu(True)
        w.add_vision_preproc_image_size(saved.images["size"]["longest_edge"])

    def vision_tensor(self, saved: Saved, source: str, value: np.ndarray, legacy: bool) -> Tensors:
        yield vision_name(f"model.{source}"), value


class Idefics3LlamaCpp(LlamaCpp):
    """It looks the blank line up by its text, which two tokens of the tiny vocabulary have."""

    def ids(self, seen: Any, soft: int | None) -> list[int | None]:
        """Return what it puts in a picture's place."""
        return [341 if i == 410 else i for i in super().ids(seen, soft)]


TEXT = {**COMMON, "rms_norm_eps": 1e-5, "max_position_embeddings": 512, "model_type": "llama"}
VISION = {"hidden_size": 80, "intermediate_size": 100, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 56, "patch_size": 14}
CLIP = {"has_vision_encoder": True, "projector_type": "idefics3", "use_silu": False, "use_gelu": True, "hidden_act": "gelu_pytorch_tanh", "image_size": 56,
        "patch_size": 14, "embedding_length": 80, "feed_forward_length": 100, "attention.head_count": 4, "projection_dim": 96, "block_count": 3,
        "resample": 1, "attention.layer_norm_epsilon": np.float32(1e-6), "projector.scale_factor": 2, "preproc_image_size": 168, "image_splitting": True,
        "image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def case(kind: str, name: str, clip: dict[str, Any] = {}) -> Case:
    return Case(kind, "llama", f"{name}Config", f"{name}ForConditionalGeneration", "smollm", {"tie_word_embeddings": False, "scale_factor": 2}, TEXT,
                VISION, TOKENS, Idefics3Sight(), videos=kind == "smolvlm", cached_as="llama",
                converted=Converted({"general.architecture": "llama", "tokenizer.chat_template": TEMPLATE}, clip={**CLIP, **clip},
                                    clip_tokens={"image_token_id": "<image>"}), dialect=Idefics3Dialect(), llama_cpp=Idefics3LlamaCpp((56, 56)))


CASES = (case("idefics3", "Idefics3"), case("smolvlm", "SmolVLM", {"video_preproc_image_size": 168, "video_sample_frames": False}))

SIZES = [(61, 47), (30, 300), (300, 17), (9, 11), (400, 500), (168, 168), (56, 56), (90, 1), (131, 130)]      # width, height
RNG = np.random.default_rng(4)
PICTURES = [RNG.integers(0, 256, (h, w, 3), dtype=np.uint8) for w, h in SIZES]


@pytest.mark.parametrize("splitting", [True, False])
def test_pixels_of_tiles(tiny_gguf, splitting: bool) -> None:
    path, folder = tiny_gguf("smolvlm", processor={"do_image_splitting": splitting})
    ours, theirs = encoder_of(path), transformers.SmolVLMImageProcessorPil.from_pretrained(folder)
    inverse = np.argsort(ours.order)
    for pixels in PICTURES:
        tiles = theirs(pixels, return_tensors="np", input_data_format="channels_last")["pixel_values"][0]
        views = ours.process(Image(pixels)).views
        assert len(views) == len(tiles)
        for view, tile in zip(views, tiles):
            patches = view.inputs["patches"][inverse].reshape(4, 4, 3, 14, 14)
            assert np.array_equal(patches.transpose(2, 0, 3, 1, 4).reshape(3, 56, 56), tile)


def test_sizes_are_transformers() -> None:
    theirs = transformers.SmolVLMImageProcessorPil(size={"longest_edge": 168}, max_image_size={"longest_edge": 56})
    config = type("Config", (), {"longest_edge": 168, "tile": 56})
    for _ in range(300):
        width, height = (int(s) for s in np.exp(RNG.uniform(0, 7, 2)))
        want = theirs.get_number_of_image_patches(height, width)
        _, (w, h) = idefics3.Vision.sizes(type("Vision", (), {"config": config}), width, height)
        n = (h // 56) * (w // 56)
        assert (n + 1 if n > 1 else 1, h // 56, w // 56) == want or n == 1 and want[0] == 1


@pytest.mark.parametrize("side", [2, 7, 14, 16, 26, 27, 32, 37])
def test_positions_are_in_transformers_buckets(side: int) -> None:
    import torch

    bounds = torch.arange(1 / side, 1.0, 1 / side)
    want = torch.bucketize(torch.clamp(torch.arange(side, dtype=torch.float32) * (1.0 / torch.tensor(side)), max=1.0 - 1e-6), bounds, right=True)
    assert buckets(side, side).tolist() == want.tolist()


def test_options_and_what_is_refused(tiny_gguf) -> None:
    path, folder = tiny_gguf("smolvlm")
    model = pe.load(path, n_ctx=128, kv_dtype="f32")
    assert len(model.encode_image(pe.open_image(PICTURES[4], image_splitting=False))) == 4
    assert len(model.encode_image(PICTURES[4])) == 4 * (9 + 1)                     # 168 x 135 pixels, up to 3 x 3 tiles
    for media, text in [(pe.open_image(PICTURES[0], image_splitting=1), "True or False"), (pe.open_image(PICTURES[0], max_tiles=2), "max_tiles"),
                        (pe.Video([PICTURES[0]] * 2, image_splitting=False), "sample_fps"), (pe.Video([PICTURES[0]] * 2, sample_fps=0), "sample_fps"),
                        (pe.Video([PICTURES[0]] * 2, num_frames=0), "num_frames")]:
        with pytest.raises(RequestError, match=text):
            model.encode_image(media)
    with pytest.raises(ContextOverflowError, match="10 tiles of 4 positions, but the context holds 30"):
        pe.load(path, n_ctx=30).encode_image(PICTURES[4])
    with pytest.raises(ContextOverflowError, match="8 frames takes 32 positions, but the context holds 30"):
        pe.load(path, n_ctx=30).encode_image([PICTURES[4]] * 8)


def test_frames_are_chosen_as_transformers_does(tiny_gguf) -> None:
    from transformers.models.smolvlm.video_processing_smolvlm import SmolVLMVideoProcessor

    ours = encoder_of(tiny_gguf("smolvlm")[0])
    for _ in range(300):
        total, fps, n, rate = int(RNG.integers(1, 3000)), float(RNG.choice([7, 24, 29.97])), int(RNG.integers(1, 70)), float(RNG.choice([0.5, 1, 2]))
        about = VideoMetadata(total, fps, duration=total / fps)
        want = SmolVLMVideoProcessor.sample_frames(SimpleNamespace(), about, n, rate).tolist()
        film = Film(total, fps, {"num_frames": n, "sample_fps": rate})
        assert ours._frames(film) == want


class Film(SimpleNamespace):
    """A video file of so many frames of nothing."""

    def __init__(self, total: int, fps: float, options: dict[str, Any]):
        super().__init__(total=total, fps=fps, options=options, frames=[])

    def __len__(self) -> int:
        return self.total


@pytest.mark.parametrize("fps", [None, 0.5])
def test_a_conversation_about_a_video(tiny_gguf, fps: float | None) -> None:
    """Which no template shows: the video stands where it is among the texts. Three frames at half of one a second are four seconds long."""
    path, folder = tiny_gguf("smolvlm")
    video = pe.Video([PICTURES[0]] * 3, fps=fps)
    messages = [{"role": "user", "content": [{"type": "video", "video": video}, {"type": "text", "text": "what moves?"}]}]
    text = film_text(None, 3, VideoMetadata(3, fps, frames_indices=[0, 1, 2]))
    assert "00:04:" in text and "0:00:04 [H" in text if fps else "0:00:00 [H" in text
    want = transformers.AutoTokenizer.from_pretrained(folder)(f"<|im_start|>User: {text}what moves?<end_of_utterance>\nAssistant:",
                                                              add_special_tokens=False)["input_ids"]
    model = pe.load(path, n_ctx=256)
    assert model.chat_ids(messages) == [-1 if i == model.tokenizer.id_of("<image>") else i for i in want]


def test_numbers_in_words() -> None:
    for n, words in {1: "one", 13: "thirteen", 20: "twenty", 64: "sixty-four", 100: "one hundred", 115: "one hundred and fifteen", 1000: "one thousand",
                     1007: "one thousand and seven", 2340: "two thousand, three hundred and forty", 12_000: "twelve thousand"}.items():
        assert idefics3.in_words(n) == words


def test_how_videos_are_taken_is_in_the_checkpoint(tmp_path) -> None:
    folder = tiny.make_checkpoint("smolvlm", tmp_path / "c", processor={"video_sampling": {"fps": 2, "max_frames": 6, "video_size": {"longest_edge": 100}}})
    meta = pe.GGUFFile(convert(folder, tmp_path / "m.gguf", "f32")).metadata
    assert [meta[f"clip.vision.video_{name}"] for name in ("preproc_image_size", "max_frames", "fps", "sample_frames")] == [100, 6, 2.0, False]
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "video_preprocessor_config.json").write_text(json.dumps({**settings, "image_mean": [0.1] * 3}))
    with pytest.raises(UnsupportedModelError, match="image_mean"):
        convert(folder, tmp_path / "n.gguf")
