"""Draw procedural portraits, so that the demo and the tests need no photographs of real people."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, ImageChops, ImageDraw

from sega_dist.errors import UserError
from sega_dist.progress import progress

# Face coordinates: the origin lies between the eyes, x points right, y down, and 1 is the side of the picture.
Points = np.ndarray | Sequence[tuple[float, float]]
Colour = np.ndarray | tuple[int, int, int]
Option = TypeVar("Option")

SUPERSAMPLING = 2
EYE_X, MOUTH_Y = 0.1225, 0.216
SKINS = [(248, 218, 200), (242, 204, 176), (230, 182, 146), (204, 148, 108), (158, 99, 70), (114, 74, 54), (86, 60, 50)]
HAIRS = [(48, 40, 38), (74, 52, 40), (112, 76, 50), (146, 76, 46), (182, 134, 84), (220, 186, 128), (172, 170, 168)]
IRISES = [(84, 52, 32), (122, 80, 44), (146, 116, 68), (96, 132, 92), (88, 136, 182), (130, 146, 160)]
STYLES = ["bald", "cropped", "short", "short", "parted", "parted", "fringe", "long", "long", "long fringe"]
BLACK, WHITE = (14, 11, 12), (255, 255, 255)

# Bumps on the face: x, y, width, height, rise. Those off the axis come in pairs.
RELIEF = [
    (0, 0.07, 0.055, 0.15, 0.04), (0, 0.118, 0.065, 0.065, 0.046), (0.036, 0.128, 0.036, 0.034, 0.02),
    (0.1, -0.085, 0.16, 0.07, 0.015), (0.105, -0.015, 0.12, 0.085, -0.022), (EYE_X, 0, 0.08, 0.05, 0.014),
    (0.15, 0.12, 0.16, 0.13, 0.026), (0, MOUTH_Y - 0.012, 0.09, 0.026, 0.011), (0, MOUTH_Y + 0.025, 0.08, 0.032, 0.018),
    (0, 0.168, 0.02, 0.04, -0.01), (0, 0.278, 0.11, 0.04, -0.013), (0, 0.325, 0.1, 0.07, 0.024),
]  # fmt: skip
# Folds on both sides: width, strength in youth, strength gained with age, knots.
FOLDS = [
    (3, 0.5, 0.1, [(0.032, 0.105), (0.044, 0.122), (0.045, 0.14), (0.034, 0.149)]),
    (4, 0.35, 0.1, [(0.036, 0.146), (0.02, 0.152), (0, 0.157)]),
    (3, 0.1, 0.3, [(0.05, 0.125), (0.082, 0.16), (0.1, 0.2), (0.102, 0.23)]),
    (3, 0.12, 0.25, [(0.075, 0.03), (0.11, 0.043), (0.15, 0.038), (0.172, 0.022)]),
    (3, 0.6, 0.0, [(0.248, 0.0), (0.264, -0.03), (0.276, -0.015), (0.272, 0.03), (0.26, 0.05), (0.252, 0.075)]),
    *[(2, -0.1, 0.5, [(0.19, 0.004 * i), (0.205, 0.012 * i - 0.01), (0.218, 0.02 * i - 0.025)]) for i in range(4)],
    *[(2, -0.16, 0.5, [(0.13, 0.012 - i), (0.05, -i), (0, 0.003 - i)]) for i in (0.15, 0.18, 0.215)],
]


class Dice:
    """Uniform draws by our own arithmetic on raw Philox words, so that no numpy version can change them."""

    def __init__(self, seed: int, index: int) -> None:
        self.words = np.random.Philox(key=np.array([seed % 2**64, index % 2**64], dtype=np.uint64))

    def many(self, count: int, low: float = 0.0, high: float = 1.0) -> np.ndarray:
        """Return `count` floats in [low, high)."""
        return low + (high - low) * ((self.words.random_raw(count) >> np.uint64(11)) * 2.0**-53)

    def one(self, low: float = 0.0, high: float = 1.0) -> float:
        """Return one float in [low, high)."""
        return float(self.many(1, low, high)[0])

    def pick(self, options: Sequence[Option]) -> Option:
        """Return one of the options."""
        return options[int(self.one(0, len(options)))]


@dataclass(frozen=True)
class Traits:
    """All that is decided about a person before the first stroke."""

    skin: np.ndarray
    hair: np.ndarray
    iris: np.ndarray
    cloth: np.ndarray
    backdrop: np.ndarray
    light: np.ndarray
    shape: np.ndarray  # four numbers from -1 to 1: width, jaw, chin and lips, eyes
    style: str
    age: float
    smile: float
    opening: float
    makeup: float
    beard: float
    freckles: float
    glasses: bool
    wave: float
    centre: np.ndarray
    scale: float
    angle: float


def sample_traits(dice: Dice) -> Traits:
    """Decide a person: grey hair comes with age, dark hair and eyes with dark skin, all else is independent."""
    tone, age, bearded = dice.one(), dice.one(), dice.one() < 0.3
    hair = 6 if age > 0.8 else int(dice.one(0, 3 if tone > 0.55 else 6))
    iris = int(dice.one(0, 2 if tone > 0.6 else 6))
    levels = np.arange(len(SKINS)) / (len(SKINS) - 1)
    light, opening = np.array([dice.one(-0.75, 0.75), dice.one(-0.7, -0.25), 1.0]), dice.one(-0.025, 0.026)
    return Traits(
        skin=np.array([np.interp(tone, levels, channel) for channel in np.array(SKINS).T]) * dice.many(3, 0.97, 1.03),
        hair=np.array(HAIRS[hair]) * dice.many(3, 0.95, 1.05),
        iris=np.array(IRISES[iris]) * dice.many(3, 0.9, 1.1),
        cloth=dice.one(50, 190) + dice.many(3, -45, 45),
        backdrop=dice.one(70, 210) + dice.many(6, -30, 30).reshape(2, 3),
        light=light / math.sqrt(float((light**2).sum())),
        shape=dice.many(4, -1, 1),
        style=dice.pick(STYLES[:7] if bearded else STYLES),
        age=age,
        smile=dice.one(-0.3, 1.0),
        opening=opening if opening > 0.008 else 0.0,
        makeup=0.0 if bearded else max(0.0, dice.one(-0.6, 1.0)),
        beard=dice.one(0.3, 1.0) if bearded else 0.0,
        freckles=max(0.0, dice.one(-1.5, 1.0)) * (tone < 0.6),
        glasses=dice.one() < 0.25,
        wave=dice.one() ** 2,
        centre=np.array([0.4965, 0.511]) + dice.many(2, -0.012, 0.012),
        scale=dice.one(0.94, 1.05),
        angle=dice.one(-0.08, 0.08),
    )


class Canvas:
    """A supersampled picture drawn on in face coordinates."""

    def __init__(self, traits: Traits, size: int) -> None:
        side = size * SUPERSAMPLING
        cosine, sine = math.cos(traits.angle), math.sin(traits.angle)
        self.axes = np.array([[cosine, sine], [-sine, cosine]]) * traits.scale * side
        self.centre, self.light, self.unit = traits.centre * side, traits.light, side / 512
        self.picture = Image.new("RGB", (side, side))
        self.draw = ImageDraw.Draw(self.picture, "RGBA")
        # Shading is smooth, so half the final resolution is enough for it.
        ticks = (np.arange(size // 2) + 0.5) * (side / (size // 2))
        back = np.linalg.inv(self.axes)
        right, down = ticks[None, :] - self.centre[0], ticks[:, None] - self.centre[1]
        self.x, self.y = right * back[0, 0] + down * back[1, 0], right * back[0, 1] + down * back[1, 1]

    def place(self, paths: Points) -> list:
        """Turn face coordinates into flat lists of pixel coordinates, one for each path."""
        pixels = np.asarray(paths) @ self.axes + self.centre
        return pixels.reshape(*pixels.shape[:-2], -1).tolist()

    def area(self, points: Points, colour: Colour, alpha: float = 1.0) -> None:
        """Fill a polygon."""
        self.draw.polygon(self.place(points), fill=ink(colour, alpha))

    def line(self, points: Points, colour: Colour, width: float = 1, alpha: float = 1.0) -> None:
        """Draw a line whose width is in half pixels of a picture of 256 pixels."""
        thickness = max(1, round(width * self.unit))
        self.draw.line(self.place(points), ink(colour, alpha), thickness, "curve" if thickness > 3 else None)

    def bump(self, x: float, y: float, width: float, height: float) -> np.ndarray:
        """Return a smooth bump, or a pair of them where x is not 0, that is 1 in the middle and 0 outside."""
        inside = np.maximum(0, 1 - ((abs(self.x) - x) / width) ** 2 - ((self.y - y) / height) ** 2)
        return inside * inside

    def stretched(self, pixels: np.ndarray) -> Image.Image:
        """Return shading as a picture of full size."""
        small = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
        return small.resize(self.picture.size, Image.Resampling.BILINEAR)

    def shade(self, outlines: Sequence[Points], factor: np.ndarray, gloss: np.ndarray | None = None) -> None:
        """Multiply the inside of the outlines by a factor and add a gloss."""
        mask = Image.new("L", self.picture.size)
        for outline in outlines:
            ImageDraw.Draw(mask).polygon(self.place(outline), fill=255)
        lack = np.clip(1 - factor, 0, 1)[..., None]
        warm = factor[..., None] * (1 - lack * (0.0, 0.2, 0.26))  # light that passes through skin comes out red
        shaded = ImageChops.multiply(self.picture, self.stretched(255 * warm))
        if gloss is not None:
            shaded = ImageChops.add(shaded, self.stretched(gloss).convert("RGB"))
        self.picture.paste(shaded, mask=mask)


def ink(colour: Colour, alpha: float = 1.0) -> tuple[int, ...]:
    """Return a colour as Pillow wants it."""
    return tuple(min(255, max(0, round(float(value)))) for value in (*colour, 255 * alpha))


def curve(points: Points, at: np.ndarray | int = 24) -> np.ndarray:
    """Return the Catmull-Rom curve through the points, at positions from 0 to 1 or at so many even ones."""
    knots = np.asarray(points, dtype=float)
    knots = np.concatenate([2 * knots[:1] - knots[1:2], knots, 2 * knots[-1:] - knots[-2:-1]])
    position = (np.linspace(0, 1, at) if isinstance(at, int) else at) * (len(knots) - 3)
    span = np.clip(position.astype(int), 0, len(knots) - 4)
    time = (position - span)[..., None]
    a, b, c, d = (knots[span + step] for step in range(4))
    return b + 0.5 * time * (c - a + time * (2 * a - 5 * b + 4 * c - d + time * (3 * (b - c) + d - a)))


def mirrored(points: Points) -> np.ndarray:
    """Continue a path that runs from the right to the axis with its mirror image on the left."""
    right = np.asarray(points, dtype=float)
    return np.concatenate([right, right[-2::-1] * (-1, 1)])


def ellipse(x: float, y: float, width: float, height: float, count: int = 28) -> np.ndarray:
    """Return an ellipse as a polygon."""
    turns = np.arange(count) * (2 * math.pi / count)
    return np.stack([x + width * np.cos(turns), y + height * np.sin(turns)], axis=-1)


def draw_background(canvas: Canvas, traits: Traits, dice: Dice) -> None:
    """Draw a soft gradient with blurred spots and, at times, the crisp boards of a wall."""
    slope = dice.one(-1, 1)
    blend = np.clip(0.5 + slope * canvas.x + (1 - abs(slope)) * canvas.y, 0, 1)[..., None]
    pixels = traits.backdrop[0] * (1 - blend) + traits.backdrop[1] * blend
    for x, y, radius, gain in dice.many(16).reshape(4, 4):
        pixels += 60 * (gain - 0.4) * canvas.bump(0.6 * x, y - 0.6, 0.15 + 0.3 * radius, 0.15 + 0.3 * radius)[..., None]
    canvas.picture.paste(canvas.stretched(pixels))
    step, lean, strength = dice.one(0.08, 0.2), dice.one(-0.03, 0.03), dice.one(-0.2, 0.22)
    for position in np.arange(-0.7, 0.7, step) if strength > 0 else ():
        canvas.line([(position, -0.8), (position + lean, 0.8)], BLACK, 3, strength)
        canvas.line([(position + 0.006, -0.8), (position + lean + 0.006, 0.8)], WHITE, 2, strength)


def draw_neck_and_shoulders(canvas: Canvas, traits: Traits, dice: Dice) -> None:
    """Draw the neck under the shadow of the chin, and clothes with hems or stripes that follow the shoulders."""
    neck = mirrored(curve([(0.15, 0.15), (0.148, 0.33), (0.165, 0.41), (0.24, 0.45), (0.6, 0.56), (0, 0.9)]))
    canvas.area(neck, traits.skin)
    low, step = dice.one(0.44, 0.5), dice.one(0.012, 0.03)
    edge = curve(mirrored([(0.62, 0.58), (0.42, 0.47), (0.28, 0.43), (0.165, 0.395), (0.1, low - 0.015), (0, low)]), 48)
    clothes = [*edge, (-0.7, 0.9), (0.7, 0.9)]
    canvas.area(clothes, traits.cloth)
    stripe, width = dice.pick([0.7, 0.8, 0.9, 1.2]), dice.one(100, 260) * step
    for row in range(1, 12):
        canvas.line(edge + (0, row * step), traits.cloth * stripe, width)
    round_off = np.clip(0.9 + traits.light[0] * canvas.x * 2 - (canvas.x / 0.3) ** 2 * 0.3, 0.5, 1)
    canvas.shade([neck, clothes], round_off * (1 - 0.55 * canvas.bump(0, 0.3, 0.24, 0.2)))
    canvas.line(edge[12:36] + (0, 0.003), traits.cloth * 0.5, 3)


def draw_head(canvas: Canvas, traits: Traits, dice: Dice) -> None:
    """Draw ears, head and features in flat colours, then light them together."""
    wide, jaw, chin, _ = 1 + traits.shape * (0.045, 0.09, 0.045, 0)
    half = [(0, -0.36), (0.12, -0.345), (0.205, -0.27), (0.247, -0.15), (0.254, -0.02), (0.246, 0.09)]
    half += [(0.226 * jaw, 0.19), (0.172 * jaw, 0.285 * chin), (0.095 * jaw, 0.35 * chin), (0, 0.372 * chin)]
    ear = [(0.235, -0.02), (0.262, -0.05), (0.288, -0.03), (0.285, 0.03), (0.268, 0.085), (0.25, 0.112), (0.23, 0.09)]
    outlines = [mirrored(curve(half, 40)) * (wide, 1), curve(ear) * (wide, 1), curve(ear) * (-wide, 1)]
    for outline, tint in zip(outlines[::-1], (0.88, 0.88, 1), strict=True):
        canvas.area(outline, traits.skin * (0.5 + 0.5 * tint, tint, tint))
    draw_mouth(canvas, traits)
    gaze = dice.many(2, -0.005, 0.005)
    for side in (-1, 1):
        canvas.area(ellipse(side * 0.0205, 0.1465, 0.0105, 0.0058), traits.skin * (0.35, 0.24, 0.22))
        draw_eye(canvas, traits, dice, side, gaze)
        draw_brow(canvas, traits, dice, side)
        for width, youth, growth, knots in FOLDS:
            strength = max(0, youth + growth * traits.age)
            canvas.line(curve(knots, 12) * (side, 1), traits.skin * (0.4, 0.28, 0.26), width, strength)
    for x, y, radius in dice.many(int(traits.freckles * 110) * 3, -1, 1).reshape(-1, 3):
        spot = ellipse(0.2 * x, 0.09 + 0.07 * y + 0.06 * x * x, 0.0033 + 0.001 * radius, 0.003 + 0.001 * radius, 8)
        canvas.area(spot, traits.skin * (0.7, 0.55, 0.45), 0.6)
    light_face(canvas, traits, outlines)


def light_face(canvas: Canvas, traits: Traits, outlines: Sequence[Points]) -> None:
    """Light the relief of the face, let it shine, and redden cheeks and nose."""
    for x, y, width in ((0.155, 0.12, 0.07), (0, 0.12, 0.03)):
        for side, size in ((-1, 1), (1, 1), (-1, 0.7), (1, 0.7)):
            canvas.area(ellipse(side * x, y, width * size, 0.7 * width * size), traits.skin * (1, 0.8, 0.8), 0.08)
    height = sum(rise * canvas.bump(x, y, width, tall) for x, y, width, tall, rise in RELIEF)
    down, right = (slope * len(canvas.x) / traits.scale for slope in np.gradient(height))
    front = np.sqrt(np.maximum(0.1, 1 - 0.9 * ((canvas.x / 0.3) ** 2 + (canvas.y / 0.43) ** 2)))
    normal = np.stack([canvas.x * 1.9 - right, canvas.y * 0.92 - down, front])
    normal /= np.sqrt((normal**2).sum(axis=0))
    facing = np.maximum(0, np.tensordot(traits.light, normal, axes=1))
    shine = np.maximum(0, 2 * facing * normal[2] - traits.light[2])
    canvas.shade(outlines, 0.42 + 0.6 * facing, 50 * shine**16)


def draw_mouth(canvas: Canvas, traits: Traits) -> None:
    """Draw the lips with their creases and, in an open mouth, the teeth."""
    wide, lift, gap = 0.078 + 0.02 * traits.smile, -0.018 * traits.smile, traits.opening
    full = 1 + 0.25 * traits.shape[2]
    lip = traits.skin * (0.88 - 0.05 * traits.makeup, 0.68 - 0.2 * traits.makeup, 0.68 - 0.12 * traits.makeup)
    bow = [(wide, lift), (wide * 0.55, lift * 0.5 - 0.017 * full), (0.014, -0.026 * full), (0, -0.021 * full)]
    upper = curve(mirrored([(wide, lift), (wide * 0.4, 0.002 - 0.3 * gap), (0, 0.003 - 0.3 * gap)]), 30) + (0, MOUTH_Y)
    arch = (1 - np.linspace(-1, 1, 30) ** 4)[:, None] * (0, 1)
    lower = upper + 1.3 * gap * arch
    bottom = lower + 0.031 * full * arch
    canvas.area([*upper, *lower[::-1]], (236, 228, 214))
    for tooth in range(3, 27, 3) if gap else ():
        canvas.line([upper[tooth], lower[tooth]], lip * 0.6, 1, 0.6)
    canvas.area([*curve(mirrored(bow), 30) + (0, MOUTH_Y), *upper[::-1]], lip * 0.9)
    canvas.area([*lower, *bottom[::-1]], lip)
    for crease in range(3, 27, 2):
        canvas.line([lower[crease], 0.35 * lower[crease] + 0.65 * bottom[crease]], lip * 0.7, 1, 0.5)
    for edge in (upper, lower):
        canvas.line(edge, lip * (0.4, 0.25, 0.25), 3, 0.9)
    canvas.line(bottom[8:22] + (0, 0.006), traits.skin * 0.4, 5, 0.15)


def draw_eye(canvas: Canvas, traits: Traits, dice: Dice, side: int, gaze: np.ndarray) -> None:
    """Draw one eye: the ball first, the lids over it, then the lashes."""
    up = 0.94 + 0.14 * traits.shape[3] - 0.12 * traits.smile
    axis, middle = np.array([side, 1]), np.array([side * EYE_X, 0])
    lid = curve([(-0.05, 0.007), (-0.03, -0.013 * up), (0.003, -0.025 * up), (0.034, -0.016 * up), (0.053, -0.002)])
    rim = curve([(-0.05, 0.007), (-0.024, 0.015 * up), (0.012, 0.019 * up), (0.038, 0.01 * up), (0.053, -0.002)])
    crease = lid * (1.08, 1.0) + (0.001, -0.0125)
    dark = 0.3 * traits.hair + 18
    canvas.area([*lid, *rim[::-1]] * axis + middle, (238, 232, 228))
    canvas.area(ellipse(side * (EYE_X - 0.047), 0.007, 0.006, 0.005), (214, 138, 130))
    draw_iris(canvas, traits, dice, *(middle + gaze))
    for edge, far in ((lid, -0.05), (rim, 0.05)):
        canvas.area([*edge, (0.075, far), (-0.065, far)] * axis + middle, traits.skin)
    canvas.area([*lid, *crease[::-1]] * axis + middle, traits.skin * (0.8, 0.68, 0.7), 0.4 + 0.4 * traits.makeup)
    canvas.line(crease * axis + middle, traits.skin * (0.4, 0.28, 0.26), 2, 0.75)
    canvas.line(lid * axis + middle + (0, 0.003), dark, 5, 0.35)
    canvas.line(lid * axis + middle, dark, 4)
    canvas.line(rim * axis + middle, traits.skin * (0.55, 0.38, 0.36), 2, 0.8)
    for lean, root in zip(np.linspace(-0.4, 1.1, 16), lid[8:], strict=True):
        tip = root + (0.008 * lean, -0.011 - 0.004 * traits.makeup)
        canvas.line([root, 0.5 * (root + tip) + (0.001, 0.002), tip] * axis + middle, dark, 2)
    for lean, root in zip(np.linspace(-0.5, 1, 9), rim[7:24:2], strict=True):
        canvas.line([root, root + (0.005 * lean, 0.007)] * axis + middle, dark, 1, 0.7)


def draw_iris(canvas: Canvas, traits: Traits, dice: Dice, x: float, y: float) -> None:
    """Draw limbal ring, iris, fibres, pupil and the reflection of the light."""
    for radius, tone in ((0.0245, 0.4), (0.0215, 1.0), (0.0145, 1.25)):
        canvas.area(ellipse(x, y, radius, radius), traits.iris * tone)
    fibres = zip(ellipse(x, y, 0.01, 0.01, 22), ellipse(x, y, 0.0205, 0.0205, 22), dice.many(22, 0.5, 1.6), strict=True)
    for start, end, tone in fibres:
        canvas.line([start, end], traits.iris * tone, 1, 0.8)
    canvas.area(ellipse(x, y, 0.0095, 0.0095), BLACK)
    shift = 0.011 if traits.light[0] > 0 else -0.011
    canvas.area(ellipse(x + shift, y - 0.0085, 0.0048, 0.0052), WHITE)
    canvas.area(ellipse(x - shift, y + 0.009, 0.0025, 0.0025), WHITE, 0.6)


def draw_brow(canvas: Canvas, traits: Traits, dice: Dice, side: int) -> None:
    """Draw one eyebrow hair by hair, each leaning outwards."""
    lift, at = 0.012 * traits.shape[3], np.linspace(0, 1, 44)
    thick = (0.016 + 0.006 * traits.shape[2] - 0.003 * traits.makeup) * np.minimum(1, 1.38 - 1.35 * at)
    spine = curve([(0.042, -0.062), (0.09, -0.08 - lift), (0.14, -0.083 - lift), (0.195, -0.055)], at)
    body, colour = thick[:, None] * (0, 0.45), 0.7 * traits.hair * (1, 0.93, 0.88)
    canvas.area([*spine + body, *(spine - body)[::-1]] * np.array([side, 1]), colour, 0.45)
    for root, reach, lean, tone in zip(spine, body, dice.many(44), dice.many(44, 0.6, 1.15), strict=True):
        tip = root + (0.009 + 0.006 * lean, 0) - reach * (0.7 + 0.6 * lean)
        canvas.line([root + 1.2 * reach, tip] * np.array([side, 1]), colour * tone, 2, 0.9)


def draw_strands(canvas: Canvas, traits: Traits, dice: Dice, paths: np.ndarray) -> None:
    """Draw hair along paths of shape (strands, points, 2), with locks of like tone and a band of sheen."""
    strands, points, _ = paths.shape
    along, locks = np.linspace(0, 1, points), dice.many(4, 0.6, 1.4)
    clump = np.sin(np.arange(strands)[:, None] * 0.7 * locks[0] + along * 2 * locks[1])
    middle = 0.33 + dice.many(strands, -0.1, 0.1)[:, None]
    sheen = 0.28 * np.maximum(0, 1 - ((along - middle) / 0.3) ** 2)
    side = 1.2 * traits.light[0] * paths[..., 0].mean(axis=1, keepdims=True)
    tone = 0.88 + 0.13 * clump + dice.many(strands, -0.08, 0.08)[:, None] + sheen + side
    swing = np.sin(6.28 * (along * (2 + 2 * locks[2]) + clump * 0.12 + locks[3])) * np.minimum(1, 4 * along)
    pixels = canvas.place(paths + 0.016 * traits.wave * swing[..., None] * (1, 0.3))
    inks = np.clip(traits.hair * tone[..., None] + 6, 0, 255).astype(int).tolist()
    for path, colours in zip(pixels, inks, strict=True):
        for start in range(0, points - 1, 2):  # one tone for two segments: each call is slow
            canvas.draw.line(path[2 * start : 2 * start + 6], tuple(colours[start]), max(1, round(2 * canvas.unit)))


def ruled(inner: Points, outer: Points, along: np.ndarray, across: np.ndarray) -> np.ndarray:
    """Return points between two curves: along them, and across from the inner to the outer one."""
    return curve(inner, along) * (1 - across[..., None]) + curve(outer, along) * across[..., None]


def draw_lock(canvas: Canvas, traits: Traits, dice: Dice, inner: Points, outer: Points, count: int) -> None:
    """Fill the space between two curves with hair that runs along them."""
    canvas.area([*curve(inner), *curve(outer)[::-1]], traits.hair * 0.6)
    time = np.linspace(0, 1, 13)
    across = np.linspace(0, 1, count)[:, None] + dice.many(count, -0.05, 0.05)[:, None] * time
    draw_strands(canvas, traits, dice, ruled(inner, outer, dice.many(count, 0.9, 1.04)[:, None] * time, across))


def draw_tufts(
    canvas: Canvas, traits: Traits, dice: Dice, inner: Points, outer: Points, count: int, reach: float, base: float
) -> None:
    """Cover the space between two curves with hair that grows across it; a reach of 1 spans all of it."""
    canvas.area([*curve(inner, 40), *curve(outer, 40)[::-1]], traits.hair * 0.6, base)
    time = np.linspace(0, 1, 3 + 2 * int(3 * reach))
    order, root = np.linspace(0, 1, count), dice.many(count, 0, 1.06 - reach)
    along = order[:, None] + (0.06 * (order - 0.5) + dice.many(count, -0.025, 0.025))[:, None] * time
    across = root[:, None] + reach * dice.many(count, 0.8, 1.12)[:, None] * time
    draw_strands(canvas, traits, dice, ruled(inner, outer, np.clip(along, 0, 1), across))


def draw_hair_behind(canvas: Canvas, traits: Traits, dice: Dice) -> None:
    """Draw the part of long hair that falls behind the neck."""
    inner, outer = [(0.0, -0.3), (0.15, 0.1), (0.1, 0.6)], [(0.02, -0.39), (0.29, 0.0), (0.32, 0.6)]
    for side in (-1, 1) if traits.style.startswith("long") else ():
        draw_lock(canvas, traits, dice, np.array(inner) * (side, 1), np.array(outer) * (side, 1), 28)


def draw_hair_in_front(canvas: Canvas, traits: Traits, dice: Dice) -> None:
    """Draw the hair on the skull and around the face: brushed up, or falling to both sides of a parting."""
    wide, line, parting = 1 + 0.045 * traits.shape[0], -0.255 + 0.02 * traits.shape[3], dice.one(-0.13, 0.13)
    if traits.style in ("cropped", "short"):
        high, count, reach = (0.03, 600, 0.2) if traits.style == "cropped" else (0.06 + 0.02 * traits.shape[2], 300, 1)
        inner = [(0.243, 0.035), (0.212, -0.12), (0.17, line + 0.04), (0.1, line + 0.01), (0, line)]
        outer = [(0.258, 0.04), (0.26 + 0.3 * high, -0.13), (0.225 + 0.3 * high, -0.27 - high / 2)]
        outer += [(0.13, -0.335 - high), (0, -0.36 - high)]
        edges = mirrored(inner) * (wide, 1), mirrored(outer) * (wide, 1)
        draw_tufts(canvas, traits, dice, edges[0], edges[1], count, reach, 0.8)
    for side in (-1, 1) if traits.style in ("parted", "fringe", "long", "long fringe") else ():
        inner = [(parting * side, line), (0.12, line + 0.03), (0.2, -0.14), (0.24, 0.0)]
        outer = [(parting * side, -0.405), (0.14, -0.372), (0.22, -0.295), (0.268, -0.18), (0.284, -0.05)]
        long = traits.style.startswith("long")
        inner += [(0.243, 0.15), (0.2, 0.34), (0.19, 0.6)] if long else [(0.248, 0.06)]
        outer += [(0.305, 0.12), (0.33, 0.34), (0.34, 0.6)] if long else [(0.268, 0.06)]
        draw_lock(canvas, traits, dice, np.array(inner) * (side * wide, 1), np.array(outer) * (side * wide, 1), 70)
    if traits.style.endswith("fringe"):
        edge = np.array([(0.05, -0.4), (0.13, -0.345), (0.19, -0.2), (0.21, -0.07)]) * (wide, 1)
        draw_lock(canvas, traits, dice, edge * (-1, 1), edge, 110)


def draw_beard(canvas: Canvas, traits: Traits, dice: Dice) -> None:
    """Draw a beard from ear to ear and a moustache."""
    low, count, base = 0.34 + 0.05 * traits.beard, int(300 + 500 * traits.beard), 0.15 + 0.5 * traits.beard
    inner = [(0.235, 0.06), (0.185, 0.15), (0.115, 0.2), (0.06, 0.27), (0, 0.275)]
    outer = [(0.245, 0.07), (0.225, 0.2), (0.17, low - 0.07), (0.09, low), (0, low + 0.02)]
    draw_tufts(canvas, traits, dice, mirrored(inner), mirrored(outer), count, 0.24, base)
    moustache = mirrored([(0.105, 0.215), (0.05, 0.168), (0, 0.172)])
    draw_tufts(canvas, traits, dice, moustache, moustache + (0, 0.022), count // 4, 0.7, base)


def draw_glasses(canvas: Canvas, dice: Dice) -> None:
    """Draw rims, bridge, temples and a faint reflection."""
    frame, width, corner, turn = dice.many(3, 15, 110), dice.one(4, 8), dice.one(0.55, 1.0), ellipse(0, 0, 1, 1, 40)
    shape = (np.sign(turn) * np.sqrt(abs(turn)) * (1 - corner) + turn * corner) * (0.092, dice.one(0.055, 0.07))
    for side in (-1, 1):
        rim = shape + (side * 0.127, 0.01)
        canvas.area(rim, WHITE, 0.06)
        canvas.area(rim[[14, 18, 36, 38]], WHITE, 0.08)
        canvas.line([*rim, *rim[:2]], frame, width)
        canvas.line(rim[22:36], frame + 70, 1)
        canvas.line([(side * 0.217, -0.005), (side * 0.262, -0.015)], frame, width)
    canvas.line(curve([(-0.037, 0.0), (0, -0.013), (0.037, 0.0)]), frame, width)


def face(seed: int, index: int, size: int = 256) -> np.ndarray:
    """Return portrait number `index` of a seed as a uint8 array of shape (size, size, 3)."""
    dice = Dice(seed, index)
    traits = sample_traits(dice)
    canvas = Canvas(traits, size)
    draw_background(canvas, traits, dice)
    draw_hair_behind(canvas, traits, dice)
    draw_neck_and_shoulders(canvas, traits, dice)
    draw_head(canvas, traits, dice)
    if traits.beard:
        draw_beard(canvas, traits, dice)
    draw_hair_in_front(canvas, traits, dice)
    if traits.glasses:
        draw_glasses(canvas, dice)
    grain = dice.many(size * size, -1.5, 1.5).reshape(size, size, 1)
    return np.clip(np.asarray(canvas.picture.reduce(SUPERSAMPLING)) + grain + 0.5, 0, 255).astype(np.uint8)


def write_folder(out: Path, images: int, seed: int = 0, size: int = 256, quality: int = 95) -> None:
    """Write portraits 0 to images - 1 as JPEG files in the layout of CelebA."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not an empty folder: give a new folder, or empty this one")
    folder = out / "img_align_celeba"
    folder.mkdir(parents=True)
    with progress("drawing", images) as advance:
        for index in range(images):
            path = folder / f"{index + 1:06d}.jpg"
            Image.fromarray(face(seed, index, size)).save(path, quality=quality, subsampling=0)
            advance(1)
