"""The model card's snippets, here and in transformers: same inputs, same ids, same shapes of
output.
"""

import base64
import functools
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file

from llava_interleave import checkpoints, hf
from llava_interleave.errors import LlavaError, OptionError, PromptError, Unsupported
from llava_interleave.hf.model import LlavaForConditionalGeneration
from llava_interleave.hf.pipelines import pipeline
from llava_interleave.hf.processor import AutoProcessor
from llava_interleave.model import Llava
from llava_interleave.quantization.replace import quantized_precision
from llava_interleave.testing import tiny_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("hf") / "llava-interleave-tiny")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    media = tmp_path_factory.mktemp("media")
    made = [media / f"{colour}.png" for colour in ("red", "green", "blue")]
    for index, path in enumerate(made):
        image = Image.new("RGB", (40 + 20 * index, 30), path.stem)
        image.paste("white", (3, 4, 20, 10 + 5 * index))
        image.save(path)
    return made


@pytest.fixture(scope="module")
def ours(folder: Path) -> tuple[LlavaForConditionalGeneration, AutoProcessor]:
    return LlavaForConditionalGeneration.from_pretrained(folder), AutoProcessor.from_pretrained(
        folder
    )


@pytest.fixture(scope="module")
def theirs(folder: Path) -> tuple[Any, Any]:
    model = transformers.LlavaForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32
    ).eval()
    # Ids without a meaning are never written here; transformers has to be told.
    size = transformers.AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids("<image>")
    model.generation_config.suppress_tokens = list(range(size, model.config.text_config.vocab_size))
    return model, transformers.AutoProcessor.from_pretrained(folder)


def chat(*images: object, text: str = "What differs?") -> list[dict[str, Any]]:
    parts = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [{"type": "text", "text": text}, *parts]}]


def same(ours: Any, theirs: Any) -> None:
    assert set(ours) == set(theirs)
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def test_the_transformers_snippet_of_the_model_card(
    ours: Any, theirs: Any, images: list[Path]
) -> None:
    conversation = [
        {
            "role": "user",
            "content": [{"type": "text", "text": "What are these?"}, {"type": "image"}],
        }
    ]
    outputs = []
    for model, processor in (ours, theirs):
        prompt = processor.apply_chat_template(conversation, add_generation_prompt=True)
        raw_image = Image.open(images[0])
        inputs = processor(images=raw_image, text=prompt, return_tensors="pt").to(
            "cpu", torch.float32
        )
        output = model.generate(**inputs, max_new_tokens=20, do_sample=False)
        outputs.append(
            (prompt, inputs, output, processor.decode(output[0][2:], skip_special_tokens=True))
        )
    (prompt, inputs, output, text), (their_prompt, their_inputs, their_output, their_text) = outputs
    assert (
        prompt
        == their_prompt
        == "<|im_start|>user\n<image>\nWhat are these?<|im_end|>\n<|im_start|>assistant\n"
    )
    same(inputs, their_inputs)
    assert inputs.input_ids is inputs["input_ids"]
    assert torch.equal(output, their_output)
    assert text == their_text


def test_a_tokenised_chat_loads_its_images(
    ours: Any, theirs: Any, images: list[Path], site: str
) -> None:
    """By path and object, in several turns; a URL of this machine is refused as everywhere."""
    named = chat(str(images[0]), text="This?")
    named[0]["content"][1] = {"type": "image", "path": str(images[0])}
    named += [
        {"role": "assistant", "content": [{"type": "text", "text": "Red."}]},
        *chat(Image.open(images[2]), text="And?"),
    ]
    opened = [
        named[0] | {"content": chat(Image.open(images[0]), text="This?")[0]["content"]},
        *named[1:],
    ]
    flags = {
        "add_generation_prompt": True,
        "tokenize": True,
        "return_dict": True,
        "return_tensors": "pt",
    }
    same(
        ours[1].apply_chat_template(named, **flags), theirs[1].apply_chat_template(opened, **flags)
    )
    given = [{"type": "text", "text": "What differs?"}, {"type": "image", "url": f"{site}/red.png"}]
    with pytest.raises(LlavaError, match="127"):
        ours[1].apply_chat_template([{"role": "user", "content": given}], **flags)


@pytest.fixture(scope="module")
def site(images: list[Path]) -> Iterator[str]:
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=images[0].parent)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches(ours: Any, theirs: Any, images: list[Path], side: str) -> None:
    """Ids and pixels equal transformers'; each row is answered as it is alone, on whichever side it
    is padded.

    Transformers itself answers right-padded rows wrongly (it goes on after the padding), so there
    ours is compared with alone.
    """
    images = [Image.open(path) for path in images]
    texts = [
        processor_text("What is it?", 1),
        processor_text("A longer question about two pictures: what differs between them?", 2),
        processor_text("No picture.", 0),
    ]
    both = []
    for model, processor in (ours, theirs):
        processor.tokenizer.padding_side = side
        inputs = processor(images=images, text=texts, return_tensors="pt", padding=True)
        both.append((inputs, model.generate(**inputs, max_new_tokens=6, do_sample=False)))
    (inputs, output), (their_inputs, their_output) = both
    same(inputs, their_inputs)
    if side == "left":
        assert torch.equal(output, their_output)
    rest = iter(images)
    for row, text in enumerate(texts):
        own = [next(rest) for _ in range(text.count("<image>"))]
        single = ours[1](images=own or None, text=text, return_tensors="pt")
        alone = ours[0].generate(**single, max_new_tokens=6)[0, single["input_ids"].shape[1] :]
        assert output[row, inputs["input_ids"].shape[1] :][: len(alone)].tolist() == alone.tolist()


def processor_text(question: str, images: int) -> str:
    return f"<|im_start|>user\n{'<image>' * images}\n{question}<|im_end|>\n<|im_start|>assistant\n"


def test_several_conversations(ours: Any, theirs: Any, images: list[Path]) -> None:
    chats = [
        chat(Image.open(images[0])),
        chat(Image.open(images[1]), Image.open(images[2]), text="Hm?"),
    ]
    flags = {
        "add_generation_prompt": True,
        "tokenize": True,
        "return_dict": True,
        "return_tensors": "pt",
    }
    same(
        ours[1].apply_chat_template(chats, **flags, padding=True, padding_side="left"),
        theirs[1].apply_chat_template(chats, **flags, padding=True, padding_side="left"),
    )
    assert ours[1].apply_chat_template(chats) == theirs[1].apply_chat_template(chats)
    assert ours[1].apply_chat_template(chats[0], tokenize=True) == theirs[1].apply_chat_template(
        chats[0], tokenize=True, return_tensors=None
    )


@pytest.fixture(scope="module")
def pipes(ours: Any, theirs: Any) -> tuple[Any, Any]:
    return (
        pipeline("image-text-to-text", model=ours[0], processor=ours[1]),
        transformers.pipeline("image-text-to-text", model=theirs[0], processor=theirs[1]),
    )


def records_equal(ours: list[Any], theirs: list[Any]) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        if isinstance(mine, list):
            records_equal(mine, other)
            continue
        assert set(mine) == set(other)
        if "generated_token_ids" in mine:
            assert torch.equal(mine["generated_token_ids"], other["generated_token_ids"])
        else:
            assert mine == other


def test_pipeline_by_name(folder: Path, images: list[Path]) -> None:
    """The card's first snippet; loading by name goes through the same way as loading the parts."""
    messages = chat(text="What does the label represent?")
    messages[0]["content"].insert(0, {"type": "image", "path": str(images[0])})
    pipe = pipeline("image-text-to-text", model=folder)
    out = pipe(text=messages, max_new_tokens=20)
    assert out[0]["input_text"] == messages
    assert out[0]["generated_text"][:-1] == messages
    assert out[0]["generated_text"][-1]["role"] == "assistant"


@pytest.mark.parametrize("flags", [{}, {"return_full_text": False}, {"return_tensors": True}])
def test_pipeline_outputs(pipes: Any, images: list[Path], flags: dict[str, bool]) -> None:
    images = [Image.open(path) for path in images]
    messages = chat(images[0])
    begun = [*messages, {"role": "assistant", "content": [{"type": "text", "text": "There is a"}]}]
    raw = [processor_text("Hm?", 1), processor_text("Hm?", 1)]
    calls = [
        {"text": messages},
        {"text": begun},
        {"text": [messages, begun]},
        {"images": images[1], "text": raw[0]},
        {"images": images[:2], "text": raw},
        {"text": "Hello there"},
    ]
    for call in calls:
        ours, theirs = (pipe(**call, **flags, max_new_tokens=8) for pipe in pipes)
        records_equal(ours, theirs)


def test_several_texts_are_answered_each_alone(pipes: Any) -> None:
    """Also with the marks between turns shown, where they are asked for."""
    texts = [processor_text("Hm?", 0), "Hello there"]
    made = pipes[0](text=texts, max_new_tokens=8, skip_special_tokens=False)
    records_equal(
        made, [pipes[0](text=text, max_new_tokens=8, skip_special_tokens=False) for text in texts]
    )
    records_equal(
        pipes[0](text=texts, max_new_tokens=8),
        [pipes[1](text=text, max_new_tokens=8) for text in texts],
    )


def test_an_answer_begun_as_plain_text_is_continued(pipes: Any) -> None:
    """As one begun in parts; transformers has no answer for it."""
    message = {"role": "user", "content": "Hm?"}
    plain, parts = (
        [message, {"role": "assistant", "content": begun}]
        for begun in ("It", [{"type": "text", "text": "It"}])
    )
    (of_plain,), (of_parts,) = (pipes[0](text=begun, max_new_tokens=8) for begun in (plain, parts))
    assert (
        of_plain["generated_text"][-1]["content"]
        == of_parts["generated_text"][-1]["content"][0]["text"]
    )


def test_an_image_part_under_each_of_its_names(ours: Any, images: list[Path]) -> None:
    embedded = base64.b64encode(images[0].read_bytes()).decode()
    named = [{"type": "image", key: str(images[0])} for key in ("image", "path", "url")]
    named += [
        {"type": "image_url", "image_url": url}
        for url in (f"data:image/png;base64,{embedded}", {"url": str(images[0])})
    ]
    named += [{"type": "image", "base64": embedded}]
    flags = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    made = [
        ours[1].apply_chat_template([{"role": "user", "content": [part]}], **flags)
        for part in named
    ]
    for one in made[1:]:
        same(one, made[0])
    with pytest.raises(PromptError, match="needs 'image'"):
        ours[1].apply_chat_template([{"role": "user", "content": [{"type": "image"}]}], **flags)


def test_sampling_is_repeatable_from_torchs_seed(ours: Any) -> None:
    inputs = ours[1](text=processor_text("Hm?", 0), return_tensors="pt")
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(
            ours[0].generate(
                **inputs, do_sample=True, temperature=50.0, top_k=0, num_return_sequences=3
            )
        )
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert drawn[0].shape[0] == 3


def test_half_precision(ours: Any, folder: Path, images: list[Path]) -> None:
    model = LlavaForConditionalGeneration.from_pretrained(
        folder, torch_dtype=torch.float16, low_cpu_mem_usage=True
    )
    assert model.dtype == torch.float16
    assert model.to("cpu", torch.bfloat16).dtype == torch.bfloat16
    inputs = ours[1](
        images=Image.open(images[0]), text=processor_text("Hm?", 1), return_tensors="pt"
    ).to("cpu", torch.bfloat16)
    assert inputs["pixel_values"].dtype == torch.bfloat16
    assert inputs["input_ids"].dtype == torch.int64
    assert model.generate(**inputs, max_new_tokens=3).shape[1] <= inputs["input_ids"].shape[1] + 3


def test_capabilities_of_a_gpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The card's GPU lines, as far as a machine without one can follow them: what is asked of the
    loader and of the network.
    """
    loads: list[dict[str, Any]] = []
    read = checkpoints.load

    def load(folder: Path, **how: Any) -> Llava:
        loads.append(how)
        return read(folder, dtype=how["dtype"])

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(checkpoints, "load", load)
    of = LlavaForConditionalGeneration.from_pretrained
    half = {"torch_dtype": torch.float16, "low_cpu_mem_usage": True}
    model = of(folder, **half, use_flash_attention_2=True)
    of(folder, **half, load_in_4bit=True)
    of(folder, **half, load_in_4bit=True, device_map=1)
    of(folder, **half, attn_implementation="flash_attention_2", device_map="cuda:1")
    assert [(how["device"], how["precision"]) for how in loads] == [
        ("cpu", None),
        ("cuda", "nf4"),
        ("cuda:1", "nf4"),
        ("cuda:1", None),
    ]
    assert {how["dtype"] for how in loads} == {torch.float16}
    moved: list[dict[str, Any]] = []
    monkeypatch.setattr(model.model, "to", lambda **how: moved.append(how))
    assert model.to(0) is model.to("cuda:0", torch.float16) is model
    assert moved == [
        {"device": "cuda:0", "dtype": None},
        {"device": "cuda:0", "dtype": torch.float16},
    ]
    with pytest.raises(OptionError, match="computes in 16 bits: pass torch_dtype"):
        of(folder, use_flash_attention_2=True)
    with pytest.raises(OptionError, match="contradict each other"):
        of(folder, load_in_8bit=True, load_in_4bit=True)
    with pytest.raises(Unsupported, match="cuda:2 does not exist: this machine has 2"):
        model.to(2)


def test_the_config_of_bitsandbytes_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[tuple[Any, ...]] = []
    read = checkpoints.load

    def load(folder: Path, **how: Any) -> Llava:
        loads.append((how["precision"], how["device"], how["dtype"]))
        return read(folder)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (1 << 40, 1 << 40))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(checkpoints, "load", load)
    of, config = LlavaForConditionalGeneration.from_pretrained, transformers.BitsAndBytesConfig
    half, four = torch.float16, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    of(folder, quantization_config=config(load_in_8bit=True))
    of(folder, quantization_config=four, torch_dtype=half)
    of(folder, quantization_config={**four, "bnb_4bit_compute_dtype": "bfloat16"})
    of(folder, load_in_8bit=True, device_map=0)
    with pytest.warns(UserWarning, match="computed in torch.float16, the config's"):
        of(
            folder,
            quantization_config={**four, "bnb_4bit_compute_dtype": half},
            torch_dtype=torch.bfloat16,
        )
    assert loads == [
        ("int8", "cuda", None),
        ("nf4", "cuda", half),
        ("nf4", "cuda", torch.bfloat16),
        ("int8", "cuda:0", None),
        ("nf4", "cuda", half),
    ]
    for wrong, says in (
        (config(), "BitsAndBytesConfig with load_in_4bit or load_in_8bit"),
        ({"quant_method": "gptq", "bits": 4}, "BitsAndBytesConfig with"),
        ({**four, "llm_int8_skip_modules": ["lm_head"]}, "llm_int8_skip_modules"),
    ):
        with pytest.raises(OptionError, match=says):
            of(folder, quantization_config=wrong)
    with pytest.raises(OptionError, match="give quantization_config or load_in_4bit"):
        of(folder, quantization_config=four, load_in_8bit=True)


def test_a_pipeline_takes_the_gpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As transformers' does; on a machine without one the CPU, and what is named wins."""
    taken: list[str] = []
    read = checkpoints.load

    def load(folder: Path, **how: Any) -> Llava:
        taken.append(how["device"])
        return read(folder)

    monkeypatch.setattr(checkpoints, "load", load)
    pipeline("image-text-to-text", model=folder)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (1 << 40, 1 << 40))
    pipeline("image-text-to-text", model=folder)
    pipeline("image-text-to-text", model=folder, device=1)
    pipeline("image-text-to-text", model=folder, device_map="cpu")
    assert taken == ["cpu", "cuda", "cuda:1", "cpu"]


def test_load_in_8bit_is_int8_also_on_a_cpu(folder: Path) -> None:
    model = LlavaForConditionalGeneration.from_pretrained(folder, load_in_8bit=True)
    assert quantized_precision(model.model) == "int8"


def test_quantized_weights_stay_where_they_are(folder: Path, tmp_path: Path) -> None:
    checkpoints.save(
        checkpoints.load(folder, precision="int8"), tmp_path / "int8", processor_from=folder
    )
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "int8")
    assert (model.dtype, model.device.type) == (torch.float32, "cpu")
    assert model.to("cpu").to(torch.float32) is model
    with pytest.raises(
        OptionError, match=r"int8 weights stay on cpu with torch\.float32: pass device_map"
    ):
        model.to(torch.bfloat16)


@pytest.mark.skipif(torch.cuda.is_available(), reason="what a machine without a GPU must say")
def test_what_a_cpu_cannot_do_is_refused(folder: Path) -> None:
    load = LlavaForConditionalGeneration.from_pretrained
    for flags, says in (
        ({"load_in_4bit": True}, "bfloat16"),
        ({"use_flash_attention_2": True}, "SDPA"),
        ({"attn_implementation": "flash_attention_2"}, "SDPA"),
        ({"attn_implementation": "eager"}, "SDPA"),
        ({"device_map": "cuda"}, "cpu"),
        ({"device_map": 0}, "cpu"),
    ):
        with pytest.raises(Unsupported, match=says):
            load(folder, **flags)
    with pytest.raises(Unsupported, match="cpu"):
        load(folder).to(0, torch.float16)
    assert load(folder, device_map="auto").device.type == "cpu"


def test_mistakes(ours: Any, folder: Path, images: list[Path]) -> None:
    model, processor = ours
    inputs = processor(text=processor_text("Hm?", 0), return_tensors="pt")
    with pytest.raises(OptionError, match="did you mean 'max_new_tokens'"):
        model.generate(**inputs, max_new_token=3)
    with pytest.raises(OptionError, match="do_sample=True"):
        model.generate(**inputs, temperature=0.7)
    with pytest.raises(Unsupported, match="beam"):
        model.generate(**inputs, num_beams=4)
    with pytest.raises(PromptError, match="2 <image> but 1 images"):
        processor(images=Image.open(images[0]), text="<image><image>", return_tensors="pt")
    with pytest.raises(PromptError, match="image tokens"):
        model.generate(input_ids=torch.tensor([[5, model.model.config.image_token_id]]))
    with pytest.raises(OptionError, match="padding=True"):
        processor(text=["a", "a longer text"], return_tensors="pt")
    with pytest.raises(Unsupported, match="image-text-to-text"):
        pipeline("text-generation", model=folder)
    with pytest.raises(Unsupported, match="video"):
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "video", "url": "x"}]}], tokenize=True
        )


def test_names_without_transformers(monkeypatch: pytest.MonkeyPatch, ours: Any) -> None:
    """The light classes stay; other names, attributes and arguments name the extra."""
    monkeypatch.setattr(hf.importlib.util, "find_spec", lambda _: None)
    assert hf.LlavaForConditionalGeneration is LlavaForConditionalGeneration
    assert hf.pipeline is pipeline
    extra = r"pip install 'llava-interleave\[hf\]'"
    with pytest.raises(Unsupported, match=extra):
        _ = hf.Trainer
    with pytest.raises(Unsupported, match=extra):
        ours[0].save_pretrained("x")
    assert not hasattr(ours[1], "image_processor")
    with pytest.raises(Unsupported, match=f"'truncation'.*{extra}"):
        ours[1](text="a", truncation=True)


def test_quantized_weights_behind_transformers_class(folder: Path, images: list[Path]) -> None:
    """The same tokens as the light class, and by transformers' own loop over the same layers."""
    checkpoint = folder.parent / "int8"
    if not checkpoint.exists():
        network = checkpoints.load(folder, precision="int8")
        checkpoints.save(network, checkpoint, processor_from=folder)
    processor = hf.AutoProcessor.from_pretrained(folder)
    inputs = processor(
        images=Image.open(images[0]), text=processor_text("Hm?", 1), return_tensors="pt"
    )
    light = LlavaForConditionalGeneration.from_pretrained(checkpoint)
    expected = light.generate(**inputs, max_new_tokens=6)
    models = [
        hf.LlavaForConditionalGeneration.from_pretrained(checkpoint),
        hf.LlavaForConditionalGeneration.from_pretrained(folder, precision="int8"),
        hf.AutoModelForImageTextToText.from_pretrained(checkpoint),
    ]
    suppressed = list(range(light.tokenizer.size - 1, light.model.config.text.vocab_size))
    for model in models:
        out = model.generate(**inputs, max_new_tokens=6, suppress_tokens=suppressed)
        assert torch.equal(out, expected)
        kinds = {type(layer.mlp.up_proj).__name__ for layer in model.model.language_model.layers}
        assert kinds == {"QuantizedLinear"}
        loop = model.generate(
            **inputs, max_new_tokens=6, suppress_tokens=suppressed, stopping_criteria=[never_stop]
        )
        assert torch.equal(loop, expected)
    with pytest.raises(Unsupported, match="llava quantize"):
        models[0].save_pretrained(folder.parent / "saved")
    with pytest.raises(OptionError, match="subfolder"):
        hf.LlavaForConditionalGeneration.from_pretrained(folder, precision="int8", subfolder="x")


def test_saved_weights_have_transformers_names(folder: Path, theirs: Any, tmp_path: Path) -> None:
    hf.LlavaForConditionalGeneration.from_pretrained(folder).save_pretrained(tmp_path / "ours")
    theirs[0].save_pretrained(tmp_path / "theirs")
    ours, expected = (
        load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs")
    )
    assert ours.keys() == expected.keys()


def never_stop(ids: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
    return torch.zeros(len(ids), dtype=torch.bool)


def test_use_engine_shares_the_weights(folder: Path, theirs: Any, images: list[Path]) -> None:
    model = transformers.LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    inputs = theirs[1](
        images=Image.open(images[0]), text=processor_text("Hm?", 1), return_tensors="pt"
    )
    expected = model.generate(**inputs, max_new_tokens=6)
    assert torch.equal(hf.use_engine(model).generate(**inputs, max_new_tokens=6), expected)
    engine = model._llava_engine.engine
    theirs_by_place = {parameter.data_ptr() for parameter in model.parameters()}
    assert {parameter.data_ptr() for parameter in engine.model.parameters()} <= theirs_by_place
    model.generate(**inputs, max_new_tokens=6)
    assert engine.load().crops_encoded == 1  # the second call used the caches
