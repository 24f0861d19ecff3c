"""Florence-2 against transformers: pixels, every stage, the projector's rows, logits, greedy and beam text, and what answers name."""

from __future__ import annotations

import json
import math
import pickle
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

import pyengine as pe
import test_blip2 as blip2
import tiny_sources
from converters import convert
from converters.florence2 import ADDED
from hollow import both, Decoder, Encoder, Full, Tensor
from oracle import encoder_of
from pictures import A, B, DOT, LONG, same, THIN
from pyengine.backends import backend
from pyengine.chat.boxes import draw, Polygon
from pyengine.chat.regions import Naming
from pyengine.cli import pictures
from pyengine.cli.talk import remote
from pyengine.engine.answer import Answer
from pyengine.engine.encoded import MediaInfo
from pyengine.engine.request import Report
from pyengine.errors import RequestError
from pyengine.graph.graph import Graph
from sight import of_any_backend
from test_bart import BART
from test_blip2_t5 import Made

try:
    import transformers
except ImportError:         # the cases are found without it
    transformers = None

pytestmark = pytest.mark.skipif(transformers is None, reason="needs transformers and torch: pip install -r requirements/test.txt")

SIDE, ROWS = 75, 26                  # grids of 19, 10 and 5 places
VISION = {"depths": [1, 2, 1], "patch_size": [7, 3, 3], "patch_stride": [4, 2, 2], "patch_padding": [3, 1, 1], "patch_prenorm": [False, True, True],
          "embed_dim": [24, 40, 64], "num_heads": [2, 5, 4], "num_groups": [3, 2, 4], "window_size": 4, "mlp_ratio": 2.5, "projection_dim": 60,
          "max_position_embeddings": 7, "drop_path_rate": 0.1}
OTHER = {"patch_prenorm": [True, False, False], "window_size": 5, "qkv_bias": False, "activation_function": "gelu_pytorch_tanh", "mlp_ratio": 3.0}
MARKS = ["<od>", "</od>", "<ocr>", "</ocr>", *(f"<loc_{i}>" for i in range(1000)), "<cap>", "</cap>", "<sep>", "<poly>", "</poly>", "<and>"]
POST = {"NUM_BBOX_HEIGHT_BINS": 1000, "NUM_BBOX_WIDTH_BINS": 1000,
        "ocr": {"PATTERN": r"(.+?)<loc_(\d+)><loc_(\d+)><loc_(\d+)><loc_(\d+)><loc_(\d+)><loc_(\d+)><loc_(\d+)><loc_(\d+)>", "AREA_THRESHOLD": 0.0},
        "phrase_grounding": {"banned_grounding_tokens": ["it", "the image"]},
        **{name: {} for name in ("pure_text", "description_with_bboxes", "description_with_polygons", "polygons", "bboxes",
                                 "description_with_bboxes_or_polygons")}}


def checkpoint(folder: Path, vision: dict[str, Any], images: dict[str, Any]) -> Made:
    """Write a tiny random checkpoint as transformers' own converter does, and its file."""
    import torch

    folder.mkdir(parents=True)
    tiny_sources.save_byte_level(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, extra_special_tokens={"image_token": "<image>"})
    tokenizer.add_tokens(MARKS, special_tokens=True)
    tokenizer.save_pretrained(folder)
    image = tokenizer.convert_tokens_to_ids("<image>")
    config = transformers.Florence2Config(
        text_config={**BART.config, "model_type": "bart", "vocab_size": len(tokenizer)}, vision_config={**VISION, **vision}, image_token_id=image,
        bos_token_id=0, pad_token_id=1, eos_token_id=2)
    model, random = transformers.Florence2ForConditionalGeneration(config), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            noise = torch.randn(p.shape, generator=random)
            if p.dim() == 1:
                p.copy_((1.0 if "norm" in name and name.endswith("weight") else 0.0) + 0.3 * noise)
            else:
                p.copy_(noise if "embed" in name or "shared" in name else 1.5 * noise / p[0].numel() ** 0.5)
    model.save_pretrained(folder)
    own = transformers.CLIPImageProcessorPil(**{
        "size": {"height": SIDE, "width": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}, "do_center_crop": False, "resample": 3,
        "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "image_seq_length": ROWS, **images})
    processor = of_any_backend(transformers.Florence2Processor)(own, tokenizer, post_processor_config=POST)
    processor.save_pretrained(folder)
    theirs = transformers.Florence2ForConditionalGeneration.from_pretrained(folder, attn_implementation="eager").eval()
    return Made(folder, convert(folder, folder.parent / "model.gguf", "f32"), theirs, processor)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return checkpoint(tmp_path_factory.mktemp("florence2") / "hf", {}, {})


@pytest.fixture(scope="module")
def model(made: Made) -> Any:
    with pe.load(made.path, n_ctx=128, kv_dtype="f32") as loaded:
        yield loaded


def test_pixels_are_bit_for_bit_those_of_transformers(made: Made) -> None:
    ours = encoder_of(made.path)
    for picture in (A, B, LONG, THIN, DOT):
        (view,) = ours.process(pe.open_image(picture)).views
        want = made.processor.image_processor(picture, return_tensors="pt")["pixel_values"][0].permute(1, 2, 0)
        assert np.array_equal(view.inputs["pixels"], want.numpy())


@pytest.mark.parametrize(("vision", "images"), [({}, {}), (OTHER, {"resample": 2, "image_mean": [0.4, 0.5, 0.6]})], ids=["usual", "others"])
def test_every_stage_and_the_rows_are_those_of_transformers(tmp_path: Path, vision: dict[str, Any], images: dict[str, Any]) -> None:
    import torch

    made = checkpoint(tmp_path / "hf", vision, images)
    pixels = made.processor.image_processor(A, return_tensors="pt")["pixel_values"]
    tower, states = made.theirs.model.vision_tower, []
    with torch.no_grad():
        x = pixels
        for conv, blocks in zip(tower.convs, tower.blocks):
            x = conv(x)
            states.append(x)
            for block in blocks:
                x = block(x)
                states.append(x)
        soft = made.theirs.get_image_features(pixels).pooler_output[0]
    ours = encoder_of(made.path).encoder
    (view,) = ours.process(pe.open_image(A), encoder_of(made.path).limits).views
    g = Graph()
    made_of = ours.states(g)
    *found, rows = backend("cpu").compile([*made_of, ours.project(made_of[-1])]).run(**view.inputs)
    assert rows.shape == (ROWS, 60)
    for got, want in zip(found, states, strict=True):
        same(got, want[0].flatten(1).T.numpy())
    same(rows, soft.numpy())


@pytest.mark.parametrize("text", ["<OD>", "<CAPTION_TO_PHRASE_GROUNDING>a green car", "<REGION_TO_CATEGORY><loc_5><loc_77><loc_400><loc_999>", "fox"])
def test_encoder_and_decoder_at_every_position(made: Made, model: Any, text: str) -> None:
    """The picture's rows, then BOS, the task's sentence and what ends it."""
    import torch

    inputs = made.inputs(text)
    ids = [2, 30, 12, 7, 299, 305, 5]
    with torch.no_grad():
        out = made.theirs(**inputs, decoder_input_ids=torch.tensor([ids]))
    read = inputs["input_ids"][0].tolist()
    assert read[:ROWS] == [made.theirs.config.image_token_id] * ROWS and read[ROWS] == 0 and read[-1] == 2
    source = [A, *read[ROWS:]]
    same(model.logits(ids, source=source), out.logits[0].numpy())
    same(model.hidden(source), out.encoder_last_hidden_state[0].numpy())


TASKS = {"<OD>": "", "<OCR>": "", "<CAPTION>": "", "<DETAILED_CAPTION>": "", "<MORE_DETAILED_CAPTION>": "", "<OCR_WITH_REGION>": "",
         "<DENSE_REGION_CAPTION>": "", "<REGION_PROPOSAL>": "", "<CAPTION_TO_PHRASE_GROUNDING>": "a fox in the snow",
         "<REFERRING_EXPRESSION_SEGMENTATION>": "the dog", "<OPEN_VOCABULARY_DETECTION>": "dog", "<REGION_TO_SEGMENTATION>": "<loc_1><loc_2><loc_33><loc_700>",
         "<REGION_TO_CATEGORY>": "<loc_1><loc_2><loc_33><loc_700>", "<REGION_TO_DESCRIPTION>": "<loc_9><loc_2><loc_33><loc_70>",
         "<REGION_TO_OCR>": "<loc_1><loc_2><loc_33><loc_999>"}


def written(made: Made, text: str, max_tokens: int, picture: Any = A, **settings: Any) -> list[int]:
    """What transformers writes, with the decoder's first token and all else."""
    import torch

    with torch.no_grad():
        return made.theirs.generate(**made.inputs(text, picture), max_new_tokens=max_tokens, do_sample=False, **{"num_beams": 1, **settings})[0].tolist()


def named(answer: Any) -> tuple[list[Any], list[Any], list[str]]:
    """Boxes, polygons as lists of numbers in parts, and labels of an answer, as the processor has them."""
    return ([[b.x1, b.y1, b.x2, b.y2] for b in answer.boxes],
            [[[n for corner in part for n in corner] for part in p.parts] for p in answer.polygons], answer.labels)


def wanted(made: Made, text: str, task: str, size: tuple[int, int]) -> tuple[list[Any], list[Any], list[str]]:
    """What the processor makes of an answer's text."""
    found = made.processor.post_process_generation(text=text, task=task, image_size=size)[task]
    if isinstance(found, str):
        return [], [], []
    polygons = [[quad] for quad in found["quad_boxes"]] if "quad_boxes" in found else found.get("polygons", [])
    return found.get("bboxes", []), polygons, found.get("labels", found.get("bboxes_labels", []) + found.get("polygons_labels", []))


@pytest.mark.parametrize("task", TASKS)
def test_tasks_are_asked_and_read_as_by_the_processor(made: Made, model: Any, task: str) -> None:
    """The prompt's ids, the greedy answer, none of whose tokens may come twice, and all that it names in a picture of another shape."""
    text = task + TASKS[task]
    read = made.inputs(text, B)["input_ids"][0].tolist()
    segments = model._prompts.made_of(text, [B]).segments
    assert [i for s in segments[1:] for i in s.ids] == read[ROWS:]
    want = written(made, text, 24, B, no_repeat_ngram_size=1)
    answer = model.generate(text, images=[B], max_tokens=24, temperature=0, no_repeat_ngram=1)
    assert answer.media[0].n_tokens == ROWS and answer.tokens == [i for i in want[1:] if i != 2] and len(set(answer.tokens)) == len(answer.tokens) > 8
    assert named(answer) == wanted(made, made.processor.batch_decode([want], skip_special_tokens=False)[0], task, B.size)


def test_beams_find_what_transformers_finds(made: Made, model: Any) -> None:
    want = written(made, "<OD>", 20, num_beams=3, no_repeat_ngram_size=2)
    answer = model.generate("<OD>", images=[A], max_tokens=20, n_beams=3, no_repeat_ngram=2)
    assert answer.tokens == [i for i in want[1:] if i != 2] and len(set(answer.tokens)) > 8
    assert named(answer) == wanted(made, made.processor.batch_decode([want], skip_special_tokens=False)[0], "<OD>", A.size)


PIECES = ["car", " a red fox", "it", "naïve café", "\n", " ", ">", "a>b", "<loc_1>", "<loc_20>", "<loc_333>", "<loc_999>", "<loc_0>", "<sep>", "<poly>", "</poly>", "<od>",
          "</s>", "<pad>", "<s>", "<and>", "<loc_", "<"]
ANSWERS = [
    "</s><s>car<loc_1><loc_2><loc_500><loc_999><loc_3><loc_4><loc_5><loc_6>wheel<loc_900><loc_8><loc_7><loc_6></s>",
    "it<loc_1><loc_2><loc_3><loc_4>the image<loc_1><loc_2><loc_3><loc_4> dog <loc_1><loc_2><loc_3><loc_4><loc_5>",
    "STOP<loc_1><loc_2><loc_3><loc_4><loc_5><loc_6><loc_7><loc_8>\nfür alle<loc_11><loc_2><loc_3><loc_4><loc_5><loc_6><loc_7><loc_88>",
    "<loc_1><loc_2><loc_3><loc_4><loc_5><loc_6><sep><loc_7><loc_8><loc_9>",
    "dog<poly><loc_1><loc_2><loc_3><loc_4><loc_5><loc_6><sep><loc_7><loc_8></poly><poly><loc_9><loc_1><loc_2></poly>cat<poly><loc_7><loc_8><loc_3></poly>",
    ""]


def test_regions_are_those_of_the_processor(made: Made) -> None:
    """Answers as the authors have them, and such as untrained models write; every task, in pictures of several sizes."""
    tasks, rng = made.processor.tasks_answer_post_processing_type, np.random.default_rng(5)
    ours = encoder_of(made.path).encoder
    odds = np.array([1.0] * 8 + [4.0] * 5 + [2.0] * 3 + [1.0] * 7)
    texts = ANSWERS + ["".join(rng.choice(PIECES, rng.integers(1, 40), p=odds / odds.sum())) for _ in range(600)]
    seen: set[str] = set()
    for n, text in enumerate(texts):
        size = [(53, 97), (1000, 1000), (640, 481), (1, 4096)][n % 4]
        for task in tasks:
            way = ours.tasks[task].regions
            if not way:
                continue
            answer = Answer("", Report(media=[MediaInfo("image", size, size, ROWS, 1, (), False, 0.0, 0.0, "")], naming=Naming(way, frozenset(ours.ignored)), marked=text))
            want = wanted(made, text, task, size)
            assert named(answer) == want, (task, text)
            seen |= {task} if want[2] else set()
    assert seen == {task for task in tasks if ours.tasks[task].regions}
    assert set(ours.tasks) == set(tasks)


def test_tasks_say_what_is_wrong(model: Any) -> None:
    with pytest.raises(RequestError, match="<OD> takes no text"):
        model.generate("<OD> cats", images=[A], max_tokens=1)
    with pytest.raises(RequestError, match="not videos"):
        model.generate("<OD>", images=[[A, A]], max_tokens=1)
    with pytest.raises(RequestError, match=r"images\[0\]: .* takes one picture a prompt, and 2 were given"):
        model.generate("<OD>", images=[A, B], max_tokens=1)


def test_conversations_ask_as_prompts_do(model: Any) -> None:
    """Places in a message are the tokens that the task reads; other tokens stay text."""
    for text in ("<OD>", "<REGION_TO_SEGMENTATION><loc_1><loc_2><loc_33><loc_700>"):
        messages = [{"role": "user", "content": [{"type": "image", "image": A}, {"type": "text", "text": text}]}]
        said, plain = model.chat(messages, max_tokens=9, temperature=0), model.generate(text, images=[A], max_tokens=9, temperature=0)
        assert said.tokens == plain.tokens and named(said) == named(plain)


def test_answers_are_kept_and_drawn(model: Any) -> None:
    answer = model.generate("<OD>", images=[B], max_tokens=24, temperature=0)
    assert answer.boxes and named(pickle.loads(pickle.dumps(answer))) == named(answer)
    stream = model.stream("<OD>", images=[B], max_tokens=24, temperature=0)
    assert named(stream.answer()) == named(answer)
    quads = [Polygon("sign", (((5, 5), (40, 8), (40, 30), (5, 25)),)), Polygon("", ((), ((1, 1),)))]
    drawn = np.asarray(draw(pe.open_image(B), [*answer.boxes, *quads]))
    assert drawn.shape == (97, 53, 3) and not np.array_equal(drawn, np.asarray(B)) and not np.array_equal(drawn[5:9, 20], np.asarray(B)[5:9, 20])


def test_checkpoints_of_the_authors(made: Made, model: Any, tmp_path: Path) -> None:
    """Their names of tensors and numbers, the projection as it is multiplied from the left, a bias of the head, and tokens that their code adds."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "hf"
    shutil.copytree(made.folder, folder)
    tiny_sources.save_byte_level(folder)                             # without a single place
    names = [(r"^model\.language_model\.", "language_model.model."), (r"^lm_head", "language_model.lm_head"), (r"^model\.", ""),
             (r"^multi_modal_projector\.image_projection\.weight", "image_projection"), (r"^multi_modal_projector\.image_position_embed", "image_pos_embed"),
             (r"^multi_modal_projector\.", ""), (r"(convs\.\d)\.conv\.", r"\1.proj."), (r"(conv[12])\.(\w+)$", r"\1.fn.dw.\2"),
             (r"\.(window|channel)_attn\.", r".\1_attn.fn."), (r"\.ffn\.", ".ffn.fn.net."), (r"\.norm2\.", ".ffn.norm."),
             (r"\.(window|channel|spatial)_block\.norm1", lambda m: f".{m[1]}_block.{'channel' if m[1] == 'channel' else 'window'}_attn.norm")]
    weights = {}
    for name, value in load_file(folder / "model.safetensors").items():
        for pattern, other in names:
            name = re.sub(pattern, other, name)
        weights[name] = value.T.contiguous() if name == "image_projection" else value
    assert {"vision_tower.blocks.1.1.channel_block.channel_attn.norm.bias", "vision_tower.blocks.0.0.spatial_block.window_attn.fn.qkv.weight",
            "vision_tower.convs.0.proj.bias", "vision_tower.blocks.0.0.spatial_block.conv1.fn.dw.weight", "image_pos_embed.row_embeddings.weight",
            "vision_tower.blocks.2.0.channel_block.ffn.fn.net.fc1.bias", "language_model.model.shared.weight"} <= set(weights)
    config = json.loads((folder / "config.json").read_text())
    vision, text = config["vision_config"], config["text_config"]
    vision |= {"dim_embed": vision.pop("embed_dim"), "image_pos_embed": {"type": "learned_abs_2d", "max_pos_embeddings": vision.pop("max_position_embeddings")}}
    n = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    rows = weights["language_model.model.shared.weight"]
    text["vocab_size"] = len(n) + len(ADDED)
    padded = np.random.default_rng(0).standard_normal((text["vocab_size"], rows.shape[1])).astype(np.float32)
    padded[: len(n)] = rows[: len(n)].numpy()
    bias = np.linspace(-1, 1, text["vocab_size"], dtype=np.float32)[None]
    weights |= {"language_model.model.shared.weight": rows.new_tensor(padded), "language_model.final_logits_bias": rows.new_tensor(bias)}
    save_file({name: value for name, value in weights.items() if "lm_head" not in name}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({name: value for name, value in config.items() if name != "image_token_id"}))
    with pe.load(convert(folder, tmp_path / "model.gguf", "f32"), n_ctx=128, kv_dtype="f32") as ours:
        assert np.array_equal(ours.encode_image(A), model.encode_image(A))
        source, ids = [A, 0, 40, 60, 7, 2], [2, 30, 12]
        known = len(n)
        assert np.allclose(ours.logits(ids, source=source)[:, :known], model.logits(ids, source=source)[:, :known] + bias[:, :known], atol=1e-5)
        assert ours.tokenize("<loc_0><loc_999><and>", add_special=False) == [known + 4, known + 1003, known + 1023]
        assert ours.generate("<OD>", images=[A], max_tokens=5, temperature=0).tokens


@dataclass(frozen=True)
class BartDecoder(Decoder):
    """Both halves of BART, as many layers each."""

    def tensors(self, dtype: str) -> Iterator[Tensor]:
        d, f = self.d_model, self.d_ff
        yield "token_embd.weight", (self.vocab_size, d), dtype
        for half, parts in (("enc", ("attn",)), ("dec", ("attn", "cross_attn"))):
            yield f"{half}.position_embd.weight", (self.n_ctx + 2, d), "F16"
            yield from both(f"{half}.token_embd_norm", d)
            for b in (f"{half}.blk.{i}" for i in range(self.n_layers)):
                for name in parts:
                    yield from (t for part in "qkvo" for t in blip2.weighted(f"{b}.{name}_{part}", d, d))
                yield from (*blip2.weighted(f"{b}.ffn_up", f, d), *blip2.weighted(f"{b}.ffn_down", d, f))
                yield from (t for name in (*parts, "ffn") for t in both(f"{b}.{name}_norm", d))


def full_encoder(widths: Sequence[int], d_model: int) -> Encoder:
    """DaViT of the published models, over squares of 768 pixels."""
    depths, kernels, heads = (1, 1, 9, 1), (7, 3, 3, 3), [width // 32 for width in widths]
    keys = {"has_vision_encoder": True, "projector_type": "florence2", "vision.image_size": 768, "vision.window_size": 12, "vision.position_count": 50,
            "vision.projection_dim": d_model, "vision.stage.block_count": depths, "vision.stage.embedding_length": widths,
            "vision.stage.kernel_size": kernels, "vision.stage.stride": (4, 2, 2, 2), "vision.stage.padding": (3, 1, 1, 1),
            "vision.stage.norm_first": (0, 1, 1, 1), "vision.stage.head_count": heads, "vision.stage.group_count": heads}
    tensors: list[Tensor] = [("mm.line_embd.weight", (50, widths[-1] // 2), "F32"), ("mm.column_embd.weight", (50, widths[-1] // 2), "F32"),
                             ("mm.proj.weight", (d_model, widths[-1]), "F16"), *both("mm.proj_norm", d_model)]
    before = 3
    for i, (n, width, kernel) in enumerate(zip(depths, widths, kernels)):
        tensors += [*blip2.weighted(f"v.stage.{i}.patch_embd", width, kernel**2 * before), *both(f"v.stage.{i}.norm", before if i else width)]
        for b in (f"v.stage.{i}.blk.{j}.{half}." for j in range(n) for half in ("spatial", "channel")):
            tensors += [(f"{b}conv{k}.{part}", shape, "F32") for k in (1, 2) for part, shape in (("weight", (width, 1, 3, 3)), ("bias", (width,)))]
            tensors += [*both(f"{b}ln1", width), *both(f"{b}ln2", width)]
            tensors += [t for name, n_out, n_in in (("attn_qkv", 3 * width, width), ("attn_out", width, width), ("ffn_up", 4 * width, width),
                                                    ("ffn_down", width, 4 * width)) for t in blip2.weighted(b + name, n_out, n_in)]
        before = width
    return {f"clip.{name}": list(value) if isinstance(value, tuple) else value for name, value in keys.items()}, tensors


@pytest.mark.parametrize(("n_layers", "d", "widths", "most", "weights"), [(6, 768, (128, 256, 512, 1024), 1024, 231e6), (12, 1024, (256, 512, 1024, 2048), 4096, 777e6)],
                         ids=["base", "large"])
def test_published_models(tmp_path: Path, machine: Any, n_layers: int, d: int, widths: tuple[int, ...], most: int, weights: float) -> None:
    """Florence-2 base and large: 231 and 777 million weights; 577 rows a picture."""
    machine(16 * 2**30)
    keys = {"decoder_start_token_id": 2, "attention.layer_norm_epsilon": 1e-5}
    decoder = BartDecoder("bart", n_layers, d, 4 * d, d // 64, d // 64, 64, 51290, most, keys=keys)
    tokens = ("<s>", "<pad>", "</s>", "<unk>", "<image>")
    path, mmproj = Full(decoder, tokens, lambda width: full_encoder(widths, width), "F16").write(tmp_path, "florence-2")
    plan = pe.plan(path, n_ctx=1024, mmproj=mmproj)
    caches = [i.nbytes for i in plan.items if i.purpose == "kv" and i.layer is not None]
    assert plan.fits and plan.picture == 577 and caches == [plan.n_seq * 1024 * d * 2 * 2] * 2 * n_layers
    assert abs(sum(math.prod(shape) for _, shape, _ in (*decoder.tensors("F16"), *full_encoder(widths, d)[1])) / weights - 1) < 0.02


def test_commands_say_and_draw_regions(model: Any, tmp_path: Path) -> None:
    """As lines, as JSON, which a conversation at a server reads again, and on the picture."""
    answer = model.generate("<OCR_WITH_REGION>", images=[B], max_tokens=40, temperature=0, no_repeat_ngram=1)
    assert answer.polygons and answer.boxes == []
    found = json.loads(json.dumps(pictures.boxes_json(answer)))
    assert found["boxes"] == [] and [remote._polygon(polygon) for polygon in found["polygons"]] == answer.polygons
    first, *lines = pictures.places(answer, ["b.png"])
    assert "53x97" in first and len(lines) == len(answer.polygons)
    assert lines[0].endswith(" ".join(f"{x},{y}" for x, y in answer.polygons[0].points))
    assert pictures.draw(answer, [pictures.Picture("b.png", pe.open_image(B))], tmp_path / "o.png")
    assert not np.array_equal(np.asarray(PIL.Image.open(tmp_path / "o.png")), np.asarray(B))
