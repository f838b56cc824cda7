"""Points as a picture, by numpy alone."""

import numpy as np

DOT_RADIUS, TILE = 1.6, 256
DOT_INK = np.array([47, 109, 179], np.float64)


def scatter_tile(points: np.ndarray, limits: tuple[float, float, float, float], size: int = TILE, colours: np.ndarray | None = None) -> np.ndarray:
    """Returns a scatter of points as a picture (3, size, size) uint8: smooth dots on white, y upwards, denser where there are more.

    Args:
        points: (N, 2); those that are not finite or outside are not drawn.
        limits: left, right, bottom and top of what is shown, a square.
        colours: (N, 3) uint8, one for each point; one blue for all by default.
    """
    left, right, bottom, top = limits
    scale = np.array([size / (right - left), size / (top - bottom)])
    with np.errstate(invalid="ignore", over="ignore"):
        places = (points.astype(np.float64) - (left, bottom)) * scale
        inside = np.isfinite(places).all(axis=1) & (places > -DOT_RADIUS).all(axis=1) & (places < size + DOT_RADIUS).all(axis=1)
    x, y = places[inside, 0], size - places[inside, 1]
    ink = np.broadcast_to(DOT_INK, (len(points), 3))[inside] if colours is None else colours[inside].astype(np.float64)
    weight, mixed = np.zeros((size, size)), np.zeros((size, size, 3))
    reach = int(DOT_RADIUS) + 1
    for row in range(-reach, reach + 1):
        for column in range(-reach, reach + 1):
            at_x, at_y = np.floor(x).astype(int) + column, np.floor(y).astype(int) + row
            cover = np.clip(DOT_RADIUS + 0.5 - np.hypot(at_x + 0.5 - x, at_y + 0.5 - y), 0, 1)
            seen = (cover > 0) & (at_x >= 0) & (at_x < size) & (at_y >= 0) & (at_y < size)
            flat = at_y[seen] * size + at_x[seen]
            weight += np.bincount(flat, cover[seen], size * size).reshape(size, size)
            for channel in range(3):
                mixed[..., channel] += np.bincount(flat, cover[seen] * ink[seen, channel], size * size).reshape(size, size)
    opacity = np.clip(18 / max(1, len(points)) ** 0.5, 0.25, 0.85)
    shade = 1 - (1 - opacity) ** weight
    colour = mixed / np.maximum(weight, 1e-9)[..., None]
    picture = 255 - shade[..., None] * (255 - colour)
    return np.ascontiguousarray(picture.round().astype(np.uint8).transpose(2, 0, 1))
