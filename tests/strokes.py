"""Makes digits as people draw them: strokes, lists of points, that vary in size, position, slant and speed."""

import math
import random

# The ways to write each digit. A way is a list of strokes, a stroke a list of smooth curves, a curve a list of points
# (x, y) that it passes through, from (0, 0) at the top left to (1, 1).
WAYS = {
    0: [[[[(0.5, 0), (0.16, 0.3), (0.2, 0.8), (0.5, 1), (0.8, 0.75), (0.84, 0.25), (0.5, 0)]]]],
    1: [[[[(0.5, 0), (0.5, 1)]]], [[[(0.3, 0.2), (0.55, 0)], [(0.55, 0), (0.55, 1)]]]],
    2: [
        [
            [
                [(0.12, 0.25), (0.35, 0.02), (0.7, 0.05), (0.82, 0.28), (0.55, 0.62), (0.08, 0.98)],
                [(0.08, 0.98), (0.92, 0.98)],
            ]
        ],
        [[[(0.15, 0.2), (0.5, 0), (0.8, 0.25), (0.5, 0.7), (0.2, 0.95), (0.2, 0.75), (0.5, 0.85), (0.95, 0.95)]]],
    ],
    3: [
        [
            [
                [(0.12, 0.12), (0.45, 0), (0.8, 0.18), (0.68, 0.38), (0.38, 0.47)],
                [(0.38, 0.47), (0.78, 0.56), (0.84, 0.82), (0.5, 1), (0.08, 0.86)],
            ]
        ]
    ],
    4: [
        [[[(0.6, 0), (0.08, 0.62)], [(0.08, 0.62), (0.92, 0.62)]], [[(0.66, 0.1), (0.66, 1)]]],
        [[[(0.18, 0), (0.12, 0.48)], [(0.12, 0.48), (0.84, 0.45)]], [[(0.82, 0), (0.76, 1)]]],
    ],
    5: [
        [
            [
                [(0.28, 0.02), (0.2, 0.44)],
                [(0.2, 0.44), (0.52, 0.36), (0.86, 0.62), (0.68, 0.93), (0.35, 1), (0.08, 0.88)],
            ],
            [[(0.28, 0.02), (0.86, 0)]],
        ]
    ],
    6: [[[[(0.68, 0), (0.32, 0.28), (0.15, 0.66), (0.3, 0.96), (0.62, 0.98), (0.8, 0.76), (0.62, 0.56), (0.2, 0.7)]]]],
    7: [
        [[[(0.1, 0.03), (0.88, 0.03)], [(0.88, 0.03), (0.6, 0.5), (0.42, 1)]]],
        [[[(0.1, 0.03), (0.88, 0.03)], [(0.88, 0.03), (0.6, 0.5), (0.42, 1)]], [[(0.36, 0.5), (0.84, 0.5)]]],
    ],
    8: [
        [
            [
                [(0.74, 0.14), (0.45, 0), (0.22, 0.2), (0.48, 0.46), (0.8, 0.74), (0.5, 1)],
                [(0.5, 1), (0.2, 0.76), (0.5, 0.46), (0.76, 0.24), (0.74, 0.14)],
            ]
        ]
    ],
    9: [
        [
            [
                [(0.78, 0.2), (0.5, 0), (0.22, 0.2), (0.36, 0.45), (0.64, 0.42), (0.78, 0.2)],
                [(0.78, 0.2), (0.76, 0.6), (0.6, 1)],
            ]
        ]
    ],
}


def variations(count, seed=1):
    """Yield digits with their strokes: growing from a tenth of the canvas to nearly all of it, anywhere, slanted."""
    chance = random.Random(seed)
    for number in range(count):
        digit = number % 10
        size = 0.1 * 9.5 ** (number // 10 / max(1, (count - 1) // 10))  # from 0.1 to 0.95 of the canvas
        slant, narrow = chance.uniform(-0.15, 0.35), chance.uniform(0.6, 0.95)
        samples = chance.choice([3, 6, 12])  # between two points of a curve: a fast pen leaves few
        strokes = [
            [point for part in stroke for point in curve(add_noise(part, chance), samples)]
            for stroke in chance.choice(WAYS[digit])
        ]
        strokes = [[(narrow * x + slant * (1 - y), y) for x, y in stroke] for stroke in strokes]
        yield digit, place(strokes, size, chance)


def place(strokes, size, chance):
    """Scale strokes to a size, a fraction of the canvas, and move them to a random position on it."""
    xs, ys = zip(*(point for stroke in strokes for point in stroke), strict=True)
    left, top, scale = min(xs), min(ys), size / max(max(xs) - min(xs), max(ys) - min(ys))
    across, down = (chance.uniform(0.02, 0.98 - scale * (max(values) - min(values))) for values in (xs, ys))
    return [[(across + scale * (x - left), down + scale * (y - top)) for x, y in stroke] for stroke in strokes]


def add_noise(points, chance):
    """Add noise to the points of a curve, except its ends, which join it to the next curve."""
    inner = [tuple(value + chance.gauss(0, 0.03) for value in point) for point in points[1:-1]]
    return [points[0], *inner, points[-1]]


def curve(points, steps):
    """Sample a smooth curve through points (Catmull and Rom 1974) in so many steps from one to the next."""
    ends = [points[0], *points, points[-1]]
    sampled = [points[0]]
    for a, b, c, d in zip(ends, ends[1:], ends[2:], ends[3:], strict=False):
        for t in (step / steps for step in range(1, steps + 1)):
            weights = (-t + 2 * t**2 - t**3, 2 - 5 * t**2 + 3 * t**3, t + 4 * t**2 - 3 * t**3, -(t**2) + t**3)
            x, y = (math.fsum(w * p[axis] for w, p in zip(weights, (a, b, c, d), strict=True)) / 2 for axis in (0, 1))
            sampled.append((x, y))
    return sampled
