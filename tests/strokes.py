"""Makes digits as people draw them: strokes, lists of points, that vary in size, position, slant and speed."""

import math
import random

# The ways to write each digit. A way is strokes separated by "/", a stroke smooth curves separated by ";", a curve the
# points x,y that it passes through, in percent of the digit's width and height from its top left.
WAYS = {
    0: ["50,0 16,30 20,80 50,100 80,75 84,25 50,0"],
    1: ["50,0 50,100", "30,20 55,0; 55,0 55,100"],
    2: ["12,25 35,2 70,5 82,28 55,62 8,98; 8,98 92,98", "15,20 50,0 80,25 50,70 20,95 20,75 50,85 95,95"],
    3: ["12,12 45,0 80,18 68,38 38,47; 38,47 78,56 84,82 50,100 8,86"],
    4: ["60,0 8,62; 8,62 92,62 / 66,10 66,100", "18,0 12,48; 12,48 84,45 / 82,0 76,100"],
    5: ["28,2 20,44; 20,44 52,36 86,62 68,93 35,100 8,88 / 28,2 86,0"],
    6: ["68,0 32,28 15,66 30,96 62,98 80,76 62,56 20,70"],
    7: ["10,3 88,3; 88,3 60,50 42,100", "10,3 88,3; 88,3 60,50 42,100 / 36,50 84,50"],
    8: ["74,14 45,0 22,20 48,46 80,74 50,100; 50,100 20,76 50,46 76,24 74,14"],
    9: ["78,20 50,0 22,20 36,45 64,42 78,20; 78,20 76,60 60,100"],
}


def strokes_of(way):
    """Return the strokes of a way: lists of curves, lists of points (x, y) from (0, 0) to (1, 1)."""
    strokes = [[curve.split() for curve in stroke.split(";")] for stroke in way.split("/")]
    return [[[tuple(int(n) / 100 for n in point.split(",")) for point in curve] for curve in part] for part in strokes]


def variations(count, seed=1):
    """Yield digits with their strokes: growing from a tenth of the canvas to nearly all of it, anywhere, slanted."""
    chance = random.Random(seed)
    for number in range(count):
        digit = number % 10
        size = 0.1 * 9.5 ** (number // 10 / max(1, (count - 1) // 10))  # from 0.1 to 0.95 of the canvas
        slant, narrow = chance.uniform(-0.15, 0.35), chance.uniform(0.6, 0.95)
        samples = chance.choice([3, 6, 12])  # between two points of a curve: a fast pen leaves few
        way = strokes_of(chance.choice(WAYS[digit]))
        strokes = [[point for part in stroke for point in curve(part, samples, chance)] for stroke in way]
        strokes = [[(narrow * x + slant * (1 - y), y) for x, y in stroke] for stroke in strokes]
        yield digit, place(strokes, size, chance)


def place(strokes, size, chance):
    """Scale strokes to a size, a fraction of the canvas, and move them to a random position on it."""
    xs, ys = zip(*(point for stroke in strokes for point in stroke), strict=True)
    left, top, scale = min(xs), min(ys), size / max(max(xs) - min(xs), max(ys) - min(ys))
    across, down = (chance.uniform(0.02, 0.98 - scale * (max(values) - min(values))) for values in (xs, ys))
    return [[(across + scale * (x - left), down + scale * (y - top)) for x, y in stroke] for stroke in strokes]


def curve(points, steps, chance):
    """Sample a smooth curve (Catmull and Rom 1974) in so many steps from one point to the next.

    It goes through points with noise, except for its ends, which join it to other curves.
    """
    inner = [tuple(value + chance.gauss(0, 0.03) for value in point) for point in points[1:-1]]
    through = [points[0], points[0], *inner, points[-1], points[-1]]
    sampled = [points[0]]
    for a, b, c, d in zip(through, through[1:], through[2:], through[3:], strict=False):
        for t in (step / steps for step in range(1, steps + 1)):
            weights = (-t + 2 * t**2 - t**3, 2 - 5 * t**2 + 3 * t**3, t + 4 * t**2 - 3 * t**3, -(t**2) + t**3)
            x, y = (math.fsum(w * p[axis] for w, p in zip(weights, (a, b, c, d), strict=True)) / 2 for axis in (0, 1))
            sampled.append((x, y))
    return sampled
