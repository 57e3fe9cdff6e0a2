"""Draws scenes. The same scene gives the same bytes on every host.

Only sums, products, roots and comparisons of float64 are used. Those are correctly rounded everywhere; sines and powers
are not, so corners come from a table of decimals. A shape is its signed distance in pixels; its coverage of a pixel is
clip(1/2 − distance, 0, 1).
"""

import io
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from make_miniature.words import COLOURS, PLAIN, Artist

PAPER = np.array((232.0, 206.0, 160.0))

# Corners on the unit circle, y down, six decimals.
CORNERS = {
    "square": ((-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)),
    "triangle": ((0.0, -1.0), (0.95, 0.72), (-0.95, 0.72)),
    "diamond_(shape)": ((0.0, -1.0), (0.78, 0.0), (0.0, 1.0), (-0.78, 0.0)),
    "hexagon": ((0.866025, -0.5), (0.866025, 0.5), (0.0, 1.0), (-0.866025, 0.5), (-0.866025, -0.5), (0.0, -1.0)),
    "star_(symbol)": (
        (0.0, -1.0),
        (0.293893, -0.404508),
        (0.951057, -0.309017),
        (0.475528, 0.154508),
        (0.587785, 0.809017),
        (0.0, 0.5),
        (-0.587785, 0.809017),
        (-0.475528, 0.154508),
        (-0.951057, -0.309017),
        (-0.293893, -0.404508),
    ),
    "bow": ((0.0, 0.0), (-1.0, -0.6), (-1.0, 0.6), (0.0, 0.0), (1.0, -0.6), (1.0, 0.6)),
    "crown": ((-0.8, 0.5), (-0.9, -0.6), (-0.4, 0.0), (0.0, -0.8), (0.4, 0.0), (0.9, -0.6), (0.8, 0.5)),
}


@dataclass(frozen=True)
class Figure:
    """x, y: centre as parts of width and height; radius: part of the shorter side; kind: girl, boy, other or thing (no
    face, no dress).
    """

    shape: str
    colour: str
    kind: str
    x: float
    y: float
    radius: float
    face: str | None = None
    mark: str | None = None


@dataclass(frozen=True)
class Scene:
    """width, height: pixels; finish 0 (worst) … 6 (masterpiece); age 0 (new) … 4 (old); pale 0 … 1 washes the colours
    out.
    """

    width: int
    height: int
    background: str
    colours: tuple[str, str]
    figures: tuple[Figure, ...] = field(default=())
    artist: Artist = PLAIN
    finish: int = 4
    age: int = 0
    pale: float = 0.0


def circle(x, y, radius):
    return np.sqrt(x * x + y * y) - radius


def box(x, y, half_width, half_height):
    return np.maximum(np.abs(x) - half_width, np.abs(y) - half_height)


def polygon(x, y, corners, scale):
    """Distance to the outline, negative inside (even-odd)."""
    nearest = np.full(x.shape, 1e18)
    inside = np.zeros(x.shape, bool)
    for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1], strict=True):
        ax, ay, bx, by = ax * scale, ay * scale, bx * scale, by * scale
        ex, ey, px, py = bx - ax, by - ay, x - ax, y - ay
        along = np.clip((px * ex + py * ey) / max(ex * ex + ey * ey, 1e-9), 0.0, 1.0)
        dx, dy = px - ex * along, py - ey * along
        nearest = np.minimum(nearest, dx * dx + dy * dy)
        if ey:
            inside ^= ((ay > y) != (by > y)) & (px < ex * py / ey)
    return np.where(inside, -1.0, 1.0) * np.sqrt(nearest)


def outline_of(shape, x, y, r):
    """Signed distance (pixels) of a body of radius r around the origin."""
    if shape in CORNERS:
        return polygon(x, y, CORNERS[shape], r)
    if shape == "ring":
        return np.abs(circle(x, y, 0.72 * r)) - 0.24 * r
    if shape == "crescent":
        return np.maximum(circle(x, y, 0.95 * r), -circle(x - 0.5 * r, y + 0.22 * r, 0.72 * r))
    if shape == "heart":
        lobes = np.minimum(circle(x - 0.42 * r, y + 0.3 * r, 0.5 * r), circle(x + 0.42 * r, y + 0.3 * r, 0.5 * r))
        tip = polygon(x, y, ((-0.84, -0.03), (0.0, -0.45), (0.84, -0.03), (0.0, 0.95)), r)
        return np.minimum(lobes, tip)
    return circle(x, y, 0.92 * r)


def paint(canvas, distance, colour, strength=1.0):
    coverage = np.clip(0.5 - distance, 0.0, 1.0)[..., None] * strength
    canvas += (np.asarray(colour, float) - canvas) * coverage


def saturate(colour, saturation, light):
    """A style's palette: towards grey or away from it, then towards white (light > 0) or black (light < 0)."""
    colour = np.asarray(colour, float)
    grey = (colour[..., :1] * 0.3 + colour[..., 1:2] * 0.59) + colour[..., 2:] * 0.11
    colour = np.clip(grey + (colour - grey) * saturation, 0.0, 255.0)
    return colour + ((255.0 if light > 0 else 0.0) - colour) * abs(light)


def background(scene, x, y):
    """The (height, width, 3) canvas; x, y: pixel centres."""
    one, two = (np.array(COLOURS[name], float) for name in scene.colours)
    canvas = np.empty((scene.height, scene.width, 3))
    canvas[:] = one
    unit = min(scene.width, scene.height)
    down = (y / scene.height)[..., None]
    kind = scene.background
    if kind == "gradient_background":
        canvas += (two - one) * down
    elif kind == "striped_background":
        step = unit / 4.0
        paint(canvas, np.abs((x + y) % step - step / 2.0) - step / 4.0, two)
    elif kind == "polka_dot_background":
        step = unit / 3.5
        paint(canvas, circle(x % step - step / 2.0, y % step - step / 2.0, step * 0.27), two)
    elif kind == "checkered_background":
        step = unit / 2.5
        paint(canvas, np.where((np.floor(x / step) + np.floor(y / step)) % 2 > 0, -1.0, 1.0), two)
    elif kind in ("blue_sky", "night_sky", "sunset", "ocean"):
        top, low, ground = {
            "blue_sky": ((92, 164, 240), (196, 226, 250), (86, 172, 66)),
            "night_sky": ((14, 18, 56), (44, 48, 110), (24, 52, 40)),
            "sunset": ((238, 92, 52), (252, 206, 96), (96, 56, 66)),
            "ocean": ((120, 196, 244), (216, 240, 250), (28, 96, 176)),
        }[kind]
        canvas[:] = np.array(top, float) + (np.array(low, float) - np.array(top, float)) * np.clip(
            down / 0.72, 0.0, 1.0
        )
        if kind == "night_sky":
            paint(canvas, circle(x - 0.82 * scene.width, y - 0.16 * scene.height, 0.09 * unit), (250, 244, 200))
        if kind == "sunset":
            paint(canvas, circle(x - 0.5 * scene.width, y - 0.66 * scene.height, 0.16 * unit), (255, 240, 170))
        if kind == "blue_sky":
            paint(canvas, circle(x - 0.16 * scene.width, y - 0.15 * scene.height, 0.1 * unit), (255, 232, 90))
        paint(canvas, 0.72 * scene.height - y, ground)
    return canvas


def clothe(canvas, figure, x, y, r):
    """A girl's bow, a boy's cap, a character's mark, and the face."""
    ink = (250, 250, 250) if figure.colour in ("black", "purple", "brown", "blue") else (30, 26, 34)
    if figure.mark == "cross":
        paint(
            canvas,
            np.minimum(box(x, y - 0.52 * r, 0.24 * r, 0.07 * r), box(x, y - 0.52 * r, 0.07 * r, 0.24 * r)),
            (255, 255, 255),
        )
    elif figure.mark == "band":
        paint(canvas, box(x, y - 0.42 * r, 0.55 * r, 0.09 * r), (255, 220, 70))
    elif figure.mark == "dot":
        paint(canvas, circle(x, y - 0.48 * r, 0.16 * r), (236, 60, 120))
    if figure.kind == "girl":
        bow = "white" if figure.colour in ("red", "pink") else "red"
        paint(canvas, polygon(x, y + 0.86 * r, CORNERS["bow"], 0.42 * r), COLOURS[bow])
    elif figure.kind == "boy":
        cap = "aqua" if figure.colour in ("blue", "black") else "blue"
        paint(canvas, box(x, y + 0.86 * r, 0.5 * r, 0.2 * r), COLOURS[cap])
        paint(canvas, box(x - 0.3 * r, y + 0.7 * r, 0.5 * r, 0.07 * r), COLOURS[cap])
    if figure.mark == "crown":
        paint(canvas, polygon(x, y + 0.98 * r, CORNERS["crown"], 0.42 * r), (250, 206, 40))
    if figure.face is None:
        return
    sides = np.abs(x) - 0.26 * r
    up = y + 0.1 * r
    if figure.face == "o_o":
        paint(canvas, circle(sides, up, 0.2 * r), (255, 255, 255))
        paint(canvas, circle(sides, up, 0.1 * r), (20, 20, 26))
    elif figure.face == "=_=":
        paint(canvas, box(sides, up, 0.15 * r, 0.045 * r), ink)
    elif figure.face == "^_^":
        paint(canvas, np.maximum(np.abs(circle(sides, up - 0.06 * r, 0.14 * r)) - 0.045 * r, up - 0.04 * r), ink)
    else:
        paint(canvas, box(sides, up, 0.055 * r, 0.11 * r), ink)
    if figure.face in ("smile", "^_^"):
        paint(canvas, np.maximum(np.abs(circle(x, y - 0.12 * r, 0.2 * r)) - 0.05 * r, 0.16 * r - y), ink)
    elif figure.face == ":<":
        paint(canvas, np.maximum(np.abs(circle(x, y - 0.42 * r, 0.2 * r)) - 0.05 * r, y - 0.36 * r), ink)
    elif figure.face == ":o":
        paint(canvas, circle(x, y - 0.24 * r, 0.11 * r), (150, 30, 50))


def stand(canvas, scene, figure, x, y):
    """Paint one figure into the part of the canvas that it can touch."""
    unit = min(scene.width, scene.height)
    r, cx, cy = figure.radius * unit, figure.x * scene.width, figure.y * scene.height
    reach = 1.5 * r + 2
    rows = slice(max(0, int(cy - reach)), max(0, int(cy + reach) + 1))
    columns = slice(max(0, int(cx - reach)), max(0, int(cx + reach) + 1))
    canvas, x, y = canvas[rows, columns], x[rows, columns] - cx, y[rows, columns] - cy
    if not canvas.size:
        return
    artist = scene.artist
    distance = outline_of(figure.shape, x, y, r)
    colour = np.array(COLOURS[figure.colour], float)
    if artist.outline:
        paint(canvas, distance - artist.outline * r, COLOURS[artist.ink])
    paint(canvas, distance, colour)
    darker, lighter = colour * 0.62, colour + (255.0 - colour) * 0.6
    if artist.fill == "soft":
        paint(canvas, np.maximum(distance, -0.25 * r - y + x * 0.3) + 0.1 * r, darker, 0.45)
        paint(canvas, circle(x + 0.3 * r, y + 0.35 * r, 0.28 * r), lighter, 0.6)
    elif artist.fill == "dots":
        step = max(0.34 * r, 5.0)
        paint(
            canvas,
            np.maximum(distance + 1.0, circle(x % step - step / 2.0, y % step - step / 2.0, step * 0.3)),
            lighter,
        )
    elif artist.fill == "hatch":
        step = max(0.3 * r, 5.0)
        paint(canvas, np.maximum(distance + 1.0, np.abs((x - y) % step - step / 2.0) - step * 0.2), darker)
    clothe(canvas, figure, x, y, r)


def blur(canvas):
    """The mean over 3 × 3 neighbours."""
    padded = np.pad(canvas, ((1, 1), (1, 1), (0, 0)), mode="edge")
    rows = (padded[:-2] + padded[1:-1] + padded[2:]) / 3.0
    return (rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]) / 3.0


def draw(scene: Scene) -> np.ndarray:
    """The picture, uint8 (height, width, 3)."""
    y, x = np.mgrid[0 : scene.height, 0 : scene.width].astype(float) + 0.5
    canvas = background(scene, x, y)
    for figure in scene.figures:
        stand(canvas, scene, figure, x, y)
    canvas = saturate(canvas, scene.artist.saturation, scene.artist.light)
    if scene.pale:
        canvas = canvas + (212.0 - canvas) * scene.pale
    canvas = canvas + (canvas * (PAPER / 255.0) - canvas) * (0.22 * scene.age)
    contrast = (0.45, 0.65, 0.85, 1.0, 1.0, 1.08, 1.18)[scene.finish]
    canvas = 128.0 + (canvas - 128.0) * contrast
    for _ in range((3, 1, 0, 0, 0, 0, 0)[scene.finish]):
        canvas = blur(canvas)
    return np.floor(np.clip(canvas, 0.0, 255.0) + 0.5).astype(np.uint8)


def webp(pixels: np.ndarray) -> bytes:
    """As the webp set was made: Pillow, quality 90. uint8 (height, width, 3 or 4)."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "WEBP", quality=90, method=4)
    return file.getvalue()
