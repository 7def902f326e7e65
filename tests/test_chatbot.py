"""What a person imports: attachments, options, stop strings, streaming, conversations, the license
notice.
"""

import dataclasses
import json
import random
import threading
import time
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import llava_interleave
from llava_interleave import checkpoints, kernels, license_notice
from llava_interleave import placement as places
from llava_interleave.chat import Chatbot, Conversation, Options, load
from llava_interleave.chat.attachments import content, part, parts
from llava_interleave.chat.detokenize import StopStrings
from llava_interleave.chat.engine_driver import FairLock
from llava_interleave.engine import Engine, SamplingParams
from llava_interleave.errors import DataError, MediaError, OptionError, PromptError, Unsupported
from llava_interleave.model import PackedAttention, arrange_features
from llava_interleave.placement import pick_device, pick_dtype, pick_precision
from llava_interleave.testing import tiny_checkpoint, tiny_config


@pytest.fixture(scope="module")
def bot(tmp_path_factory: pytest.TempPathFactory) -> Chatbot:
    return load(tiny_checkpoint(tmp_path_factory.mktemp("bot") / "tiny"), device="cpu")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("files")
    made = [folder / f"{colour}.png" for colour in ("red", "blue")]
    for path in made:
        Image.new("RGB", (40, 30), path.stem).save(path)
    return made


def test_an_answer_is_the_networks_greedy_continuation(bot: Chatbot, files: list[Path]) -> None:
    """The whole way from files to text against the bare network, one token at a time."""
    answer = bot.ask("What changed?", files, max_new_tokens=12)
    prompt = bot.prompt(bot.turn("What changed?", files))
    spans = [
        (m.start, arrange_features(bot.model.encode(m.pixels), m.layout)) for m in prompt.media
    ]
    tokens = list(prompt.tokens)
    for _ in range(12):
        with torch.inference_mode():
            x = bot.model.embed(torch.tensor(tokens), spans)
            hidden = bot.model(x, torch.arange(len(tokens)), PackedAttention([len(tokens)]))[-1]
            tokens.append(int(bot.model.logits(hidden)[: bot.processor.tokenizer.size].argmax()))
        if tokens[-1] in bot.processor.tokenizer.eos_ids:
            break
    assert list(answer.tokens) == tokens[len(prompt) :]
    assert str(answer) == answer.text == bot.processor.tokenizer.decode(answer.tokens)
    assert (
        answer.usage.prompt == len(prompt) == bot.estimate(bot.turn("What changed?", files)).total
    )
    assert answer.usage.generated == len(answer.tokens)
    assert answer.timings.total > 0


def test_folded_stream_is_chat(bot: Chatbot, files: list[Path]) -> None:
    turn = bot.turn("What?", files)
    for changes in (
        {},
        {"temperature": 50.0, "seed": 4},
        {"temperature": 50.0, "seed": 4, "n": 3},
        {"logprobs": 2},
    ):
        chunks = list(bot.stream(turn, max_new_tokens=20, **changes))
        for index, answer in enumerate(bot.choices(turn, max_new_tokens=20, **changes)):
            mine = [c for c in chunks if c.index == index]
            assert "".join(c.text for c in mine) == answer.text
            assert [c.answer is None for c in mine] == [True] * (len(mine) - 1) + [False]
            assert mine[-1].answer.tokens == answer.tokens


def test_n_answers_are_those_of_their_seeds(bot: Chatbot) -> None:
    several = bot.choices(bot.turn("Hm?"), n=3, temperature=50, seed=10, max_new_tokens=8)
    alone = [bot.ask("Hm?", temperature=50, seed=10 + i, max_new_tokens=8) for i in range(3)]
    assert [a.tokens for a in several] == [a.tokens for a in alone]
    assert len({a.tokens for a in several}) == 3
    with pytest.raises(OptionError, match="one answer, but n is 3: call choices"):
        bot.ask("Hm?", n=3)


def test_progress_counts_the_prompt_that_is_read(bot: Chatbot, files: list[Path]) -> None:
    tokenizer = bot.processor.tokenizer
    engine = Engine(
        bot.model,
        eos_ids=tokenizer.eos_ids,
        vocab=tokenizer.size,
        kv_bytes=1 << 24,
        max_num_batched_tokens=8,
        max_num_seqs=8,
    )
    bot = Chatbot(bot.source, bot.processor, engine, bot.model)
    progress: list[tuple[int, int]] = []
    answer = bot.stream(
        bot.turn("What?", files),
        max_new_tokens=4,
        progress=lambda done, total: progress.append((done, total)),
    )
    assert progress == []
    length = [chunk.answer for chunk in answer][-1].usage.prompt
    assert len(progress) > 2
    assert [total for _, total in progress] == [length] * len(progress)
    assert progress == sorted(progress)
    assert progress[-1][0] < length


def test_logprobs(bot: Chatbot) -> None:
    answer = bot.ask("Hm?", logprobs=3, max_new_tokens=6)
    assert [entry.token for entry in answer.logprobs] == list(answer.tokens)
    assert all(
        entry.top[0] == (entry.token, entry.logprob) and len(entry.top) == 3
        for entry in answer.logprobs
    )
    assert bot.ask("Hm?", max_new_tokens=6).logprobs is None


def test_a_stop_string_ends_the_answer_before_it(bot: Chatbot) -> None:
    whole = bot.ask("Tell me.", max_new_tokens=60, ignore_eos=True).text
    stop = whole[20:24]
    answer = bot.ask("Tell me.", max_new_tokens=60, ignore_eos=True, stop=[stop, "never in it"])
    assert answer.text == whole[: whole.find(stop)]
    assert answer.finish_reason == "stop"
    assert answer.usage.generated == len(answer.tokens) < 60
    assert (
        "".join(
            c.text
            for c in bot.stream(bot.turn("Tell me."), max_new_tokens=60, ignore_eos=True, stop=stop)
        )
        == answer.text
    )
    assert not bot.engine.busy


@given(
    st.text("abc", max_size=20),
    st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    st.integers(),
)
def test_stop_strings_do_not_depend_on_token_borders(
    text: str, stops: list[str], seed: int
) -> None:
    """Any cut of the text into pieces gives the same: the text before the stop string that is
    complete first.
    """
    ends = sorted((text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text)
    expected = text[: ends[0][1]] if ends else text
    cuts = random.Random(seed)
    filtered, shown, rest = StopStrings(stops), "", text
    while rest and not filtered.stopped:
        count = cuts.randint(1, len(rest))
        shown, rest = shown + filtered.push(rest[:count]), rest[count:]
        assert expected.startswith(shown)
    assert shown + ("" if filtered.stopped else filtered.finish()) == expected
    assert filtered.stopped == bool(ends)


def test_unknown_options_name_the_nearest(bot: Chatbot) -> None:
    with pytest.raises(OptionError, match=r"did you mean 'temperature'"):
        bot.ask("Hm?", temprature=1)
    with pytest.raises(OptionError, match=r"known: .*max_new_tokens"):
        bot.ask("Hm?", xyz=1)
    for wrong in ({"n": 0}, {"stop": [""]}, {"top_p": 3}, {"frames": 0}, {"preset": "none"}):
        with pytest.raises(OptionError):
            bot.ask("Hm?", max_new_tokens=1, **wrong)


def test_options_have_all_of_sampling_with_its_defaults() -> None:
    """A sampling keyword that the engine learns must not be missing, or mean something else, for
    the person who asks.
    """
    options = Options()
    for field in dataclasses.fields(SamplingParams)[
        1:
    ]:  # the first is max_new_tokens, of which an answer takes less where less is left
        assert getattr(options, field.name) == getattr(SamplingParams(), field.name), field.name


def test_attachments_stand_where_the_question_says(bot: Chatbot, files: list[Path]) -> None:
    first, second = ({"type": "image", "path": str(path)} for path in files)
    assert content("What?", files) == [first, second, {"type": "text", "text": "What?"}]
    assert content("Is <image> bluer than <image>?", files) == [
        {"type": "text", "text": "Is "},
        first,
        {"type": "text", "text": " bluer than "},
        second,
        {"type": "text", "text": "?"},
    ]
    prompt = bot.prompt(bot.turn("Is <image> bluer than <image>?", files))
    literal = bot.processor.prompt(
        [{"role": "user", "content": "Is <image> bluer than <image>?"}], files
    )
    assert prompt.tokens == literal.tokens
    with pytest.raises(PromptError, match="3 <image> but 2 attachments"):
        bot.ask("<image><image><image>", files)


def test_kinds_of_attachments(files: list[Path], tmp_path: Path) -> None:
    """Content decides for files, the name for URLs; a video called .png is a video."""
    gif = tmp_path / "clip.png"
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(gif, "GIF", save_all=True, append_images=frames[1:])
    assert part(gif)["type"] == part(gif.read_bytes())["type"] == "video"
    assert part(str(files[0])) == {"type": "image", "path": str(files[0])}
    assert part("https://example.org/a/clip.mp4?size=1") == {
        "type": "video",
        "url": "https://example.org/a/clip.mp4?size=1",
    }
    assert part("https://example.org/image.jpg")["type"] == "image"
    assert part("https://example.org/clip")["type"] == "media"
    assert part("data:video/mp4;base64,AAAA")["type"] == "video"
    assert part(np.zeros((4, 8, 8, 3), np.uint8))["type"] == "video"
    assert part(np.zeros((8, 8, 3), np.uint8))["type"] == "image"
    assert part(frames)["video"] == frames
    assert part(b"\0\0\0\x1cftypisom0000")["type"] == "video"
    with pytest.raises(MediaError, match=r"cannot read .*missing"):
        part(tmp_path / "missing.png")


def test_every_kind_of_attachment_is_answered(bot: Chatbot, files: list[Path]) -> None:
    image = Image.open(files[0]).convert("RGB")
    same = [
        files[0],
        str(files[0]),
        files[0].read_bytes(),
        image,
        np.array(image),
        {"type": "image", "path": str(files[0])},
    ]
    assert len({bot.ask("What?", [one], max_new_tokens=5).tokens for one in same}) == 1
    grid = bot.model.config.vision.grid
    folder = {"type": "video", "path": str(files[0].parent)}
    for video in (folder, [image, image], np.stack([np.array(image)] * 2)):
        prompt = bot.prompt(bot.turn("What?", [video]))
        assert [m.layout.length for m in prompt.media] == [2 * grid**2]
    both = bot.prompt(bot.turn("What?", [files[0].parent]))  # blue.png, red.png: two photos
    assert [m.layout.length for m in both.media] == [grid**2] * 2


def test_a_folder_is_its_photos_or_a_video_where_names_number_frames(tmp_path: Path) -> None:
    for name in ("IMG_10.JPG", "IMG_9.JPG", "._IMG_9.JPG", "cover.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name, "PNG")
    assert [Path(p["path"]).name for p in parts(tmp_path)] == [
        "IMG_9.JPG",
        "IMG_10.JPG",
        "cover.png",
    ]
    assert [p["type"] for p in parts(str(tmp_path))] == ["image"] * 3
    words = [p.get("text", "-") for p in content("In <image>, what?", [tmp_path])]
    assert words == ["In ", "-", "-", "-", ", what?"]
    words = [p.get("text", "-") for p in content("<image>a<image>b<image>c", [tmp_path])]
    assert words == ["-", "a", "-", "b", "-", "c"]
    with pytest.raises(PromptError, match="2 <image> but 3 attachments"):
        content("<image><image>", [tmp_path])
    (tmp_path / "list.txt").touch()
    with pytest.warns(UserWarning, match=r"1 of 4 files in .* are not attached: list\.txt"):
        assert len(parts(tmp_path)) == 3
    clip = tmp_path / "clip"
    clip.mkdir()
    with pytest.raises(MediaError, match="holds no images or videos"):
        parts(clip)
    for number in range(3):
        Image.new("RGB", (8, 8)).save(clip / f"frame_{number:04}.png")
    assert parts(clip) == [{"type": "video", "path": str(clip)}]


def test_a_video_is_attached_like_an_image(bot: Chatbot, tmp_path: Path) -> None:
    with av.open(tmp_path / "clip.mp4", "w") as file:
        stream = file.add_stream("mpeg4", rate=8, width=64, height=48, pix_fmt="yuv420p")
        for shade in range(16):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), shade * 16, np.uint8))
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    messages = bot.turn("What happens?", [tmp_path / "clip.mp4"])
    assert [m.layout.crops for m in bot.prompt(messages, frames=4).media] == [4]
    assert [m.layout.crops for m in bot.prompt(messages, fps=4, end=1.0).media] == [5]
    assert bot.estimate(messages, frames=4, frame_times=True).total == len(
        bot.prompt(messages, frames=4, frame_times=True)
    )
    assert bot.chat(messages, frames=2, max_new_tokens=3).usage.prompt == len(
        bot.prompt(messages, frames=2)
    )


def test_a_conversation_goes_on(bot: Chatbot, files: list[Path], tmp_path: Path) -> None:
    """A second turn computes only what is new, equals the whole history asked at once, and can be
    taken back, saved, resumed.
    """
    talk = bot.conversation()
    talk.attach(files[0])
    first = talk.ask("What is it?", max_new_tokens=5)
    talk.attach(files[1])
    second = talk.ask("And this?", max_new_tokens=5)
    assert second.usage.cached >= first.usage.prompt - 16
    assert second.tokens == bot.chat(talk.messages[:-1], max_new_tokens=5).tokens
    for embed in (False, True):
        talk.save(tmp_path / "talk.json", embed=embed)
        again = bot.resume(tmp_path / "talk.json")
        assert bot.prompt(again.messages).tokens == bot.prompt(talk.messages).tokens
        assert [m.key for m in bot.prompt(again.messages).media] == [
            m.key for m in bot.prompt(talk.messages).media
        ]
    assert [path.name for path in tmp_path.iterdir()] == ["talk.json"]
    assert talk.undo()
    assert talk.pending == [{"type": "image", "path": str(files[1])}]
    assert talk.ask("And this?", max_new_tokens=5).tokens == second.tokens
    assert talk.undo()
    assert talk.undo()
    assert not talk.undo()
    assert talk.messages == []


def test_objects_in_memory_are_saved_whole(bot: Chatbot, files: list[Path], tmp_path: Path) -> None:
    talk = bot.conversation()
    image = Image.open(files[0]).convert("RGB")
    views = {"type": "views", "views": {"front": image, "left": np.array(image)}}
    talk.attach(
        image,
        np.array(image),
        files[1].read_bytes(),
        [image, image],
        files[0].parent,
        views,
    )
    talk.ask("Hm?", max_new_tokens=1)
    talk.save(tmp_path / "talk.json", embed=True)
    again = bot.resume(tmp_path / "talk.json")
    assert [m.key for m in bot.prompt(again.messages).media] == [
        m.key for m in bot.prompt(talk.messages).media
    ]


def test_a_failed_save_leaves_the_old_file(bot: Chatbot, tmp_path: Path) -> None:
    talk = bot.conversation()
    talk.save(tmp_path / "talk.json")
    talk.messages = [{"role": "user", "content": [{"type": "text", "text": object()}]}]
    with pytest.raises(TypeError):
        talk.save(tmp_path / "talk.json")
    assert [path.name for path in tmp_path.iterdir()] == ["talk.json"]
    assert json.loads((tmp_path / "talk.json").read_text())["messages"] == []


def test_a_broken_off_answer_is_not_part_of_the_conversation(
    bot: Chatbot, files: list[Path]
) -> None:
    talk = bot.conversation()
    talk.attach(files[0])
    pieces = talk.stream("What?", max_new_tokens=100, ignore_eos=True)
    next(pieces)
    pieces.close()
    assert (talk.messages, len(talk.pending)) == ([], 1)
    assert not bot.engine.busy


def test_other_files_are_not_conversations(bot: Chatbot, tmp_path: Path) -> None:
    for text in ("", "[]", '{"format": "other"}'):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(DataError):
            Conversation.load(tmp_path / "x.json", bot)
    with pytest.raises(DataError, match="cannot read"):
        Conversation.load(tmp_path / "missing.json", bot)


def test_threads_share_a_bot(bot: Chatbot, files: list[Path]) -> None:
    """Answers of threads that ask at once are those of asking one after another."""
    questions = [f"Question {i}?" for i in range(6)]
    alone = [bot.ask(q, files[:1], max_new_tokens=10).tokens for q in questions]
    together: dict[str, tuple[int, ...]] = {}
    threads = [
        threading.Thread(
            target=lambda q=q: together.update({q: bot.ask(q, files[:1], max_new_tokens=10).tokens})
        )
        for q in questions
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[q] for q in questions] == alone


def test_precision(bot: Chatbot) -> None:
    assert bot.info()["precision"] == "float32"
    assert pick_dtype("bfloat16", bot.source, "cpu") == torch.bfloat16
    half = load(bot.source, precision="bfloat16", device="cpu")
    assert half.info()["precision"] == "bfloat16"
    with pytest.raises(OptionError, match="int3"):
        load(bot.source, precision="int3")


def test_auto_is_the_fastest_that_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real 0.5B ran in bfloat16 at a seventh of int8's pace, unless one had read of int8."""
    half, whole = (
        tiny_checkpoint(tmp_path / str(dtype), dtype=dtype)
        for dtype in (torch.bfloat16, torch.float32)
    )
    assert pick_precision("auto", half, "cpu") == (torch.float32, None)  # small
    with monkeypatch.context() as kernel_patch:
        kernel_patch.setattr(kernels, "unavailable_reason", lambda: None)
        assert pick_precision("int8", half, "cpu") == (torch.bfloat16, "int8")
    monkeypatch.setattr("llava_interleave.placement.MAX_FLOAT32_PARAMETERS", 0)
    assert pick_precision("auto", whole, "cpu") == (torch.float32, None)
    assert pick_precision("bfloat16", half, "cpu") == (torch.bfloat16, None)
    monkeypatch.setattr(kernels, "unavailable_reason", lambda: None)
    assert pick_precision("auto", half, "cpu") == (torch.bfloat16, "int8")
    monkeypatch.setattr(kernels, "unavailable_reason", lambda: "no compiler")
    monkeypatch.setattr(kernels, "multiplies_bfloat16", lambda: True)
    assert pick_precision("auto", half, "cpu") == (torch.bfloat16, None)


def test_auto_never_chooses_a_dtype_that_the_cpu_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without AVX-512 PyTorch multiplied 1.3 GFLOP/s in bfloat16 and 150 in float32: an answer
    about one image took a quarter of an hour, where there was no compiler.
    """
    half = tiny_checkpoint(tmp_path / "tiny", dtype=torch.bfloat16)
    monkeypatch.setattr(places, "MAX_FLOAT32_PARAMETERS", 0)
    monkeypatch.setattr(kernels, "multiplies_bfloat16", lambda: False)
    monkeypatch.setattr(kernels, "unavailable_reason", lambda: None)
    assert pick_precision("auto", half, "cpu") == (torch.bfloat16, "int8")
    assert pick_precision("int4,head=int4", half, "cpu") == (torch.bfloat16, "int4,head=int4")
    assert pick_precision("int8,tower=float", half, "cpu") == (
        torch.float32,
        "int8,tower=float",
    )  # PyTorch multiplies a part
    with pytest.warns(
        UserWarning,
        match="no fast products in bfloat16: int8 and float32 are a hundred times as fast",
    ):
        load(half, precision="bfloat16", device="cpu")
    monkeypatch.setattr(kernels, "unavailable_reason", lambda: "no compiler")
    assert pick_precision("auto", half, "cpu") == (torch.float32, None)
    with pytest.warns(UserWarning, match="no fast products in float16: float32 is a hundred"):
        load(half, precision="float16", device="cpu")


def test_auto_takes_the_gpu_that_the_network_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the CPU, and says by how much: out of memory at the first long prompt is no way to learn
    it.
    """
    wide = tiny_config(
        text={"hidden_size": 256, "intermediate_size": 512, "tie_word_embeddings": False}
    )
    folder = tiny_checkpoint(tmp_path / "tiny", wide, dtype=torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto", folder) == "cpu"
    free = [0]
    card = {
        "is_available": True,
        "mem_get_info": free,
        "get_device_capability": (9, 0),
        "is_bf16_supported": True,
    }
    for name, value in card.items():
        monkeypatch.setattr(
            torch.cuda,
            name,
            lambda *_, value=value, **__: (value[0], 0) if value is free else value,
        )
    monkeypatch.setattr(places, "MAX_FLOAT32_PARAMETERS", 0)
    config, dtype = checkpoints.Checkpoint.open(folder).config, torch.bfloat16
    kv = 4096 * 2 * 2 * 256 * 2  # tokens, layers, K and V, width, bytes
    need = {
        few: checkpoints.weight_bytes(config, dtype, few) + kv + (1 << 30) for few in (None, "int4")
    }
    assert need["int4"] < need[None]
    free[0] = need[None]
    assert pick_device("auto", folder) == pick_device("auto") == "cuda"
    free[0] -= 1
    with pytest.warns(
        UserWarning,
        match=r"needs 1\.0 GiB in bfloat16, and the GPU has 1\.0 GiB free: it runs on the CPU; use precision int4",
    ):
        assert pick_device("auto", folder) == "cpu"
    assert pick_device("auto", folder, "int4") == "cuda"
    free[0] = need["int4"] - 1
    with pytest.warns(UserWarning, match="in int4"):
        assert pick_device("auto", folder, "int4") == "cpu"
    assert pick_precision("auto", folder, "cuda") == (dtype, None)
    assert pick_precision("fp8", folder, "cuda") == (dtype, "fp8")


def test_the_kv_cache_gets_the_free_memory_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "profile_kv_bytes", lambda model, **how: (model, *how.values()))
    model = SimpleNamespace(
        language_model=SimpleNamespace(norm=SimpleNamespace(weight=SimpleNamespace(is_cuda=True)))
    )
    assert places.kv_memory(model, "int8", 0.9) == (model, "int8", 0.9)
    with pytest.raises(OptionError, match=r"gpu_memory is a fraction of the memory.*not 1\.5"):
        load(gpu_memory=1.5)


def test_the_dtype_of_apples_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_checkpoint(tmp_path / "tiny", dtype=torch.bfloat16)
    assert pick_dtype("auto", folder, "mps") == torch.float32
    monkeypatch.setattr(places, "MAX_FLOAT32_PARAMETERS", 0)
    for version, dtype in ((13, torch.float16), (14, torch.bfloat16)):
        monkeypatch.setattr(
            torch.backends.mps,
            "is_macos_or_newer",
            lambda major, minor, version=version: (version, 0) >= (major, minor),
        )
        assert pick_dtype("auto", folder, "mps") == dtype
    with pytest.raises(Unsupported, match="int4 is not supported on mps"):
        pick_precision("int4", folder, "mps")
    with pytest.raises(Unsupported, match="fp8 is not supported on mps: it needs a CUDA GPU"):
        pick_precision("fp8", folder, "mps")


def test_license_notice_once(
    bot: Chatbot,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Shown for a checkpoint that names the family's base, once a user; never for others."""
    for variable in ("XDG_STATE_HOME", "HOME", "LOCALAPPDATA"):
        monkeypatch.setenv(variable, str(tmp_path / "home"))
    load(bot.source, device="cpu")
    assert capsys.readouterr().err == ""
    official = tmp_path / "official"
    checkpoints.save(bot.model, official, processor_from=bot.source)
    config = json.loads((official / "config.json").read_text())
    config["text_config"]["_name_or_path"] = "Qwen/Qwen1.5-0.5B-Chat"
    (official / "config.json").write_text(json.dumps(config))
    load(official, device="cpu")
    assert "research only" in capsys.readouterr().err
    load(official, device="cpu")
    assert capsys.readouterr().err == ""
    assert license_notice.is_published("lmms-lab/llava-next-interleave-qwen-7b", tmp_path, {})
    assert license_notice.is_published("llava-hf/llava-interleave-qwen-0.5b-hf", tmp_path, {})
    assert not license_notice.is_published(
        "llava_interleave/builtin", Path(llava_interleave.__file__).parent, {}
    )


def test_loading_reads_config_json_once_and_builds_one_meta_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_checkpoint(tmp_path / "tiny", dtype=torch.bfloat16)
    reads: list[Path] = []
    built: list[Any] = []
    loading = import_module("llava_interleave.checkpoints.load")
    read_text, build = Path.read_text, loading.meta_network

    def counted_read(path: Path, *args: Any, **more: Any) -> str:
        reads.append(path)
        return read_text(path, *args, **more)

    monkeypatch.setattr(Path, "read_text", counted_read)
    monkeypatch.setattr(loading, "meta_network", lambda *args: built.append(args) or build(*args))
    for precision in ("auto", "int4"):
        load(folder, precision=precision, device="cpu")
    assert len(built) == 2 and reads.count(folder / "config.json") == 2


def test_a_home_that_cannot_be_written_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(license_notice, "state_folder", lambda: tmp_path / "file" / "below")
    license_notice.show_once("llava-hf/llava-interleave-qwen-0.5b-hf", tmp_path, {})


def test_a_waiting_thread_gets_the_lock_next() -> None:
    """The thread that computes steps would take it again each time, so that a question of another
    one waits until a frame is prefilled or an answer is complete."""
    lock, began, turns = FairLock(), threading.Event(), 0

    def work() -> None:
        nonlocal turns
        for _ in range(100):
            with lock:
                turns += 1
                began.set()
                time.sleep(0.001)

    thread = threading.Thread(target=work)
    thread.start()
    began.wait()
    before = turns
    with lock:
        assert turns <= before + 1
    thread.join()
