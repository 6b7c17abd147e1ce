"""Every random choice takes a seed derived from (run seed, stage, index), never from global state."""
import hashlib


def derive_seed(seed: int, stage: str, *index: int) -> int:
    """A 63-bit seed that depends on nothing but its arguments (SHA-256; stable across machines and versions)."""
    text = ":".join([str(int(seed)), stage, *(str(int(i)) for i in index)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
