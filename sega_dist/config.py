"""Every hyper-parameter: one frozen dataclass a part, one line a field."""

import dataclasses
import hashlib
import json
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sega_dist.errors import UserError, closest

Scale = Literal[4, 8, 16]
Kernels = Literal["auto", "triton", "hybrid", "reference"]
Compile = Literal["off", "default", "max"]
GeneratorKind = Literal["sega", "srcnn", "vdsr", "srresnet", "esrgan", "urdgn", "fsrnet", "facegan"]
FACE_SIDES = (32, 64, 128, 256, 512, 1024)  # of a face GAN
ContentLayer = Literal["conv3_3", "conv5_4", "relu5_4"]


@dataclass(frozen=True)
class DataConfig:
    size: int = 256  # HR side in pixels; must be the shards'
    patch: int = 0  # side of the random HR square a step trains on, in pixels; 0 = whole images
    hflip: float = 0.5  # probability of a horizontal flip, the same for LR and HR
    workers: int = 2  # decoding processes a rank
    max_bad_samples: int = 100  # damaged samples replaced by their neighbour before the run stops


@dataclass(frozen=True)
class GeneratorConfig:
    kind: GeneratorKind = "sega"  # which network; channels is of all but facegan, the keys after blocks are of sega
    channels: int = 64  # channels of the trunk (urdgn: of its first convolution)
    blocks: int = 16  # residual blocks of srresnet and esrgan, convolutions of vdsr
    nested_blocks: int = 4  # dense nested blocks, three RIDBs each
    alpha: float = 0.2  # residual scale of a dense nested block
    beta: float = 0.2  # residual scale of a RIDB
    slope: float = 0.2  # negative slope of LeakyReLU
    zero_fusion: bool = False  # start with the trunk's branch at zero (its batch norm's weight): a faster first hour


@dataclass(frozen=True)
class NormConfig:
    momentum: float = 0.1  # of the generator's running statistics
    eps: float = 1e-5  # added to the variance
    conv_bias: bool = False  # bias in convolutions before batch norm; it is cancelled there, so its gradient is noise


@dataclass(frozen=True)
class EncoderConfig:
    kind: Literal["vgg19_pool8", "trainable", "none"] = "vgg19_pool8"  # frozen VGG19, small and trained with D, absent
    width: int = 64  # of the trainable encoder; its embedding has 8 x width channels


@dataclass(frozen=True)
class DiscriminatorConfig:
    kind: Literal["sega", "srgan", "esrgan", "urdgn", "facegan"] = "sega"  # which network; sega's alone reads semantics
    width: int = 64  # channels of the first convolution
    slope: float = 0.2  # negative slope of LeakyReLU
    dropout: float = 0.5  # in the fully connected layers
    last_bias: Literal["auto", "yes", "no"] = "auto"  # auto: with bce alone; else its gradient is exactly zero
    fake_semantics: Literal["lr", "sr"] = "lr"  # the fake tuple's embedding is that of the LR input (paper) or of SR


@dataclass(frozen=True)
class FaceGanConfig:
    z_size: int = 512  # numbers that a face is made from
    w_size: int = 512  # numbers that each layer of the generator reads
    mapping_layers: int = 8  # fully connected, from z to w
    channel_base: int = 16384  # channels of both networks at side s: this over s
    channel_max: int = 512  # but so many at most
    style_mixing: float = 0.9  # probability that a face's later layers read another w
    r1_gamma: float = 1.0  # weight of D's squared gradient at real images (R1), halved
    r1_interval: int = 16  # steps between updates of D by it, each with so many times its weight


@dataclass(frozen=True)
class LossConfig:
    adv: Literal["rals", "bce", "ragan"] = "rals"  # relativistic least squares, cross-entropy, relativistic c.-e.
    w_content: float = 1.0  # weight of the distance of VGG19's features
    content: ContentLayer = "conv3_3"  # which features: conv before its ReLU, relu after it
    content_norm: Literal["mse", "l1"] = "mse"  # mean square or mean absolute value of their difference
    w_adv: float = 1e-3  # weight of the adversarial loss; 0 = no discriminator
    w_pixel: float = 0.0  # weight of the pixel difference, of images in [-1,1]
    pixel: Literal["l1", "mse", "sse"] = "l1"  # mean absolute value, mean square, or each image's sum of squares
    warmup: Literal["all", "pixel"] = "all"  # before D plays: all but its loss, or the pixel difference with weight 1


@dataclass(frozen=True)
class TrainConfig:
    images: int = 240_000  # length of the run in images seen by all ranks together
    batch_size: int = 8  # images a step over all ranks
    optimizer: Literal["adam", "sgd", "rmsprop"] = "adam"  # of both players
    learning_rate: float = 1e-4  # of both players
    betas: tuple[float, float] = (0.9, 0.999)  # Adam's; sgd's momentum is the first, rmsprop's average the second
    weight_decay: float = 0.0  # times the weight, added to its gradient
    clip: float = 0.0  # largest norm of a player's gradient, scaled down to it; 0 = never
    milestones: tuple[float, ...] = ()  # shares of `images` after which the learning rate falls
    decay: float = 0.5  # by this factor
    content_warmup_kimg: float = 0.0  # thousands of images at the start without a discriminator; see loss.warmup
    ema_kimg: float = 0.0  # half-life of the weight average in thousands of images; 0 = the raw weights
    precision: Literal["fp32", "tf32", "bf16", "fp16", "fp64"] = "fp32"  # bf16, fp16: autocast; fp64: for proofs
    activation_checkpointing: bool = False  # compute activations again in backward: less memory, same result
    seed: int = 0  # of weights, order, flips and dropout
    tick_kimg: float = 1.0  # a line of statistics each so many thousand images
    grid_kimg: float = 10.0  # pictures and preview scores
    checkpoint_kimg: float = 10.0  # checkpoint and snapshot
    keep: int = 2  # newest checkpoints kept


@dataclass(frozen=True)
class Config:
    scale: Scale = 4  # HR side over LR side
    kernels: Kernels = "auto"  # fused ops: auto takes what the table of this GPU says, others ask for one or fail
    compile: Compile = "off"  # torch.compile's mode for the networks; on one GPU the step becomes CUDA graphs as well
    data: DataConfig = field(default_factory=DataConfig)
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    norm: NormConfig = field(default_factory=NormConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    facegan: FaceGanConfig = field(default_factory=FaceGanConfig)  # of kind facegan alone: faces from nothing
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    @property
    def hr_size(self) -> int:
        """HR side of what a step trains on."""
        return self.data.patch or self.data.size

    @property
    def lr_size(self) -> int:
        return self.hr_size // self.scale

    @property
    def is_face_gan(self) -> bool:
        """Whether it makes faces from random numbers, and none from LR."""
        return self.generator.kind == "facegan"

    @property
    def has_discriminator(self) -> bool:
        """Without a weight on its loss there is no second player."""
        return self.loss.w_adv > 0


MOST = 4096  # channels, nested blocks: a file that asks for more was not written by us
LARGEST = 1e300  # of a number that stands for a float

# Keys that may change when a run goes on: they decide how long, how fast and how loudly, not what is computed.
FREE_ON_RESUME = {
    "kernels", "compile", "data.workers", "data.max_bad_samples", "train.images", "train.activation_checkpointing",
    "train.tick_kimg", "train.grid_kimg", "train.checkpoint_kimg", "train.keep",
}  # fmt: skip

SCHEDULE = ("content_warmup_kimg", "ema_kimg", "tick_kimg", "grid_kimg", "checkpoint_kimg")  # of `train`


def learning_rate(train: TrainConfig, nimg: int) -> float:
    """Of the step that starts at image `nimg`."""
    return train.learning_rate * train.decay ** sum(nimg >= share * train.images for share in train.milestones)


def validate(config: Config) -> Config:
    """The same configuration, or a UserError that names the key, its value and what is legal."""
    size, patch, scale, train = config.data.size, config.data.patch, config.scale, config.train
    is_trained = config.encoder.kind == "trainable"
    has_semantics = config.has_discriminator and config.encoder.kind != "none"
    kind, judge = config.generator.kind, config.discriminator.kind
    least = 8 if kind == "sega" or has_semantics else 4  # an embedding is of 8x8
    rules = [
        (size >= 32 and size % 32 == 0, "data.size", size, "a multiple of 32, at least 32"),
        (
            patch == 0 or (32 <= patch <= size and patch % 32 == 0),
            "data.patch",
            patch,
            "0, or a multiple of 32 up to data.size",
        ),
        (
            config.lr_size >= least,
            "scale",
            scale,
            f"such that LR has {least} pixels a side at least (HR has {config.hr_size})",
        ),
        (
            not has_semantics or config.hr_size <= 256,
            "data.size or data.patch",
            config.hr_size,
            "at most 256 where an encoder embeds it in 8x8",
        ),
        (
            not is_trained or config.hr_size.bit_count() == 1,
            "data.patch or data.size",
            config.hr_size,
            "a power of two for encoder.kind trainable",
        ),
        (0 <= config.data.hflip <= 1, "data.hflip", config.data.hflip, "a probability"),
        (config.data.workers >= 0, "data.workers", config.data.workers, "0 or more"),
        (config.data.max_bad_samples >= 0, "data.max_bad_samples", config.data.max_bad_samples, "0 or more"),
        (1 <= config.generator.channels <= MOST, "generator.channels", config.generator.channels, f"from 1 to {MOST}"),
        (
            1 <= config.generator.nested_blocks <= MOST,
            "generator.nested_blocks",
            config.generator.nested_blocks,
            f"from 1 to {MOST}",
        ),
        (1 <= config.generator.blocks <= MOST, "generator.blocks", config.generator.blocks, f"from 1 to {MOST}"),
        (kind != "vdsr" or config.generator.blocks > 1, "generator.blocks", config.generator.blocks, "2 or more"),
        (kind != "urdgn" or scale < 16, "scale", scale, "4 or 8 for generator.kind urdgn, which doubles three times"),
        (
            not has_semantics or judge == "sega",
            "encoder.kind",
            config.encoder.kind,
            f"none for discriminator.kind {judge}, which judges the image alone",
        ),
        (
            not config.has_discriminator or judge != "esrgan" or config.hr_size % 64 == 0,
            "data.patch or data.size",
            config.hr_size,
            "a multiple of 64 for discriminator.kind esrgan",
        ),
        (config.encoder.width >= 1, "encoder.width", config.encoder.width, "1 or more"),
        (config.discriminator.width >= 2, "discriminator.width", config.discriminator.width, "2 or more"),
        (0 <= config.discriminator.dropout < 1, "discriminator.dropout", config.discriminator.dropout, "in [0, 1)"),
        (train.images >= 1, "train.images", train.images, "1 or more"),
        (train.batch_size >= 2, "train.batch_size", train.batch_size, "2 or more: batch norm needs two samples"),
        (train.learning_rate > 0, "train.learning_rate", train.learning_rate, "above 0"),
        (all(0 <= beta < 1 for beta in train.betas), "train.betas", train.betas, "two numbers in [0, 1)"),
        (train.keep >= 1, "train.keep", train.keep, "1 or more"),
        (
            list(train.milestones) == sorted(set(train.milestones)) and all(0 < m < 1 for m in train.milestones),
            "train.milestones",
            train.milestones,
            "shares between 0 and 1, each above the one before",
        ),
        (0 < train.decay <= 1, "train.decay", train.decay, "above 0, at most 1"),
        (0 <= train.seed < 2**63, "train.seed", train.seed, "0 or more, and fit 63 bits"),
    ]
    rules += [(getattr(train, name) > 0, f"train.{name}", getattr(train, name), "above 0")
              for name in ("tick_kimg", "grid_kimg", "checkpoint_kimg")]  # fmt: skip
    rules += [(getattr(train, name) >= 0, f"train.{name}", getattr(train, name), "0 or more")
              for name in ("content_warmup_kimg", "ema_kimg", "weight_decay", "clip")]  # fmt: skip
    rules += [(getattr(config.loss, name) >= 0, f"loss.{name}", getattr(config.loss, name), "0 or more")
              for name in ("w_content", "w_adv", "w_pixel")]  # fmt: skip
    for is_legal, key, value, legal in [*rules, *(_face_gan_rules(config) if "facegan" in (kind, judge) else [])]:
        if not is_legal:
            raise UserError(f"{key} is {value}; it must be {legal}")
    if train.content_warmup_kimg and config.loss.warmup == "pixel" and not config.has_discriminator:
        raise UserError("loss.warmup is pixel, but no discriminator plays afterwards: loss.w_adv must be above 0")
    if config.loss.w_content == config.loss.w_pixel == 0 and (train.content_warmup_kimg or not config.loss.w_adv):
        raise UserError("loss.w_content or loss.w_pixel must be above 0 wherever no discriminator trains the generator")
    return config


def _face_gan_rules(config: Config) -> list[tuple[bool, str, Any, str]]:
    """What a face GAN asks for besides: whether it is so, the key, its value, what is legal."""
    face, loss, train = config.facegan, config.loss, config.train
    sizes = [(name, getattr(face, name)) for name in ("z_size", "w_size", "channel_base", "channel_max")]
    sides, alone = ", ".join(map(str, FACE_SIDES)), "facegan together with the other player"
    return [
        (config.is_face_gan, "generator.kind", config.generator.kind, alone),
        (config.discriminator.kind == "facegan", "discriminator.kind", config.discriminator.kind, alone),
        (config.hr_size in FACE_SIDES, "data.size or data.patch", config.hr_size, f"one of {sides} for a face GAN"),
        *((1 <= value <= 16 * MOST, f"facegan.{name}", value, f"from 1 to {16 * MOST}") for name, value in sizes),
        (1 <= face.mapping_layers <= 64, "facegan.mapping_layers", face.mapping_layers, "from 1 to 64"),
        (face.channel_base >= config.hr_size, "facegan.channel_base", face.channel_base,
         f"{config.hr_size} or more: one channel at the largest side"),
        (0 <= face.style_mixing <= 1, "facegan.style_mixing", face.style_mixing, "a probability"),
        (face.r1_gamma >= 0, "facegan.r1_gamma", face.r1_gamma, "0 or more"),
        (face.r1_interval >= 1, "facegan.r1_interval", face.r1_interval, "1 or more"),
        (config.encoder.kind == "none", "encoder.kind", config.encoder.kind, "none for a face GAN, which has no LR"),
        (loss.adv == "bce", "loss.adv", loss.adv, "bce for a face GAN"),
        (loss.w_adv > 0, "loss.w_adv", loss.w_adv, "above 0 for a face GAN"),
        (not loss.w_content, "loss.w_content", loss.w_content, "0 for a face GAN, which has no target"),
        (not loss.w_pixel, "loss.w_pixel", loss.w_pixel, "0 for a face GAN, which has no target"),
        (not train.content_warmup_kimg, "train.content_warmup_kimg", train.content_warmup_kimg, "0 for a face GAN"),
        (not train.activation_checkpointing, "train.activation_checkpointing", train.activation_checkpointing,
         "false for a face GAN: R1 goes backward twice"),
    ]  # fmt: skip


def shortened(config: Config, images: int) -> Config:
    """The same training in `images` images: what is counted in thousands of them keeps its share of the whole."""
    train = config.train
    scaled: dict[str, Any] = {name: float(f"{getattr(train, name) * images / train.images:.6g}") for name in SCHEDULE}
    return validate(dataclasses.replace(config, train=dataclasses.replace(train, images=images, **scaled)))


def to_dict(config: Config) -> dict[str, Any]:
    """Nested plain values, as they stand in JSON."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(values: dict[str, Any], where: str = "configuration") -> Config:
    """The inverse of `to_dict`, not yet validated; missing keys keep their defaults, unknown ones raise UserError."""
    config: Config = _build(Config, values, "", where)
    return config


def load(path: Path) -> dict[str, Any]:
    """The values of a JSON configuration file."""
    try:
        values = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"cannot read configuration {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold a JSON object of configuration keys")
    return values


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`base` with the values of `over` laid on top, section by section."""
    nested = {key: merge(base[key], value) for key, value in over.items()
              if isinstance(value, dict) and isinstance(base.get(key), dict)}  # fmt: skip
    return {**base, **over, **nested}


def digest(values: dict[str, Any]) -> str:
    """SHA-256 of the canonical JSON of `values`."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def differences(old: Config, new: Config) -> list[str]:
    """`key: old -> new` for every key that differs and may not change on resume."""
    before, after = flat(to_dict(old)), flat(to_dict(new))
    free = FREE_ON_RESUME - ({"train.images"} if old.train.milestones else set())  # shares of it decide the past too
    return [f"{key}: {before[key]} -> {after[key]}" for key in before
            if key not in free and before[key] != after[key]]  # fmt: skip


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as one level of dotted keys."""
    keys: dict[str, Any] = {}
    for key, value in values.items():
        keys |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return keys


def _build(kind: type, values: dict[str, Any], prefix: str, where: str) -> Any:
    types = typing.get_type_hints(kind)
    arguments = {}
    for key, value in values.items():
        if key not in types:
            raise UserError(f"unknown key {prefix}{key} in {where}{closest(key, list(types))}")
        if dataclasses.is_dataclass(types[key]):
            if not isinstance(value, dict):
                raise UserError(f"{prefix}{key} in {where} must be a section, not {value!r}")
            arguments[key] = _build(types[key], value, f"{prefix}{key}.", where)
        else:
            arguments[key] = _value(types[key], value, prefix + key, where)
    return kind(**arguments)


def _value(kind: Any, value: Any, key: str, where: str) -> Any:
    if typing.get_origin(kind) is Literal:
        if not any(value == legal and type(value) is type(legal) for legal in typing.get_args(kind)):
            legal = ", ".join(map(str, typing.get_args(kind)))
            raise UserError(f"{key} in {where} is {value!r:.80}; it must be one of {legal}")
        return value
    if typing.get_origin(kind) is tuple:
        is_any_length = typing.get_args(kind)[1] is ...
        if (
            isinstance(value, (list, tuple))
            and (is_any_length or len(value) == 2)
            and all(isinstance(v, (int, float)) and abs(v) < LARGEST for v in value)
        ):
            return tuple(map(float, value))
    elif kind is float and isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < LARGEST:
        return float(value)
    elif isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    names[tuple[float, ...]] = "a list of numbers"
    raise UserError(f"{key} in {where} is {value!r:.80}; it must be {names.get(kind, 'two numbers')}")
