"""Recipes: files and flags become one record, everything unknown or contradictory is refused by
name, what is stored is read.
"""

import dataclasses
import inspect
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from llava_interleave.cli import app
from llava_interleave.cli import train as command
from llava_interleave.config import LoraConfig
from llava_interleave.errors import OptionError
from llava_interleave.train import recipe, run
from llava_interleave.train.recipe import DPOConfig, Recipe


@pytest.mark.parametrize("name", recipe.SHIPPED)
def test_a_shipped_recipe_is_whole_and_comes_back_from_its_own_file(
    name: str, tmp_path: Path
) -> None:
    found = recipe.read(recipe.find(name))
    assert found.epochs
    (tmp_path / "again.toml").write_text(found.toml())
    assert recipe.read(tmp_path / "again.toml") == found


def test_shipped_recipes_have_what_was_published() -> None:
    """Of LLaVA-NeXT: scripts pretrain_siglip.sh, direct_finetune_siglip_a4.sh and dpo.sh;
    config.json of the checkpoints.
    """
    names = ("align", "dpo", "instruct", "interleave")
    align, dpo, instruct, interleave = (recipe.read(recipe.find(name)) for name in names)
    assert not align.anyres
    assert (
        align.tower_lr_scale,
        align.projector_lr_scale,
        align.decoder_lr_scale,
        align.lr,
        align.template,
    ) == (
        0,
        1,
        0,
        1e-3,
        "plain",
    )
    assert instruct.lr * instruct.tower_lr_scale == pytest.approx(2e-6)
    assert (instruct.lr, instruct.anyres, instruct.tokens) == (1e-5, True, 32768)
    assert (
        interleave.tower_lr_scale,
        interleave.projector_lr_scale,
        interleave.decoder_lr_scale,
        interleave.tokens,
    ) == (
        0,
        1,
        1,
        32768,
    )
    assert (dpo.dpo, dpo.lr, dpo.lr_schedule, dpo.warmup_ratio, dpo.epochs) == (
        DPOConfig(beta=0.1),
        5e-7,
        "linear",
        0.1,
        3,
    )
    assert {one.warmup_ratio for one in (align, instruct, interleave)} == {0.03}
    for one in (align, dpo, instruct, interleave):
        assert (one.weight_decay, one.min_lr_ratio, one.beta2, one.max_grad_norm) == (
            0,
            0,
            0.999,
            1,
        )


def test_recipes_of_onevision_have_what_was_published() -> None:
    """Of LLaVA-NeXT: scripts finetune_si.sh, finetune_ov.sh, dpo_ov7b.sh and
    SO400M_Qwen2_7B_ov_to_video_am9.sh.
    """
    for name in ("onevision-mid", "onevision-image", "onevision", "llava-video"):
        one = recipe.read(recipe.find(name))
        assert one.lr * one.tower_lr_scale == pytest.approx(2e-6)
        assert (one.projector_lr_scale, one.decoder_lr_scale) == (1, 1)
        assert (one.lr, one.warmup_ratio, one.lr_schedule) == (1e-5, 0.03, "cosine")
        assert (one.epochs, one.tokens, one.weight_decay, one.anyres) == (1, 32768, 0, None)
    chat = recipe.read(recipe.find("onevision-dpo"))
    assert (chat.dpo, chat.lr, chat.lr_schedule) == (DPOConfig(beta=0.1), 5e-7, "cosine")
    assert (chat.warmup_ratio, chat.epochs) == (0.1, 1)
    rates = (chat.tower_lr_scale, chat.projector_lr_scale, chat.decoder_lr_scale)
    assert rates == (1, 1, 1)


def test_every_value_that_can_be_set_is_stored_and_read(tmp_path: Path) -> None:
    """Also texts with quotes, line ends, control characters and letters beyond ASCII."""
    odd = 'a "b" \\ \n\t\x7f\x00 ü 🦙'
    full = Recipe(
        model=odd, source=tmp_path / "ü.json", media=tmp_path, question=odd, steps=3, held_out=0.5, dpo=DPOConfig(label_smoothing=0.1),
        adapter=LoraConfig(targets=("*.q_proj", odd)),
    )  # fmt: skip
    (tmp_path / "full.toml").write_text(full.toml(), "utf-8")
    assert recipe.read(tmp_path / "full.toml") == full


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("stesp = 3", "unknown key 'stesp'; did you mean 'steps'?"),
        ("[dpo]\nbeat = 0.1", "unknown key 'dpo.beat'; did you mean 'dpo.beta'?"),
        ("[lora]\nrank = 8", "unknown key 'lora'"),
        ("lr = '1e-3'", "lr must be a number, not '1e-3'"),
        ("steps = 3.0", "steps must be a whole number, not 3.0"),
        ("steps = true", "steps must be a whole number, not True"),
        ("skip_errors = 1", "skip_errors must be true or false, not 1"),
        ("lr = -1.0", "lr must be a number from 0 on, and is -1.0"),
        ("lr = nan", "lr must be a number from 0 on, and is nan"),
        ("lr = 0.0", "lr must be above 0"),
        ("keep = 0", "keep must be above 0"),
        ("dpo = true", r"dpo must be a table, \[dpo\]"),
        ("[adapter]\ntargets = []", "targets must be a list of texts"),
        ("steps = 3\nepochs = 1", r"steps \(3\) and epochs \(1\) exclude each other"),
        ("steps = 0", "steps and epochs must be above 0"),
        ("images_first_ratio = 1.5", "images_first_ratio must be at most 1.0, and is 1.5"),
        ("lr_schedule = 'cosin'", "unknown lr_schedule 'cosin'; did you mean 'cosine'?"),
        ("projector_lr_scale = 0\ndecoder_lr_scale = 0", "nothing is left to train"),
        ("template = 'plain'\nimages_first_ratio = 0.5", "leave out images_first_ratio"),
        ("images_first_ratio = 0.5\n[dpo]", "images_first_ratio is for SFT"),
        ("[dpo]\nloss_type = 'ipo'\nlabel_smoothing = 0.1", "ipo has no label smoothing"),
        ("[dpo]\nloss_type = 'ipo_mean'", "unknown loss_type 'ipo_mean'; did you mean"),
        ("[dpo]\nlabel_smoothing = 0.5", "label_smoothing must be below 0.5"),
        ("[dpo]\nbeta = 0", "beta must be above 0"),
        ("best_by = 'world'", "unknown best_by 'world'"),
        ("evaluate_questions = 3", "evaluate_questions is for benchmarks: give evaluate too"),
        ("use_ema = false", "use_ema is for averaged weights: give ema_decay"),
        ("ema_decay = 1.0", "ema_decay must be at most 0.999999"),
        ("optimizer = 'adamw8'", "unknown optimizer 'adamw8'; did you mean 'adamw'?"),
        ("optimizer = 'adamw8bit'\nmuon_lr_scale = 1.0", "exclude each other: Muon"),
        ("trackers = ['wandbb']", "unknown tracker 'wandbb'; did you mean 'wandb'?"),
        ("[dpo]\n[kto]", "dpo and kto are two ways to learn preferences"),
        ("[kto]\nundesirable_weight = 0", "undesirable_weight must be above 0"),
        ("template = 'plain'\n[kto]", "leave out kto"),
        ("[kto]\n[grpo]\nrewards = ['a:b']", "leave out dpo, kto, images_first_ratio"),
        ("steps = ", "cannot be read as TOML"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_name_of_file_and_field(
    text: str, error: str, tmp_path: Path
) -> None:
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(OptionError, match=rf"mine\.toml.*{error}"):
        recipe.read(tmp_path / "mine.toml")


def test_a_missing_file_and_an_unknown_name() -> None:
    with pytest.raises(OptionError, match=r"none\.toml cannot be read"):
        recipe.read(recipe.find("none.toml"))
    with pytest.raises(OptionError, match=r"unknown recipe 'aling'; did you mean 'align'\?"):
        recipe.find("aling")


def test_relative_paths_start_at_the_recipe_file(tmp_path: Path) -> None:
    (tmp_path / "start").mkdir()
    (tmp_path / "mine.toml").write_text('model = "start"\nsource = "a/b.json"\nmedia = "m"')
    found = recipe.read(tmp_path / "mine.toml")
    assert (found.model, found.source, found.media) == (
        str(tmp_path / "start"),
        tmp_path / "a" / "b.json",
        tmp_path / "m",
    )
    (tmp_path / "mine.toml").write_text('model = "org/name"')
    assert recipe.read(tmp_path / "mine.toml").model == "org/name"


def test_flags_change_single_settings_and_the_result_is_handed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every setting has a flag; one that is not used leaves the file's value."""
    seen: list[Any] = []
    monkeypatch.setattr(run, "run", lambda chosen, out: seen.append((chosen, out)))
    monkeypatch.setattr("llava_interleave.chat.locate", lambda name, _: Path(name))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.toml").write_text(
        'model = "org/x"\nsource = "s.json"\nepochs = 2\nlr = 1.0\nbfloat16 = true\n[dpo]\nloss_type = "ipo"'
    )

    def recipe_of(*words: str) -> Recipe:
        done = CliRunner().invoke(app, ["train", *words, "-o", "out"])
        if done.exception:
            raise done.exception
        return seen[-1][0]

    stored = recipe.read(tmp_path / "mine.toml")
    model = str(tmp_path / "org" / "x")
    assert recipe_of("-r", "mine.toml") == dataclasses.replace(stored, model=model)
    assert recipe_of(
        "other", "-r", "mine.toml", "--steps", "5", "--no-bfloat16", "--dpo-beta", "0.3"
    ) == dataclasses.replace(
        stored,
        model=model,
        source=tmp_path / "other",
        steps=5,
        epochs=None,
        bfloat16=False,
        dpo=DPOConfig(beta=0.3, loss_type="ipo"),
    )
    again = recipe_of(
        "x.json",
        "-m",
        "m",
        "--adapter-targets",
        "a*",
        "--adapter-targets",
        "b",
        "--epochs",
        "1.5",
        "--lr",
        "1",
    )
    assert again == Recipe(
        model=str(tmp_path / "m"),
        source=tmp_path / "x.json",
        epochs=1.5,
        lr=1.0,
        adapter=LoraConfig(targets=("a*", "b")),
    )
    with pytest.raises(OptionError, match="name samples, or a recipe"):
        recipe_of("-r", "align")
    with pytest.raises(OptionError, match="ipo has no label smoothing"):
        recipe_of("-r", "mine.toml", "--dpo-label-smoothing", "0.1")
    flags = set(inspect.signature(command.train).parameters)
    fields = {f.name for f in dataclasses.fields(Recipe)} - set(recipe.TABLES)
    assert flags == {"out", "name"} | fields | {
        f"{name}_{f.name}"
        for name, table in recipe.TABLES.items()
        for f in dataclasses.fields(table)
    }


@pytest.mark.parametrize(("schedule", "least"), [("cosine", 0.0), ("cosine", 0.1), ("linear", 0.0)])
@pytest.mark.parametrize("ratio", [0.0, 0.03, 0.25])
def test_the_learning_rate_is_transformers(schedule: str, least: float, ratio: float) -> None:
    optimization = pytest.importorskip("transformers.optimization")
    found = Recipe(steps=70, warmup_ratio=ratio, lr_schedule=schedule, min_lr_ratio=least)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    name = "cosine_with_min_lr" if least else schedule
    scheduler = optimization.get_scheduler(
        name,
        optimizer,
        num_warmup_steps=math.ceil(ratio * 70),
        num_training_steps=70,
        scheduler_specific_kwargs={"min_lr": least} if least else None,
    )
    for step in range(70):
        assert found.lr_factor(step) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        optimizer.step()
        scheduler.step()


def test_every_setting_has_a_sentence() -> None:
    for record in (Recipe, DPOConfig, LoraConfig):
        assert all(field.metadata["help"].endswith(".") for field in dataclasses.fields(record))
