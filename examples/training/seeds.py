"""Seeds of random numbers that depend on several numbers, such as a run's seed and a step."""

import hashlib


def derive_seed(*numbers: int) -> int:
    """Hashes several numbers to a seed of 32 bits, all that torch.Generator uses."""
    key = hashlib.blake2b(" ".join(map(str, numbers)).encode(), digest_size=4)
    return int.from_bytes(key.digest(), "little")
