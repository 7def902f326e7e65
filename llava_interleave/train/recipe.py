"""A training run's settings: one frozen record.

TOML keys, flags and the settings stored with every checkpoint come from its fields.
"""

from __future__ import annotations

import dataclasses
import json
import math
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import LoraConfig
from ..errors import OptionError
from ..options import unknown

FOLDER = Path(__file__).parent / "recipes"
SHIPPED = tuple(sorted(path.stem for path in FOLDER.glob("*.toml")))
RESUMABLE_FIELDS = frozenset(
    (
        *("source", "media", "skip_errors", "device", "workers", "activation_checkpointing"),
        *("save_every", "save_minutes", "keep", "evaluate_every", "sample_generations"),
        *("log_every", "trackers", "tracker_project", "max_skipped_steps", "timeout_minutes"),
        *("data_cache", "early_stopping", "evaluate", "evaluate_questions", "evaluate_data"),
        *("profile_steps", "cpu_offload"),
    )
)
"""A resumed run may have other values of these fields: they do not change the weights."""
QUANTIZED = ("int8", "int4", "fp8", "nf4")
"""Precisions of frozen weights; listed here because a recipe is read without PyTorch."""
OPTIMIZERS = ("adamw", "adamw8bit", "paged_adamw8bit")
TRACKERS = ("tensorboard", "wandb", "mlflow")
LOSS_TYPES = ("sigmoid", "ipo", "ipo_sum", "simpo", "orpo")
GRPO_LOSS_TYPES = ("grpo", "dapo", "dr_grpo")


def _setting(default: Any, sentence: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": sentence})


@dataclass(frozen=True, slots=True, kw_only=True)
class DPOConfig:
    """Direct preference optimization (Rafailov et al. 2023, arXiv 2305.18290): learn from pairs."""

    beta: float = _setting(
        0.1,
        "Strength of the KL penalty towards the reference model, the one training starts from; of "
        "SimPO (2.0 in its paper) the scale of rewards, of ORPO the weight of the odds ratio.",
    )
    label_smoothing: float = _setting(
        0.0, "Assumed fraction of pairs whose labels are swapped, below 0.5."
    )
    loss_type: str = _setting(
        "sigmoid",
        "sigmoid (DPO); ipo, the squared loss of IPO (Azar et al. 2023) on mean log-probabilities "
        "of tokens, as its authors train; ipo_sum, on their sums; simpo (Meng et al. 2024) and "
        "orpo (Hong et al. 2024), on means and without a reference model.",
    )
    gamma: float = _setting(0.5, "SimPO's target margin between the rewards of both answers.")

    def __post_init__(self) -> None:
        check_types(self)
        if self.beta == 0:
            raise OptionError("beta must be above 0: with 0 nothing is learnt")
        if self.label_smoothing >= 0.5:
            raise OptionError(f"label_smoothing must be below 0.5, and is {self.label_smoothing}")
        if self.loss_type not in LOSS_TYPES:
            raise unknown("loss_type", self.loss_type, LOSS_TYPES)
        if self.loss_type not in ("sigmoid", "simpo") and self.label_smoothing:
            raise OptionError(
                f"{self.loss_type} has no label smoothing, and label_smoothing is "
                f"{self.label_smoothing}: leave out one of them"
            )

    @property
    def reference(self) -> bool:
        """Whether log-probabilities under the model before training are needed."""
        return self.loss_type not in ("simpo", "orpo")


@dataclass(frozen=True, slots=True, kw_only=True)
class KTOConfig:
    """Kahneman-Tversky optimization (Ethayarajh et al. 2024, arXiv 2402.01306): learn from answers
    that are labelled desirable or not."""

    beta: float = _setting(
        0.1, "Strength of the KL penalty towards the reference model, the one training starts from."
    )
    desirable_weight: float = _setting(1.0, "Weight of the losses of desirable answers.")
    undesirable_weight: float = _setting(
        1.0,
        "Weight of the losses of undesirable answers; the paper wants weight times number of one "
        "kind to be 1 to 4/3 of the other's.",
    )

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("beta", "desirable_weight", "undesirable_weight"):
            if not getattr(self, name):
                raise OptionError(f"{name} must be above 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class GRPOConfig:
    """Group relative policy optimization (Shao et al. 2024, arXiv 2402.03300): learn from rewards
    of sampled answers."""

    rewards: tuple[str, ...] = _setting(
        (), "Reward functions, module:name, each (prompt, answer, sample) -> number."
    )
    reward_weights: tuple[float, ...] = _setting((), "Weights of the rewards; by default 1 each.")
    reward_seconds: float = _setting(60.0, "A reward function that takes longer ends the run.")
    questions: int = _setting(8, "Questions of an optimizer step.")
    group_size: int = _setting(8, "Answers to each question.")
    max_new_tokens: int = _setting(64, "Maximum number of tokens of an answer.")
    temperature: float = _setting(
        1.0, "Sampling temperature; log-probabilities are those at this temperature."
    )
    clip_low: float = _setting(0.2, "The ratio of probabilities is clipped below 1 by this.")
    clip_high: float = _setting(0.2, "The ratio is clipped above 1 by this; 0.28 in DAPO.")
    beta: float = _setting(
        0.0, "Strength of the KL penalty towards the model before training; 0 needs no copy of it."
    )
    loss_type: str = _setting(
        "grpo",
        "grpo: the mean over answers of the means of their tokens; dapo: the mean over all tokens; "
        "dr_grpo: the sum over tokens by answers times max_new_tokens.",
    )
    scale_rewards: bool = _setting(
        True, "Divide advantages by the standard deviation of the group's rewards."
    )
    dynamic_sampling: bool = _setting(
        True, "Draw other questions for those whose answers all have one reward (DAPO)."
    )
    iterations: int = _setting(1, "Optimizer steps on the same answers.")

    def __post_init__(self) -> None:
        check_types(self)
        if not self.rewards:
            raise OptionError("grpo needs rewards: functions, module:name")
        if self.reward_weights and len(self.reward_weights) != len(self.rewards):
            raise OptionError(
                f"there are {len(self.rewards)} rewards and {len(self.reward_weights)} "
                "reward_weights: give one for each, or none"
            )
        if not all(map(math.isfinite, self.reward_weights)):
            raise OptionError(f"reward_weights must be numbers, and are {self.reward_weights}")
        if self.group_size < 2:
            raise OptionError("group_size must be at least 2: answers are compared with each other")
        for name in ("questions", "max_new_tokens", "temperature", "iterations", "reward_seconds"):
            if not getattr(self, name):
                raise OptionError(f"{name} must be above 0")
        if self.loss_type not in GRPO_LOSS_TYPES:
            raise unknown("loss_type", self.loss_type, GRPO_LOSS_TYPES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """All settings of a training run. Without `dpo` it is supervised fine-tuning (SFT)."""

    model: str | None = _setting(
        None, "The checkpoint to start from: a folder or a Hugging Face name."
    )
    source: Path | None = _setting(  # noqa: RUF009
        None,
        "Samples: .json, .jsonl, .parquet or .tar (with * several), a .yaml mixture of those, or a "
        "folder of images.",
    )
    media: Path | None = _setting(  # noqa: RUF009
        None, "Folder that relative paths of media start from; without it the file's own folder."
    )
    data_cache: Path | None = _setting(  # noqa: RUF009
        None,
        "Folder that keeps validated samples for other runs on the same data; without it the "
        "run's own.",
    )
    question: str | None = _setting(None, "The question about each sample of an image folder.")
    held_out: float | None = _setting(
        None,
        "Fraction of every data set that is held out for evaluation; without it 0.1 of a folder, "
        "nothing of a file.",
    )
    skip_errors: bool = _setting(
        False, "Leave out samples with errors and list them, instead of refusing to start."
    )
    seed: int = _setting(0, "Seed of the order of samples, the mixture and the held-out split.")
    template: str = _setting(
        "chat", "Layout of a sample: chat, or plain, images and answer without a question."
    )
    anyres: bool | None = _setting(
        None,
        "Cut the image of a single-image sample into tiles. Default: as the checkpoint was "
        "trained.",
    )
    images_first_ratio: float = _setting(
        0.0,
        "Fraction of multi-image samples (re-drawn each epoch) whose images are all moved before "
        "the text.",
    )
    steps: int | None = _setting(None, "Optimizer steps; or give `epochs`.")
    epochs: float | None = _setting(None, "Passes over all samples; or give `steps`.")
    lr: float = _setting(1e-5, "Peak learning rate.")
    warmup_ratio: float = _setting(0.03, "Fraction of the steps with a rising learning rate.")
    lr_schedule: str = _setting(
        "cosine", "Learning rate decay after the warm-up: cosine or linear."
    )
    min_lr_ratio: float = _setting(0.0, "Final learning rate as a fraction of the peak.")
    tower_lr_scale: float = _setting(
        0.0, "Factor on the learning rate of the vision tower; 0 freezes it."
    )
    projector_lr_scale: float = _setting(
        1.0, "Factor on the learning rate of the projector; 0 freezes it."
    )
    decoder_lr_scale: float = _setting(
        1.0, "Factor on the learning rate of the decoder; 0 freezes it."
    )
    embedding_lr_scale: float = _setting(
        1.0, "Factor on the decoder's learning rate for its token embeddings; 0 freezes them."
    )
    weight_decay: float = _setting(0.0, "Weight decay of matrices; vectors have none.")
    beta2: float = _setting(0.999, "AdamW's beta2, the decay of the second moment; beta1 is 0.9.")
    muon_lr_scale: float = _setting(
        0.0,
        "Train matrices except embeddings with Muon, with this factor on their learning rate; "
        "0 trains them with AdamW.",
    )
    max_grad_norm: float = _setting(1.0, "Gradients are clipped to this norm.")
    optimizer: str = _setting(
        "adamw",
        "adamw; adamw8bit, whose state has 8 bits (bitsandbytes, Dettmers et al. 2021, arXiv "
        "2110.02861); or paged_adamw8bit, whose state moves to the CPU's memory where that of a "
        "CUDA GPU is full.",
    )
    ema_decay: float = _setting(
        0.0, "Decay of an exponential moving average of the trained weights; 0 keeps none."
    )
    use_ema: bool = _setting(
        True,
        "Evaluate and write the averaged weights, if there are any; false only keeps them in the "
        "checkpoints.",
    )
    max_skipped_steps: int = _setting(
        0,
        "A step with a NaN or infinite loss or gradient is skipped; more than so many in a row end "
        "the run.",
    )
    tokens: int = _setting(8192, "Most tokens of a batch; samples are packed, never cut.")
    images: int = _setting(0, "Most images and video frames of a batch; 0 for no limit.")
    grad_accum_steps: int = _setting(
        1, "Batches of an optimizer step, over all processes together."
    )
    activation_checkpointing: bool = _setting(
        False, "Keep only the inputs of layers and recompute the rest: slower, in less memory."
    )
    bfloat16: bool | None = _setting(
        None,
        "Multiply matrices in bfloat16 where that is faster; weights stay float32. Default: on a "
        "CUDA GPU that has bfloat16.",
    )
    cpu_offload: bool = _setting(
        False,
        "Keep parameters, gradients and optimizer state of several processes in the CPU's memory; "
        "layers go to the GPU while they are computed.",
    )
    device: str = _setting("auto", "auto, cpu, cuda or cuda:N.")
    workers: int = _setting(1, "Data loader processes; 0 loads samples in the training process.")
    save_every: int = _setting(200, "Steps between checkpoints.")
    save_minutes: float = _setting(0.0, "Minutes between checkpoints, in addition; 0 for none.")
    keep: int = _setting(
        2, "How many of the last checkpoints are kept, in addition to the best by held-out loss."
    )
    timeout_minutes: float = _setting(
        10.0,
        "Minutes that a process of a distributed run waits for the others before it ends.",
    )
    evaluate_every: int = _setting(
        0, "Steps between evaluations on held-out samples; 0 only before and after training."
    )
    early_stopping: int = _setting(
        0, "End the run after so many evaluations in a row without a better one; 0 for never."
    )
    best_by: str = _setting(
        "loss",
        "What the best checkpoint and early_stopping go by: loss, the held-out one, or one of "
        "evaluate, the higher the better.",
    )
    evaluate: tuple[str, ...] = _setting(
        (),
        "Benchmarks of every evaluation: tasks of `llava eval`, such as docvqa, world (the tiny "
        "world's) or module:Task; several times.",
    )
    evaluate_questions: int = _setting(
        0, "Only the first questions of each of their data sets; 0 for all."
    )
    evaluate_data: Path | None = _setting(  # noqa: RUF009
        None, "Folder of their data sets; without it `data`."
    )
    sample_generations: int = _setting(
        4, "How many held-out questions are answered at each evaluation."
    )
    log_every: int = _setting(10, "Steps between lines of the log.")
    precision: str | None = _setting(
        None,
        "Precision of the frozen weights under an adapter (QLoRA): int8 or int4, on a GPU also fp8 "
        "or nf4; without it as they are stored.",
    )
    trackers: tuple[str, ...] = _setting(
        (), "Also send the log to tensorboard, wandb or mlflow; several times."
    )
    tracker_project: str = _setting(
        "llava-interleave", "Project (of MLflow: experiment) of the trackers."
    )
    profile_steps: int = _setting(
        0, "Profile so many steps, after the first two of this start, into the folder profile."
    )
    dpo: DPOConfig | None = _setting(  # noqa: RUF009
        None, "Preference optimization from pairs of answers."
    )
    kto: KTOConfig | None = _setting(  # noqa: RUF009
        None, "Preference optimization from single answers with labels."
    )
    grpo: GRPOConfig | None = _setting(  # noqa: RUF009
        None, "Reinforcement learning from rewards of sampled answers, on one process."
    )
    adapter: LoraConfig | None = _setting(  # noqa: RUF009
        None, "Train a LoRA adapter; the learning rate scales are those of its matrices."
    )

    def __post_init__(self) -> None:
        check_types(self)
        for name in (
            *("grad_accum_steps", "tokens", "save_every", "keep", "log_every"),
            *("max_grad_norm", "lr", "timeout_minutes"),
        ):
            if getattr(self, name) == 0:
                raise OptionError(f"{name} must be above 0")
        for name, known in (("template", ("chat", "plain")), ("lr_schedule", ("cosine", "linear"))):
            if getattr(self, name) not in known:
                raise unknown(name, getattr(self, name), known)
        for name, most in (
            ("held_out", 0.9),
            ("warmup_ratio", 1.0),
            ("min_lr_ratio", 1.0),
            ("images_first_ratio", 1.0),
            ("beta2", 0.9999),
            ("ema_decay", 0.999999),
        ):
            if (getattr(self, name) or 0) > most:
                raise OptionError(f"{name} must be at most {most}, and is {getattr(self, name)}")
        if self.steps == 0 or self.epochs == 0:
            raise OptionError("steps and epochs must be above 0")
        if self.early_stopping and not self.evaluate_every:
            raise OptionError("early_stopping counts evaluations: give evaluate_every too")
        if self.best_by not in ("loss", *self.evaluate):
            raise unknown("best_by", self.best_by, ("loss", *self.evaluate))
        if self.evaluate_questions and not self.evaluate:
            raise OptionError("evaluate_questions is for benchmarks: give evaluate too")
        if not self.use_ema and not self.ema_decay:
            raise OptionError("use_ema is for averaged weights: give ema_decay, or leave it out")
        if self.optimizer not in OPTIMIZERS:
            raise unknown("optimizer", self.optimizer, OPTIMIZERS)
        if self.optimizer != "adamw" and self.muon_lr_scale:
            raise OptionError(
                f"optimizer {self.optimizer} and muon_lr_scale exclude each other: Muon is for "
                "matrices next to adamw"
            )
        for tracker in self.trackers:
            if tracker not in TRACKERS:
                raise unknown("tracker", tracker, TRACKERS)
        if self.steps and self.epochs:
            raise OptionError(
                f"steps ({self.steps}) and epochs ({self.epochs}) exclude each other: "
                "leave out one of them"
            )
        if self.precision and self.precision not in QUANTIZED:
            raise unknown("precision", self.precision, QUANTIZED)
        if self.precision and not self.adapter:
            raise OptionError(
                f"precision {self.precision} is for the frozen weights under an adapter: "
                "train one (--adapter-rank), or leave it out"
            )
        if not self.tower_lr_scale + self.projector_lr_scale + self.decoder_lr_scale:
            raise OptionError(
                "tower_lr_scale, projector_lr_scale and decoder_lr_scale are all 0: "
                "nothing is left to train"
            )
        if self.dpo and self.kto:
            raise OptionError(
                "dpo and kto are two ways to learn preferences: leave out one of them"
            )
        if self.template == "plain" and (
            self.images_first_ratio or self.preferences or self.anyres
        ):
            names = ("images_first_ratio", "dpo", "kto", "anyres")
            other = next(name for name in names if getattr(self, name))
            raise OptionError(
                f"template plain shows whole images and one answer: leave out {other}"
            )
        if self.grpo and (self.preferences or self.images_first_ratio or self.template == "plain"):
            raise OptionError(
                "grpo samples answers to the questions of chat samples: leave out dpo, kto, "
                "images_first_ratio and template plain"
            )
        if self.grpo and self.grad_accum_steps > self.grpo.questions:
            raise OptionError(
                f"{self.grpo.questions} questions cannot be {self.grad_accum_steps} batches: "
                "raise grpo.questions, or lower grad_accum_steps"
            )
        if self.preferences and self.images_first_ratio:
            raise OptionError(
                "images_first_ratio is for SFT, and dpo and kto learn preferences: leave out one "
                "of them"
            )

    @property
    def preferences(self) -> DPOConfig | KTOConfig | None:
        """How preferences are learnt, if they are."""
        return self.dpo or self.kto

    @property
    def warmup_steps(self) -> int:
        """Steps with a rising learning rate."""
        return math.ceil(self.warmup_ratio * (self.steps or 0))

    def lr_factor(self, step: int) -> float:
        """The learning rate of a step as a fraction of the peak; transformers' schedules."""
        assert self.steps is not None
        if step < self.warmup_steps:
            return step / self.warmup_steps
        progress = min(1.0, (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps))
        linear = self.lr_schedule == "linear"
        left = 1 - progress if linear else 0.5 * (1 + math.cos(math.pi * progress))
        return self.min_lr_ratio + (1 - self.min_lr_ratio) * left

    def lr_scale(self, parameter: str) -> float:
        """The factor on the learning rate of a parameter, by its name."""
        if parameter.startswith("vision_tower."):
            return self.tower_lr_scale
        if parameter.startswith("multi_modal_projector."):
            return self.projector_lr_scale
        embedding = parameter.startswith("language_model.embed_tokens.")
        return self.decoder_lr_scale * (self.embedding_lr_scale if embedding else 1.0)

    def but(self, changes: Mapping[str, Any]) -> Recipe:
        """The recipe with other values; those of a table by `table.field`. Raises OptionError."""
        values: dict[str, Any] = {}
        tables: dict[str, dict[str, Any]] = {}
        for name, value in changes.items():
            table, dot, field = name.partition(".")
            if dot:
                tables.setdefault(table, {})[field] = value
            else:
                values[name] = value
        for table, own in tables.items():
            before = values.get(table) or getattr(self, table)
            values[table] = dataclasses.replace(before, **own) if before else TABLES[table](**own)
        for one, other in (("steps", "epochs"), ("epochs", "steps")):
            if one in values and other not in values:  # it replaces the recipe's other one
                values[other] = None
        return dataclasses.replace(self, **values)

    def stored(self) -> dict[str, Any]:
        """All settings as JSON and TOML have them; None is left out."""
        values = {k: v for k, v in dataclasses.asdict(self).items() if v is not None}
        stored: dict[str, Any] = json.loads(json.dumps(values, default=str))
        return stored

    def toml(self) -> str:
        """All settings as a file for `read`."""
        values = self.stored()
        tables = {name: values.pop(name) for name in TABLES if name in values}
        lines = [_line(name, value) for name, value in values.items()]
        for name, table in tables.items():
            lines += [f"\n[{name}]", *(_line(field, value) for field, value in table.items())]
        return "\n".join(lines) + "\n"


TABLES: dict[str, type[DPOConfig] | type[KTOConfig] | type[GRPOConfig] | type[LoraConfig]] = {
    "dpo": DPOConfig,
    "kto": KTOConfig,
    "grpo": GRPOConfig,
    "adapter": LoraConfig,
}


def fields(record: type[Any]) -> list[tuple[dataclasses.Field[Any], Any]]:
    """The fields of a record, each with its type."""
    hints = typing.get_type_hints(record)
    return [(field, hints[field.name]) for field in dataclasses.fields(record)]


def find(name: str) -> Path:
    """The file of a recipe: a .toml file, or a shipped one. Raises OptionError."""
    if name.endswith(".toml"):
        return Path(name)
    if name not in SHIPPED:
        raise unknown("recipe", name, SHIPPED)
    return FOLDER / f"{name}.toml"


def read(path: Path) -> Recipe:
    """The recipe of a TOML file; its relative paths start from its folder.

    Raises OptionError with the file's name.
    """
    try:
        values = tomllib.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise OptionError(f"{path} cannot be read as TOML: {error}") from error
    try:
        for name, table in TABLES.items():
            if name in values:
                if not isinstance(values[name], dict):
                    raise OptionError(f"{name} must be a table, [{name}]")
                values[name] = _record(table, values[name], f"{name}.")
        for name in ("source", "media", "data_cache", "evaluate_data"):
            if isinstance(values.get(name), str):
                values[name] = path.parent.absolute() / values[name]
        if isinstance(model := values.get("model"), str) and (path.parent / model).is_dir():
            values["model"] = str((path.parent / model).absolute())
        return _record(Recipe, values)
    except OptionError as error:
        raise OptionError(f"{path}: {error}") from None


T = typing.TypeVar("T")


def _record(record: type[T], values: Mapping[str, Any], prefix: str = "") -> T:
    known = [field.name for field, _ in fields(record)]
    if wrong := next((name for name in values if name not in known), None):
        raise unknown("key", prefix + wrong, [prefix + name for name in known])
    return record(
        **{
            name: tuple(value) if isinstance(value, list) else value
            for name, value in values.items()
        }
    )


def changed_settings(stored: Mapping[str, Any], recipe: Recipe) -> str:
    """The settings that change weights and differ from stored ones; "" if there are none."""
    stored, wanted = (
        json.loads(json.dumps(Recipe().stored() | _with_defaults(values)))
        for values in (stored, recipe.stored())
    )
    return ", ".join(
        f"{name}: {stored.get(name)!r} there, {wanted.get(name)!r} here"
        for name in sorted((stored.keys() | wanted.keys()) - RESUMABLE_FIELDS)
        if stored.get(name) != wanted.get(name)
    )


def _with_defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with the defaults of their tables, whose keys an older version may not have had."""
    tables = {
        name: {field.name: field.default for field in dataclasses.fields(table)}
        for name, table in TABLES.items()
        if name in values
    }
    return {**values, **{name: own | values[name] for name, own in tables.items()}}


def check_types(record: Any) -> None:
    """Raises OptionError for a field of another type, and for a number below 0."""
    for field, hint in fields(type(record)):
        value = getattr(record, field.name)
        if not _fits(value, hint):
            raise OptionError(f"{field.name} must be {_in_words(hint)}, not {value!r}")
        if isinstance(value, int | float) and not (0 <= value < math.inf or field.name == "seed"):
            raise OptionError(f"{field.name} must be a number from 0 on, and is {value}")


def _fits(value: object, hint: Any) -> bool:
    if isinstance(hint, types.UnionType):
        return any(_fits(value, one) for one in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        (one, _) = typing.get_args(hint)
        return isinstance(value, tuple) and all(_fits(part, one) for part in value)
    if hint is float:
        return type(value) in (int, float)
    return type(value) is hint if hint in (int, bool) else isinstance(value, hint)


def _in_words(hint: Any) -> str:
    words = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "a text",
        Path: "a path",
    }
    if typing.get_origin(hint) is tuple:
        return f"a list, each {_in_words(typing.get_args(hint)[0])}"
    kinds = typing.get_args(hint) or (hint,)
    return " or ".join(words[kind] for kind in kinds if kind in words) or "a table"


def _line(name: str, value: object) -> str:
    """TOML's basic strings, numbers and truth values are JSON's, but for DEL."""
    return f"{name} = {json.dumps(value, ensure_ascii=False)}".replace("\x7f", "\\u007f")
