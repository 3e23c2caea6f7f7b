"""Random scores from a counter: splitmix64 (Steele et al., OOPSLA 2014) in whole numbers."""

_MODULUS = 2**64


def random_scores(seed, key, count):
    """Score the first `count` tokens of a prompt with this `key`, floats in [0, 1)."""
    start = _splitmix64((_splitmix64(seed) + key) % _MODULUS)
    return [(_splitmix64((start + 0x9E3779B97F4A7C15 * m) % _MODULUS) >> 40) / 2**24 for m in range(count)]


def _splitmix64(state):
    x = (state + 0x9E3779B97F4A7C15) % _MODULUS
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % _MODULUS
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % _MODULUS
    return x ^ (x >> 31)
